"""A LoRA instead of full fine-tuning."""

from typing import TYPE_CHECKING, Any

from peft import LoraConfig, get_peft_model

from sft_probe.errors import UserError

if TYPE_CHECKING:
    from sft_probe.train.arguments import SftArguments


def add_lora(model: Any, arguments: "SftArguments") -> Any:
    """The model with trainable LoRA layers, the rest frozen; without dropout.

    Raises:
        UserError: the target modules are not in the model.
    """
    names = arguments.lora_target_modules.split(",")
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        target_modules="all-linear" if names == ["all-linear"] else names,
        task_type="CAUSAL_LM",
    )
    try:
        with_lora: Any = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules: {error}") from error
    if arguments.activation_checkpointing:
        with_lora.enable_input_require_grads()  # else no gradient passes the frozen embeddings
    return with_lora
