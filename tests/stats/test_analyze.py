"""`sft-probe analyze`: numbers that are known beforehand, published ones, imports, and what it
refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import SHARED, Run, needs_shared, user_error
from score_files import CURVES, NUM_TOKENS, STEPS, write_run

from sft_probe.analysis.stats.curves import half_step
from sft_probe.analysis.stats.runs import load_recording

REFERENCE = SHARED / "reference/qwen1.5-1.8b_sft_extend.csv"


def _tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    changes, verdict, contrasts = (
        pd.read_csv(folder / f"{name}.csv") for name in ("changes", "verdict", "contrasts")
    )
    return changes, verdict.set_index("category"), contrasts


def test_the_verdict_on_known_curves(sft_probe: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "known")
    result = sft_probe("analyze", run)
    assert result.returncode == 0, result.stderr
    for words in (
        "chosen rose 13.0 nats by step 8, half of it by step 4; intervals over prompts; one run",
        "then fell to",
        "below its start; intervals over prompts; one run",
        "24 held-out prompts in 24 clusters",
        "this is one run, so they leave out training noise",
    ):
        assert words in result.stdout, result.stdout
    changes, verdict, _ = _tables(run / "analysis")
    for category, curve in CURVES.items():
        row = verdict.loc[category]
        assert row["change"] == pytest.approx(
            curve(STEPS[-1]), abs=4 * float(verdict["stderr"].to_dict()[category])
        )
        assert row["stderr"] == pytest.approx(1 / np.sqrt(24), rel=0.35)
        assert row["share_first"] == pytest.approx(0.1 / 1.25, abs=1e-4)
        assert row["share_body"] == pytest.approx(0.9 / 1.25, abs=1e-4)
        assert row["share_eos"] == pytest.approx(0.25 / 1.25, abs=1e-4)
    assert list(verdict.loc[["chosen", "rejected", "non_response"], "rank"]) == [1, 2, 3]
    assert list(verdict["sign"].loc[["chosen", "non_response"]]) == ["+", "-"]
    assert verdict.loc["non_response", "peak_step"] == 4
    parts = changes[(changes["category"] == "chosen") & (changes["step"] == 8)].set_index(
        ["measure", "unit"]
    )["change"]
    whole = parts["logprob", "nats/response"]
    positions = [f"tokens_{name}" for name in ("1", "2_4", "5_16", "17_64", "65_up")]
    assert sum(parts[name, "nats/response"] for name in positions) == pytest.approx(whole, abs=1e-4)
    assert parts["tokens_5_16", "nats/response"] == pytest.approx(
        0.9 * whole * 12 / (NUM_TOKENS - 1), abs=1e-3
    )
    assert parts["body", "nats/body token"] == pytest.approx(
        0.9 * whole / (NUM_TOKENS - 1), abs=1e-4
    )
    assert parts["logprob", "nats/byte"] == pytest.approx(whole / (4 * NUM_TOKENS), abs=1e-4)
    assert pd.read_parquet(run / "analysis/changes.parquet").shape == changes.shape


def test_with_include_eos_the_terminator_counts(sft_probe: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "known")
    plain = _verdict_of(sft_probe, run)
    with_eos = _verdict_of(sft_probe, run, "--include-eos")
    np.testing.assert_allclose(with_eos["change"], 1.25 * plain["change"], rtol=1e-4)


def _verdict_of(sft_probe: Run, *arguments: object) -> pd.DataFrame:
    out = Path(str(arguments[0])) / "analysis"
    assert sft_probe("analyze", *arguments).returncode == 0
    return pd.read_csv(out / "verdict.csv").set_index("category")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [([0, 2, 4, 8], 4.0), ([0, 8, 8, 8], 0.5), ([0, -1, -3, -4], 2.0 - 0.5), ([0, 5, -5, 1], 0.1)],
)
def test_the_half_step_is_where_half_of_the_change_is_reached(
    changes: list[float], expected: float
) -> None:
    steps = [0, 1, 2, 4] if changes[1] < 0 else [0, 1, 4, 8]
    assert half_step(steps, changes) == pytest.approx(expected)


def test_several_runs_are_averaged_and_shown_with_both_kinds_of_noise(
    sft_probe: Run, tmp_path: Path
) -> None:
    runs = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in range(3)]
    result = sft_probe("analyze", *runs, "--out", tmp_path / "out")
    assert "mean of 3 runs of made-up on chosen" in result.stdout, result.stderr
    assert "! 3 runs: intervals for other runs and prompts hold the truth in 92%" in result.stdout
    table = pd.read_csv(tmp_path / "out/over_runs.csv").query("step == 8").set_index("category")
    verdict = pd.read_csv(tmp_path / "out/verdict.csv")
    means = verdict.groupby("category")["change"]
    np.testing.assert_allclose(table["change"], means.mean().reindex(table.index), atol=1e-4)
    half = (
        4.302653 * means.std().reindex(table.index) / np.sqrt(3)
    )  # t quantile of 2 degrees of freedom
    np.testing.assert_allclose(table["high"] - table["change"], half, atol=1e-3)
    assert (table["both_high"] - table["both_low"] > 0).all()


def test_means_over_runs_are_of_the_docs_that_all_runs_have_and_of_one_setting(
    sft_probe: Run, tmp_path: Path
) -> None:
    runs = []
    for rate in (1e-5, 2e-5):
        for seed in range(2):
            run = write_run(
                tmp_path / f"rate{rate}-s{seed}",
                seed=seed,
                num_docs=30,
                order_seed=seed,
                omit=lambda row: row["category"] == "rejected" and int(row["doc_id"][1:]) >= 5,
            )
            manifest = json.loads((run / "manifest.json").read_text()) | {
                "arguments": {"learning_rate": rate}
            }
            (run / "manifest.json").write_text(json.dumps(manifest))
            runs.append(run)
    result = sft_probe("analyze", *runs, "--out", tmp_path / "out")
    assert result.stdout.count("mean of 2 runs of made-up") == 2, result.stderr
    for rate in (1e-5, 2e-5):
        assert f"alone (0, 1): rate{rate}-s0, rate{rate}-s1\n" in result.stdout
    assert "; 5 to 30 held-out prompts in 5 to 30 clusters" in result.stdout
    over = result.stdout.partition("mean of 2 runs")[2]
    assert "under 10 effective clusters: rejected (5.0)" in over
    table = pd.read_csv(tmp_path / "out/over_runs.csv").query("step == 8")
    assert dict(zip(table["category"], table["num_docs"], strict=True)) == {
        "chosen": 30,
        "rejected": 5,
        "non_response": 30,
    }
    means = pd.read_csv(tmp_path / "out/verdict.csv").groupby("category")["change"].mean()
    np.testing.assert_allclose(table["change"], means.reindex(table["category"]), atol=1e-5)


@needs_shared
def test_a_table_of_published_means_gives_its_published_changes(sft_probe: Run) -> None:
    result = sft_probe("analyze", REFERENCE)
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert "+43.6" in lines["chosen"]
    assert "+36.6" in lines["rejected"]
    assert "+22.8" in lines["irr_train"]
    assert (
        "irr_test rose 7.9 nats by example 10000, then fell to about its start (-0.7); means only"
        in result.stdout
    )


def test_the_results_of_a_plain_lm_eval_give_the_same_changes(
    sft_probe: Run, swept_run: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    for path in swept_run.glob("sweep/step_*/heldout/*_*.json*"):
        folder = theirs / f"checkpoint-{int(path.parts[-3][5:])}" / "some_model"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    (next(theirs.rglob("samples_*")).parent / "notes.txt").write_text("not of lm-eval")
    for path in theirs.rglob("results_*.json"):
        results = json.loads(path.read_text())
        results["config"]["model_args"] = "pretrained=some/model,dtype=float32"
        path.write_text(json.dumps(results))
    own = tmp_path / "own"
    shutil.copytree(swept_run, own)
    mine, other = _verdict_of(sft_probe, own), _verdict_of(sft_probe, theirs)
    pd.testing.assert_frame_equal(
        mine[["change", "low", "high"]], other.loc[mine.index, ["change", "low", "high"]]
    )
    assert other["share_body"].isna().all()
    assert "has no scores of the terminator" in user_error(
        sft_probe("analyze", theirs, "--include-eos")
    )


def test_margins_slopes_and_pmi_of_a_real_run(
    sft_probe: Run, swept_run: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(swept_run, own)
    result = sft_probe("analyze", own)
    assert "nats hang on its own prompt (change of PMI over" in result.stdout, result.stderr
    _, verdict, contrasts = _tables(own / "analysis")
    pmi = contrasts[contrasts["contrast"] == "pmi"].set_index("step")["value"]
    moved_pmi = contrasts[contrasts["contrast"] == "pmi_change"].set_index("step")
    np.testing.assert_allclose(moved_pmi["value"], pmi - pmi.iloc[0], atol=1e-5)
    assert moved_pmi["low"].isna().to_list() == [step == 0 for step in moved_pmi.index], (
        "no variance, no interval"
    )
    last = contrasts[contrasts["step"] == 4].set_index(["contrast", "category"])["value"]
    change = verdict["change"].astype(float).to_dict()
    expected = change["chosen"] - change["random"]
    assert last["margin_change", "random"] == pytest.approx(expected, abs=1e-4)
    rows = pd.read_parquet(own / "scores.parquet").query("step == 4 and split == 'heldout'")
    docs = {doc["doc_id"]: doc for doc in map(json.loads, _embedded_lines())}
    own_prompt, borrowed = (
        rows[rows["category"] == name].set_index("doc_id")["logprob"].astype(float).to_dict()
        for name in ("chosen", "random")
    )
    differences = [
        own_prompt[docs[str(name)]["random_doc_id"]] - value for name, value in borrowed.items()
    ]
    assert last["pmi", "chosen"] == pytest.approx(np.mean(differences), abs=1e-4)
    chosen = rows[rows["category"] == "chosen"].set_index("doc_id")
    start = (
        pd.read_parquet(own / "scores.parquet")
        .query("step == 0 and category == 'chosen'")
        .set_index("doc_id")
    )
    moved = chosen["logprob"] - start["logprob"].reindex(chosen.index)
    assert last["slope", "chosen"] == pytest.approx(
        np.polyfit(chosen["num_tokens"], moved, 1)[0], abs=1e-5
    )


def _embedded_lines() -> list[str]:
    from sft_probe import data

    folder = Path(str(data.__path__[0])) / "helpful-mini"
    return [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def test_analyze_copes_with_one_doc_one_category_and_a_missing_score(
    sft_probe: Run, tmp_path: Path
) -> None:
    only = {"chosen": CURVES["chosen"]}
    result = sft_probe("analyze", write_run(tmp_path / "one", curves=only, num_docs=1))
    assert "too few prompts for an interval" in result.stdout, result.stderr
    holed = write_run(
        tmp_path / "holed",
        omit=lambda row: (row["step"], row["doc_id"], row["category"]) == (8, "d3", "chosen"),
    )
    result = sft_probe("analyze", holed)
    assert "1 of 288 scores are missing" in result.stdout, result.stderr
    assert list(_tables(holed / "analysis")[1]["num_docs"]) == [23, 24, 24]


def test_analyze_prints_many_steps_and_categories(sft_probe: Run, tmp_path: Path) -> None:
    curves = {f"c{number}": lambda step, rate=number: rate * step / 154 for number in range(12)}
    result = sft_probe(
        "analyze", write_run(tmp_path / "big", curves=curves, steps=range(154), num_docs=4)
    )
    assert result.returncode == 0, result.stderr
    assert sum(line.startswith("- c") for line in result.stdout.splitlines()) == 12


def test_repeated_responses_are_one_cluster(sft_probe: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "texts", texts=dict.fromkeys(CURVES, "word"))
    lines = (run / "set.jsonl").read_text().splitlines()
    docs = [json.loads(line) for line in lines]
    for doc in docs[:5]:
        doc["non_response"] = "the same for five"
    (run / "set.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    text = sft_probe("analyze", run).stdout
    assert "24 held-out prompts in 20 to 24 clusters" in text
    assert "one cluster holds over 10% of the docs: non_response (21%)" in text
    _, verdict, _ = _tables(run / "analysis")
    assert verdict["num_clusters"].to_dict() == {"chosen": 24, "rejected": 24, "non_response": 20}
    assert sft_probe("plot", run, "--format", "svg").returncode == 0
    trajectory = pd.read_csv(run / "trajectory.csv").query("step == 8").set_index("category")
    ends = trajectory.loc[verdict.index, ["low", "high"]]
    np.testing.assert_allclose(
        ends, verdict[["low", "high"]], atol=6e-5, err_msg="one mean has one interval"
    )


def test_a_foreign_sweep_finds_its_probe_set_from_any_directory(
    sft_probe: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    docs = [
        {
            "doc_id": f"d{number}",
            "conversation_id": f"c{number}",
            "split": "heldout",
            "chosen": f"Answer {number}.",
            "non_response": f"The same for {number // 4}.",
            "messages": [{"role": "user", "content": f"Q{number}"}],
        }
        for number in range(12)
    ]
    Path("set.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for step in (0, 1):
        shutil.copytree(tiny_model, f"ck/checkpoint-{step}")
    result = sft_probe("sweep", "out", "--checkpoints", "ck/*", "--probe_set", "set.jsonl")
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir("/")
    recording = load_recording(tmp_path / "out")
    assert recording.texts["d7"]["chosen"] == "Answer 7."
    assert not [note for note in recording.notes if "probe set" in note]


def test_analyze_warns_where_live_and_swept_scores_differ(
    sft_probe: Run, swept_run: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(swept_run, own)
    (own / "probe").mkdir()
    for path in own.glob("sweep/step_*/heldout/rows.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        live = [{**row, "source": "live", "logprob": row["logprob"] + 0.5} for row in rows]
        target = own / "probe" / f"{path.parts[-3]}.jsonl"
        target.write_text("".join(json.dumps(row) + "\n" for row in live))
    assert "live probe and sweep differ by up to 0.50 nats" in sft_probe("analyze", own).stdout


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "step,category\n0,chosen\n", "needs category, one of step"),
        ("a.csv", "step,category,logprob\n0,chosen,-1\n1,chosen,x\n", "line 3: logprob is 'x'"),
        ("a.csv", "step,category,logprob\n0,chosen,-1\n", "one step only (0)"),
        ("a.csv", "", "cannot be read as CSV"),
        (
            "a.json",
            '{"logps_eval_prob_train/chosen": -1}\n{"logps_eval_prob_train/chosen": NaN}\n',
            "no key logps_eval_prob_train/CATEGORY holds a finite number in every line",
        ),
        ("a.json", '{"loss": 1}\n', "a.json holds none of: a CSV of means or of benchmarks"),
        (
            "a.json",
            3 * '{"logps_eval_prob_train/chosen": -1}\n',
            "one evaluation only, so nothing can have changed. 2 of 3 lines repeat an earlier "
            "evaluation",
        ),
        ("a.json", "[]\n", "line 1: must be a JSON object, not []"),
        ("a.json", "", "is empty"),
        ("a.parquet", "not parquet", "no parquet file of score rows"),
        ("results_2026-01-01T00-00-00.json", "{}", "tells no step"),
        ("nothing.txt", "", "holds no scores"),
    ],
)
def test_analyze_refuses_what_cannot_be_analyzed_with_one_message(
    sft_probe: Run, tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content)
    source = tmp_path / name if name.startswith("a.") else tmp_path
    assert words in user_error(sft_probe("analyze", source))


def test_a_category_that_never_moves_is_said_not_to_have_moved(
    sft_probe: Run, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("step,category,logprob\n0,a,-1\n1,a,-1\n0,b,-1\n1,b,-9\n")
    result = sft_probe("analyze", tmp_path / "a.csv")
    assert "a did not change clearly (+0.0 nats by step 1); means only" in result.stdout, (
        result.stderr
    )


def test_files_without_score_rows_are_refused_by_name(sft_probe: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run / "probe/step_000001.jsonl"
    lines = path.read_text()
    path.write_text(lines.replace('"split": "heldout"', '"split": "test"'))
    assert "there is no split 'test'." in user_error(sft_probe("analyze", run))
    path.write_text(lines[: len(lines) // 2])
    assert "step_000001.jsonl holds no score rows of this version" in user_error(
        sft_probe("analyze", run)
    )
    path.write_text(
        "".join(line for line in lines.splitlines(keepends=True) if '"chosen"' not in line)
    )
    first = run / "probe/step_000000.jsonl"
    rest = [
        line
        for line in first.read_text().splitlines(keepends=True)
        if '"category": "rejected"' not in line
    ]
    first.write_text("".join(rest))
    verdict = _verdict_of(sft_probe, run)
    assert "rejected was scored at one step only" in verdict["sentence"]["rejected"]
    assert verdict["rank"].drop("rejected").notna().all()


def test_runs_of_different_settings_are_not_averaged(
    sft_probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # several runs have their tables there
    runs = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in range(3)]
    path = runs[2] / "manifest.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "arguments": {"learning_rate": 1e-3}})
    )
    text = sft_probe("analyze", *runs).stdout
    assert (
        "mean of 2 runs of made-up on chosen that differ in their order seed alone (0, 1)" in text
    )
    again = write_run(tmp_path / "again", seed=0)
    result = sft_probe("analyze", runs[0], again)
    assert "mean of" not in result.stdout
    assert "same order seed and so are no repeats: s0, again" in result.stderr


def test_runs_that_cannot_be_averaged_are_refused_with_the_reason(
    sft_probe: Run, tmp_path: Path
) -> None:
    assert "does not exist" in user_error(sft_probe("analyze", tmp_path / "nowhere"))
    assert "one step only (0)" in user_error(
        sft_probe("analyze", write_run(tmp_path / "short", steps=[0]))
    )
    run = write_run(tmp_path / "twice")
    assert "Use one of chosen, rejected" in user_error(
        sft_probe("analyze", run, "--categories", "nonsense")
    )
    shutil.copy(run / "probe/step_000001.jsonl", run / "probe/step_000002.jsonl")
    assert "two score rows of run twice" in user_error(sft_probe("analyze", run))
