"""Checkpoints whose small files are odd: configs of adapters, indices of shards, tokenizers; and
inputs that failed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch
from adapter_forms import load_reference, save_adapter
from helpers import SHARED, Run, make_docs, needs_shared, user_error
from references import expected_logprob
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

WriteSet = Callable[[list[dict[str, Any]]], Path]


@pytest.fixture
def sweep(sft_probe: Run, write_set: WriteSet, tmp_path: Path) -> Callable[..., Any]:
    probe_set = write_set(make_docs())

    def run(pattern: str = "checkpoint-*", out: str = "run") -> Any:
        return sft_probe(
            "sweep", tmp_path / out, "--checkpoints", tmp_path / pattern, "--probe_set", probe_set
        )

    return run


def steps(run: Path) -> list[int]:
    return sorted(set(pd.read_parquet(run / "scores.parquet")["step"]))


ADAPTER_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "base null": (
        lambda c: {**c, "base_model_name_or_path": None},
        "`base_model_name_or_path` is null",
    ),
    "base empty": (
        lambda c: {**c, "base_model_name_or_path": ""},
        '`base_model_name_or_path` is ""',
    ),
    "base a number": (
        lambda c: {**c, "base_model_name_or_path": 7},
        "`base_model_name_or_path` is 7",
    ),
    "base missing": (
        lambda c: {key: value for key, value in c.items() if key != "base_model_name_or_path"},
        "`base_model_name_or_path` is missing",
    ),
    "base nowhere": (lambda c: {**c, "base_model_name_or_path": "/no/where"}, "'/no/where'"),
    "revision a number": (lambda c: {**c, "revision": 7}, "`revision` is 7"),
    "a list": (lambda _: [], "must hold a JSON object, not []"),
    "a text": (lambda _: "x", 'must hold a JSON object, not "x"'),
    "no type": (
        lambda c: {key: value for key, value in c.items() if key != "peft_type"},
        "`peft_type` is None",
    ),
    "an unknown type": (lambda c: {**c, "peft_type": "MAGIC"}, "`peft_type` is 'MAGIC'"),
    "a type of type": (lambda c: {**c, "peft_type": ["LORA"]}, "`peft_type` is ['LORA']"),
    "a type that mixes": (lambda c: {**c, "peft_type": "XLORA"}, "XLORA"),
    "another task": (lambda c: {**c, "task_type": "POEMS"}, "POEMS"),
    "rank a text": (lambda c: {**c, "r": "four"}, "cannot load the LORA adapter"),
    "no such target": (lambda c: {**c, "target_modules": ["other"]}, "other"),
    "targets a number": (lambda c: {**c, "target_modules": 5}, "LORA"),
}


@pytest.mark.parametrize("kind", ADAPTER_CONFIGS)
def test_a_damaged_adapter_config_is_named(
    kind: str, tiny_model: Path, tmp_path: Path, sweep: Any
) -> None:
    for step in (1, 2, 3):
        save_adapter("LoRA", tiny_model, tmp_path / f"checkpoint-{step}", seed=step)
    change, message = ADAPTER_CONFIGS[kind]
    path = tmp_path / "checkpoint-2/adapter_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    error = user_error(sweep())
    assert "step 2: " in error
    assert message in error
    assert kind == "base nowhere" or "checkpoint-2" in error
    assert steps(tmp_path / "run") == [1, 3]


INDICES: dict[str, tuple[Any, str]] = {
    "no map": ({"metadata": {}}, "`weight_map` must be an object"),
    "a map alone": ({"weight_map": {"a": "model.safetensors"}}, "`metadata` must be an object"),
    "a list": ([], "must hold a JSON object, not []"),
    "an empty map": (
        {"metadata": {}, "weight_map": {}},
        "`weight_map` must give the name of a file",
    ),
    "a number for a file": (
        {"metadata": {}, "weight_map": {"a": 1}},
        "`weight_map` must give the name of a file",
    ),
    "a path": (
        {"metadata": {}, "weight_map": {"a": "../checkpoint-1/x"}},
        "`weight_map` must give the name of a file",
    ),
    "no such file": ({"metadata": {}, "weight_map": {"a": "a.safetensors"}}, "a.safetensors"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_a_damaged_index_of_weight_shards_is_named(
    kind: str, tiny_model: Path, tmp_path: Path, sweep: Any
) -> None:
    for step in (1, 2):
        shutil.copytree(tiny_model, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-2/model.safetensors").unlink()
    value, message = INDICES[kind]
    (tmp_path / "checkpoint-2/model.safetensors.index.json").write_text(json.dumps(value))
    error = user_error(sweep())
    assert "checkpoint-2/" in error
    assert message in error
    assert steps(tmp_path / "run") == [1]


def qwen_base(tiny_model: Path, folder: Path) -> Path:
    """A Qwen2 model, whose type tells transformers how the files of a tokenizer are read."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")  # noqa: S106
    fast.save_pretrained(folder)
    return folder


