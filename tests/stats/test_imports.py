"""Runs that were trained and scored elsewhere: what is taken for what, known numbers, and what is
refused."""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import SHARED, Run, needs_shared, user_error
from hypothesis import given
from hypothesis import strategies as st
from score_files import write_run

from sft_probe.analysis.stats.imports.learning_dynamics import read_metrics
from sft_probe.analysis.stats.runs import load_recording

PUBLISHED = SHARED / "reference/learning-dynamics"
TEXTS = SHARED / "data/helpful-base/probe_train.jsonl"


def _metrics(folder: Path, lines: list[dict[str, Any]], name: str = "prob_train_metrics") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _doc_level(folder: Path, *, num_docs: int = 24) -> tuple[np.ndarray, Path]:
    """A made-up run of 4 evaluations: the array, and a file of texts in which 6 docs share one."""
    generator = np.random.default_rng(1)
    values = generator.normal(-50, 9, size=(1, 4, num_docs)) + np.zeros((4, 1, 1))
    values[:, 0] += np.arange(4)[:, None] + generator.normal(0, 0.5, size=(4, num_docs))
    values[:, 2] = np.nan
    keys = [f"logps_eval_prob_train/{name}" for name in ("chosen", "other")]
    keys = [keys[0], "argmax_prob_logits", "except_argmax_prob_logits", keys[1]]
    values[:, 1] = values[:, 0] / 2
    lines = [dict(zip(keys, map(float, step.mean(axis=1)), strict=True)) for step in values]
    _metrics(folder, [lines[0], lines[1], lines[0], *lines[2:], lines[3]])
    np.save(folder / "logp_npy_all_chosen.npy", values)
    texts = folder / "texts.jsonl"
    docs = [
        {"prompt": f"P{n}", "chosen": f"A{n}", "other": "same" if n < 6 else f"B{n}"}
        for n in range(num_docs)
    ]
    texts.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return values, texts


def test_log_probs_of_docs_become_a_run_like_any_other(sft_probe: Run, tmp_path: Path) -> None:
    values, texts = _doc_level(tmp_path / "theirs")
    run = tmp_path / "runs/theirs"
    result = sft_probe("import", tmp_path / "theirs", "--texts", texts, "--out", run)
    for words in (
        "24 docs at 4 evaluations",
        "log-prob with the terminator, prompts trained on: chosen, other",
        "other measures: chosen argmax_prob_logits",
        "! 2 of 6 lines repeat an earlier evaluation and were dropped",
        "not finite in every line): except_argmax_prob_logits",
    ):
        assert words in result.stdout, (result.stdout, result.stderr)
    result = sft_probe("analyze", run)
    assert "24 prompts trained on in 19 to 24 clusters" in result.stdout, result.stderr
    assert "nats per response with the terminator" in result.stdout
    verdict = pd.read_csv(run / "analysis/verdict.csv").set_index("category")
    moved = values[3, 0] - values[0, 0]
    assert verdict.loc["chosen", "change"] == pytest.approx(moved.mean(), abs=1e-5)
    assert verdict.loc["chosen", "stderr"] == pytest.approx(
        moved.std(ddof=1) / math.sqrt(24), abs=1e-5
    )
    measures = pd.read_csv(run / "benchmarks.csv")
    argmax = measures[measures["metric"] == "argmax_prob_logits"]
    np.testing.assert_allclose(argmax["value"], values[:, 1].mean(axis=1))
    spread = values[:, 1].std(axis=1, ddof=1) / math.sqrt(24)
    np.testing.assert_allclose(argmax["stderr"], spread, rtol=1e-6)
    for command in ("plot", "report"):
        assert sft_probe(command, run).returncode == 0
    assert "P7" in (run / "report.html").read_text()
    again = load_recording(run)
    assert again.texts["line_00001"] == {"chosen": "A0", "other": "same"}
    in_place = load_recording(tmp_path / "theirs").notes
    assert set(in_place) - set(again.notes) == {
        "no texts were given (--texts): docs with one text are not one cluster"
    }


