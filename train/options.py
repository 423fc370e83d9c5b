"""The options of `sft-probe train`: ours, and the Trainer's, read without importing torch."""

import argparse
import ast
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from sft_probe import recipes
from sft_probe.command_line import check_known, parser_of, read_config
from sft_probe.errors import UserError, unknown
from sft_probe.models import EMBEDDED_MODEL
from sft_probe.options import Command, Option, options_of, real, whole
from sft_probe.probe_set import DEFAULT_PROBE_SET

PROG = "sft-probe train"
SNAPSHOT_DTYPES = ("training", "float32")
PAIR = ("chosen", "rejected")


@dataclass
class ModelOptions:
    """Model"""

    model_name_or_path: str = EMBEDDED_MODEL
    """Hub id, path, or the embedded model."""
    dtype: str = "float32"
    """Data type of the weights in training: float32, bfloat16 or float16."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2, ... Default: what transformers chooses."""
    lora_r: int | None = None
    """Rank of a LoRA. Default: all weights are trained."""
    lora_alpha: int = 16
    """Scale of the LoRA."""
    lora_target_modules: str = "all-linear"
    """Modules that get a LoRA: names with commas between them."""
    deepspeed: str | None = None
    """cpu, zero1, zero2, zero3, zero3_offload, a JSON file, or none. Default: zero2 with a GPU, cpu
    without."""


@dataclass
class ObjectiveOptions:
    """Objective"""

    objective: str = "sft"
    """sft, or dpo: the preference stage, on pairs of chosen and rejected (docs/training.md)."""
    beta: float = 0.1
    """dpo: strength of the pull towards the reference."""
    loss_type: str = "sigmoid"
    """dpo: loss of a pair, sigmoid or ipo."""
    label_smoothing: float = 0.0
    """dpo: chance that a pair is the wrong way round, below 0.5."""
    sft_weight: float = 0.0
    """dpo: weight of the SFT loss on chosen that is added."""
    reference: str | None = None
    """dpo: model whose log-probs the loss compares with. Default: the one that training starts
    from."""


@dataclass
class StepOptions:
    """Snapshots, live probe and resume states"""

    snapshot_steps: str = "log2"
    """Steps whose weights are kept, such as 0,1,2,4,...,512,+100,epoch,last (docs/training.md); 0
    and last always are."""
    snapshot_dtype: str | None = None
    """training, or float32 for the masters of 16-bit training. Default: the masters where there
    are any."""
    probe_steps: str | None = None
    """Steps at which held-out docs are scored in training, in the same grammar. Default: none."""
    probe_train: int = 0
    """Number of docs of the train split that are scored with them, always the same."""
    probe_max_tokens: int | None = None
    """Tokens in one forward pass of the probe. Default: what suits the device."""
    resume_steps: str | None = "+500"
    """Steps whose full state is kept to resume from, in the same grammar."""
    max_wall_time_s: float | None = None
    """Seconds until training stops with a resume state and exit code 75. Default: no limit."""


@dataclass
class TrainerDefaults:
    """Options of the Trainer with a default of ours"""

    lr_scheduler_type: str = "constant_with_warmup"
    """Schedule of the learning rate; constant, so that step s of a long run ends a short one."""
    save_strategy: str = "no"
    """Leave it: --resume_steps says when a resume state is saved."""
    save_total_limit: int = 2
    """Resume states kept, at least 2: the last one may be half-written."""
    report_to: str = "none"
    """none, wandb, tensorboard or trackio."""
    logging_steps: float = 1
    """Steps between two log lines."""
    logging_nan_inf_filter: bool = False
    """Leave it: what is logged is what the files say."""
    remove_unused_columns: bool = False
    """Leave it: the examples hold exactly what the model takes."""


@dataclass
class TrainOptions(ModelOptions, ObjectiveOptions, StepOptions, TrainerDefaults):
    """What is trained, on what, and where it goes."""

    output_dir: str | None = None
    """Directory of the run; the same one resumes. A --dry_run needs none."""
    probe_set: str = DEFAULT_PROBE_SET
    """Probe set whose train split is trained on: path, hub id or embedded name."""
    train_category: str = "chosen"
    """What to train on: chosen, chosen_no_prompt, chosen:0.5,rejected:0.5 (docs/training.md)."""
    train_data: str | None = None
    """Train on this instead: .jsonl[.gz] or .parquet, a directory of them, or a hub id
    (docs/training.md)."""
    prompt_column: str = "prompt"
    """Column of the prompts in --train_data."""
    response_column: str = "response"
    """Column of the responses in --train_data."""
    prompt_format: str | None = None
    """hh, chat, plain or a Jinja file. Default: the probe set's own."""
    max_length: int = 1024
    """Tokens of prompt, response and terminator; longer docs are dropped and named."""
    max_prompt_tokens: int | None = None
    """Longer prompts lose whole turns on the left. Default: no limit."""
    dry_run: bool = False
    """Print schedule, tokens, padding and disk, and train nothing."""


