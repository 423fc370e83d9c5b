import itertools
import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gemini_server import VERSION, GeminiServer
from synth_fakes import make_request, text_of

from sft_probe.errors import UserError
from sft_probe.synth.asking.budget import Limits, Price
from sft_probe.synth.asking.live import ask_all
from sft_probe.synth.asking.protocol import Answer, RetryLater
from sft_probe.synth.asking.store import Store
from sft_probe.synth.writers.gemini import GeminiBatchWriter, GeminiWriter, read_answer
from sft_probe.synth.writers.gemini_legacy import LegacyGeminiWriter
from sft_probe.synth.writers.http import Connection, Reply
from sft_probe.synth.writers.keys import Secret
from sft_probe.synth.writers.openai import OpenAIWriter, read_completion
from sft_probe.synth.writers.replies import read_reply, wait_s

KEY = "AIza-a-secret-key"
NUMBERS = itertools.count()
PRICE = Price(0.0, 100.0)
FAST = Limits(first_backoff_s=0.01, timeout_s=60, price=PRICE)
MODEL = "gemini-test"
WRITERS: dict[str, Callable[[str], Any]] = {
    "gemini": lambda url: GeminiWriter(MODEL, base_url=url),
    "gemini-legacy": lambda url: LegacyGeminiWriter(MODEL, base_url=url, timeout_s=2),
    "openai": lambda url: OpenAIWriter(MODEL, base_url=f"{url}/openai/v1"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[GeminiServer]:
    with GeminiServer() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "answers.sqlite")
    yield store
    store.close()


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GEMINI_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    for name in ("GOOGLE_API_KEY", "GOOGLE_GEMINI_BASE_URL", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=list(WRITERS))
def writer(request: pytest.FixtureRequest, server: GeminiServer) -> Any:
    return WRITERS[request.param](server.url)


def prompt_with(faults: str) -> str:
    """No two are alike, since the server counts the calls of each."""
    return f"Say number {next(NUMBERS)} again @faults({faults})"


def ask(prompt: str, writer: Any, store: Store, limits: Limits = FAST) -> Answer:
    [(_, answer)] = ask_all([make_request(prompt)], writer, store, limits)
    return answer


def test_an_answer_has_its_text_version_and_tokens(
    writer: Any, server: GeminiServer, store: Store
) -> None:
    prompt = f"A question for {writer.name}"
    answer = ask(prompt, writer, store)
    assert (answer.status, answer.text, answer.model_version) == ("ok", text_of(prompt), VERSION)
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (
        len(prompt) // 4,
        25,
    )  # 20 and 5 of thoughts
    assert text_of(prompt)[-9:] in answer.raw
    assert server.requests[prompt] == 1


@pytest.mark.parametrize(
    ("fault", "billed"),
    [
        ("429", 0),
        ("429_retry_info", 0),
        ("500", 0),
        ("503", 0),
        ("malformed_error", 0),
        ("cut", 1),
        ("hangup", 1),
        ("malformed", 1),
    ],
)
def test_errors_that_may_pass_are_retried_by_us_and_never_by_the_sdk(
    writer: Any, server: GeminiServer, store: Store, fault: str, billed: int
) -> None:
    prompt = prompt_with(fault)
    assert ask(prompt, writer, store).text == text_of(prompt)
    assert server.requests[prompt] == 2
    assert store.lost_calls()[0] == billed == server.calls[prompt] - 1


def test_a_slow_call_times_out(writer: Any, server: GeminiServer, store: Store) -> None:
    prompt = prompt_with("slow")
    limits = Limits(first_backoff_s=0.01, timeout_s=2, price=PRICE)
    assert ask(prompt, writer, store, limits).text == text_of(prompt)
    assert store.lost_calls()[0] >= 1


def test_the_retry_after_header_is_obeyed(writer: Any, server: GeminiServer, store: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sft_probe.synth.asking.budget.backoff_s",
            lambda *_: pytest.fail("the server said how long"),
        )
        assert ask(prompt_with("429_retry_after"), writer, store).status == "ok"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("blocked_prompt", ("blocked", "prompt: PROHIBITED_CONTENT")),
        ("safety", ("blocked", "SAFETY")),
        ("recitation", ("blocked", "RECITATION")),
        ("max_tokens", ("truncated", "MAX_TOKENS")),
        ("empty", ("invalid", "empty text")),
        ("no_finish", ("invalid", "finish reason None")),
    ],
)
@pytest.mark.parametrize("name", ["gemini", "gemini-legacy"])
def test_blocked_truncated_and_empty_answers_are_never_data(
    name: str, server: GeminiServer, store: Store, fault: str, expected: tuple[str, str]
) -> None:
    writer = WRITERS[name](server.url)
    prompt = prompt_with(fault)
    answer = ask(prompt, writer, store)
    assert (answer.status, answer.reason, answer.text) == (*expected, None)
    assert server.calls[prompt] == 1
    assert answer.num_output_tokens is not None  # it is paid for all the same


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("max_tokens", "truncated"),
        ("safety", "blocked"),
        ("refusal", "refused"),
        ("empty", "invalid"),
    ],
)
def test_answers_without_text_of_an_openai_server_are_never_data(
    server: GeminiServer, store: Store, fault: str, status: str
) -> None:
    writer = WRITERS["openai"](server.url)
    answer = ask(prompt_with(fault), writer, store)
    assert (answer.status, answer.text) == (status, None)