@needs_shared
def test_published_log_probs_of_docs_give_the_published_table(
    sft_probe: Run, tmp_path: Path
) -> None:
    expected = {  # start, change by the last evaluation, its error clustered by own text
        "chosen": (-151.98, 5.64, 0.91),
        "rejected": (-121.35, -76.29, 1.31),
        "chosen_initial": (-151.66, -45.85, 2.32),
        "irr_train": (-193.41, -29.59, 1.27),
        "irr_test": (-161.16, -48.98, 1.05),
        "irr_hum": (-187.90, -34.72, 0.96),
        "random_permute": (-401.35, -90.14, 2.23),
        "random_nonhum": (-361.76, -79.14, 1.79),
    }
    folder = tmp_path / "pythia410m_dpo"
    folder.mkdir()
    shutil.copy(PUBLISHED / "pythia410m_dpo.metrics.json", folder / "prob_train_metrics.json")
    shutil.copy(PUBLISHED / "pythia410m_dpo.logp.npy", folder / "logp_npy_all_chosen.npy")
    result = sft_probe("import", folder, "--texts", TEXTS, "--out", tmp_path / "run")
    assert "500 docs at 50 evaluations" in result.stdout, result.stderr
    assert "before its fix of May 2025, which are wrong" in result.stdout
    assert "not finite in every line): except_argmax_prob_logits" in result.stdout
    assert sft_probe("analyze", tmp_path / "run").returncode == 0
    verdict = pd.read_csv(tmp_path / "run/analysis/verdict.csv").set_index("category")
    assert len(verdict) == 12
    found = verdict.loc[list(expected), ["start", "change", "stderr"]].to_numpy()
    np.testing.assert_allclose(found, np.array(list(expected.values())), atol=0.0051)
    assert verdict["num_clusters"]["irr_train"] == 306
    assert "chosen rose 11.8 nats by evaluation 25, then fell" in verdict["sentence"]["chosen"]


FAULTS_OF_ARRAYS = {
    "shape": "holds 3 evaluations of 4 rows, but",
    "flat": "not [evaluations, rows, docs] of numbers",
    "objects": "cannot be read as an array of numbers",
    "text": "cannot be read as an array of numbers",
    "mean": "row 0 at evaluation 2 has the mean",
    "alone": "beside it must lie its prob_train_metrics.json",
    "lines": "texts.jsonl has 23 lines, but there are 24 docs",
    "prompt": "texts.jsonl, line 2: no text 'prompt'",
    "two": "holds several arrays: logp2.npy, logp_npy_all_chosen.npy",
}


