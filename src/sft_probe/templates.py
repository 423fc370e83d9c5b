"""A tokenizer's chat template: what it writes before and after an answer, and the clock that it may
read."""

from collections.abc import Sequence
from datetime import datetime
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from sft_probe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]

_QUESTION, _ANSWER, _NEXT_QUESTION = "SFTPROBEQUESTION", "SFTPROBEANSWER", "SFTPROBEFURTHER"


class ChatTemplate:
    """Renders messages at one fixed time.

    Args:
        tokenizer: has a chat template.
        time: what the template reads as `strftime_now`.

    Raises:
        UserError: the template is no valid Jinja, or there are several and none is the default.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", time: datetime) -> None:
        from jinja2 import TemplateError

        # private, and stable since transformers 4.43: `apply_chat_template` lets no caller set
        # `strftime_now`
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            self._template: Any = _compile_jinja_template(tokenizer.get_chat_template())
        except (TemplateError, ValueError) as error:
            raise UserError(f"the tokenizer's chat template is not usable ({error}).") from error
        self._tokens = tokenizer.special_tokens_map
        self._time = time
        self.times_read: set[str] = set()
        """The formats in which the template has read the clock so far."""

    def pinned_time(self) -> str | None:
        """Return the time that all renderings showed, in ISO 8601: a date where they showed no
        more; `None` where none read the clock."""
        day = self._time.replace(hour=0, minute=0, second=0)
        if not self.times_read:
            return None
        shows_day_only = all(
            day.strftime(text) == self._time.strftime(text) for text in self.times_read
        )
        return (
            day.date().isoformat() if shows_day_only else self._time.isoformat(timespec="seconds")
        )

    def generation_prompt(self, messages: Messages) -> str:
        """Return what the template gives to a model that is to answer.

        Raises:
            UserError: the template refuses the messages, or leaves the question out, as one does
                that expects images.
        """
        text = self._render(messages, add_generation_prompt=True)
        if messages[-1]["content"].strip() not in text:
            raise refusal("chat", messages, "the template does not write the text of the last turn")
        return text

    def answer_prompt(self, messages: Messages) -> str:
        """Return what stands before an answer in a conversation that holds it.

        It differs from the generation prompt where that one opens a thought or a channel that
        answers are not in, or leaves to the model what every answer begins with. The last question
        is replaced by a marker to find both ends.
        """
        given = self.generation_prompt(messages)
        marked = [*messages[:-1], {**messages[-1], "content": _QUESTION}]
        asked = self._try_render(marked, add_generation_prompt=True)
        answered = self._try_render([*marked, {"role": "assistant", "content": _ANSWER}])
        opening, before_answer = (
            asked.rpartition(_QUESTION)[2],
            _between(answered, _QUESTION, _ANSWER),
        )
        if before_answer is None or _QUESTION not in asked or not given.endswith(opening):
            return given
        return given.removesuffix(opening) + before_answer

    def answer_end(self) -> str:
        """Return what ends an answer, without white space around it; empty where nothing does.

        Some templates end only turns that another one follows: there it is what comes before the
        next turn's opening.
        """
        turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        end = self._try_render(turns).partition(_ANSWER)[2].strip()
        if end:
            return end
        longer = self._try_render([*turns, {"role": "user", "content": _NEXT_QUESTION}])
        between = _between(longer, _ANSWER, _NEXT_QUESTION) or ""
        opening = longer.partition(_QUESTION)[0]
        shared = commonprefix([between[::-1], opening[::-1]])  # noqa: RUF071 - characters are meant
        return between[: len(between) - len(shared)].strip()

    def _try_render(self, messages: Messages, **options: bool) -> str:
        """Return the rendering, or nothing where the template refuses the messages."""
        try:
            return self._render(messages, **options)
        except UserError:
            return ""

    def _render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        values: dict[str, Any] = {
            **self._tokens,
            "strftime_now": self._read_clock,
            "tools": None,
            "documents": None,
        }
        turns = [
            {name: value for name, value in turn.items() if value is not None} for turn in messages
        ]
        try:
            return str(
                self._template.render(
                    messages=turns, add_generation_prompt=add_generation_prompt, **values
                )
            )
        except (
            Exception
        ) as error:  # templates raise what they like: for a system turn, for turns out of order
            raise refusal("chat", messages, error) from error

    def _read_clock(self, text: str) -> str:
        self.times_read.add(text)
        return self._time.strftime(text)


def refusal(format_name: str, messages: Messages, reason: Exception | str) -> UserError:
    """Say why a format cannot render some messages, in the template's own words."""
    roles = ", ".join(turn["role"] for turn in messages)
    return UserError(
        f"the prompt format {format_name} refuses the turns {roles} ({reason}); use hh, plain or a "
        "Jinja file."
    )


def _between(text: str, start: str, end: str) -> str | None:
    """Return what stands between the last `start` before `end`, and `end`; `None` where one of them
    is missing."""
    before, found_end, _ = text.rpartition(end)
    _, found_start, between = before.rpartition(start)
    return between if found_start and found_end else None