def test_thoughts_and_broken_unicode_are_never_data(server: GeminiServer, store: Store) -> None:
    writer = WRITERS["gemini"](server.url)
    prompt = prompt_with("thought")
    assert ask(prompt, writer, store).text == text_of(prompt)
    answer = ask(prompt_with("surrogate"), writer, store)
    assert (answer.status, answer.reason) == ("invalid", "the text is not valid Unicode")


def test_a_changed_model_version_stops_the_run(writer: Any, store: Store) -> None:
    ask(f"first {writer.name}", writer, store)
    with pytest.raises(UserError, match="'test-model-001' so far, and now from 'test-model-002'"):
        ask(prompt_with("other_version"), writer, store)


def test_a_request_that_the_server_refuses_is_asked_again_by_the_next_run_alone(
    writer: Any, server: GeminiServer, store: Store
) -> None:
    prompt = prompt_with("bad_request")
    answer = ask(prompt, writer, store)
    assert (answer.status, answer.text, answer.is_final) == ("invalid", None, False)
    assert "HTTP 400" in str(answer.reason)
    assert server.requests[prompt] == 1
    assert store.cost_usd() == 0
    assert ask(prompt, writer, store).text == text_of(prompt)  # the server is repaired


@pytest.mark.parametrize(
    ("fault", "message"), [("no_model", "no such model"), ("bad_key", "not valid")]
)
def test_errors_that_no_request_gets_past_stop_the_run_at_once(
    writer: Any, store: Store, fault: str, message: str
) -> None:
    with pytest.raises(
        UserError, match=f"accepts no request: HTTP 40.*{message}.*Check the key"
    ) as caught:
        ask(prompt_with(fault), writer, store)
    assert KEY not in str(caught.value)
    assert store.cost_usd() == 0