def num_tokens(run: Path, step: int) -> list[int]:
    table = pd.read_parquet(run / "scores.parquet").query("step == @step")
    return list(table.sort_values(["doc_id", "category"])["num_tokens"])


def test_an_adapters_own_tokenizer_is_read_as_its_base_says(
    tiny_model: Path, tmp_path: Path, sweep: Any
) -> None:
    base = qwen_base(tiny_model, tmp_path / "base")
    for folder in ("checkpoint-5", "both/checkpoint-5"):
        save_adapter("LoRA", base, tmp_path / folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / folder)
    shutil.copytree(base, tmp_path / "both/checkpoint-0")
    assert sweep("checkpoint-5", "alone").returncode == 0
    assert sweep("both/*", "out").returncode == 0
    assert (
        num_tokens(tmp_path / "alone", 5)
        == num_tokens(tmp_path / "out", 5)
        == num_tokens(tmp_path / "out", 0)
    )
    score = (
        pd.read_parquet(tmp_path / "out/scores.parquet")
        .query("step == 5 and doc_id == 'd2'")
        .set_index("category")
    )
    adapted, tokenizer = (
        load_reference(base, tmp_path / "both/checkpoint-5"),
        AutoTokenizer.from_pretrained(base),
    )
    reference = expected_logprob(adapted, tokenizer, make_docs()[2])
    assert score.loc["chosen", "logprob"] == pytest.approx(reference, abs=1e-3)


def test_tokenizers_are_compared_by_their_ids(tiny_model: Path, tmp_path: Path, sweep: Any) -> None:
    """Step 1 has one more token, in no text; step 2 splits digits; step 3 holds no tokenizer; step
    4 ends otherwise."""
    for step in range(5):
        shutil.copytree(tiny_model, tmp_path / f"checkpoint-{step}")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["zyzzyva"])
    tokenizer.save_pretrained(tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-2/tokenizer.json"
    digits = {"type": "Digits", "individual_digits": True}
    state = json.loads(path.read_text())
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}
    path.write_text(json.dumps(state))
    for file in (tmp_path / "checkpoint-3").glob("*token*"):
        file.unlink()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = "<|im_end|>"  # noqa: S105
    tokenizer.save_pretrained(tmp_path / "checkpoint-4")
    error = user_error(sweep())
    assert "checkpoint-1 has another vocabulary" in error  # a warning
    assert "step 2: " in error
    assert (
        "checkpoint-2 has another tokenizer than the sweep's first checkpoint: its token ids "
        "differ for"
    ) in error
    assert (
        "checkpoint-4 has another tokenizer than the sweep's first checkpoint: its token ids "
        "differ for the term"
    ) in error
    assert steps(tmp_path / "run") == [0, 1, 3]


# --- inputs that failed, with the values that are right


@pytest.fixture
def case(tmp_path: Path, sft_probe: Run) -> Callable[..., Any]:
    """Copies a case and sweeps some of its checkpoints."""

    def run(name: str, pattern: str, out: str = "out") -> tuple[Path, Any]:
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(SHARED / "cases" / name, folder)
            for path in folder.rglob("adapter_config.json"):
                path.write_text(path.read_text().replace("BASE_DIR", str(folder / "base")))
        flags = (
            "--probe_set",
            folder / "set.jsonl",
            "--prompt_format",
            "plain",
            "--max_length",
            256,
        )
        return folder, sft_probe("sweep", folder / out, "--checkpoints", folder / pattern, *flags)

    return run


