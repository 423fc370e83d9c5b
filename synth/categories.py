"""Categories of response, their prompt templates and topics, and the requests made from them."""

import hashlib
import itertools
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
from sft_probe.probe_set import Doc
from sft_probe.synth.asking.protocol import Request
from sft_probe.synth.duplicates import count_words
from sft_probe.synth.options import SynthRun

SOURCE_OF = {
    "paraphrase": "rejected",
    "variant": "prompt",
    "non_response": "topic",
    "chosen_paraphrase": "chosen",
    "format_flip": "chosen",
}
"""Categories that a writer writes, and what each is made from."""
DEFAULT_KINDS = ("paraphrase", "variant", "random", "non_response")
KINDS = (*DEFAULT_KINDS, "chosen_paraphrase", "format_flip", "permuted", "untrained")
"""Categories that a set may hold beside chosen and rejected. `random` and `permuted` need no model,
`untrained` is written by the untrained model."""
TOPIC_LISTS = ("subjects", "places", "angles")
_DETAILS = "details"
"""An optional fourth list, which makes it unlikely that two docs share a topic."""
_TEMPLATE_SUFFIXES = (".txt", ".jinja", ".jinja2", ".j2", ".yaml", ".yml")
_VERSION = re.compile(r"\{#-?\s*version\s+([\w.-]+)\s*-?#\}")


def kinds_of(options: SynthRun) -> tuple[str, ...]:
    """Return the categories of a set beside chosen and rejected."""
    asked = options.categories or DEFAULT_KINDS
    return tuple(kind for kind in asked if kind not in ("chosen", "rejected"))


@dataclass(frozen=True, kw_only=True)
class Template:
    """A prompt template: a Jinja file whose first line is `{# version N #}`."""

    name: str
    """With the version, such as `paraphrase@1`."""
    sha256: str
    text: str
    path: str

    def render(self, variables: dict[str, Any]) -> str:
        """Return the prompt. Raise `UserError` where the template uses an unknown variable."""
        try:
            return str(self._compiled.render(variables))
        except Exception as error:  # whatever its expressions raise
            known = ", ".join(variables)
            raise UserError(f"the template {self.path}: {error}; it may use {known}.") from error

    @cached_property
    def _compiled(self) -> Any:
        # S701: plain text for a model, not HTML
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(self.text)


def load_templates(kinds: tuple[str, ...], directory: Path | None) -> dict[str, Template]:
    """Return the template of each written category: the user's `CATEGORY.txt`, else the packaged
    one.

    Raises:
        UserError: the directory does not exist, or a template cannot be read or has no version.
    """
    if directory is not None:
        if not directory.is_dir():
            raise UserError(f"--templates {directory}: no such directory.")
        # a file that looks like a template but has another name would be ignored
        known = [*(f"{kind}.txt" for kind in SOURCE_OF), "topics.yaml"]
        files = (file for file in directory.iterdir() if file.suffix in _TEMPLATE_SUFFIXES)
        if unknown := sorted(file.name for file in files if file.name not in known):
            raise UserError(
                f"--templates {directory}: no category has a template {', '.join(unknown)}; there "
                f"are {', '.join(known)}."
            )
    return {kind: _load_template(kind, directory) for kind in kinds if kind in SOURCE_OF}


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
    """Return the lists of `topics.yaml`. A topic is one entry of each list.

    Raises:
        UserError: `topics.yaml` has another form, or makes fewer topics than there are docs.
    """
    path = _template_file("topics.yaml", directory)
    try:
        lists = yaml.safe_load(path.read_text("utf-8"))
        names = [*TOPIC_LISTS, *([_DETAILS] if _DETAILS in lists else [])]
        parts = [list(dict.fromkeys(map(str.strip, lists[name]))) for name in names]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} must hold the lists subjects, places and angles, each of text ({error})."
        ) from error
    number = math.prod(map(len, parts))
    if number < num_docs:
        raise UserError(
            f"{path} makes {number} topics but {num_docs} are needed. Add to its lists."
        )
    return parts


def topic_of(parts: Sequence[Sequence[str]], key: bytes) -> str:
    """Return the topic of a doc, by a hash of its key alone."""
    digest = hashlib.sha256(b"topic" + key).digest()
    numbers = (int.from_bytes(digest[4 * i : 4 * i + 4]) for i in range(len(parts)))
    return " ".join(part[number % len(part)] for part, number in zip(parts, numbers, strict=True))


def order_topics(parts: Sequence[Sequence[str]], seed: int) -> list[str]:
    """Return the topics in the order in which rule 1 (`splits.RULE`) hands them out."""
    topics = list(dict.fromkeys(" ".join(words) for words in itertools.product(*parts[:3])))
    random.Random(seed).shuffle(topics)  # noqa: S311 - reproducible, not secret
    return topics


def request_of(doc: Doc, category: str, **fields: Any) -> Request:
    """Return a request for a text as long as the chosen response of a doc."""
    num_words = count_words(doc.responses["chosen"])
    return Request(
        doc_id=doc.doc_id,
        category=category,
        num_words=num_words,
        max_output_tokens=max(1024, 4 * num_words),
        **fields,
    )


def make_requests(doc: Doc, templates: dict[str, Template], topic: str) -> list[Request]:
    """Return one request for each template, in the order of `templates`."""
    sources = {
        "chosen": doc.responses["chosen"],
        "rejected": doc.responses["rejected"],
        "prompt": doc.messages[-1]["content"],
        "topic": topic,
    }
    num_words = count_words(doc.responses["chosen"])
    variables = {**sources, "conversation": conversation(doc.messages), "num_words": num_words}
    return [
        request_of(
            doc,
            kind,
            template=template.name,
            template_sha256=template.sha256,
            prompt=template.render(variables),
            source_text=sources[SOURCE_OF[kind]],
        )
        for kind, template in templates.items()
    ]


def conversation(messages: Sequence[dict[str, str]]) -> str:
    """Return turns as a template shows them, each after its speaker."""
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    return "\n\n".join(f"{names[turn['role']]}: {turn['content'].strip()}" for turn in messages)


def permuted(text: str, seed: str) -> str | None:
    """Return the words of a text in another, seeded order; None where all orders are the same."""
    words = text.split()
    if len(set(words)) < 2:
        return None
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    shuffled = list(words)
    while shuffled == words:
        generator.shuffle(shuffled)
    return " ".join(shuffled)