@pytest.mark.parametrize("fault", FAULTS_OF_ARRAYS)
def test_an_array_that_does_not_fit_is_one_message(
    sft_probe: Run, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "theirs"
    values, texts = _doc_level(folder)
    array = folder / "logp_npy_all_chosen.npy"
    lines = texts.read_text().splitlines(keepends=True)
    if fault == "shape":
        np.save(array, values[:3])
    elif fault == "flat":
        np.save(array, values[0])
    elif fault == "objects":
        np.save(array, np.array([{}, 1], dtype=object), allow_pickle=True)
    elif fault == "text":
        array.write_text("no array")
    elif fault == "mean":
        values[2, 0] += 0.01
        np.save(array, values)
    elif fault == "alone":
        (folder / "prob_train_metrics.json").unlink()
    elif fault == "lines":
        texts.write_text("".join(lines[1:]))
    elif fault == "prompt":
        texts.write_text("".join([lines[0], '{"chosen": "a"}\n', *lines[2:]]))
    else:
        np.save(folder / "logp2.npy", values)
    source = array if fault == "alone" else folder
    result = sft_probe("import", source, "--texts", texts, "--out", tmp_path / "out")
    assert FAULTS_OF_ARRAYS[fault] in user_error(result)
    assert not (tmp_path / "out").exists()


def test_a_metric_file_alone_gives_means(sft_probe: Run, tmp_path: Path) -> None:
    values = [(-122.5, -97.0), (-100.0, -80.0), (-79.5, -60.5)]
    lines = [
        {
            "logps_eval_prob_train/chosen": a,
            "p_e": math.nan,
            "logps_eval_prob_train/reject_gptformat": b,
        }
        for a, b in values
    ]
    path = _metrics(tmp_path, lines)
    result = sft_probe("analyze", path, "--out", tmp_path / "out")
    assert "from evaluation 0 to 2" in result.stdout, result.stderr
    verdict = pd.read_csv(tmp_path / "out/verdict.csv").set_index("category")
    assert verdict["change"].to_dict() == pytest.approx({"chosen": 43.0, "reject_gptformat": 36.5})
    assert set(verdict["split"]) == {"train"}
    assert "keys left out (not known, or not finite in every line): p_e" in result.stdout
    run = tmp_path / "run"
    assert sft_probe("import", path, "--out", run).returncode == 0
    for command in ("analyze", "plot", "report"):
        assert sft_probe(command, run).returncode == 0
    pd.testing.assert_frame_equal(
        pd.read_csv(run / "analysis/verdict.csv").drop(columns="run"),
        verdict.reset_index().drop(columns="run")[
            pd.read_csv(run / "analysis/verdict.csv").drop(columns="run").columns
        ],
    )


def test_a_repeated_line_that_lost_a_key_or_a_number_is_a_repeat(tmp_path: Path) -> None:
    lines = [
        {f"logps_eval_prob_train/{name}": -9.0 * step for name in ("chosen", "rejected")}
        for step in range(3)
    ]
    partial = dict(list(lines[1].items())[:1])
    not_finite = lines[2] | {"logps_eval_prob_train/rejected": math.nan}
    recording = load_recording(_metrics(tmp_path, [*lines, partial, not_finite]))
    assert recording.means is not None
    assert set(recording.means["category"]) == {"chosen", "rejected"}
    assert set(recording.means["step"]) == {0, 1, 2}
    assert "2 of 5 lines repeat an earlier evaluation and were dropped" in recording.notes


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(-4e-4, 4e-4)), min_size=2, max_size=30).filter(
        lambda lines: len({number for number, _ in lines}) > 1
    )
)
def test_repeated_and_interleaved_evaluations_count_once(lines: list[tuple[int, float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.json")
        path.write_text(
            "".join(f'{{"logps_eval_prob_train/a": {-n + e}, "p_e": NaN}}\n' for n, e in lines)
        )
        found = read_metrics(path)
    first = list(dict.fromkeys(number for number, _ in lines))
    assert found.means is not None
    assert list(found.means["value"].round()) == [-number for number in first], (
        "in the order of their first line"
    )
    assert list(found.means["step"]) == list(range(len(first)))
    repeats = len(lines) - len(first)
    words = f"{repeats} of {len(lines)} lines repeat"
    assert any(words in note for note in found.notes) == (repeats > 0)


@needs_shared
@pytest.mark.parametrize(
    ("name", "evaluations", "start", "changes", "is_wrong"),
    [
        ("pythia410m_dpo", 50, -151.98, {"chosen": (49, 5.64)}, True),
        (
            "qwen1.8b_sft_chosen",
            40,
            -122.81,
            {"chosen": (39, 66.4), "rejected": (8, 10.1), "irr_test": (3, 7.3)},
            False,
        ),
        ("qwen1.8b_dpo_after_sft", 30, -54.38, {"rejected": (29, -218.8)}, False),
    ],
)
def test_published_metric_files_are_read_with_all_evaluations_and_categories(
    name: str,
    evaluations: int,
    start: float,
    changes: dict[str, tuple[int, float]],
    is_wrong: bool,
) -> None:
    found = read_metrics(PUBLISHED / f"{name}.metrics.json")
    assert found.means is not None
    table = found.means.pivot(index="step", columns="category", values="value")
    assert table.shape == (evaluations, 12)
    assert table["chosen"].iloc[0] == pytest.approx(start, abs=0.01)
    for category, (step, change) in changes.items():
        moved = table[category].iloc[step] - table[category].iloc[0]
        assert moved == pytest.approx(change, abs=0.06), category
    assert any("except_argmax_prob_logits" in note for note in found.notes)
    assert any("fix of May 2025" in note for note in found.notes) == is_wrong


def _old_results(folder: Path, step: int, accuracy: float, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"70m_step{step}.json"
    arguments = f"use_accelerate=True,pretrained=EleutherAI/pythia-70m,revision=step{step}"
    value = {
        "results": {"arc_easy": {"acc": accuracy, "acc_stderr": 0.01}, "wsc": {"acc": 0.4}},
        "versions": {"arc_easy": 0, "wsc": 0},
        "config": {"model": "hf-causal", "model_args": arguments, "num_fewshot": 0, **config},
    }
    path.write_text(json.dumps(value, indent=2))
    return path


def test_results_of_an_old_lm_eval_stand_on_a_step_axis(sft_probe: Run, tmp_path: Path) -> None:
    for step, accuracy in ((0, 0.25), (512, 0.28), (143000, 0.4)):
        _old_results(tmp_path / "zero-shot", step, accuracy)
    run = tmp_path / "run"
    result = sft_probe("import", tmp_path / "zero-shot", "--out", run)
    assert "steps, by the names of the files: 0, 512, 143000" in result.stdout, result.stderr
    assert "2 benchmarks: arc_easy, wsc" in result.stdout
    table = pd.read_csv(run / "benchmarks.csv").query("task == 'arc_easy'")
    assert table[["step", "value", "stderr"]].to_numpy().tolist() == [
        [0, 0.25, 0.01],
        [512, 0.28, 0.01],
        [143000, 0.4, 0.01],
    ]
    text = sft_probe("analyze", run).stdout
    half = 1.96 * math.sqrt(2) * 0.01
    assert f"+0.15  [{0.15 - half:+.3g}, {0.15 + half:+.3g}]" in text.replace("   ", "  "), text
    assert load_recording(run).model == "EleutherAI/pythia-70m"
    for command in ("plot", "report"):
        assert sft_probe(command, run).returncode == 0
    assert (run / "figures/benchmarks.png").is_file()


def test_a_wide_table_gives_a_run_for_each_model(sft_probe: Run, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(
        "model,epoch,arc_easy,arc_easy_stderr,copa,date\n"
        "org/a,0,0.25,0.01,0.5,mon\norg/a,1,0.3,0.01,,tue\norg/b,0,0.2,,0.6,wed\norg/b,1,0.4,,0.6,x\n"
    )
    result = sft_probe("import", path, "--out", tmp_path / "runs")
    assert "! columns left out, which hold no numbers: date" in result.stdout, result.stderr
    one, other = (load_recording(tmp_path / "runs" / name) for name in ("org_a", "org_b"))
    assert (one.model, one.step_unit) == ("org/a", "epoch")
    assert one.benchmarks is not None
    assert one.benchmarks[["task", "step", "value"]].to_numpy().tolist() == [
        ["arc_easy", 0, 0.25],
        ["arc_easy", 1, 0.3],
        ["copa", 0, 0.5],
    ]
    assert one.benchmarks["stderr"].to_list()[:2] == [0.01, 0.01]
    assert other.benchmarks is not None
    assert other.benchmarks["stderr"].isna().all()
    assert "+0.2" in sft_probe("analyze", tmp_path / "runs/org_b").stdout
    assert "holds 2 models" in user_error(sft_probe("analyze", path))


LOG = [
    {"step": 10, "loss": 0.69, "logps/chosen": -90.0, "rewards/margins": 0.0, "epoch": 0.1},
    {"step": 10, "eval_logps/chosen": -95.0, "eval_rewards/margins": 0.0},
    {"step": 20, "loss": 0.5, "logps/chosen": -80.0, "rewards/margins": 1.5, "epoch": 0.2},
    {"step": 20, "logps/chosen": -85.0, "epoch": 0.2},
    {"step": 20, "eval_logps/chosen": -92.0, "eval_rewards/margins": 1.0},
]


@pytest.mark.parametrize("form", ["trainer_state.json", "log.jsonl", "wandb.csv", "page.csv"])
def test_logs_of_preference_training_give_means_and_rewards(
    sft_probe: Run, tmp_path: Path, form: str
) -> None:
    path = tmp_path / "theirs" / form
    path.parent.mkdir()
    if form == "trainer_state.json":
        path.write_text(json.dumps({"global_step": 20, "log_history": LOG}, indent=2))
    elif form == "log.jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in LOG))
    else:
        prefix = "my run - " if form == "page.csv" else ""
        names = {"step": "Step" if prefix else "train/global_step"}
        for key in ("logps/chosen", "rewards/margins"):
            names |= {key: f"{prefix}train/{key}", f"eval_{key}": f"{prefix}eval/{key}"}
        pd.DataFrame(LOG).rename(columns=names).to_csv(path, index=False)
    run = tmp_path / "run"
    result = sft_probe("import", path, "--out", run)
    assert "mean log-prob, nats per response, eval: chosen" in result.stdout, result.stderr
    assert "! 1 values were logged again later" in result.stdout
    assert "keys left out: loss" in result.stdout
    assert sft_probe("analyze", run).returncode == 0
    verdict = pd.read_csv(run / "analysis/verdict.csv").set_index("split")
    assert verdict["change"].to_dict() == {"heldout": 3.0, "train": 5.0}
    rewards = pd.read_csv(run / "benchmarks.csv").query("filter == 'heldout'")
    assert rewards[["task", "metric", "step", "value"]].to_numpy().tolist() == [
        ["rewards", "margins", 10, 0.0],
        ["rewards", "margins", 20, 1.0],
    ]


FAULTS = [
    ("a.txt", "x", "is none of: a CSV of means"),
    ("a.csv", "model,epoch\nm,0\n", "has the columns model, epoch. A table of benchmarks needs"),
    ("a.csv", "model,epoch,copa\nm,0.5,0.1\n", "line 2: epoch is 0.5; a step is a whole number"),
    ("a.csv", "epoch,copa\n0,0.1\n1,0.1\n1,0.2\n", "line 4: a second row of a at epoch 1"),
    ("a.csv", "step,logps/chosen\n1,x\n", "entry 1: logps/chosen is 'x', which is no number"),
    ("a.csv", "logps/chosen,loss\n-1,2\n", "entry 1: no step"),
    ("a.json", '{"results": {}, "versions": {}}', "its name tells no step"),
    ("a_step1.json", '{"results": {}, "versions": {}}', "holds no result that is a number"),
    ("a_step1.json", '{"results": {"t": 1}, "versions": {}}', "'results' of t is no object"),
    ("a_step1.json", '{"results": 1, "versions": {}}', "'results' is 1, not an object"),
    ("a.json", '{\n  "log_history": [\n', "line 3: not valid JSON"),
    ("a.json", '{\n  "log_history": 3\n}', "'log_history' is 3, not a list"),
    ("a.json", '{"log_history": [3]}', "entry 1 of 'log_history' is no object"),
    ("a.json", '{"log_history": [{"loss": 1}]}', "holds no logps/... and no rewards/..."),
    ("a.jsonl", '{"logps/chosen": -1, "step": 1}\n{\n', "line 2: not valid JSON"),
    ("a.json", "\x00\xff", "not valid JSON"),
]


@pytest.mark.parametrize(("name", "content", "words"), FAULTS)
def test_a_file_with_faults_is_one_message(
    sft_probe: Run, tmp_path: Path, name: str, content: str, words: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    message = user_error(sft_probe("import", path, "--out", tmp_path / "out"))
    assert words in message
    assert name in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("results_1.json", "{", "line 1: not valid JSON"),
        ("results_1.json", '{"results": {"t": 1}}', "'results' of t is no object"),
        ("results_1.json", '{"results": []}', "'results' is [], not an object"),
        ("results_1.json", '{"results": {}}', "no results of benchmarks, and no samples"),
        ("samples_t_2026-01-01T00-00-00.jsonl", "{}\n[1]\n", "line 2: must be a JSON object"),
    ],
)
def test_results_of_lm_eval_with_faults_are_one_message(
    sft_probe: Run, tmp_path: Path, name: str, content: str, words: str
) -> None:
    folder = tmp_path / "theirs/step4"
    folder.mkdir(parents=True)
    if name.startswith("samples"):
        (folder / "results_2026-01-01T00-00-00.json").write_text('{"results": {}}')
    (folder / name).write_text(content)
    message = user_error(sft_probe("import", tmp_path / "theirs", "--out", tmp_path / "out"))
    assert words in message, message


def test_benchmarks_of_a_plain_lm_eval_are_kept(sft_probe: Run, tmp_path: Path) -> None:
    for step, right in ((0, [0.0, 0.0, 1.0]), (4, [1.0, 0.0, 1.0])):
        folder = tmp_path / f"theirs/step{step}"
        folder.mkdir(parents=True)
        metrics = {"acc,none": sum(right) / 3, "acc_stderr,none": 0.3, "alias": "quiz"}
        results = {"results": {"quiz": metrics}, "n-samples": {"quiz": {"effective": 3}}}
        (folder / "results_2026-01-01T00-00-00.json").write_text(json.dumps(results))
        lines = [
            {"doc": {"query": f"q{n}"}, "filter": "none", "acc": value, "resps": [[["-1", 0]]] * 2}
            for n, value in enumerate(right)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "samples_quiz_2026-01-01T00-00-00.jsonl").write_text(text)
    result = sft_probe("import", tmp_path / "theirs", "--out", tmp_path / "run")
    assert "benchmarks: quiz" in result.stdout, result.stderr
    table = pd.read_csv(tmp_path / "run/benchmarks.csv")
    assert table["step"].to_list() == [0, 4]
    assert set(table["clusters"]) == {3}
    assert "+0.333" in sft_probe("analyze", tmp_path / "run").stdout


def test_files_of_two_settings_or_one_step_are_not_one_run(sft_probe: Run, tmp_path: Path) -> None:
    _old_results(tmp_path / "mixed", 1, 0.2)
    _old_results(tmp_path / "mixed", 2, 0.2, num_fewshot=5)
    out = tmp_path / "out"
    message = user_error(sft_probe("import", tmp_path / "mixed", "--out", out))
    assert "70m_step2.json is of EleutherAI/pythia-70m 5" in message
    shutil.copy(
        _old_results(tmp_path / "twice", 1, 0.2), tmp_path / "twice/70m-again_step000001.json"
    )
    message = user_error(sft_probe("import", tmp_path / "twice", "--out", out))
    assert "are of one step. Import one of their folders" in message


def test_an_import_never_overwrites_a_run_of_ones_own(sft_probe: Run, tmp_path: Path) -> None:
    own = write_run(tmp_path / "own")
    path = tmp_path / "a.csv"
    path.write_text("step,category,logprob\n0,a,-1\n1,a,-2\n")
    assert "is no imported run" in user_error(sft_probe("import", path, "--out", own))
    assert sft_probe("import", path, "--out", tmp_path / "new").returncode == 0
    assert sft_probe("import", path, "--out", tmp_path / "new").returncode == 0
    message = user_error(sft_probe("import", path, "--texts", path, "--out", tmp_path / "new"))
    assert "--texts: " in message


def test_sums_with_and_without_the_terminator_share_no_table(
    sft_probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, texts = _doc_level(tmp_path / "theirs")
    assert sft_probe("import", "theirs", "--texts", texts, "--out", "runs/theirs").returncode == 0
    own = write_run(tmp_path / "own")
    message = user_error(sft_probe("analyze", own, "runs/theirs"))
    assert "sums of theirs hold the terminator, as published. Give --include-eos" in message
    result = sft_probe("analyze", own, "runs/theirs", "--include-eos")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("nats per response with the terminator") == 2
    for words in (
        "! steps count different things, so no axis is shared: optimizer step (own); evaluation",
        "! scored on held-out prompts (own); prompts trained on (theirs): compare splits of one",
        "! no doc is common to all runs: compare changes, not levels",
        "nothing can be paired",
    ):
        assert words in result.stdout, result.stdout
    both = ("own", "runs/theirs", "--include-eos")
    message = user_error(sft_probe("plot", *both, "--color", "run"))
    assert "--color run puts all runs on one axis, but steps count different things" in message
    for command in ("plot", "report"):
        assert sft_probe(command, *both).returncode == 0
    assert "compare splits of one kind" in Path("report.html").read_text()


def test_steps_that_count_different_things_have_axes_of_their_own(
    sft_probe: Run, tmp_path: Path
) -> None:
    for name, column in (("steps", "step"), ("examples", "train_examples")):
        rows = "".join(f"{step},chosen,{-9 + step}\n" for step in (0, 1, 4))
        (tmp_path / f"{name}.csv").write_text(f"{column},category,logprob\n{rows}")
    runs = (tmp_path / "steps.csv", tmp_path / "examples.csv")
    result = sft_probe("plot", *runs, "--out", tmp_path / "out", "--format", "svg")
    assert result.returncode == 0, result.stderr
    svg = (tmp_path / "out/changes_heldout.svg").read_text()
    for words in ("optimizer step (log)", "training examples (log)", "as published; no intervals"):
        assert words in svg, words
