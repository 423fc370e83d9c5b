"""From raw pairs to a set on disk, through the command line."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import yaml
from gemini_server import GeminiServer
from helpers import Run, user_error
from synth_fakes import ECHOED, raw_rows, read_rows, write_rows, write_templates

from sft_probe.probe_set import load_probe_set
from sft_probe.synth.asking.store import request_key
from sft_probe.synth.build import SetPlan, plan_set
from sft_probe.synth.options import SynthRun
from sft_probe.synth.sources import read_pairs
from sft_probe.synth.splits import RULE
from sft_probe.synth.writers.gemini import GeminiBatchWriter
from sft_probe.synth.writers.offline import OfflineWriter

KEY = "test-key-123"


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[Any] = raw_rows(24)
    rows[3:3] = [{"chosen": "no transcript", "rejected": "nor this"}, rows[0]]
    return write_rows(tmp_path_factory.mktemp("raw") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def offline_set(tmp_path_factory: pytest.TempPathFactory, sft_probe: Run, raw: Path) -> Path:
    """A set by the offline writer with every kind but `untrained`. Copy it before you change it."""
    out = tmp_path_factory.mktemp("offline") / "set"
    kinds = "paraphrase,variant,random,non_response,chosen_paraphrase,format_flip,permuted"
    result = sft_probe(
        "synth", "--source", raw, "--writer", "offline", "--categories", kinds, "--out", out
    )
    assert result.returncode == 0, result.stderr
    return out


def test_a_written_set_keeps_the_category_contract_and_accounts_for_every_row(
    offline_set: Path, sft_probe: Run
) -> None:
    probe_set = load_probe_set(str(offline_set))
    assert not probe_set.faults
    assert probe_set.categories == (
        "chosen",
        "rejected",
        "paraphrase",
        "variant",
        "random",
        "non_response",
        "chosen_paraphrase",
        "format_flip",
        "permuted",
    )
    provenance = probe_set.manifest["provenance"]
    rows = provenance["rows"]
    assert rows["read"] == 26
    assert rows["used"] == len(probe_set.docs) == 26 - rows["left_out"]
    rejected = read_rows(offline_set / "synthesis" / "rejected_rows.jsonl")
    assert {(row["file"], row["line"]) for row in rejected[:2]} == {
        ("pairs.jsonl", 4),
        ("pairs.jsonl", 5),
    }
    used = {
        json.loads(line)["meta"]["line"]
        for name in ("train", "heldout")
        for line in (offline_set / f"{name}.jsonl").read_text("utf-8").splitlines()
    }
    assert used | {row["line"] for row in rejected} == set(range(1, 27))
    assert set(provenance["overlap_of_splits"].values()) == {0}
    assert "offline helpful-mini" in probe_set.manifest["categories"]["variant"]
    assert "no faults" in sft_probe("probe-set", offline_set).stdout


def test_texts_of_a_doc_are_what_the_card_says(offline_set: Path) -> None:
    for doc in read_rows(offline_set / "train.jsonl"):
        assert sorted(doc["permuted"].split()) == sorted(doc["chosen"].split())
        assert doc["permuted"] != doc["chosen"]
        words = len(doc["chosen"].split())
        for kind, ratio in doc["meta"]["length_ratio"].items():
            assert ratio == round(len(doc[kind].split()) / words, 3)
        assert 0.5 <= doc["meta"]["length_ratio"]["variant"] <= 2


def test_the_same_inputs_give_the_same_bytes_without_a_call(
    offline_set: Path, raw: Path, tmp_path: Path, sft_probe: Run
) -> None:
    kinds = (
        "--categories",
        "paraphrase,variant,random,non_response,chosen_paraphrase,format_flip,permuted",
    )
    base = ("synth", "--source", raw, "--writer", "offline", *kinds)
    names = ("train.jsonl", "heldout.jsonl", "probe_set.json", "README.md", "lengths.png")
    before = {name: (offline_set / name).read_bytes() for name in names}
    again = tmp_path / "set"
    shutil.copytree(offline_set, again)
    (again / "train.jsonl").unlink()
    dry = sft_probe(*base, "--out", again, "--dry-run")
    assert "calls: 0 (" in dry.stdout, dry.stdout + dry.stderr
    assert not (again / "train.jsonl").exists()
    assert sft_probe(*base, "--out", again).returncode == 0
    assert {name: (again / name).read_bytes() for name in names} == before
    assert sft_probe(*base, "--out", tmp_path / "other" / "set", "--seed", 1).returncode == 0
    assert (tmp_path / "other" / "set" / "train.jsonl").read_bytes() != before["train.jsonl"]


def test_datasets_loads_the_directory_as_it_is(offline_set: Path, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(str(offline_set), cache_dir=str(tmp_path))
    probe_set = load_probe_set(str(offline_set))
    assert {split: rows.num_rows for split, rows in loaded.items()} == {
        split: len(probe_set.of_split(split)) for split in ("train", "heldout")
    }
    assert loaded["train"][0]["messages"][-1]["role"] == "user"
    assert set(probe_set.categories) <= set(loaded["train"].column_names)


def test_the_card_has_a_header_and_escapes_what_it_shows(
    raw: Path, tmp_path: Path, sft_probe: Run
) -> None:
    source = tmp_path / "<b>|a`.jsonl"
    shutil.copy(raw, source)
    result = sft_probe(
        "synth",
        "--source",
        source,
        "--writer",
        "offline",
        "--license",
        "cc-by-4.0",
        "--limit",
        12,
        "--out",
        tmp_path / "set",
    )
    assert result.returncode == 0, result.stderr
    _, header, body = (tmp_path / "set" / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "cc-by-4.0"
    assert "<b>" not in body
    assert "&lt;b&gt;&#124;a&#96;.jsonl" in body
    assert "12 were not drawn" in body
    assert (tmp_path / "set" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_status_and_dry_run_tell_what_is_left_and_what_it_costs(
    offline_set: Path, raw: Path, tmp_path: Path, sft_probe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = sft_probe("synth", "status", offline_set).stdout
    assert "variant" in status
    assert "set: " in status
    assert "is missing" in user_error(sft_probe("synth", "status", tmp_path))
    dry = sft_probe(
        "synth",
        "--source",
        raw,
        "--writer",
        "openai",
        "--model",
        "mine",
        "--base-url",
        "http://127.0.0.1:9/v1",
        "--price",
        "1,2",
        "--out",
        tmp_path / "dry",
        "--dry-run",
    )
    assert "calls: 72 (0 texts are stored)" in dry.stdout, dry.stderr
    assert "cost: 0.0" in dry.stdout
    assert not (tmp_path / "dry").exists()
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    gemini = ("synth", "--source", raw, "--writer", "gemini", "--out", tmp_path / "gemini")
    assert " USD, at most " in sft_probe(*gemini, "--dry-run").stdout
    assert "set the environment variable GEMINI_API_KEY" in user_error(sft_probe(*gemini))


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    return write_templates(tmp_path / "templates")


@pytest.mark.parametrize("writer", ["gemini", "gemini-batch", "openai"])
def test_a_set_written_by_a_server_is_not_asked_for_twice(  # noqa: PLR0917 - fixtures
    writer: str,
    raw: Path,
    templates: Path,
    tmp_path: Path,
    sft_probe: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.setitem(GeminiBatchWriter.__init__.__kwdefaults__ or {}, "poll_s", 0.05)
    with (templates / "non_response.txt").open("a") as file:
        file.write("faults(safety)")
    with GeminiServer() as server:
        url = server.url + ("/openai/v1" if writer == "openai" else "")
        command = (
            "synth",
            "--source",
            raw,
            "--writer",
            writer,
            "--model",
            "test-model",
            "--base-url",
            url,
            "--limit",
            10,
            "--templates",
            templates,
            "--price",
            "1,2",
            "--out",
            tmp_path / "set",
        )
        first = sft_probe(*command)
        assert first.returncode == 0, first.stderr
        written = (tmp_path / "set" / "train.jsonl").read_bytes()
        num_calls = server.requests.total()
        again = sft_probe(*command)
        assert again.returncode == 0, again.stderr
        assert server.requests.total() == num_calls
        assert (tmp_path / "set" / "train.jsonl").read_bytes() == written
    probe_set = load_probe_set(str(tmp_path / "set"))
    provenance = probe_set.manifest["provenance"]
    assert len(probe_set.docs) == 10
    assert provenance["failed_checks"] == {"first": {"non_response": {"blocked": 10}}, "second": {}}
    assert probe_set.manifest["categories"]["variant"] == f"{writer} test-model, variant@7"
    assert provenance["model_versions"] == [
        f"{kind}: test-model-001" for kind in ("non_response", "paraphrase", "variant")
    ]
    assert provenance["cost_usd"] > 0
    assert KEY not in first.stderr + first.stdout
    assert not [
        path
        for path in (tmp_path / "set").rglob("*")
        if path.is_file() and KEY.encode() in path.read_bytes()
    ]


def test_a_doc_whose_text_fails_twice_is_left_out_and_named(
    raw: Path, templates: Path, tmp_path: Path, sft_probe: Run
) -> None:
    fault = "{% if prompt | length > 120 %}@faults(max_tokens,safety){% endif %}"
    (templates / "variant.txt").write_text("{# version 8 #}\nNow " + ECHOED + fault, "utf-8")
    with GeminiServer() as server:
        result = sft_probe(
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
    assert result.returncode == 0, result.stderr
    left_out = [
        row
        for row in read_rows(tmp_path / "set" / "synthesis" / "rejected_rows.jsonl")
        if "doc_id" in row
    ]
    assert left_out
    assert {row["reason"] for row in left_out} == {"`variant`, written twice: blocked"}
    usable = {pair.doc_id: pair for pair in read_pairs(str(raw), [])}
    assert {row["doc_id"] for row in left_out} == {
        doc_id for doc_id, pair in usable.items() if len(pair.messages[-1]["content"]) > 120
    }
    assert len(load_probe_set(str(tmp_path / "set")).docs) == 24 - len(left_out)


def test_bad_requests_are_user_errors(raw: Path, tmp_path: Path, sft_probe: Run) -> None:
    def message(*flags: object) -> str:
        return user_error(
            sft_probe(
                "synth", "--source", raw, "--writer", "offline", "--out", tmp_path / "set", *flags
            )
        )

    assert "--source, --out are missing" in user_error(sft_probe("synth"))
    assert "--categories: there is no category 'nonsense'" in message(
        "--categories", "paraphrase,nonsense"
    )
    assert "no such directory" in message("--templates", tmp_path / "none")
    assert "usable docs but needs 2 or more" in message("--limit", 3)
    assert "no prompt format" in message("--prompt-format", "hhh")
    assert "needs --model" in user_error(
        sft_probe("synth", "--source", raw, "--writer", "openai", "--out", tmp_path / "set")
    )
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "variant.txt").write_text("no version")
    assert "must start with its version" in message("--templates", folder)
    (folder / "variant.txt").write_text("{# version 1 #} {{ unknown }}")
    assert "'unknown' is undefined" in message("--templates", folder)
    (tmp_path / "set" / "other.jsonl").write_text("{}")
    assert "holds other.jsonl" in message()
    nothing = write_rows(tmp_path / "bad.jsonl", [{"a": 1}, 3])
    assert "no usable row among 2" in user_error(
        sft_probe("synth", "--source", nothing, "--writer", "offline", "--out", tmp_path / "set2")
    )


def test_system_turns_need_another_format(tmp_path: Path, sft_probe: Run) -> None:
    answer = "This is the {} answer number {}, " + "which goes on for a while " * 4 + "and ends."
    rows = [
        {
            side: [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": f"Question {i} of {i * i}?"},
                {"role": "assistant", "content": answer.format(side, i)},
            ]
            for side in ("chosen", "rejected")
        }
        for i in range(20)
    ]
    source = write_rows(tmp_path / "chat.jsonl", rows)
    base = ("synth", "--source", source, "--writer", "offline", "--out", tmp_path / "set")
    assert "the prompt format hh has no system turn" in user_error(sft_probe(*base))
    result = sft_probe(*base, "--prompt-format", "plain")
    assert result.returncode == 0, result.stderr
    assert load_probe_set(str(tmp_path / "set")).prompt_format == "plain"


@pytest.mark.slow
def test_raw_pairs_become_a_set_a_run_and_a_figure(
    raw: Path, tiny_model: Path, tmp_path: Path, sft_probe: Run
) -> None:
    out, run = tmp_path / "set", tmp_path / "run"
    commands: list[list[object]] = [
        ["synth", "--source", raw, "--writer", "offline", "--heldout-frac", 0.3, "--out", out],
        [
            "train",
            "--model_name_or_path",
            tiny_model,
            "--probe_set",
            out,
            "--max_length",
            1024,
            "--max_steps",
            2,
            "--seed",
            0,
            "--per_device_train_batch_size",
            4,
            "--learning_rate",
            1e-3,
            "--snapshot_steps",
            "0,last",
            "--deepspeed",
            "none",
            "--output_dir",
            run,
        ],
        ["sweep", run],
        ["plot", run],
    ]
    for command in commands:
        result = sft_probe(*command)
        assert result.returncode == 0, (command, result.stderr)
    table = pd.read_csv(run / "trajectory.csv")
    assert set(table["category"]) == {
        "chosen",
        "rejected",
        "paraphrase",
        "variant",
        "random",
        "non_response",
    }
    assert set(table["step"]) == {0, 2}
    assert (table["num_docs"] == len(load_probe_set(str(out)).of_split("heldout"))).all()
    assert (run / "figures" / "trajectory_heldout.png").is_file()


@pytest.mark.slow
def test_the_untrained_model_adds_its_own_answer(tmp_path: Path, sft_probe: Run) -> None:
    countries = ("France", "Italy", "Spain", "Japan")
    rows = [
        {
            "prompt": f"What is the capital of {name}?",
            "chosen": f"The capital of {name} is easy.",
            "rejected": f"{name}?",
        }
        for name in countries
    ]
    result = sft_probe(
        "synth",
        "--source",
        write_rows(tmp_path / "r.jsonl", rows),
        "--writer",
        "offline",
        "--categories",
        "untrained",
        "--heldout-frac",
        0.5,
        "--prompt-format",
        "chat",
        "--out",
        tmp_path / "set",
    )
    assert result.returncode == 0, result.stderr
    probe_set = load_probe_set(str(tmp_path / "set"))
    assert probe_set.categories == ("chosen", "rejected", "untrained")
    assert (
        probe_set.manifest["categories"]["untrained"]
        == "hf smollm2-135m-instruct-q4_1, untrained@1"
    )
    answers = {doc.messages[0]["content"]: doc.responses["untrained"] for doc in probe_set.docs}
    assert len(answers) == 4
    assert "Paris" in answers["What is the capital of France?"]
    assert "<|im" not in "".join(answers.values())


def plan_of(source: Path, rule: int = RULE, **changes: Any) -> SetPlan:
    kinds = ("paraphrase", "non_response")
    options = SynthRun(
        source=str(source), out=source.parent, categories=kinds, **({"seed": 3} | changes)
    )
    return plan_set(options, [], rule=rule)


def many_rows(first: int, last: int) -> list[dict[str, str]]:
    """Rows of which every fifth goes on with the conversation of the one before."""
    rows = []
    for i in range(first, last):
        root = (
            f"Tell me of matter {i - (i % 5 == 4)}, "
            f"{hashlib.sha256(str(i - (i % 5 == 4)).encode()).hexdigest()}."
        )
        more = "\n\nAssistant: Yes?\n\nHuman: Go on." if i % 5 == 4 else ""
        rows.append(
            {
                side: f"\n\nHuman: {root}{more}\n\nAssistant: {side} {i}."
                for side in ("chosen", "rejected")
            }
        )
    return rows


@pytest.mark.parametrize("frac", [None, 0.3])
def test_appended_moved_or_removed_rows_move_no_doc_and_ask_for_nothing_twice(
    frac: float | None, tmp_path: Path
) -> None:
    rows = many_rows(0, 400)
    appended = rows + many_rows(400, 440)
    shuffled = random.Random(0).sample(appended, len(appended))
    plans = [
        plan_of(write_rows(tmp_path / f"{name}.jsonl", of), heldout_frac=frac, limit=limit)
        for name, of, limit in (
            ("whole", rows, None),
            ("one", [*rows, many_rows(500, 501)[0]], None),
            ("appended", appended, None),
            ("shuffled", shuffled, None),
            ("some", rows[1::2], None),
            ("limited", rows, 100),
            ("more", appended, 150),
        )
    ]
    splits = [{pair.responses["chosen"]: pair.split for pair in plan.docs} for plan in plans]
    writer = OfflineWriter()
    asked = [{request_key(writer, request) for request in plan.requests()} for plan in plans]
    for number in range(1, len(plans)):
        common = splits[0].keys() & splits[number].keys()
        assert {splits[0][chosen] == splits[number][chosen] for chosen in common} == {True}
    assert splits[2] == splits[3]
    assert asked[2] == asked[3]
    assert asked[0] < asked[1]
    assert len(asked[1] - asked[0]) == 2
    assert asked[0] < asked[2]
    assert asked[5] < asked[0]
    assert 2 * 395 <= len(asked[0]) <= 2 * 400
    share = list(splits[0].values()).count("heldout") / 400
    assert abs(share - (frac or 0.2)) < 0.09


def test_a_directory_begun_under_the_first_split_rule_keeps_it(
    raw: Path, tmp_path: Path, sft_probe: Run
) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", raw_rows(24))
    plan = plan_of(source, rule=1, heldout_frac=0.25, limit=20)
    rows = [(pair.doc_id, pair.split, plan.topics[pair.doc_id]) for pair in plan.docs]
    assert rows[0] == ("pairs-000007", "train", "a lighthouse at a crossroads at dawn in winter")
    assert (
        hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "8c7bf3b59282c79f"
    )  # as version 0.1 made it
    command = ("synth", "--source", raw, "--writer", "offline", "--out")
    sft_probe(
        *command, tmp_path / "new" / "set", "--dry-run"
    )  # which asks nothing, so that no rule is chosen
    for name in ("old", "new"):
        assert sft_probe(*command, tmp_path / name / "set").returncode == 0
    rule = tmp_path / "old/set/synthesis/rule.json"
    rule.unlink()  # version 0.1 wrote none
    rules = []
    for name in ("old", "new"):
        assert sft_probe(*command, tmp_path / name / "set").returncode == 0
        rules.append(load_probe_set(str(tmp_path / name / "set")).manifest["provenance"]["rule"])
    assert rules == [1, 2]
    assert json.loads(rule.read_text()) == {"rule": 1}


def test_a_set_of_chosen_rejected_and_random_needs_no_writer_and_no_key(
    raw: Path, tmp_path: Path, sft_probe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    base = ("synth", "run", "--source", raw, "--out", tmp_path / "set")
    assert "--categories random, which needs no model" in user_error(sft_probe(*base))
    kinds = ("--categories", "chosen,rejected,random,permuted")
    dry = sft_probe(*base, *kinds, "--dry-run")
    assert "calls: 0; no model is needed" in dry.stdout, dry.stderr
    assert not (tmp_path / "set").exists()
    for _ in range(2):  # the second run resumes
        result = sft_probe(*base, *kinds)
        assert result.returncode == 0, result.stderr
    probe_set = load_probe_set(str(tmp_path / "set"))
    assert probe_set.categories == ("chosen", "rejected", "random", "permuted")
    assert len(probe_set.docs) == 24
    chosen = {doc.doc_id: doc.responses["chosen"] for doc in probe_set.docs}
    for doc in probe_set.docs:
        assert doc.random_doc_id is not None
        assert doc.responses["random"] == chosen[doc.random_doc_id] != doc.responses["chosen"]


def test_raw_preference_pairs_are_recognised_with_the_command_that_makes_a_set_of_them(
    raw: Path, tmp_path: Path, sft_probe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = user_error(sft_probe("probe-set", raw))
    assert "is not a probe set: no row has a `doc_id` or a `split`" in message
    assert "preference pairs, in 26 rows with the columns chosen, rejected" in message
    assert len(message.splitlines()) == 5
    assert message == user_error(sft_probe("train", "--probe_set", raw, "--output_dir", "run"))
    command = next(line.strip() for line in message.splitlines() if "--categories random" in line)
    result = sft_probe(*command.removeprefix("sft-probe ").split())
    assert result.returncode == 0, result.stderr
    assert "no faults" in sft_probe("probe-set", command.split()[-1]).stdout


def test_preference_pairs_with_a_prompt_column_are_a_table_too(
    tmp_path: Path, sft_probe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Q{i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = user_error(sft_probe("probe-set", "pairs.jsonl"))
    command = next(line.strip() for line in message.splitlines() if "--from-table" in line)
    result = sft_probe(*command.removeprefix("sft-probe ").split())
    assert result.returncode == 0, result.stderr


def test_a_table_of_other_columns_is_recognised_too(
    tmp_path: Path, sft_probe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}.", "n": i} for i in range(120)]
    write_rows(tmp_path / "own.jsonl", rows)
    message = user_error(sft_probe("probe-set", "own.jsonl"))
    assert "a table of 120 rows with the columns question, answer, n" in message
    command = message.splitlines()[-1].strip()
    result = sft_probe(*command.removeprefix("sft-probe ").split())
    assert result.returncode == 0, result.stderr
    pd.DataFrame(rows).to_parquet(tmp_path / "own.parquet")
    assert "--from-table own.parquet" in user_error(sft_probe("probe-set", "own.parquet"))
    pd.DataFrame(rows).to_csv(tmp_path / "own.csv", index=False)
    message = user_error(sft_probe("train", "--probe_set", "own.csv", "--output_dir", "run"))
    assert "own.csv is a table with the columns question, answer, n" in message
    again = message.splitlines()[-1].strip().removeprefix("sft-probe ").split()
    assert sft_probe(*again[:-1], tmp_path / "again").returncode == 0
