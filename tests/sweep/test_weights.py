"""The sweep's one live model: whatever is wrong with a checkpoint is named, and the other steps are
scored."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import Run, make_docs, make_tokenizer, user_error
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from references import expected_logprob
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe.scoring import score as scoring

WriteSet = Callable[[list[dict[str, Any]]], Path]


@pytest.fixture
def checkpoints(tiny_model: Path, tmp_path: Path) -> Path:
    """`checkpoint-1` to `-3`: the tiny model, its weights multiplied."""
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        shutil.copytree(tiny_model, folder)
        change(folder, partial(multiply, 1 + step / 10))
    return tmp_path


def multiply(factor: float, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * factor for name, tensor in tensors.items()}


def change(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in edit(tensors).items()},
        path,
        {"format": "pt"},
    )


@pytest.fixture
def sweep(sft_probe: Run, write_set: WriteSet, checkpoints: Path) -> Callable[..., Any]:
    probe_set = write_set(make_docs())

    def run(*more: object, pattern: str = "checkpoint-*") -> Any:
        flags = ("--checkpoints", checkpoints / pattern, "--probe_set", probe_set)
        return sft_probe("sweep", checkpoints / "run", *flags, *more)

    return run


def table(checkpoints: Path) -> Any:
    return pd.read_parquet(checkpoints / "run/scores.parquet").set_index(
        ["step", "doc_id", "category"]
    )


def check(checkpoints: Path, steps: tuple[int, ...]) -> None:
    """The steps in the table, and their numbers against a model loaded afresh."""
    scores = table(checkpoints)
    assert sorted(set(scores.index.get_level_values("step"))) == list(steps)
    for step in steps:
        folder = checkpoints / f"checkpoint-{step}"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        reference = expected_logprob(model, AutoTokenizer.from_pretrained(folder), make_docs()[2])
        row: Any = scores.loc[(step, "d2", "chosen")]
        assert row["logprob"] == pytest.approx(reference, abs=1e-3)


def test_each_step_has_its_own_weights(sweep: Any, checkpoints: Path) -> None:
    assert sweep().returncode == 0
    check(checkpoints, (1, 2, 3))


def test_sharded_duplicate_and_untied_weights_are_scored_right(
    sweep: Any, checkpoints: Path
) -> None:
    folder = checkpoints / "checkpoint-2"
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    # ZeRO-2 saves the tied head again
    change(
        checkpoints / "checkpoint-3",
        lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()},
    )
    # a tied config with another head in the file, which transformers leaves as it is, whichever
    # checkpoint is first
    change(
        checkpoints / "checkpoint-1",
        lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1},
    )
    assert sweep().returncode == 0
    check(checkpoints, (1, 2, 3))


NORM = "model.norm.weight"
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "missing": (
        lambda t: {name: tensor for name, tensor in t.items() if name != NORM},
        "missing_keys ['model.norm",
    ),
    "extra": (lambda t: {**t, "other.weight": torch.ones(2)}, "unexpected_keys ['other.weight']"),
    "shape": (lambda t: {**t, NORM: torch.ones(7)}, "model.norm.weight [7], not [32]"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(kind: str, sweep: Any, checkpoints: Path) -> None:
    edit, message = BAD_TENSORS[kind]
    change(checkpoints / "checkpoint-2", edit)
    error = user_error(sweep())
    assert "step 2: " in error
    assert message in error
    check(checkpoints, (1, 3))


def test_weights_that_are_not_safetensors_are_named(sweep: Any, checkpoints: Path) -> None:
    (checkpoints / "checkpoint-2/model.safetensors").rename(
        checkpoints / "checkpoint-2/pytorch_model.bin"
    )
    (checkpoints / "checkpoint-3/model.safetensors").write_bytes(b"not a tensor")
    error = user_error(sweep())
    assert "checkpoint-2 holds no model.safetensors" in error
    assert "cannot read" in error
    check(checkpoints, (1,))


def test_a_checkpoint_of_another_architecture_or_vocabulary_is_refused(
    sweep: Any, checkpoints: Path
) -> None:
    path = checkpoints / "checkpoint-2/config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3, "vocab_size": 700})
    )
    tokenizer: Any = make_tokenizer()
    tokenizer.add_tokens(["zyzzyva", "teacher"])
    tokenizer.save_pretrained(checkpoints / "checkpoint-3")
    error = user_error(sweep())
    assert "num_hidden_layers (3 here, 2 there); vocab_size (700 here, 600 there)" in error
    assert "checkpoint-3 has another tokenizer than the sweep's first checkpoint" in error
    assert "its token ids differ for 6 docs (d0, d1, d2, ...)" in error
    check(checkpoints, (1,))
    error = user_error(sweep(pattern="checkpoint-2"))
    assert "model_config.num_hidden_layers (2 there, 3 now)" in error
    assert "tokenizer_sha256" in user_error(sweep(pattern="checkpoint-3"))


def test_settings_of_the_first_sweep_hold_for_later_ones(sweep: Any, checkpoints: Path) -> None:
    assert sweep("--max_tokens", 300, pattern="checkpoint-1").returncode == 0
    manifest = json.loads((checkpoints / "run/sweep/manifest.json").read_text())
    assert manifest["max_tokens"] == 300
    assert manifest["doc_ids"] == [f"d{i}" for i in range(6)]
    assert manifest["terminator_id"] == 0
    assert sweep().returncode == 0
    assert json.loads((checkpoints / "run/sweep/manifest.json").read_text()) == manifest
    (path,) = (checkpoints / "run/sweep/step_000003/heldout").glob("results_*.json")
    assert json.loads(path.read_text())["config"]["model_args"]["max_tokens"] == 300
    assert "max_length (1024 there, 512 now)" in user_error(sweep("--max_length", 512))


def test_out_of_memory_restarts_the_step_with_half_the_budget(
    sweep: Any, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Any = vars(scoring)["score"]

    def score(*arguments: Any, max_tokens: int, **more: Any) -> Any:
        for number, pair in enumerate(original(*arguments, max_tokens=max_tokens, **more)):
            if max_tokens > 500 and number == 4:  # the trial of the way of scoring has 4 items
                raise torch.OutOfMemoryError
            yield pair

    monkeypatch.setattr(scoring, "score", score)
    assert sweep().returncode == 0
    check(checkpoints, (1, 2, 3))
    assert json.loads((checkpoints / "run/sweep/manifest.json").read_text())["max_tokens"] == 256


def test_logits_with_nan_are_reported(sweep: Any, checkpoints: Path, tiny_model: Path) -> None:
    """Step 2 has NaN in the embedding of a token of the `other` responses alone, step 3 gives
    nothing but NaN."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    others = {
        i
        for doc in make_docs()
        for text in (f"\n\nHuman: {doc['messages'][0]['content']}\n\nAssistant: {doc['chosen']}",)
        for i in tokenizer.encode(text)
    }
    bad = next(i for i in tokenizer.encode(" " + make_docs()[2]["other"]) if i not in others)

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head = tensors["model.embed_tokens.weight"].clone()
        tensors["model.embed_tokens.weight"][bad] = float("nan")
        return {**tensors, "lm_head.weight": head}

    for step in (1, 2, 3):
        path = checkpoints / f"checkpoint-{step}/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
        change(
            checkpoints / f"checkpoint-{step}",
            spoil
            if step == 2
            else lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()},
        )
    change(checkpoints / "checkpoint-3", lambda t: {**t, NORM: t[NORM] * float("inf")})
    for _ in range(2):  # a complete sweep says it again
        error = user_error(sweep())
        assert (
            "step 2: heldout: the logits of 3 responses are NaN or infinite: d0 other, d2 other, "
            "d4 other"
        ) in error
        assert "step 3: heldout: the logits of 6 responses are NaN" in error
        check(checkpoints, (1, 2))
    assert set(table(checkpoints).loc[2].index.get_level_values("category")) == {"chosen"}
    faults = (checkpoints / "run/sweep/step_000003/heldout/faults.jsonl").read_text().splitlines()
    assert json.loads(faults[0]) == {
        "step": 3,
        "split": "heldout",
        "category": "chosen",
        "doc_id": "d0",
        "reason": "NaN or inf",
    }
    assert (
        pd.read_csv(checkpoints / "run/trajectory.csv")
        .query("step == 2")["delta_ci_low"]
        .notna()
        .all()
    )


