"""Formats in whole runs: the rule and the clock of a run, docs that a template refuses, texts that
are no Unicode."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import CHATML, SHARED, Run, make_docs, make_tokenizer, needs_shared, user_error
from tokenizer_matrix import MEMBERS, make, save_model, write_mixed_set

from sft_probe.errors import UserError
from sft_probe.probe_set import find_lone_surrogate, load_probe_set
from sft_probe.prompts import PromptFormat, encode_probe_set, resolve_format, terminator_id

WriteSet = Callable[[list[dict[str, Any]]], Path]
SPANNING = next(member for member in MEMBERS if member.name.startswith("llama3 plain"))
CLOCK = "{{ strftime_now('%H:%M:%S.%f') }}\n" + CHATML
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)


def train_flags(model: Path, probe_set: Path, out: Path) -> list[str]:
    return (
        f"--model_name_or_path {model} --probe_set {probe_set} --max_length 512 --max_steps 4 "
        "--learning_rate 1e-3 "
        "--per_device_train_batch_size 2 --deepspeed none --snapshot_steps 0,last --output_dir "
        f"{out}"
    ).split()


def model_with_template(template: str, folder: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return save_model(tokenizer, folder)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_one_join_rule_holds_for_all_docs_of_a_run(tmp_path: Path) -> None:
    """A doc that alone would have the ordinary split gets the rule of the others."""
    tokenizer = SPANNING.make()
    probe_set = load_probe_set(str(write_mixed_set(tmp_path / "set.jsonl")))
    unmarked = [doc for doc in probe_set.docs if not doc.messages[-1]["content"].endswith("?")]
    assert resolve_format("plain", tokenizer, unmarked).name == "plain"
    prompt_format = resolve_format("plain", tokenizer, probe_set.docs)
    assert prompt_format.name == "plain+in_use"
    kept, dropped = encode_probe_set(probe_set, prompt_format, tokenizer, 512)
    assert (len(kept), dropped) == (8, [])
    for item in kept:
        assert str(tokenizer.decode(item.prompt_ids)).endswith("\n\n")


def test_a_prompt_format_that_the_run_recorded_is_not_chosen_again(tmp_path: Path) -> None:
    tokenizer = SPANNING.make()
    docs = load_probe_set(str(write_mixed_set(tmp_path / "set.jsonl"))).docs
    assert resolve_format("plain", tokenizer, docs, "plain").name == "plain"
    assert resolve_format("plain", tokenizer, docs[:1], "plain+in_use").name == "plain+in_use"
    assert resolve_format("plain+in_use", tokenizer, docs[:1]).name == "plain+in_use"
    assert resolve_format("hh", tokenizer, docs, "plain+in_use").name == "hh"
    spec = resolve_format("plain", tokenizer, docs).source
    assert (
        PromptFormat(spec, tokenizer).source
        == spec
        == resolve_format(spec, tokenizer, docs, "plain").source
    )


def test_runs_of_earlier_versions_are_swept_in_the_format_they_were_trained_in(
    sft_probe: Run, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    manifest = read(run / "manifest.json")
    assert manifest["prompt_format"] == "hh"
    (run / "manifest.json").write_text(json.dumps({**manifest, "prompt_format_source": "hh"}))
    result = sft_probe("sweep", run)
    assert result.returncode == 0, result.stderr
    assert set(pd.read_parquet(run / "scores.parquet")["prompt_format"]) == {"hh"}


def test_a_run_of_an_earlier_version_that_left_docs_out_is_swept_under_its_own_rule(
    sft_probe: Run, tmp_path: Path
) -> None:
    model, out = save_model(SPANNING.make(), tmp_path / "model"), tmp_path / "run"
    flags = [
        *train_flags(model, write_mixed_set(tmp_path / "set.jsonl"), out),
        "--prompt_format",
        "plain",
    ]
    assert sft_probe("train", *flags).returncode == 0
    manifest = read(out / "manifest.json")
    assert (manifest["prompt_format"], manifest["num_examples"]) == ("plain+in_use", 4)
    before = {**manifest, "prompt_format": "plain", "prompt_format_source": "plain"}
    (out / "manifest.json").write_text(json.dumps(before))
    result = sft_probe("sweep", out)
    assert result.returncode == 0, result.stderr
    scores = pd.read_parquet(out / "scores.parquet")
    assert set(scores["prompt_format"]) == {"plain"}
    assert set(scores["doc_id"]) == {"d2", "d6"}
    assert "d3" in result.stderr


def test_a_template_that_shows_the_time_shows_that_of_the_first_rendering_in_all_docs(
    sft_probe: Run, tmp_path: Path
) -> None:
    """Through a stop, its resume, and two sweeps; the template shows the time to the
    microsecond."""
    model, out = model_with_template(CLOCK, tmp_path / "model"), tmp_path / "run"
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in make_docs(12)))
    flags = [*train_flags(model, path, out), "--prompt_format", "chat", "--probe_steps", "0,last"]
    stopped = sft_probe("train", *flags, "--max_wall_time_s", "0.001")
    assert stopped.returncode == 75, stopped.stderr
    pinned = read(out / "started.json")["prompt_format"]
    assert pinned.startswith("chat@")
    result = sft_probe("train", *flags)
    assert result.returncode == 0, result.stderr
    assert (
        read(out / "manifest.json")["prompt_format"]
        == read(out / "probe/manifest.json")["prompt_format"]
        == pinned
    )
    for splits in ("heldout", "heldout,train"):
        result = sft_probe("sweep", out, "--splits", splits)
        assert result.returncode == 0, result.stderr
    scores = pd.read_parquet(out / "scores.parquet")
    assert set(scores["prompt_format"]) == {pinned}
    both = scores.pivot_table(
        index=["step", "split", "category", "doc_id"], columns="source", values="logprob"
    )
    assert (both["live"] - both["lm_eval"]).abs().max() < 1e-3


def test_a_resumed_sweep_of_foreign_checkpoints_keeps_the_time_its_template_shows(
    sft_probe: Run, tmp_path: Path
) -> None:
    model_with_template(CLOCK, tmp_path / "models/checkpoint-1")
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in make_docs(4)))
    flags = [
        "sweep",
        tmp_path / "out",
        "--checkpoints",
        tmp_path / "models/*",
        "--probe_set",
        path,
        "--max_length",
        512,
    ]
    assert sft_probe(*flags, "--prompt_format", "chat@2001-02-03T04:05:06").returncode == 0
    first = pd.read_parquet(tmp_path / "out/scores.parquet")
    assert set(first["prompt_format"]) == {"chat@2001-02-03T04:05:06"}
    result = sft_probe(*flags, "--prompt_format", "chat", "--splits", "heldout,train")
    assert result.returncode == 0, result.stderr
    both = pd.read_parquet(tmp_path / "out/scores.parquet")
    assert set(both["prompt_format"]) == {"chat@2001-02-03T04:05:06"}
    assert len(both) == 2 * len(first)


def test_a_time_is_recorded_no_finer_than_the_template_shows_it(tmp_path: Path) -> None:
    docs = load_probe_set("helpful-mini").docs[:2]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    name = resolve_format("chat", tokenizer, docs).name
    assert len(name) == len("chat@2001-02-03")
    prompt = resolve_format("chat", tokenizer, docs, "chat@2001-02-03").render(docs[0].messages)
    assert prompt.text.startswith("03 Feb 2001\n")
    given = resolve_format("chat@2002-03-04", tokenizer, docs)
    assert given.name == "chat@2002-03-04"
    with pytest.raises(UserError, match="does not say which"):
        resolve_format("chat", tokenizer, docs, "chat")
    assert resolve_format("chat@2001-02-03", tokenizer, docs, "chat").name == "chat@2001-02-03"
    with pytest.raises(UserError, match="names no time"):
        PromptFormat("chat@2001-99-99", tokenizer)


def with_refused_docs(docs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One doc of each split has two user turns one after the other."""
    for doc in docs[:2]:
        doc["messages"] = [{"role": "user", "content": "Are you there?"}, *doc["messages"]]
    return docs


