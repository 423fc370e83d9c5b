"""Code that comes with a checkpoint is never run: not by any call, whatever stands on stdin or is
asked for."""

import ast
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Run, user_error
from processes import run_forked

import sft_probe as package
from sft_probe.errors import UserError
from sft_probe.tasks.lm import ProbeLM

ROOT = Path(package.__file__).resolve().parents[2]
LOADERS = {
    "from_pretrained",
    "from_config",
    "load_dataset",
    "load_dataset_builder",
    "pipeline",
    "get_class_from_dynamic_module",
    "load_custom_generate",
}
# PEFT loads neither configs nor classes of a base; its own method has no such argument
WITHOUT_CODE = {"PeftModel", "PeftConfig"}


def loading_calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        owner = getattr(getattr(call.func, "value", None), "id", None)
        if name in LOADERS and owner not in WITHOUT_CODE:
            found.append(call)
    return found


def test_every_call_of_a_loader_forbids_remote_code() -> None:
    rooms = ("src", "analysis", "tasks", "train", "synth", "benchmarks")
    paths = [
        path for room in rooms for path in (ROOT / room).rglob("*.py") if not path.is_symlink()
    ]
    calls = {path: loading_calls(path) for path in paths}
    assert sum(map(len, calls.values())) >= 8
    for path, found in calls.items():
        for call in found:
            assert any(forbids(item) for item in call.keywords), f"{path}, line {call.lineno}"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):  # and nothing allows it
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert forbids(node), f"{path}, line {node.lineno}"


def forbids(keyword: ast.keyword) -> bool:
    value = keyword.value
    return (
        keyword.arg == "trust_remote_code"
        and isinstance(value, ast.Constant)
        and value.value is False
    )


CODE = """
import pathlib
pathlib.Path(MARKER).write_text("was run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(tiny_model: Path, folder: Path, marker: Path, kind: str) -> Path:
    """A copy of the tiny model whose config, model or tokenizer is a class in a file beside it."""
    shutil.copytree(tiny_model, folder)
    (folder / "own.py").write_text(CODE.replace("MARKER", repr(str(marker))))
    name = "tokenizer_config.json" if kind == "tokenizer" else "config.json"
    values = json.loads((folder / name).read_text())
    if kind == "tokenizer":
        values |= {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
        }
    elif kind == "config":
        classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        values |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": classes}
    else:  # a known config without a causal LM of its own in transformers
        values |= {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}}
    (folder / name).write_text(json.dumps(values))
    return folder


def run_with_yes(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Runs the program as a user at a terminal who says yes to every question."""
    return run_forked(*arguments, answers="y\n" * 9)


def command(name: str, folder: Path, out: Path) -> list[object]:
    if name == "sweep":
        return [
            "sweep",
            out,
            "--checkpoints",
            folder,
            "--probe_set",
            "helpful-mini",
            "--prompt_format",
            "plain",
        ]
    if name == "train":
        flags = (
            "--probe_set helpful-mini --prompt_format plain --max_length 1024 --max_steps 1 "
            "--deepspeed none"
        )
        return ["train", "--model_name_or_path", folder, *flags.split(), "--output_dir", out]
    flags = "run --model sft_probe --tasks sft_probe_chosen --device cpu --limit 2"
    more = ["--trust_remote_code"] if name.endswith("flag") else []
    trust = ",trust_remote_code=True" if name.endswith("trusts") else ""
    return ["lm-eval", *flags.split(), "--model_args", f"pretrained={folder}{trust}", *more]


@pytest.mark.parametrize("kind", ["config", "model", "tokenizer"])
@pytest.mark.parametrize("name", ["sweep", "train"])
def test_loading_never_runs_code_beside_the_weights(
    *,
    name: str,
    kind: str,
    tiny_model: Path,
    tmp_path: Path,
    sft_probe: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marker = tmp_path / "marker"
    folder = with_code(tiny_model, tmp_path / "checkpoint-1", marker, kind)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    error = user_error(sft_probe(*command(name, folder, tmp_path / "out")))
    assert not marker.exists()
    assert (
        len(
            {
                line
                for line in error.splitlines()
                if "code of a checkpoint is never run here" in line
            }
        )
        == 1
    ), error


@pytest.mark.parametrize("kind", ["config", "model", "tokenizer"])
def test_the_sft_probe_model_of_lm_eval_runs_no_code_of_a_checkpoint(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    folder = with_code(tiny_model, tmp_path / "checkpoint-1", marker, kind)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError, match="code of a checkpoint is never run here"):
        ProbeLM(pretrained=str(folder), device="cpu")
    with pytest.raises(UserError, match="never runs code that comes with a model"):
        ProbeLM(pretrained=str(folder), device="cpu", trust_remote_code=True)
    assert not marker.exists()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["config", "model", "tokenizer"])
@pytest.mark.parametrize(
    "name", ["sweep", "train", "lm-eval", "lm-eval that trusts", "lm-eval with the flag"]
)
def test_no_command_runs_code_that_comes_with_a_checkpoint(
    name: str, kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    folder = with_code(tiny_model, tmp_path / "checkpoint-1", marker, kind)
    error = user_error(run_with_yes(*command(name, folder, tmp_path / "out")))
    assert not marker.exists()
    assert "[y/N]" not in error
    assert len({line for line in error.splitlines() if "never run" in line}) == 1, error
