"""The class of the `sft_probe_*` tasks: lm-eval's own, without the flags that would make their
numbers wrong."""

from typing import Any

from lm_eval.api.task import ConfigurableTask

from sft_probe.errors import UserError

_REFUSED = {
    "cache_requests": "its key knows neither the probe set nor the prompt format: another set "
    "would get these requests",
    "apply_chat_template": "the prompt format of the probe set already renders the turns",
    "system_instruction": "it would stand before prompts that the prompt format has already "
    "rendered",
}
"""Arguments of `build_all_requests`, named like the flags of lm-eval, and why a probe task refuses
them."""


class ProbeTask(ConfigurableTask):
    """A task of log-probs of given responses after prompts that are rendered already."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def build_all_requests(self, **arguments: Any) -> None:
        """Build the requests as lm-eval does.

        Raises:
            UserError: a flag would change the prompts, or take requests from a cache that does not
                know them.
        """
        for name, reason in _REFUSED.items():
            if arguments.get(name):
                raise UserError(
                    f"--{name} cannot be used with {self.config.task}: {reason}. Leave the flag "
                    "out."
                )
        if self.config.num_fewshot:
            raise UserError(
                f"{self.config.task} takes no few-shot examples (num_fewshot "
                f"{self.config.num_fewshot})."
            )
        super().build_all_requests(**arguments)