@dataclass
class Train(TrainOptions, Command):
    """Fine-tune a model on one category, with snapshots, live probe and exact resume.

    Options of transformers.TrainingArguments work as well and are listed after ours. The same
    command resumes a run that was cut off. Start several processes with torchrun
    --nproc_per_node N -m sft_probe.train.sft, or with deepspeed --module sft_probe.train.sft.

    Examples:
        sft-probe train --config quickstart --output_dir runs/mine
        sft-probe train --probe_set sets/mine --train_category rejected --output_dir runs/rejected
        sft-probe train --config runs/mine/config.yaml --seed 1 --output_dir runs/again
        sft-probe train --config quickstart_dpo --output_dir runs/dpo
        sft-probe train --config hh_pythia --dry_run
    """

    config: Annotated[str | None, "FILE|NAME"] = None
    """Recipe: a YAML file of options, such as the config.yaml that every run writes, or the name of
    an included one (quickstart, hh_pythia, hh_qwen, hh_qwen_lora, ultrafeedback; quickstart_dpo,
    hh_pythia_dpo, hh_qwen_dpo). Options on the command line win."""


_NO_PROMPT = "_no_prompt"


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which docs, by their fraction, are trained on with which response."""

    name: str
    """As written: the category, with `_no_prompt` where the prompt is left out."""
    category: str
    with_prompt: bool
    fraction: float


def parse_mixture(text: str, categories: Sequence[str], source: str) -> list[Share]:
    """Parse the value of `--train_category`.

        mixture  = share {"," share}
        share    = category [":" fraction]     fraction of the docs; default: all of them
        category = a category of the set, or one followed by `_no_prompt`: the same response
                   tokens without the prompt

    Raises:
        UserError: an unknown category, one that comes twice, or a fraction that is not above 0 and
            at most 1.
    """
    shares = []
    for item in text.split(","):
        name, _, fraction = (piece.strip() for piece in item.partition(":"))
        category = name if name in categories else name.removesuffix(_NO_PROMPT)
        if category not in categories:
            where = f"--train_category {text}: {source}"
            raise unknown("category", name, categories, where=where)
        shares.append(
            Share(
                name=name,
                category=category,
                with_prompt=category == name,
                fraction=_fraction(fraction, text),
            )
        )
    if len({share.name for share in shares}) < len(shares):
        raise UserError(f"--train_category {text}: a category comes twice.")
    return shares


def mixture_of(
    objective: str, train_category: str, categories: Sequence[str], source: str
) -> list[Share]:
    """Return the mixture that is trained on: both sides of each pair in the preference stage.

    Raises:
        UserError: the source lacks a category.
    """
    if objective != "dpo":
        return parse_mixture(train_category, categories, source)
    if missing := [name for name in PAIR if name not in categories]:
        raise UserError(
            f"--objective dpo needs `chosen` and `rejected` of each prompt; {source} has no "
            f"`{missing[0]}`, only {', '.join(categories)}."
        )
    return [Share(name=name, category=name, with_prompt=True, fraction=1.0) for name in PAIR]


def _fraction(text: str, flag: str) -> float:
    try:
        value = float(text or 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise UserError(
            f"--train_category {flag}: a fraction is above 0 and at most 1, not {text!r}."
        )
    return value


@cache
def train_options() -> tuple[Option, ...]:
    """Return our options and then those of the Trainer that we do not declare."""
    ours = options_of(Train, underscores=True)
    theirs = {option.name: option for option in _trainer_options()}
    choices = {name: option.choices for name, option in theirs.items()}
    names = {option.name for option in ours}
    return (
        *(replace(option, choices=choices.get(option.name, option.choices)) for option in ours),
        *(option for name, option in theirs.items() if name not in names),
    )


def _trainer_options() -> list[Option]:
    """Return the fields of `TrainingArguments`, as its source declares them.

    An import would take seconds, for torch. Comments such as `# --- Optimizer ---` title the
    groups.
    """
    source = _source("training_args.py")
    sections = [
        (number, match[1])
        for number, line in enumerate(source.splitlines(), start=1)
        if (match := re.fullmatch(r"    # --- (.+) ---", line))
    ]
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Call):
                    titles = [title for number, title in sections if number < field.lineno]
                    found.append(_trainer_option(field, field.value, titles[-1] if titles else ""))
    return found


def read_switch(text: str) -> bool:
    """Return what the Trainer takes for true or false; a flag alone is true.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if text.lower() in ("", "yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


_READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "bool": ("true|false", read_switch),
    "int": ("N", whole),
    "float": ("X", real),
    "str": ("TEXT", str),
}
"""Placeholder and reader of the types of the Trainer's options."""