def test_the_key_is_sent_and_written_nowhere(
    writer: Any, server: GeminiServer, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for fault in ("ok", "bad_request", "cut"):
        ask(prompt_with(fault), writer, store)
    assert "[key]" in str(ask(prompt_with("echo_key"), writer, store).text)
    assert any(KEY in str(key) for key in server.keys)
    assert KEY not in caplog.text
    for path in store.path.parent.iterdir():
        assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_server_that_cannot_be_reached_costs_nothing(name: str, store: Store) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        writer = WRITERS[name](f"http://127.0.0.1:{closed.getsockname()[1]}")
        answer = ask(
            "Anyone?", writer, store, Limits(first_backoff_s=0.01, max_attempts=2, price=PRICE)
        )
    assert answer.status == "error"
    assert "connection failed" in str(answer.reason)
    assert store.cost_usd() == 0


def test_a_writer_can_be_used_in_run_after_run(writer: Any, store: Store) -> None:
    for number in range(3):
        assert ask(f"run {number} of {writer.name}", writer, store).status == "ok"


def test_each_writer_calls_its_own_address_and_api_version(
    server: GeminiServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/openai/v1")
    before = server.paths.copy()
    ask("by v1", GeminiWriter(MODEL, api_version="v1"), store)
    ask("by v1beta", GeminiWriter(MODEL), store)
    ask("by legacy", LegacyGeminiWriter(MODEL), store)
    ask("by openai", OpenAIWriter(MODEL), store)
    path = f"models/{MODEL}:generateContent"
    assert server.paths - before == {
        f"/v1/{path}": 1,
        f"/v1beta/{path}": 2,
        "/openai/v1/chat/completions": 1,
    }


def test_generation_settings_reach_the_server(
    writer: Any, server: GeminiServer, store: Store
) -> None:
    prompt = f"settings of {writer.name}"
    list(
        ask_all([make_request(prompt, temperature=0.25, max_output_tokens=77)], writer, store, FAST)
    )
    body = next(body for body in server.bodies if prompt in json.dumps(body))
    given = body.get("generationConfig", body)
    assert given["temperature"] == 0.25
    assert given.get("maxOutputTokens", given.get("max_tokens")) == 77


def test_keys_come_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMINI_API_KEY")
    monkeypatch.delenv("OPENAI_API_KEY")
    for make in (GeminiWriter, LegacyGeminiWriter, GeminiBatchWriter):
        with pytest.raises(UserError, match="GEMINI_API_KEY or GOOGLE_API_KEY"):
            make(MODEL)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        OpenAIWriter(MODEL)
    OpenAIWriter(MODEL, base_url="http://127.0.0.1:1/v1")


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "{}",
        '{"error": "no"}',
        '{"detail": "Not Found"}',
        '{"candidates": {}}',
        '{"candidates": [1]}',
        '{"candidates": [{"finishReason": "STOP", "content": 1}]}',
        '{"candidates": [{"finishReason": ["STOP"]}]}',
        '{"promptFeedback": []}',
        '{"candidates": [{"finishReason": "STOP", "content": {"parts": [{"text": 5}, 7]}}], '
        '"usageMetadata": '
        "[1]}",
        '{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}], "usage": 3, "model": '
        "4}",
        '{"choices": [[]]}',
        '{"usageMetadata": {"promptTokenCount": 1e99, "totalTokenCount": -5}}',
    ],
)
@pytest.mark.parametrize("read", [read_answer, read_completion])
def test_any_json_is_read_and_none_of_it_becomes_data(
    read: Callable[..., Answer], body: str
) -> None:
    connection, reply = Connection(Secret(KEY), "http://127.0.0.1"), Reply(200, {}, body.encode())
    if body == "[]":
        with pytest.raises(RetryLater):
            read_reply(connection, reply, read)
        return
    answer = read_reply(connection, reply, read)
    assert (answer.text, answer.raw) == (None, body)
    assert answer.status in ("blocked", "invalid", "error")
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (
        None,
        None,
    )  # so it counts at its worst case


def test_the_wait_before_a_retry_is_read_from_each_kind_of_reply() -> None:
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "13.5s"}
    assert wait_s({"error": {"details": [{"@type": "x"}, info]}}, {}) == 13.5
    assert wait_s({"details": [info]}, {"Retry-After": "7"}) == 13.5
    assert wait_s({"details": "no list"}, {"retry-after": "7"}) == 7
    assert wait_s("text", {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    for odd in ("soon", "\u00b2", "-5", "nan", "1e999", "9" * 400, "Wed, 99 Foo 0000", ""):
        assert wait_s(None, {"retry-after": odd}) is None
    assert wait_s({}, {}) is None
