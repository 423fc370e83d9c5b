"""Three ways by which lm-eval 0.4.13 finds the tasks: a directory, stubs in its own package, and a
pass-through."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from sft_probe.errors import UserError
from sft_probe.files import make_dir, write_text
from sft_probe.probe_set import SPLITS, load_probe_set

PACKAGED_TASKS_DIR = Path(__file__).resolve().parent


def write_tasks_dir(probe_set_source: str, out: Path) -> Path:
    """Write one YAML per category and split of a user's own probe set, and their group; return the
    directory.

    lm-eval indexes task names before it reads any data, so a set's own categories need files of
    their own.
    """
    probe_set = load_probe_set(probe_set_source)
    path = Path(probe_set_source).expanduser()
    source = str(path.resolve()) if path.exists() else probe_set_source
    make_dir(out)
    write_text(out / "_probe_template", (PACKAGED_TASKS_DIR / "_probe_template").read_text("utf-8"))
    for split in SPLITS:
        for category in probe_set.categories:
            name = task_name(category, split)
            task = {
                "include": "_probe_template",
                "task": name,
                "dataset_kwargs": {"category": category, "split": split},
                "test_split": split,
                "metadata": {"version": 1.0, "probe_set": source},
            }
            write_text(out / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))
    group = {
        "group": "sft_probe",
        "task": [task_name(category, "heldout") for category in probe_set.categories],
    }
    write_text(out / "sft_probe.yaml", yaml.safe_dump(group, sort_keys=False))
    return out


def task_name(category: str, split: str) -> str:
    """Return the name of the task of a category: `sft_probe_<category>` on held-out prompts,
    `sft_probe_train_<category>` on the prompts trained on."""
    return f"sft_probe_train_{category}" if split == "train" else f"sft_probe_{category}"


def _stub_dir() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / "sft_probe"


def link_tasks() -> Path:
    """Write stubs into the installed lm-eval, so that plain `lm_eval --tasks 'sft_probe_*'` works.

    Each stub is one `include:` line with an absolute path. Returns their directory.

    Raises:
        UserError: the installed lm-eval cannot be written to.
    """
    folder = make_dir(_stub_dir())
    for path in sorted(PACKAGED_TASKS_DIR.glob("*.yaml")):
        write_text(folder / path.name, f"include: {json.dumps(str(path))}\n")
    return folder


def unlink_tasks() -> Path:
    """Remove what `link_tasks` wrote; return the directory that held it."""
    folder = _stub_dir()
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def run_lm_eval(arguments: list[str]) -> None:
    """Run lm-eval's own command line with our tasks on its include path and our model, `--model
    sft_probe`.

    Raises:
        UserError: an include path of the user's own is given (lm-eval takes only one), or a flag
            that would make the numbers of probe tasks wrong.
    """
    from lm_eval.__main__ import cli_evaluate

    if any(argument.split("=")[0] == "--include_path" for argument in arguments):
        raise UserError(
            "lm-eval takes one --include_path, and `sft-probe lm-eval` gives it the probe tasks. "
            "Run `sft-probe link-tasks` once, then plain `lm_eval` with your own --include_path."
        )
    sys.argv = ["lm-eval", *arguments]
    if _takes_include_path(arguments):
        import sft_probe.tasks.lm  # noqa: F401 - registers the model

        _refuse_use_cache()
        sys.argv += ["--include_path", str(PACKAGED_TASKS_DIR)]
    cli_evaluate()


def _refuse_use_cache() -> None:
    """Make `--use_cache` an error for probe tasks of models other than ours, which cannot bind the
    cache to themselves.

    lm-eval's own function is wrapped, since flags also come from its `--config` files. Its command
    line looks the function up when it runs.
    """
    import lm_eval

    simple_evaluate = lm_eval.simple_evaluate

    def checked(*, model: str, tasks: list[Any], use_cache: str | None, **arguments: Any) -> Any:
        probes = [task for task in tasks if isinstance(task, str) and task.startswith("sft_probe")]
        if use_cache is not None and probes and model != "sft_probe":
            raise UserError(
                f"--use_cache cannot be used with {probes[0]} and --model {model}: lm-eval finds "
                "answers by the text "
                "of a request alone, so another checkpoint would get these. Leave it out, or use "
                "--model sft_probe."
            )
        return simple_evaluate(model=model, tasks=tasks, use_cache=use_cache, **arguments)

    lm_eval.simple_evaluate = checked


def _takes_include_path(arguments: list[str]) -> bool:
    """Return whether lm-eval would load tasks: not for its help."""
    return bool(arguments) and not {"-h", "--help"} & set(arguments)