def make_adapters(model_dir: Path, out: Path, config: Any) -> list[Any]:
    """Adapters `checkpoint-1` and `-2` with the tokenizer of their base; returns merged models."""
    merged = []
    for step in (1, 2):
        torch.manual_seed(step)
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
        model.save_pretrained(str(out / f"checkpoint-{step}"))
        if isinstance(config, LoraConfig):
            merged.append(model.merge_and_unload())
    return merged


def test_lora_adapters_are_scored_on_their_base(
    sft_probe: Run, tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    models = make_adapters(tiny_model, tmp_path, config)
    flags = ("--checkpoints", tmp_path / "checkpoint-*", "--probe_set", write_set(make_docs()))
    result = sft_probe("sweep", tmp_path / "run", *flags)
    assert result.returncode == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for step, model in enumerate(models, start=1):
        row: Any = table(tmp_path).loc[(step, "d2", "chosen")]
        assert row["logprob"] == pytest.approx(
            expected_logprob(model, tokenizer, make_docs()[2]), abs=1e-3
        )
    path = tmp_path / "checkpoint-2/adapter_model.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
    error = user_error(sft_probe("sweep", tmp_path / "again", *flags))
    assert f"lacks tensors of the adapter: ['{lost}']" in error


def test_adapters_that_learn_a_prompt_are_refused(
    sft_probe: Run, tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    make_adapters(
        tiny_model, tmp_path, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    flags = ("--checkpoints", tmp_path / "checkpoint-*", "--probe_set", write_set(make_docs()))
    assert "adapters that learn a prompt cannot be scored" in user_error(
        sft_probe("sweep", tmp_path / "run", *flags)
    )


def test_revisions_of_the_hub_come_from_its_cache(
    sft_probe: Run, checkpoints: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    """The layout that huggingface_hub leaves on disk stands for the hub, which is out of reach
    here."""
    repository = tmp_path / "hub/models--org--tiny"
    for step in (1, 2):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / f"refs/step{step}").write_text(f"{step}" * 40)
        shutil.copytree(
            checkpoints / f"checkpoint-{step}", repository / "snapshots" / (f"{step}" * 40)
        )
    flags = (
        "--model",
        "org/tiny",
        "--revisions",
        "step1,step2,step3",
        "--probe_set",
        write_set(make_docs()),
    )
    result = sft_probe("sweep", checkpoints / "run", *flags, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert (
        "step 3: no directory and no model on the hub: 'org/tiny' (revision step3)"
        in user_error(result)
    )
    check(checkpoints, (1, 2))
