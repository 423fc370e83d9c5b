"""The key goes to the configured server and nowhere else, and a run can always be ended."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gemini_faults import escaped
from gemini_server import GeminiServer
from helpers import Run, user_error
from synth_fakes import make_request, raw_rows, text_of, write_rows

from sft_probe.errors import UserError
from sft_probe.synth.asking.budget import Limits, Price
from sft_probe.synth.asking.live import ask_all
from sft_probe.synth.asking.protocol import Answer
from sft_probe.synth.asking.store import Store
from sft_probe.synth.writers import key_version, least_thinking
from sft_probe.synth.writers.gemini import GeminiBatchWriter, GeminiWriter
from sft_probe.synth.writers.gemini_legacy import LegacyGeminiWriter
from sft_probe.synth.writers.keys import Secret, read_key
from sft_probe.synth.writers.openai import OpenAIWriter

KEY = "AIza+S3cret/Key=0123"
WRITERS: dict[str, Callable[[str], Any]] = {
    "gemini": lambda url: GeminiWriter("m", base_url=url),
    "gemini-legacy": lambda url: LegacyGeminiWriter("m", base_url=url, timeout_s=30),
    "gemini-batch": lambda url: GeminiBatchWriter("m", base_url=url, poll_s=0.01),
    "openai": lambda url: OpenAIWriter("m", base_url=f"{url}/openai/v1"),
}


@pytest.fixture(scope="module")
def thief() -> Iterator[GeminiServer]:
    with GeminiServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GEMINI_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, KEY)


def ask(writer: Any, path: Path, prompt: str = "Say it") -> Answer:
    with Store(path) as store:
        [(_, answer)] = ask_all(
            [make_request(prompt)], writer, store, Limits(price=Price(0.0, 1.0))
        )
    return answer


@pytest.mark.parametrize("name", list(WRITERS))
def test_no_environment_variable_sends_the_key_elsewhere(
    name: str, thief: GeminiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thief.seen.clear()
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, thief.url)
    monkeypatch.setenv("GOOGLE_GENAI_CLIENT_MODE", "record")
    monkeypatch.setenv("GOOGLE_GENAI_REPLAYS_DIRECTORY", str(tmp_path / "replays"))
    monkeypatch.setenv("GOOGLE_API_USE_MTLS_ENDPOINT", "always")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password another-secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with GeminiServer() as server:
        writer = WRITERS[name](server.url)
        assert ask(writer, tmp_path / "a.sqlite").text == text_of("Say it")
        assert any(KEY in one for one in server.seen)
        assert not any("another-secret" in one or "Basic" in one for one in server.seen)
    assert not thief.seen
    assert not (tmp_path / "replays").exists()


def test_an_sdk_that_calls_another_server_is_stopped(thief: GeminiServer, tmp_path: Path) -> None:
    thief.seen.clear()
    with GeminiServer() as server:
        for writer in (
            GeminiWriter("m", base_url=server.url),
            OpenAIWriter("m", base_url=server.url),
        ):
            writer._connection.base_url = (
                thief.url
            )  # what the SDK is given; the origin is pinned before
            with pytest.raises(
                UserError, match=rf"a call would go to {thief.url}/.* alone, so the run ends"
            ):
                ask(writer, tmp_path / "a.sqlite")
        assert not server.seen
    assert not thief.seen


@pytest.mark.parametrize(
    "value", ["a\nb-long-enough", "schlüssel-12345", "with blank", "tab\tkey-1234"]
)
def test_what_cannot_be_a_key_is_refused_without_showing_it(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", value)
    with pytest.raises(
        UserError, match="GEMINI_API_KEY holds characters that no key has"
    ) as caught:
        GeminiWriter("m")
    assert value not in str(caught.value)
    monkeypatch.setenv("GEMINI_API_KEY", f"\n {KEY}\r\n")
    assert read_key("GEMINI_API_KEY").value == KEY


@pytest.mark.parametrize("url", ["no address", "ftp://host", "http://", "//host", "http://host:x"])
def test_an_invalid_server_address_is_refused(url: str) -> None:
    for make in (GeminiWriter, LegacyGeminiWriter, GeminiBatchWriter, OpenAIWriter):
        with pytest.raises(UserError, match="is not the address of a server"):
            make("m", base_url=url)


def test_a_key_is_redacted_however_it_is_escaped() -> None:
    secret = Secret(KEY)
    forms = [
        KEY,
        json.dumps({"a": KEY}),
        escaped(KEY),
        json.dumps(escaped(KEY)),
        KEY.replace("/", "\\/"),
        "".join(f"%{ord(char):02X}" for char in KEY),
        "".join(f"&#{ord(char)};" for char in KEY),
        json.dumps(json.dumps({"a": escaped(KEY)})),
    ]
    for form in forms:
        redacted = secret.redact(f"before {form} after")
        assert "[key]" in redacted, form
        assert "S3" not in redacted, form
    assert secret.redact("AIza+S3cret/Key=012") == "AIza+S3cret/Key=012"
    assert Secret("EMPTY").redact("EMPTY words") == "EMPTY words"


def test_no_log_record_shows_a_key(caplog: pytest.LogCaptureFixture) -> None:
    GeminiWriter("m", base_url="http://127.0.0.1:9")
    caplog.set_level(logging.DEBUG)
    try:
        raise ValueError(f"header {KEY}")
    except ValueError:
        logging.getLogger("another_package").exception("failed with %s", {"x-goog-api-key": KEY})
    logging.getLogger("another_package").warning("a wrong format %d", KEY)
    assert "a wrong format" in caplog.messages[-1]
    assert "[key]" in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "gemini-legacy",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("gemini", "openai")),
    ],
)
def test_a_second_interrupt_ends_at_once_and_no_process_shows_the_key(
    name: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", raw_rows(12))
    with GeminiServer(always="slow") as server:
        url = server.url + ("/openai/v1" if name == "openai" else "")
        asked = {
            "source": source,
            "writer": name,
            "model": "m",
            "base-url": url,
            "out": tmp_path / "set",
        }
        flags = [str(part) for flag, value in asked.items() for part in (f"--{flag}", value)]
        with subprocess.Popen(
            [sys.executable, "-X", "dev", "-m", "sft_probe", "synth", *flags],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ) as process:
            while not server.num_requests and process.poll() is None:
                time.sleep(0.05)
            commands = [
                path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()
            ]
            assert not any(KEY.encode() in command for command in commands)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            said = ""
            while "waiting for calls in flight" not in said:
                said += process.stderr.readline()
            began_s = time.monotonic()
            process.send_signal(signal.SIGINT)
            said += process.communicate(timeout=60)[1]
            assert time.monotonic() - began_s < 25  # the server would take 30 s
    assert process.returncode == 130, said
    assert "Traceback" not in said, said
    assert "ResourceWarning" not in said, said
    assert KEY not in said


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("gemini-2.5-flash", {"thinkingBudget": 0}),
        ("gemini-2.5-pro", {"thinkingBudget": 128}),
        ("models/gemini-3-flash-preview", {"thinkingLevel": "MINIMAL"}),
        ("gemini-3.1-pro", {"thinkingLevel": "LOW"}),
        ("gemini-3.5-flash-lite", None),
        ("gemini-2.5-flash-lite", None),
        ("gemma-3", None),
    ],
)
def test_a_model_that_thinks_is_told_to_think_least(
    model: str, config: Any, tmp_path: Path
) -> None:
    with GeminiServer() as server:
        writers: list[Any] = [GeminiWriter(model, base_url=server.url)]
        writers.append(GeminiBatchWriter(model, base_url=server.url, poll_s=0.01))
        for writer in writers:
            assert ask(writer, tmp_path / f"{writer.name}.sqlite").status == "ok"
            assert writer.api_version == key_version("v1beta", writer.name, model)
            assert (writer.api_version == "v1beta") == (config is None)
        told = server.bodies[0]["generationConfig"].get("thinkingConfig")
        lines = [json.loads(line) for file in server._files.values() for line in file.splitlines()]
        in_batch = lines[0]["request"]["generationConfig"].get("thinkingConfig")
        plain = [
            json.dumps(one).lower().replace("_", "") for one in (told, in_batch, config)
        ]  # the SDK says thinking_budget
        assert plain[0] == plain[1] == plain[2]
    assert least_thinking("openai", model) == least_thinking("hf", model)
    assert bool(least_thinking("gemini-legacy", model).num_tokens) == (config is not None)


def test_thinking_tokens_are_added_to_the_output_limit_with_a_message(
    tmp_path: Path, sft_probe: Run
) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", raw_rows(12))
    base = (
        "synth",
        "--source",
        source,
        "--writer",
        "gemini",
        "--dry-run",
        "--out",
        tmp_path / "set",
        "--model",
    )
    plain = sft_probe(*base, "gemini-2.5-flash")
    assert (
        "gemini-2.5-flash thinks before it writes; requests have thinkingBudget 0" in plain.stderr
    )
    roomy = sft_probe(*base, "gemini-2.5-flash", "--thinking-tokens", 4096)
    assert "4096 more tokens in the output limit" in roomy.stderr
    bounds = [float(result.stdout.rpartition("at most ")[2]) for result in (plain, roomy)]
    assert bounds[1] == pytest.approx(bounds[0] + 2 * 2 * 36 * 4096 * 2.5 / 1e6, abs=1e-3)
    assert "thinks" not in sft_probe(*base, "gemini-3.5-flash-lite").stderr
    assert "is not positive" in user_error(sft_probe(*base, "m", "--thinking-tokens", 0))


def test_the_answer_is_stored_as_it_came_and_no_sdk_reads_it(tmp_path: Path) -> None:
    with GeminiServer(always="thought") as server:
        for name in ("gemini", "gemini-legacy"):
            answer = ask(WRITERS[name](server.url), tmp_path / f"{name}.sqlite")
            assert answer.text == text_of("Say it")
            parts = json.loads(answer.raw)["candidates"][0]["content"]["parts"]
            assert parts[0]["text"] == "a thought"
            assert "responseId" in answer.raw