def check_scores(folder: Path, models: dict[int, Any], out: str = "out") -> pd.DataFrame:
    """Compare every score of a case with a float64 pass over the joint ids by a model that was
    loaded alone."""
    table = (
        pd.read_parquet(folder / out / "scores.parquet")
        .set_index(["step", "doc_id", "category"])
        .sort_index()
    )
    tokenizer_dir = next(
        path for path in (folder / "base", folder / "ck/checkpoint-0") if path.exists()
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_dir)
    docs = {
        doc["doc_id"]: doc
        for doc in map(json.loads, (folder / "set.jsonl").read_text().splitlines())
    }
    assert set(table.index.get_level_values("step")) == set(models)
    for key, row in table.iterrows():
        step, doc_id, category = cast(tuple[int, str, str], key)
        prompt = "\n\n".join(turn["content"].strip() for turn in docs[doc_id]["messages"])
        ids = tokenizer.encode(f"{prompt}\n\n{docs[doc_id][category]}")
        with torch.no_grad():
            logprobs = models[step].double()(torch.tensor([ids])).logits[0].log_softmax(-1)
        place = range(len(ids) - row["num_tokens"], len(ids))
        assert row["logprob"] == pytest.approx(
            sum(float(logprobs[i - 1, ids[i]]) for i in place), abs=2e-3
        )
    return table


@needs_shared
def test_untied_heads_under_a_tied_config_are_scored_right(case: Any) -> None:
    folder, result = case("tie_untied_heads", "ck/*")
    assert result.returncode == 0, result.stderr
    table = check_scores(
        folder, {0: AutoModelForCausalLM.from_pretrained(folder / "ck/checkpoint-0")}
    )
    assert table.loc[(0, "d0", "chosen"), "logprob"] == pytest.approx(-180.9268, abs=1e-3)


@needs_shared
@pytest.mark.parametrize("kind", ["save_embed", "save_head"])
def test_adapters_with_saved_modules_on_a_tied_base_are_scored_right(kind: str, case: Any) -> None:
    folder, result = case("tie_adapter_modules_to_save", f"{kind}/*")
    assert result.returncode == 0, result.stderr
    check_scores(
        folder,
        {i: load_reference(folder / "base", folder / kind / f"checkpoint-{i}") for i in (1, 2, 3)},
    )


@needs_shared
def test_left_over_embeddings_of_an_adapter_do_not_reach_the_next_checkpoint(case: Any) -> None:
    folder, result = case("adapter_left_over_embeddings", "ck/*")
    assert result.returncode == 0, result.stderr
    models = {
        i: load_reference(folder / "base", folder / "ck" / f"checkpoint-{i}") for i in (1, 2, 3)
    }
    assert check_scores(folder, models).loc[(3, "d0", "chosen"), "logprob"] == pytest.approx(
        -110.5702, abs=1e-3
    )


@needs_shared
def test_a_tokenizer_without_a_config_is_read(case: Any) -> None:
    folder, result = case("tokeniser_without_config", "adapter/*", "alone")
    assert result.returncode == 0, result.stderr
    shutil.copytree(folder / "base", folder / "both/checkpoint-0")
    shutil.copytree(folder / "adapter/checkpoint-5", folder / "both/checkpoint-5")
    _, result = case("tokeniser_without_config", "both/*")
    assert result.returncode == 0, result.stderr
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapter = load_reference(folder / "base", folder / "adapter/checkpoint-5")
    check_scores(folder, {5: adapter}, "alone")
    check_scores(folder, {0: base, 5: adapter})
    assert num_tokens(folder / "alone", 5) == num_tokens(folder / "out", 5)


@needs_shared
@pytest.mark.parametrize(
    ("kind", "good", "message"),
    [
        ("null", [1], "checkpoint-2/adapter_config.json: `base_model_name_or_path` is null"),
        ("missing", [1], "checkpoint-2/adapter_config.json: `base_model_name_or_path` is missing"),
        ("resized", [0, 9], "model.embed_tokens.weight"),
    ],
)
def test_odd_adapter_configs_are_refused_and_the_other_checkpoints_scored(
    kind: str, good: list[int], message: str, case: Any
) -> None:
    folder, result = case("adapter_config_odd", f"{kind}/*")
    error = user_error(result)
    assert message in error
    assert kind != "resized" or ("[602, 32]" in error and "[600, 32]" in error)
    assert steps(folder / "out") == good
