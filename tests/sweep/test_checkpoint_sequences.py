"""In memory is what the checkpoint holds, in any order of checkpoints: the tensors of the library's
own loader."""

import gc
import json
import random
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
import torch
from adapter_forms import (
    FORMS,
    adapter_rows,
    differing_tensors,
    load_reference,
    make_base,
    save_adapter,
)
from helpers import Run, make_docs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft_probe.analysis.sweep.checkpoints import Checkpoint
from sft_probe.analysis.sweep.live_model import LiveModel
from sft_probe.analysis.sweep.request import SweepRequest
from sft_probe.analysis.sweep.settings import SweepSettings, resolve_settings
from sft_probe.errors import UserError
from sft_probe.tasks.lm import ProbeLM

Tensors = dict[str, torch.Tensor]
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NUM_SEQUENCES = 40
SEQUENCE_LENGTH = 8

# what is refused, by a word of the reason
REFUSED = {
    "LoRA, init pissa_niter_4": "init_lora_weights",
    "activated LoRA": "alora_invocation_tokens",
    "Poly": "POLY",
    "Lily": "LILY",
    "PVeRA, sample_at_inference": "PVERA",
    "Shadow": "SHADOW",
    "prompt tuning": "PROMPT_TUNING",
    "multitask prompt tuning": "MULTITASK_PROMPT_TUNING",
    "prefix tuning": "PREFIX_TUNING",
    "P-tuning": "P_TUNING",
    "CPT": "CPT",
    "cartridge": "CARTRIDGE",
    "X-LoRA": "XLORA",
    "resized": "vocab_size",
    "missing tensor": "missing_keys",
    "another shape": "model.norm.weight [7], not [32]",
    "pickled": "no model.safetensors",
    "adapter on a resized base": "[602, 32]",
    "adapter without a base": "base_model_name_or_path",
    "adapter of an adapter": "is an adapter itself",
    "adapter of an unknown type": "peft_type",
    "adapter without a tensor": "lacks tensors of the adapter",
    "adapter with another tensor": "has tensors that the adapter has no place for",
    "adapter of another shape": "size mismatch",
    "index without a map": "weight_map",
}
SOME_FORMS = (
    "LoRA",
    "LoRA, DoRA",
    "LoRA, modules_to_save embed_tokens",
    "LoRA, modules_to_save lm_head",
    "LoRA, trainable_token_indices",
    "LoRA, target embed_tokens",
    "LoRA, target lm_head",
    "LoRA, bias all",
    "LoRA, init pissa",
    "IA3",
    "trainable tokens",
    "LayerNorm tuning",
    "prompt tuning",
)


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in change(tensors).items()},
        path,
        {"format": "pt"},
    )


def add_whole_models(base: Path, pool: Path) -> None:
    """Write the base in every form of file that a whole model comes in, and in some that are
    refused."""

    def copy(label: str, change: Callable[[Tensors], Tensors]) -> Path:
        shutil.copytree(base, pool / label)
        edit(pool / label, change)
        return pool / label

    def halve(tensors: Tensors) -> Tensors:
        return {name: tensor / 2 for name, tensor in tensors.items()}

    def cast(dtype: torch.dtype, every: int = 1) -> Callable[[Tensors], Tensors]:
        return lambda t: {
            name: x.to(dtype) if i % every == 0 else x
            for i, (name, x) in enumerate(halve(t).items())
        }

    copy("base", dict)
    copy("halved", halve)
    copy("another head", lambda t: {**t, HEAD: t[EMBEDDINGS] + 1})
    copy("the same head twice", lambda t: {**t, HEAD: t[EMBEDDINGS].clone()})
    copy("bfloat16", cast(torch.bfloat16))
    copy("float16", cast(torch.float16))
    copy("mixed dtypes", cast(torch.bfloat16, every=3))
    copy("NaN", lambda t: {**t, "model.norm.weight": t["model.norm.weight"] * float("nan")})
    copy(
        "missing tensor",
        lambda t: {name: x for name, x in t.items() if name != "model.norm.weight"},
    )
    copy("another shape", lambda t: {**t, "model.norm.weight": torch.ones(7)})
    pickled = copy("pickled", dict)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for label in ("sharded", "index without a map"):
        folder = copy(label, halve)
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="50KB")
    (pool / "index without a map/model.safetensors.index.json").write_text('{"metadata": {}}')
    resized = copy(
        "resized",
        lambda t: {name: torch.cat([x, x[:2]]) if len(x) == 600 else x for name, x in t.items()},
    )
    config = json.loads((resized / "config.json").read_text())
    (resized / "config.json").write_text(json.dumps({**config, "vocab_size": 602}))
    if config["tie_word_embeddings"]:
        copy(
            "only the head",
            lambda t: {(HEAD if name == EMBEDDINGS else name): x for name, x in t.items()},
        )


