"""What ends `synth` before its set is written, and what the next run makes of it."""

from pathlib import Path

import pytest
from gemini_server import GeminiServer
from helpers import Run, user_error
from synth_fakes import ECHOED, raw_rows, read_rows, write_rows, write_templates


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", raw_rows(12))


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    return write_templates(tmp_path / "templates")


def test_a_text_without_an_answer_holds_up_the_set_and_is_not_written_otherwise(
    raw: Path, templates: Path, tmp_path: Path, sft_probe: Run
) -> None:
    faults = ",".join(["503"] * 6)  # as many as there are attempts
    (templates / "variant.txt").write_text("{# version 9 #}\nNow " + ECHOED + f"@faults({faults})", "utf-8")
    with GeminiServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft_probe.synth.call.backoff_s", lambda *_: 0.0)
        command = ("synth", "--source", raw, "--writer", "openai", "--model", "m", "--limit", 10, "--base-url",
                   server.url + "/openai/v1", "--templates", templates, "--out", tmp_path / "set")  # fmt: skip
        assert "10 texts have no answer (most often: HTTP 503: " in user_error(sft_probe(*command))
        assert not (tmp_path / "set" / "train.jsonl").exists()
        assert set(server.calls.values()) == {1}
        again = sft_probe(*command)
        assert again.returncode == 0, again.stderr
        assert set(server.calls.values()) == {1}
    assert {index for doc in read_rows(tmp_path / "set" / "train.jsonl")
            for index in doc["meta"]["sample_index"].values()} == {0}  # fmt: skip
