"""What a sweep is asked to score, what of it is there, and the dry run that shows both.

Imports nothing that takes time.
"""

from pathlib import Path

from sft_probe.analysis.sweep.checkpoints import Checkpoint
from sft_probe.analysis.sweep.request import SweepRequest, find_checkpoints, run_manifest
from sft_probe.probe_set import DEFAULT_PROBE_SET, ProbeSet, load_probe_set

ANSWERS = "--generate"
OTHER_PROMPTS = "--contexts"
REFERENCE = "reference.json"
"""In a part that was scored beside a reference: which weights that had."""


def step_folder(directory: Path, step: int) -> Path:
    """Return where the parts of a step lie."""
    return directory / "sweep" / f"step_{step:06d}"


def parts_asked_for(request: SweepRequest, folder: Path) -> dict[str, Path]:
    """Return the directory of each part of a step that a request asks for, by what is scored."""
    options = (
        f"-{request.num_fewshot}shot" if request.num_fewshot is not None else "",
        f"-limit{request.limit:g}" if request.limit is not None else "",
        "-chat" if request.apply_chat_template else "",
    )
    parts = {split: folder / split for split in request.splits}
    parts |= {spec: folder / f"benchmark_{slug(spec)}{''.join(options)}" for spec in request.tasks}
    if request.generate:
        parts[ANSWERS] = folder / f"generate_{request.generate}"
    if request.contexts:
        parts[OTHER_PROMPTS] = folder / f"contexts_{'_'.join(sorted(request.contexts))}"
    return parts


def is_scored(request: SweepRequest, name: str, part: Path) -> bool:
    """Return whether a part is there, beside a reference where one is asked for."""
    is_beside_one = (part / REFERENCE).exists() or name not in request.splits
    return part.exists() and (request.reference is None or is_beside_one)


def slug(spec: str) -> str:
    """Return a spec as part of a directory's name."""
    return "".join(c if c.isalnum() else "_" for c in Path(spec).name.removesuffix(".yaml"))


def inputs_text(request: SweepRequest, probe_set: ProbeSet, prompt_format: str) -> str:
    """Return a line on the probe set and one on the prompt format, with where each comes from.

    Args:
        request: what the user asked for.
        probe_set: what is scored.
        prompt_format: its name.
    """
    foreign = bool(request.checkpoints or request.model)
    own = "the default, embedded: --probe-set names another" if foreign else "that of the run"
    docs = [f"{len(probe_set.of_split(split))} {split} docs" for split in request.splits]
    format_origin = "that of the probe set" if foreign else "that of the run"
    return (
        f"probe set: {probe_set.source} ({'--probe-set' if request.probe_set else own}), "
        f"{' and '.join(docs)}, {len(probe_set.categories)} categories\n"
        f"prompt format: {prompt_format} "
        f"({'--prompt-format' if request.prompt_format else format_origin})"
    )


def chosen_inputs(request: SweepRequest) -> tuple[ProbeSet, str]:
    """Return the probe set of a sweep and its prompt format, as far as no tokenizer has a say.

    Raises:
        UserError: there is no such set, or the run has not finished.
    """
    manifest = run_manifest(request)
    probe_set = load_probe_set(request.probe_set or manifest.get("probe_set") or DEFAULT_PROBE_SET)
    recorded = manifest.get("prompt_format_source") or probe_set.prompt_format
    return probe_set, request.prompt_format or recorded


def plan(request: SweepRequest) -> str:
    """Return what a sweep would score: step, name and size of each checkpoint, and what is done.

    Nothing is loaded or written, and no benchmark is looked up.

    Raises:
        UserError: no checkpoint is found, or the step of one is not clear.
    """
    checkpoints, problems = find_checkpoints(request)
    index, num_shards = request.shard
    lines = [f"{'step':>8}  {'size':>9}  {'done':<30} checkpoint"]
    for checkpoint in checkpoints[index - 1 :: num_shards]:
        parts = parts_asked_for(request, step_folder(request.directory, checkpoint.step))
        done = [name for name, path in parts.items() if is_scored(request, name, path)]
        text = "all" if len(done) == len(parts) else ", ".join(done) or "-"
        size = _size_bytes(checkpoint)
        size_text = "on hub" if size is None else f"{size / 1e6:,.0f} MB"
        lines.append(f"{checkpoint.step:>8}  {size_text:>9}  {text:<30} {checkpoint.name}")
    asked = ", ".join(parts_asked_for(request, request.directory))
    lines += [inputs_text(request, *chosen_inputs(request)), f"asked for: {asked}"]
    return "\n".join([*lines, *(f"cannot be scored: {problem}" for problem in problems)])


def _size_bytes(checkpoint: Checkpoint) -> int | None:
    """Return the size of a checkpoint's weights; `None` where they are not on this disk."""
    folder = Path(checkpoint.model)
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