def add_adapters(base: Path, pool: Path, forms: tuple[str, ...]) -> None:
    """Write an adapter of each form, and some with a fault."""
    for number, form in enumerate(forms):
        save_adapter(form, base, pool / form, seed=number)
    save_adapter("LoRA", base, pool / "LoRA, another", seed=100)
    save_adapter(
        "LoRA",
        pool / "another head",
        pool / "LoRA, save_embedding_layers",
        save_embedding_layers=True,
    )
    save_adapter(
        "LoRA", pool / "resized", pool / "adapter on a resized base", save_embedding_layers=True
    )
    for label in ("LoRA, save_embedding_layers", "adapter on a resized base"):
        edit_config(pool / label, base_model_name_or_path=str(base))
    for label, change in (
        ("adapter without a base", {"base_model_name_or_path": None}),
        ("adapter of an adapter", {"base_model_name_or_path": str(pool / "LoRA")}),
        ("adapter of an unknown type", {"peft_type": "MAGIC"}),
        ("adapter of another shape", {"r": 3}),
    ):
        shutil.copytree(pool / "LoRA", pool / label)
        edit_config(pool / label, **change)
    tensors = load_file(pool / "LoRA/adapter_model.safetensors")
    faulty = {
        "adapter without a tensor": dict(list(tensors.items())[1:]),
        "adapter with another tensor": {**tensors, "base_model.model.other.weight": torch.ones(2)},
    }
    for label, changed in faulty.items():
        shutil.copytree(pool / "LoRA", pool / label)
        save_file(changed, pool / label / "adapter_model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def make_pool(folder: Path, forms: tuple[str, ...], *, tied: bool) -> Path:
    base = make_base(folder / "the base", tied=tied)
    add_whole_models(base, folder)
    add_adapters(base, folder, forms)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def small_pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool"), SOME_FORMS, tied=request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def whole_pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool"), tuple(FORMS), tied=request.param)


