"""Adapters of PEFT: which of them are computed right here, and what they leave of the model under them.

Models are run by their layers: packed pairs in training, rows with a cache of our own in decoding. An adapter that changes
layers, as LoRA does, is part of that. What others do beside it is left undone: they put states before a prompt, have a forward
pass of their own, or change their ranks by calls in every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from safetensors import SafetensorError

from synpo.config import ConfigError

BESIDE = ("AdaLoraConfig", "AdaptionPromptConfig", "XLoraConfig", "PolyConfig")
"""Kinds that do more than change layers, beside those that learn prompts."""

TAKES = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of `init_lora_weights`, or their beginnings, that take out of the model's weights what they put into the adapter."""

NOT_AGAIN = ("pissa_niter", "lora_ga")
"""Those of them that take something else the next time."""


def check_adapters(configs: Iterable[Any]) -> None:
    """Raise ConfigError for a PEFT configuration whose adapter would not be computed as PEFT does."""
    for config in configs:
        kind = type(config).__name__
        if config.is_prompt_learning or kind in BESIDE:
            raise ConfigError(
                f"model.adapter: an adapter of kind {kind} does more than change layers of the model, which is not supported "
                "here; train LoRA (LoraConfig)"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ConfigError(
                "model.adapter: an activated LoRA (alora_invocation_tokens) acts on what follows certain tokens alone, which is "
                "not supported here; take an adapter without them"
            )


def load_adapter(model: Any, path: str) -> Any:
    """The model with the adapter of a folder, whose parameters require gradients where PEFT trains them.

    Raises ConfigError: it cannot be read, does not fit the model, is of a kind that is not computed here, or was begun by taking
    something out of the model's weights that cannot be told any more.
    """
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(path)
        check_adapters([config])
        if _begun(config).startswith(NOT_AGAIN):
            raise ConfigError(
                f"model.adapter: {path} was begun by {config.init_lora_weights}, which took something out of the model's weights "
                "that is not in the folder; save it where it was trained with path_initial_model_for_weight_conversion "
                "(save_pretrained of PEFT), as plain LoRA"
            )
        with warnings.catch_warnings():  # of a name that transformers renamed under PEFT
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return PeftModel.from_pretrained(model, path, is_trainable=True)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()  # one of many weights of another shape
        raise ConfigError(f"model.adapter: {path} cannot be put on the model: {reason}") from error


def base_is_kept(model: Any) -> bool:
    """Whether `model` with its adapter off is the one under it: it has one, which took nothing out of its weights, and trains no
    biases, which have no copy."""
    return hasattr(model, "disable_adapter") and not any(
        getattr(config, "bias", "none") != "none" or _begun(config).startswith(TAKES)
        for config in model.peft_config.values()
    )


def _begun(config: Any) -> str:
    return str(getattr(config, "init_lora_weights", ""))
