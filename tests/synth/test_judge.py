"""The second opinion of the writer on its own texts."""

import re
from pathlib import Path

import pytest
from gemini_server import GeminiServer
from helpers import Run, user_error
from synth_fakes import make_request, raw_rows, read_rows, write_rows, write_templates

from sft_probe.probe_set import load_probe_set
from sft_probe.synth.asking.budget import max_prompt_tokens
from sft_probe.synth.asking.protocol import Answer
from sft_probe.synth.checks import fault_in, longest_opinion, opinion_request
from sft_probe.synth.writers.gemini import GeminiBatchWriter

PRICE = (1.0, 2.0)
NUM_DOCS = 20


def billed_usd(server: GeminiServer) -> float:
    return sum(prompt * PRICE[0] + output * PRICE[1] for prompt, output in server.billed) / 1e6


@pytest.mark.parametrize("writer", ["gemini", "gemini-batch", "openai"])
def test_a_text_that_its_writer_turns_down_is_written_again_then_left_out(
    writer: str, tmp_path: Path, sft_probe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "a-key-for-the-tests-of-the-judge")
    monkeypatch.setitem(GeminiBatchWriter.__init__.__kwdefaults__ or {}, "poll_s", 0.05)
    raw = write_rows(tmp_path / "raw.jsonl", raw_rows(24))
    out = tmp_path / "set"
    with GeminiServer() as server:
        command = (
            "synth",
            "--source",
            raw,
            "--writer",
            writer,
            "--model",
            "test-model",
            "--base-url",
            server.url + ("/openai/v1" if writer == "openai" else ""),
            "--limit",
            NUM_DOCS,
            "--judge",
            "--price",
            ",".join(map(str, PRICE)),
            "--templates",
            write_templates(tmp_path / "templates"),
            "--out",
            out,
        )
        dry = sft_probe(*command, "--dry-run").stdout
        assert f"calls: {2 * 3 * NUM_DOCS} (0 texts are stored)" in dry
        first = sft_probe(*command)
        assert first.returncode == 0, first.stderr
        assert billed_usd(server) <= float(dry.rpartition("at most ")[2]) + 1e-4
        num_calls, written = server.requests.total(), (out / "train.jsonl").read_bytes()
        assert "calls: 0 (" in sft_probe(*command, "--dry-run").stdout
        assert sft_probe(*command).returncode == 0
        assert server.requests.total() == num_calls
        assert (out / "train.jsonl").read_bytes() == written
    provenance = load_probe_set(str(out)).manifest["provenance"]
    num_bad = sum(counts["judged"] for counts in provenance["failed_checks"]["first"].values())
    assert num_bad > 0
    # the server writes the same text again, which is like no other text of the set
    assert provenance["opinions"] == {"judged": 2 * num_bad, "yes": 3 * NUM_DOCS - num_bad}
    assert provenance["failed_checks"]["second"] == provenance["failed_checks"]["first"]
    left_out = [
        row for row in read_rows(out / "synthesis" / "rejected_rows.jsonl") if "doc_id" in row
    ]
    assert len(load_probe_set(str(out)).docs) == NUM_DOCS - len({row["doc_id"] for row in left_out})
    assert all(re.fullmatch(r"`\w+`, written twice: judged", row["reason"]) for row in left_out)
    assert "judge" in sft_probe("synth", "status", out).stdout


def test_a_writer_that_cannot_judge_ends_the_run(tmp_path: Path, sft_probe: Run) -> None:
    raw = write_rows(tmp_path / "raw.jsonl", raw_rows(24))
    base = ("synth", "--source", raw, "--judge", "--out", tmp_path / "set")
    assert "--judge needs a writer that can read" in user_error(
        sft_probe(*base, "--writer", "offline")
    )
    templates = write_templates(tmp_path / "templates")
    with pytest.MonkeyPatch.context() as patch, GeminiServer() as server:
        patch.setattr("synth_fakes._JUDGED", re.compile("(?!)"))
        message = user_error(
            sft_probe(
                *base,
                "--writer",
                "openai",
                "--model",
                "m",
                "--base-url",
                server.url + "/openai/v1",
                "--templates",
                templates,
            )
        )
    assert "none of the first 50 answers for `judge` can be used: no verdict (50)" in message
    assert "leave --judge out" in message


@pytest.mark.parametrize(
    ("text", "status", "fault"),
    [
        ("yes", "ok", None),
        (" **Yes.**", "ok", None),
        ("No, it refuses.", "ok", "judged"),
        ("NO", "ok", "judged"),
        ("Not bad", "ok", "no verdict"),
        ("", "ok", "no verdict"),
        ("yes", "truncated", "no verdict"),
        (None, "blocked", "no verdict"),
    ],
)
def test_a_verdict_is_the_first_word(text: str | None, status: str, fault: str | None) -> None:
    assert fault_in(Answer(status=status, raw="{}", text=text)) == fault


@pytest.mark.parametrize(
    "text", ["word " * 5000, "\u6c34" * 5000, "\U0001f600" * 5000, "half \ud83d", "{task} {0}"]
)
def test_no_verdict_is_longer_than_the_cost_estimate_says(text: str) -> None:
    request = make_request("Write it.")
    opinion = opinion_request(request, text, 7)
    assert max_prompt_tokens(opinion) <= max_prompt_tokens(longest_opinion(request, 7))
    assert opinion.max_output_tokens == longest_opinion(request, 7).max_output_tokens == 23
