"""What is written for each prompt: the kinds of response, their prompt templates, the topics, the
requests."""

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft_probe.errors import UserError
from sft_probe.synth.asking.protocol import Request
from sft_probe.synth.duplicates import count_words
from sft_probe.synth.hh import Messages, Pair
from sft_probe.synth.sources import SourcePair

SOURCE_OF = {
    "paraphrase": "rejected",
    "variant": "prompt",
    "non_response": "topic",
    "chosen_paraphrase": "chosen",
    "format_flip": "chosen",
}
"""The categories that the writer writes, and what each is made from."""
DEFAULT_KINDS = ("paraphrase", "variant", "random", "non_response")
KINDS = (*DEFAULT_KINDS, "chosen_paraphrase", "format_flip", "permuted", "untrained")
"""All that can stand beside chosen and rejected; `random` and `permuted` are made here, `untrained`
by that model."""
TOPIC_LISTS = ("subjects", "places", "angles")
_DETAILS = "details"
"""A fourth list, which may be missing: it makes it unlikely that two docs have one topic."""
_TEMPLATE_SUFFIXES = (".txt", ".jinja", ".jinja2", ".j2", ".yaml", ".yml")
_VERSION = re.compile(r"\{#-?\s*version\s+([\w.-]+)\s*-?#\}")


@dataclass(frozen=True, kw_only=True)
class Template:
    """A prompt template: a Jinja file whose first line is `{# version N #}`."""

    name: str
    """With the version, such as `paraphrase@1`."""
    sha256: str
    text: str
    path: str

    def render(self, variables: dict[str, Any]) -> str:
        """The prompt. Raises `UserError` where the template asks for what is not given."""
        try:
            return str(self._compiled.render(variables))
        except Exception as error:  # whatever its expressions raise
            known = ", ".join(variables)
            raise UserError(f"the template {self.path}: {error}. It is given {known}.") from error

    @cached_property
    def _compiled(self) -> Any:
        # S701: plain text for a model, not HTML
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(self.text)


def load_templates(kinds: tuple[str, ...], directory: Path | None) -> dict[str, Template]:
    """The template of each written category: `CATEGORY.txt` in `directory` where it is there, else
    the packaged one.

    Raises:
        UserError: there is no such directory, or a template is not readable or has no version.
    """
    if directory is not None and not directory.is_dir():
        raise UserError(f"--templates {directory}: no such directory.")
    _check_names(directory)
    return {kind: _load_template(kind, directory) for kind in kinds if kind in SOURCE_OF}


def _check_names(directory: Path | None) -> None:
    """Raise `UserError` where a file looks like a template and has no name of one: it would be
    passed over."""
    known = [*(f"{kind}.txt" for kind in SOURCE_OF), "topics.yaml"]
    files = directory.iterdir() if directory else ()
    unknown = sorted(
        file.name for file in files if file.suffix in _TEMPLATE_SUFFIXES and file.name not in known
    )
    if unknown:
        raise UserError(
            f"--templates {directory}: no category has a template {', '.join(unknown)}; there are "
            f"{', '.join(known)}."
        )


def _load_template(kind: str, directory: Path | None) -> Template:
    path = _template_file(f"{kind}.txt", directory)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the template {path}: {error}") from error
    version = _VERSION.match(text)
    if version is None:
        raise UserError(f"the template {path} must start with its version, like {{# version 2 #}}.")
    return Template(
        name=f"{kind}@{version[1]}",
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        text=text[version.end() :].strip(),
        path=str(path),
    )


def _template_file(name: str, directory: Path | None) -> Path:
    if directory is not None and (directory / name).is_file():
        return directory / name
    return Path(str(resources.files("sft_probe.synth").joinpath("templates", name)))


def read_topics(directory: Path | None, num_docs: int) -> list[list[str]]:
    """The lists of `topics.yaml`, of which a topic takes one entry each.

    Raises:
        UserError: `topics.yaml` is not as it must be, or makes fewer topics than there are docs.
    """
    path = _template_file("topics.yaml", directory)
    try:
        lists = yaml.safe_load(path.read_text("utf-8"))
        parts = [list(dict.fromkeys(map(str.strip, lists[name]))) for name in TOPIC_LISTS]
        parts += [
            list(dict.fromkeys(map(str.strip, lists[name])))
            for name in (_DETAILS,)
            if name in lists
        ]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: must hold the lists subjects, places and angles, each of text ({error})."
        ) from error
    number = math.prod(map(len, parts))
    if number < num_docs:
        raise UserError(
            f"{path} makes {number} topics and {num_docs} are needed: add to its lists."
        )
    return parts


def topic_of(parts: Sequence[Sequence[str]], key: bytes) -> str:
    """The topic of a doc by a hash of its key: the same whatever other docs there are."""
    digest = hashlib.sha256(b"topic" + key).digest()
    numbers = (int.from_bytes(digest[4 * i : 4 * i + 4]) for i in range(len(parts)))
    return " ".join(part[number % len(part)] for part, number in zip(parts, numbers, strict=True))


def make_requests(pair: SourcePair, templates: dict[str, Template], topic: str) -> list[Request]:
    """What the writer is asked for one pair, in the order of `templates`."""
    num_words = count_words(pair.chosen)
    sources = {
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "prompt": pair.messages[-1]["content"],
        "topic": topic,
    }
    variables = {**sources, "conversation": conversation(pair.messages), "num_words": num_words}
    return [
        Request(
            doc_id=pair.doc_id,
            category=kind,
            template=template.name,
            template_sha256=template.sha256,
            prompt=template.render(variables),
            source_text=sources[SOURCE_OF[kind]],
            num_words=num_words,
            max_output_tokens=max(1024, 4 * num_words),
        )
        for kind, template in templates.items()
    ]


def conversation(messages: Messages) -> str:
    """The turns as a template shows them, with the speaker before each."""
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    return "\n\n".join(f"{names[turn['role']]}: {turn['content'].strip()}" for turn in messages)


def permuted(pair: Pair, seed: str) -> str | None:
    """The words of the chosen response in a seeded order; `None` where every order is the same."""
    words = pair.chosen.split()
    if len(set(words)) < 2:
        return None
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    shuffled = list(words)
    while shuffled == words:
        generator.shuffle(shuffled)
    return " ".join(shuffled)
