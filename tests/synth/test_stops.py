"""What ends `synth` before its set is written, and what the next run makes of it."""

import asyncio
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from gemini_server import GeminiServer
from helpers import Run, user_error
from synth_fakes import (
    ECHOED,
    FAST,
    FakeWriter,
    make_request,
    prompts,
    raw_rows,
    read_rows,
    write_rows,
    write_templates,
)

from sft_probe.synth.asking.live import ask_all
from sft_probe.synth.asking.store import Store
from sft_probe.synth.duplicates import near_duplicates
from sft_probe.synth.writers.offline import OfflineWriter


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", raw_rows(12))


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    return write_templates(tmp_path / "templates")


def test_no_set_is_written_while_a_text_has_no_answer(
    raw: Path, templates: Path, tmp_path: Path, sft_probe: Run
) -> None:
    faults = ",".join(["503"] * 6)  # as many as there are attempts
    (templates / "variant.txt").write_text(
        "{# version 9 #}\nNow " + ECHOED + f"@faults({faults})", "utf-8"
    )
    with GeminiServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft_probe.synth.asking.budget.backoff_s", lambda *_: 0.0)
        command = (
            "synth",
            "--source",
            raw,
            "--writer",
            "openai",
            "--model",
            "m",
            "--limit",
            10,
            "--base-url",
            server.url + "/openai/v1",
            "--templates",
            templates,
            "--out",
            tmp_path / "set",
        )
        assert "10 texts have no answer (most often: HTTP 503: " in user_error(sft_probe(*command))
        assert not (tmp_path / "set" / "train.jsonl").exists()
        assert set(server.calls.values()) == {1}
        again = sft_probe(*command)
        assert again.returncode == 0, again.stderr
        assert set(server.calls.values()) == {1}
    assert {
        index
        for doc in read_rows(tmp_path / "set" / "train.jsonl")
        for index in doc["meta"]["sample_index"].values()
    } == {0}


def files_of(folder: Path) -> dict[str, bytes]:
    names = (
        "train.jsonl",
        "heldout.jsonl",
        "probe_set.json",
        "README.md",
        "synthesis/rejected_rows.jsonl",
    )
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def test_a_killed_run_ends_in_the_same_files(
    raw: Path, templates: Path, tmp_path: Path, sft_probe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "test-key-123")
    with GeminiServer(latency_s=0.1) as server:
        command = [
            "synth",
            "--source",
            raw,
            "--writer",
            "gemini",
            "--model",
            "m",
            "--base-url",
            server.url,
            "--price",
            "1,2",
            "--concurrency",
            4,
            "--templates",
            templates,
            "--out",
        ]
        killed, whole = tmp_path / "a" / "set", tmp_path / "b" / "set"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(
            [sys.executable, "-m", "sft_probe", *map(str, command), str(killed)],
            env=environment,
            stderr=subprocess.PIPE,
        ) as process:
            while server.requests.total() < 10 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        for out in (killed, whole):
            result = sft_probe(*command, out)
            assert result.returncode == 0, result.stderr
    assert "calls without an answer" in sft_probe("synth", "status", killed).stdout
    assert " for 0 calls" not in sft_probe("synth", "status", killed).stdout
    assert len(files_of(killed)) >= 4
    assert files_of(killed) == files_of(whole)


def test_files_that_synth_did_not_write_are_not_replaced(
    raw: Path, tmp_path: Path, sft_probe: Run
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "README.md").write_text("my own")
    base = ("synth", "--writer", "offline", "--out", out)
    assert "holds README.md, which sft-probe synth has not written" in user_error(
        sft_probe(*base, "--source", raw)
    )
    (out / "README.md").unlink()
    raw.rename(out / "train.jsonl")
    for source in (out, out / "train.jsonl"):
        assert "would be overwritten" in user_error(sft_probe(*base, "--source", source))
    assert len(read_rows(out / "train.jsonl")) == 12