@cache
def _enumerations() -> dict[str, tuple[str, ...]]:
    """Return the values of each enumeration of the Trainer, by its class, from the source."""
    found = {}
    for name in ("training_args.py", "trainer_utils.py"):
        for node in ast.parse(_source(name)).body:
            if isinstance(node, ast.ClassDef) and "ExplicitEnum" in map(ast.unparse, node.bases):
                values = [
                    _literal(item.value) for item in node.body if isinstance(item, ast.Assign)
                ]
                found[node.name] = tuple(value for value in values if isinstance(value, str))
    return found


def _source(name: str) -> str:
    """Return the source of a module of transformers; empty where that is not installed."""
    spec = importlib.util.find_spec("transformers")
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = Path(folders[0] if folders else "", name)
    return path.read_text("utf-8") if path.is_file() else ""


def _trainer_option(field: ast.AnnAssign, value: ast.Call, section: str) -> Option:
    name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
    keywords = {keyword.arg: keyword.value for keyword in value.keywords}
    metadata, default = _literal(keywords.get("metadata")), _literal(keywords.get("default"))
    about = metadata.get("help", "") if isinstance(metadata, dict) else ""
    plain = kind.removesuffix(" | None")
    metavar, read = _READERS.get(plain, ("VALUE", str))
    return Option(
        name=name,
        help=" ".join(about.replace("%%", "%").split()),
        group=f"Trainer: {section}" if section else "Trainer",
        flag=f"--{name}",
        metavar=metavar,
        read=read,
        choices=_enumerations().get(plain.partition(" ")[0], ()),
        default=default,
    )


def _literal(node: ast.expr | None) -> object:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def print_help() -> None:
    """Print our options, then those of the Trainer by subject."""
    parser_of(PROG, Train, train_options(), positionals=True).print_help()


def expand(argv: Sequence[str]) -> list[str]:
    """Return the flags of a recipe, then those of the command line, in the Trainer's spelling.

    Raises:
        UserError: an unknown flag, or a recipe that cannot be read.
    """
    flags = [part for argument in argv for part in _split(argument)]
    if "--config" in flags:
        index = flags.index("--config")
        if index + 1 == len(flags):
            raise UserError("--config needs a recipe: a YAML file or a name.")
        flags = recipe_flags(flags[index + 1]) + flags[:index] + flags[index + 2 :]
    check_known(
        PROG,
        [flag for flag in flags if flag[:2] == "--" and flag[2:] not in _known()],
        train_options(),
    )
    return flags


@cache
def _known() -> frozenset[str]:
    """Return the names of all flags; `no_` switches off what is on by default."""
    names = [option.name for option in train_options()]
    return frozenset([*names, *(f"no_{name}" for name in names)])


def _split(argument: str) -> list[str]:
    """Return `--max-steps=4` as `--max_steps`, `4`, the spelling by which attempts compare."""
    if argument[:2] != "--":
        return [argument]
    name, *value = argument.split("=", 1)
    return ["--" + name[2:].replace("-", "_"), *value]


def recipe_flags(name: str | Path) -> list[str]:
    """Return a recipe as flags. Raises `UserError` where it cannot be read, or a key is unknown."""
    path = recipes.find_recipe(str(name))
    flags = []
    for key, value in read_config(path).items():
        option = key.replace("-", "_")
        if option not in _known():
            names = [known.name for known in train_options()]
            use = f"See {PROG} --help."
            raise unknown("option", key, names, where=str(path), use=use)
        values = value if isinstance(value, list) else [value]
        flags += [f"--{option}", *map(str, values)]
    return flags


def values_of(flags: Sequence[str]) -> dict[str, list[str]]:
    """Return each flag with the texts that follow it, the later ones winning."""
    found: dict[str, list[str]] = {}
    name = ""
    for part in flags:
        if part[:2] == "--":
            name = part[2:]
            found[name] = []
        elif name:
            found[name].append(part)
    return found


def given_options(flags: Sequence[str]) -> dict[str, Any]:
    """Return each flag with its values, the later ones winning: what `config.yaml` holds.

    Read as a recipe, each value is the same text again, so that a run counts as the same run.
    """
    return {
        name: values if len(values) > 1 else _plain("".join(values) or "true")
        for name, values in values_of(flags).items()
    }


def _plain(text: str) -> Any:
    """Return a number where YAML would give the same text back, so that it needs no quotes."""
    if not re.fullmatch(r"-?\d+(\.\d+)?", text):
        return text
    value = float(text) if "." in text else int(text)
    return value if str(value) == text else text