def test_docs_that_the_template_refuses_are_left_out_and_named(
    sft_probe: Run, write_set: WriteSet, tmp_path: Path
) -> None:
    model, out = model_with_template(ALTERNATING, tmp_path / "model"), tmp_path / "run"
    flags = [
        *train_flags(model, write_set(with_refused_docs(make_docs(12))), out),
        "--prompt_format",
        "chat",
    ]
    result = sft_probe("train", *flags, "--probe_steps", "last")
    assert result.returncode == 0, result.stderr
    manifest = read(out / "manifest.json")
    assert manifest["num_examples"] == 5
    (drop,) = manifest["dropped"]
    assert drop["doc_id"] == "d1"
    assert "roles must alternate" in drop["reason"]
    held = next(
        line
        for line in result.stderr.splitlines()
        if "held out, but cannot be scored: d0: " in line
    )
    assert "roles must alternate" in held
    result = sft_probe("sweep", out)
    assert result.returncode == 0, result.stderr
    assert set(pd.read_parquet(out / "scores.parquet")["doc_id"]) == {"d2", "d4", "d6", "d8", "d10"}
    assert (
        "left out of all categories: d0: the prompt format chat refuses the turns user, user"
        in result.stderr
    )


def test_training_data_that_the_template_refuses_is_left_out_and_named(
    sft_probe: Run, write_set: WriteSet, tmp_path: Path
) -> None:
    model, out = model_with_template(ALTERNATING, tmp_path / "model"), tmp_path / "run"
    rows = [
        [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": f"So {i}."}]
        for i in range(5)
    ]
    rows[2].insert(0, {"role": "user", "content": "Hello?"})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    flags = [
        *train_flags(model, write_set(make_docs()), out),
        "--prompt_format",
        "chat",
        "--train_data",
        str(data),
    ]
    result = sft_probe("train", *flags)
    assert result.returncode == 0, result.stderr
    assert (
        "not trained on: data.jsonl-000003: the prompt format chat refuses the turns user, user"
        in result.stderr
    )
    assert read(out / "manifest.json")["num_examples"] == 4


def test_one_message_where_the_template_refuses_all_docs(
    sft_probe: Run, write_set: WriteSet, tmp_path: Path
) -> None:
    model = model_with_template("{{ raise_exception('not today') }}", tmp_path / "checkpoint-1")
    probe_set = write_set(make_docs())
    flags = [*train_flags(model, probe_set, tmp_path / "run"), "--prompt_format", "chat"]
    message = user_error(sft_probe("train", *flags))
    assert "no doc is left to train on; 3 were dropped: d1: " in message.splitlines()[-1]
    message = user_error(
        sft_probe(
            "sweep",
            tmp_path / "out",
            "--checkpoints",
            model,
            "--probe_set",
            probe_set,
            "--prompt_format",
            "chat",
        )
    )
    assert "not today" in message


def test_half_a_surrogate_pair_is_a_fault_with_its_line(
    sft_probe: Run, write_set: WriteSet, tmp_path: Path
) -> None:
    docs = make_docs(12)
    docs[2]["chosen"] = "half \ud83d"
    docs[4]["messages"][0]["content"] = "\udc00 what?"
    docs[6]["doc_id"] = "d\ud83d"
    docs[8]["meta"] = {"notes": ["fine", {"\ud83d": 1}]}
    docs[10]["chosen"] = (
        "whole \ud83d\ude00"  # json.dumps writes two escapes, which are one character
    )
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    result = sft_probe("probe-set", path, process=True)
    for line, place in (
        (3, "chosen"),
        (5, "messages[0].content"),
        (7, "doc_id"),
        (9, "meta.notes[1].\\ud83d"),
    ):
        assert any(
            f"line {line}" in text and f"`{place}` holds half a surrogate pair" in text
            for text in result.stdout.splitlines()
        ), (line, result.stdout)
    assert "Traceback" not in result.stderr
    assert [doc.doc_id for doc in load_probe_set(str(path)).docs] == [
        f"d{i}" for i in (0, 1, 3, 5, 7, 9, 10, 11)
    ]
    model = model_with_template(CHATML, tmp_path / "model")
    result = sft_probe("train", *train_flags(model, path, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert len(read(tmp_path / "run/manifest.json")["dropped"]) == 4
    assert sft_probe("sweep", tmp_path / "run").returncode == 0


def test_half_a_surrogate_pair_is_found_in_any_field() -> None:
    assert find_lone_surrogate({"a": ["ok", {"b": "\ud83d"}]}) == "a[1].b"
    assert find_lone_surrogate({"a": "\U0001f600", "n": 1, "x": None}) is None
    assert find_lone_surrogate("\udfff") == ""


def test_a_template_that_leaves_the_question_out_is_refused() -> None:
    """As those of models that see: they look for parts of a turn, where the turn is a text."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ "
        "part['text'] }}{% endif %}{% endfor %}{% endfor %}<|im_start|>"
    )
    probe_set = load_probe_set("helpful-mini")
    prompt_format = resolve_format("chat", tokenizer, probe_set.docs)
    kept, dropped = encode_probe_set(probe_set, prompt_format, tokenizer, 512)
    assert not kept
    assert "does not write the text of the last turn" in dropped[0].reason


@pytest.mark.parametrize("spec", ["hh@2026-01-01", "plain+full_render"])
def test_a_time_may_be_given_for_chat_formats_only(spec: str) -> None:
    with pytest.raises(UserError, match="only chat takes a time"):
        PromptFormat(spec)


@needs_shared
@pytest.mark.parametrize(("template", "expected"), [("think", -160.4847), ("channel", -141.3956)])
def test_the_prompt_is_what_stands_before_the_answer_in_a_full_rendering(
    template: str, expected: float, sft_probe: Run, tmp_path: Path
) -> None:
    """Not inside the thought, or without the channel, that the template's generation prompt leads
    to."""
    cases = SHARED / "cases"
    shutil.copytree(
        cases / "clock_in_template/ck/checkpoint-1",
        tmp_path / "checkpoint-1",
        copy_function=shutil.copyfile,
    )
    text = (cases / f"generation_prompt_opens_thought/{template}.jinja").read_text()
    (tmp_path / "checkpoint-1/chat_template.jinja").write_text(text)
    result = sft_probe(
        "sweep",
        tmp_path / "out",
        "--checkpoints",
        tmp_path / "checkpoint-1",
        "--prompt_format",
        "chat",
        "--probe_set",
        cases / "clock_in_template/set.jsonl",
    )
    assert result.returncode == 0, result.stderr
    scores = pd.read_parquet(tmp_path / "out/scores.parquet").set_index(["doc_id", "category"])
    assert scores.loc[("d0", "chosen"), "logprob"] == pytest.approx(expected, abs=1e-3)
    assert set(scores["prompt_format"]) == {"chat+full_render"}


@needs_shared
@pytest.mark.parametrize("name", ["set", "mix"])
@pytest.mark.parametrize("spec", ["chat", "plain", "hh", "alpaca.j2"])
@pytest.mark.parametrize("model", ["ck", "eos_bos"])
def test_no_doc_is_left_out_because_a_token_spans_prompt_and_response(
    model: str, spec: str, name: str
) -> None:
    from transformers import AutoTokenizer

    case = SHARED / "cases/token_spans_the_join"
    tokenizer = AutoTokenizer.from_pretrained(case / model / "checkpoint-1")
    probe_set = load_probe_set(str(case / f"{name}.jsonl"))
    if spec == "chat" and not tokenizer.chat_template:
        with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
            resolve_format(spec, tokenizer, probe_set.docs)
        return
    given = str(case / spec) if spec.endswith(".j2") else spec
    prompt_format = resolve_format(given, tokenizer, probe_set.docs)
    assert prompt_format.in_use == (spec != "hh")
    kept, dropped = encode_probe_set(probe_set, prompt_format, tokenizer, 512)
    assert (len(kept), dropped) == (8, [])


@needs_shared
def test_the_terminator_is_found_however_the_tokenizer_registers_it() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "cases/end_of_turn_not_extra_special/model")
    assert terminator_id("chat", tokenizer) == 601
    assert terminator_id("hh", tokenizer) == 0


def test_a_token_that_a_tokenizer_appends_is_eos_or_refused_by_name() -> None:
    docs = load_probe_set("helpful-mini").docs[:2]
    tokenizer = make("llama3", eos="</s>", adds="<s> A <sep>")
    with pytest.raises(UserError, match="the tokenizer puts '<sep>' after every text"):
        resolve_format("hh", tokenizer, docs)


def test_a_chat_template_given_as_prompt_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(CHATML)
    with pytest.raises(UserError, match="is a chat template"):
        PromptFormat(str(path))