def test_too_few_docs_are_reported_with_the_reasons(
    raw: Path, templates: Path, tmp_path: Path, sft_probe: Run
) -> None:
    (templates / "variant.txt").write_text(
        "{# version 3 #}\n{{ topic }}@faults(safety,safety)", "utf-8"
    )
    with GeminiServer() as server:
        message = user_error(
            sft_probe(
                "synth",
                "--source",
                raw,
                "--writer",
                "openai",
                "--model",
                "m",
                "--base-url",
                server.url + "/openai/v1",
                "--templates",
                templates,
                "--out",
                tmp_path / "set",
            )
        )
    assert "Left out: `variant`, written twice: blocked (12, first in " in message
    assert len(read_rows(tmp_path / "set" / "synthesis" / "rejected_rows.jsonl")) == 12


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("variant.txt", "{# version 1 #} {{ 1 // 0 }}", "variant.txt: integer"),
        ("variant.txt", "{# version 1 #} {{ topic + 1 }}", "variant.txt: can only"),
        ("format.jinja", "{{ messages[0].content.nothing() }}", "refuses the turns user"),
        ("format.jinja", "{{ 1 // 0 }}", "refuses the turns user"),
    ],
)
def test_any_error_of_a_prompt_template_is_one_message(  # noqa: PLR0917 - fixtures
    name: str, text: str, message: str, raw: Path, tmp_path: Path, sft_probe: Run
) -> None:
    (tmp_path / name).write_text(text)
    flags = (
        ("--prompt-format", tmp_path / name)
        if name == "format.jinja"
        else ("--templates", tmp_path)
    )
    result = sft_probe(
        "synth", "--source", raw, "--writer", "offline", *flags, "--out", tmp_path / "set"
    )
    assert message in user_error(result)


@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf"])
def test_a_rate_is_a_positive_number(
    number: str, raw: Path, tmp_path: Path, sft_probe: Run
) -> None:
    base = ("synth", "--source", raw, "--writer", "offline", "--out", tmp_path / "set")
    assert "is not a positive number" in user_error(
        sft_probe(*base, f"--requests-per-minute={number}")
    )
    if number != "0":
        assert "is no amount of money" in user_error(sft_probe(*base, f"--max-cost-usd={number}"))


def test_a_missing_model_is_reported_before_any_call(
    raw: Path, tmp_path: Path, sft_probe: Run
) -> None:
    with GeminiServer() as server:
        flags = (
            "--categories",
            "variant,untrained",
            "--untrained-model",
            tmp_path / "none",
            "--model",
            "m",
        )
        user_error(
            sft_probe(
                "synth",
                "--source",
                raw,
                "--writer",
                "openai",
                *flags,
                "--base-url",
                server.url + "/openai/v1",
                "--out",
                tmp_path / "set",
            )
        )
        assert not server.requests


def test_the_revision_of_a_hub_source_is_read_once_and_reported(
    tmp_path: Path, sft_probe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(
        name: str, *, data_dir: str | None, revision: str | None, trust_remote_code: bool
    ) -> Any:
        assert trust_remote_code is False
        asked.append((name, data_dir, revision))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(raw_rows(12))})

    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *_: SimpleNamespace(sha="abc123")
    )
    monkeypatch.setattr(datasets, "load_dataset", load)
    result = sft_probe(
        "synth", "--source", "me/pairs:x", "--writer", "offline", "--out", tmp_path / "set"
    )
    assert result.returncode == 0, result.stderr
    assert asked == [("me/pairs", "x", "abc123")]
    card = (tmp_path / "set" / "README.md").read_text("utf-8")
    assert "me/pairs:x at revision abc123" in card
    assert '"source_revision": "abc123"' in (tmp_path / "set" / "probe_set.json").read_text("utf-8")
    assert "do not mean what their category says" in card
    assert "Prompt templates (not followed)" in card
    assert "variant@" not in card.partition("## Where")[0]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