def checkpoint(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(step=step, model=str(folder), source=str(folder.parent))


def sweep_settings(
    pool: Path, probe_set: Path, dtype: Literal["float32", "bfloat16"]
) -> SweepSettings:
    request = SweepRequest(
        directory=pool / "out",
        checkpoints=["*"],
        probe_set=str(probe_set),
        prompt_format="plain",
        dtype=dtype,
    )
    return resolve_settings(request, [checkpoint(pool / "base", 0)])


def reference_model(folder: Path, base: Path, dtype: torch.dtype) -> Any:
    if (folder / "adapter_config.json").exists():
        return load_reference(base, folder, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def check_sequence(
    pool: Path, probe_set: Path, labels: list[str], dtype: Literal["float32", "bfloat16"]
) -> None:
    """Load the checkpoints one after another; each is refused, or every tensor is that of a load of
    it alone."""
    settings = sweep_settings(pool, probe_set, dtype)
    live = LiveModel(dtype, "cpu", settings)
    lm: ProbeLM | None = None
    for number, label in enumerate(labels):
        told = f"{label!r}, after {labels[:number]}"
        try:
            model = live.load(checkpoint(pool / label, number))
            reason = ""
        except UserError as error:
            reason = str(error)
        assert REFUSED.get(label, "") in reason, told
        assert (label in REFUSED) == bool(reason), f"{told}: {reason}"
        if reason:
            continue
        if lm is None:
            lm = ProbeLM(
                pretrained=model, backend="causal", tokenizer=settings.tokenizer, max_length=256
            )
        lm.use(model)
        reference = reference_model(pool / label, pool / "the base", getattr(torch, dtype))
        assert differing_tensors(lm.model, reference) == [], told


def test_a_loaded_model_stays_as_it_is_when_its_file_is_overwritten(
    tmp_path: Path, probe_set: Path
) -> None:
    base = make_base(tmp_path / "base", tied=True)
    reference = reference_model(shutil.copytree(base, tmp_path / "copy"), base, torch.float32)
    model = LiveModel("float32", "cpu", sweep_settings(tmp_path, probe_set, "float32")).load(
        checkpoint(base, 0)
    )
    path = base / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert differing_tensors(model, reference) == []


def test_a_sweep_holds_only_one_model_in_memory(tmp_path: Path, probe_set: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    save_adapter("LoRA, modules_to_save embed_tokens", base, tmp_path / "adapter")
    live = LiveModel("float32", "cpu", sweep_settings(tmp_path, probe_set, "float32"))
    model = live.load(checkpoint(base, 0))
    lm = ProbeLM(
        pretrained=model, backend="causal", tokenizer=live.settings.tokenizer, max_length=256
    )
    for step, folder in enumerate((tmp_path / "adapter", base), start=1):
        earlier = weakref.ref(model)
        lm.use(None)
        model = live.load(checkpoint(folder, step))
        gc.collect()
        assert earlier() is None
        lm.use(model)


def sequence(pool: Path, seed: int) -> list[str]:
    labels = labels_in(pool)
    return random.Random(seed).choices(
        labels, [1 if label in REFUSED else 3 for label in labels], k=SEQUENCE_LENGTH
    )


def labels_in(pool: Path) -> list[str]:
    return sorted(path.name for path in pool.iterdir() if path.name not in ("the base", "out"))


@pytest.fixture(scope="module")
def probe_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "set.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in make_docs()))
    return path


@pytest.mark.parametrize("seed", range(2))
def test_checkpoints_of_any_forms_in_any_order_are_scored_as_alone(
    seed: int, small_pool: Path, probe_set: Path
) -> None:
    check_sequence(small_pool, probe_set, sequence(small_pool, seed), "float32")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(NUM_SEQUENCES))
def test_checkpoints_of_any_forms_in_many_orders_are_scored_as_alone(
    seed: int, whole_pool: Path, probe_set: Path
) -> None:
    check_sequence(
        whole_pool,
        probe_set,
        sequence(whole_pool, seed),
        "bfloat16" if seed % 4 == 0 else "float32",
    )


@pytest.mark.full
def test_at_least_60_forms_of_adapters_are_right_and_the_others_refused() -> None:
    results = {form: result for form, result, _ in adapter_rows()}
    assert {
        form for form, result in results.items() if result == "refused"
    } == REFUSED.keys() & FORMS.keys()
    assert list(results.values()).count("right") >= 60
    assert "untested" not in results.values()  # by the version of PEFT in constraints.txt


@pytest.mark.full
def test_every_form_is_scored_right_after_every_other_form(
    whole_pool: Path, probe_set: Path, sft_probe: Run, tmp_path: Path
) -> None:
    """One sweep over the whole pool: each checkpoint is refused by name, or scored as one that is
    loaded alone."""
    labels = labels_in(whole_pool)
    random.Random(1).shuffle(labels)
    labels.remove("base")
    labels.insert(0, "base")  # what the others have to agree with
    for step, label in enumerate(labels):
        (tmp_path / f"checkpoint-{step}").symlink_to(whole_pool / label)
    flags = ("--probe_set", probe_set, "--prompt_format", "plain", "--max_length", 256)
    result = sft_probe(
        "sweep", tmp_path / "out", "--checkpoints", tmp_path / "checkpoint-*", *flags
    )
    scores = pd.read_parquet(tmp_path / "out/scores.parquet").set_index(
        ["step", "doc_id", "category"]
    )["logprob"]
    settings = sweep_settings(whole_pool, probe_set, "float32")
    for step, label in enumerate(labels):
        if label in REFUSED or label == "NaN":
            assert f"step {step}: " in result.stderr, label
            assert step not in scores.index.get_level_values("step")
            continue
        model = reference_model(whole_pool / label, whole_pool / "the base", torch.float32)
        for doc in [doc for doc in settings.docs if doc.doc.split == "heldout"]:
            for category, ids in doc.continuation_ids.items():
                joint = torch.tensor([doc.prompt_ids + ids])
                with torch.no_grad():
                    logprobs = model(joint).logits[0].double().log_softmax(-1)
                place = range(len(doc.prompt_ids), joint.shape[1])
                expected = sum(float(logprobs[i - 1, joint[0, i]]) for i in place)
                assert scores[step, doc.doc.doc_id, category] == pytest.approx(
                    expected, abs=2e-3
                ), label