def test_status_writes_nothing_whatever_is_left_and_a_dry_run_makes_nothing(
    raw: Path, tmp_path: Path, sft_probe: Run
) -> None:
    out = tmp_path / "set"
    base = ("synth", "--source", raw, "--writer", "offline", "--out", out)
    assert sft_probe(*base, "--dry-run").returncode == 0
    assert not out.exists()
    assert sft_probe(*base).returncode == 0
    with Store(
        out / "synthesis/answers.sqlite"
    ) as store:  # as a killed run leaves it, with its log not merged
        list(ask_all(prompts(3), FakeWriter(), store, FAST))
        assert (out / "synthesis/answers.sqlite-wal").stat().st_size
        shutil.copytree(out, tmp_path / "killed")
    (tmp_path / "killed/synthesis/answers.sqlite-shm").unlink()
    for folder in (out, tmp_path / "killed"):
        before = snapshot(folder)
        status = sft_probe("synth", "status", folder)
        assert "paraphrase" in status.stdout, status.stderr
        assert sft_probe("synth", *base[1:-1], folder, "--dry-run").returncode == 0
        assert snapshot(folder) == before
    assert "paraphrase          ok" in status.stdout


@pytest.mark.parametrize("damage", ["garbage", "middle", "cut", "columns", "jobs", "text"])
def test_a_damaged_store_is_one_message(
    damage: str, raw: Path, tmp_path: Path, sft_probe: Run
) -> None:
    out = tmp_path / "set"
    base = ("synth", "--source", raw, "--writer", "offline", "--out", out)
    assert sft_probe(*base).returncode == 0
    path = out / "synthesis/answers.sqlite"
    content = path.read_bytes()
    if damage == "garbage":
        path.write_bytes(b"not a database " * 1000)
    elif damage == "middle":
        path.write_bytes(content[:4096] + bytes(255 for _ in content[4096:]))
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        sql = {
            "columns": "DROP TABLE answers",
            "jobs": "DROP TABLE jobs",
            "text": "UPDATE answers SET raw = CAST(x'ff41' AS TEXT), category = CAST(x'ff' AS "
            "TEXT)",
        }
        connection = sqlite3.connect(path)
        with connection:
            connection.execute(sql[damage])
        connection.close()
    message = user_error(sft_probe("synth", "status", out))
    assert re.search(r"answers\.sqlite cannot be used as a store of answers \(", message), message
    if damage != "jobs":
        assert "answers.sqlite" in user_error(sft_probe(*base))


def test_a_category_that_never_passes_ends_the_run(
    raw: Path, templates: Path, tmp_path: Path, sft_probe: Run
) -> None:
    source = write_rows(tmp_path / "many.jsonl", raw_rows(70))
    (templates / "variant.txt").write_text(
        "{# version 9 #}\nToo short.@ {{ conversation }}", "utf-8"
    )
    with GeminiServer() as server:
        result = sft_probe(
            "synth",
            "--source",
            source,
            "--writer",
            "openai",
            "--model",
            "m",
            "--base-url",
            server.url + "/openai/v1",
            "--templates",
            templates,
            "--categories",
            "non_response,variant",
            "--out",
            tmp_path / "set",
        )
        message = user_error(result)
        assert re.search(
            r"none of the first 50 answers for `variant` can be used: length \(50\).*--templates",
            message,
        )
        assert server.calls.total() < 140  # what was in flight is stored too
    assert re.search(r"\d+ length", message)  # the live line shows what fails


def test_a_misnamed_template_is_an_error(
    raw: Path, templates: Path, tmp_path: Path, sft_probe: Run
) -> None:
    base = (
        "synth",
        "--source",
        raw,
        "--writer",
        "offline",
        "--templates",
        templates,
        "--out",
        tmp_path / "set",
    )
    for name in ("paraphrases.txt", "Variant.txt", "variant.jinja", "topics.yml"):
        (templates / name).write_text("{# version 1 #} x")
        assert f"no category has a template {name}; there are paraphrase.txt" in user_error(
            sft_probe(*base)
        )
        (templates / name).unlink()
    (templates / "README.md").write_text("notes")
    assert sft_probe(*base).returncode == 0


def test_offline_texts_do_not_repeat() -> None:
    async def write(number: int) -> list[str]:
        writer = OfflineWriter()
        requests = [
            make_request(f"p{i}", num_words=1 + i % 40, sample_index=i % 2) for i in range(number)
        ]
        return [str((await writer.write(request)).text) for request in requests]

    texts = asyncio.run(write(2000))
    assert texts == asyncio.run(write(2000))
    assert len(near_duplicates(texts)) <= 4
    assert all(abs(len(text.split()) - (1 + i % 40)) <= 5 for i, text in enumerate(texts))
