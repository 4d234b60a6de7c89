"""What is trained: a new LoRA on the language model, its output head if asked; or both of them whole; or, of a model that comes
with an adapter, whatever PEFT trains of that adapter (biases, modules saved with it, single tokens), wherever it is."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from synpo.config import Config, ConfigError, LoraSection
from synpo.model.adapter import CaptionModel
from synpo.model.peft_kinds import check_adapters
from synpo.model.quantize import NOT_LANGUAGE


def language_prefix(model: Any) -> str:
    """Dotted name of the language model inside `model` ("model" in a text model, "model.language_model" in most others)."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def make_trainable(lm: CaptionModel, config: Config) -> list[str]:
    """Let the parameters of `lm` require gradients as the section `lora` says; null: all of language model and head.

    Returns:
        Names of the modules that LoRA wraps; none where the model itself is trained.

    Raises:
        ConfigError: as `apply_lora`, or the model itself cannot be trained: it is quantized, or has an adapter.
    """
    if config.lora is not None:
        return apply_lora(lm, config.lora)
    if config.model.quantization != "none" or config.model.adapter:
        raise ConfigError(
            "lora: null trains the weights themselves, which needs model.quantization = none and no model.adapter (merge "
            "it into the model); or leave lora out and train an adapter"
        )
    frozen = {id(p) for _, p in lm.vision_parameters()}
    for parameter in lm.model.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    return []


def apply_lora(lm: CaptionModel, section: LoraSection) -> list[str]:
    """Put a fresh, trainable LoRA on `lm.model`, everything else frozen; a model that has an adapter already goes on with that.

    `section.target_modules` is a regular expression over full module names; only matches inside the language model, and
    its output head, count, so that `.*q_proj` does not reach a vision tower that names its layers the same way.

    Returns:
        Names of the wrapped modules.

    Raises:
        ConfigError: the model's adapter is not LoRA or not one for every token, nothing matches, a match is not a linear layer
            PEFT can wrap, or it belongs to a vision tower.
    """
    if isinstance(lm.model, PeftModel):
        return _going_on(lm.model)
    prefix = language_prefix(lm.model)
    head = next(name for name, module in lm.model.named_modules() if module is lm.model.get_output_embeddings())
    target = re.compile(rf"(?={re.escape(prefix)}\.|{re.escape(head)}$)(?:{section.target_modules})")
    matches = [name for name, _ in lm.model.named_modules() if target.fullmatch(name)]
    if not matches:
        examples = [name for name, _ in lm.model.named_modules() if name.startswith(prefix) and name.endswith("_proj")]
        raise ConfigError(
            f"lora.target_modules: {section.target_modules!r} matches no module of the language model ({prefix}); "
            f"its projections are named like {', '.join(examples[:7]) or 'nothing that ends in _proj'}"
        )
    outside = [name for name in matches if re.match(NOT_LANGUAGE, name)]
    if outside:
        raise ConfigError(
            f"lora.target_modules: {section.target_modules!r} reaches {outside[0]} and {len(outside) - 1} more modules "
            "outside the language model; name the language model's layers in the expression"
        )
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=target.pattern,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():  # of a name that transformers renamed under PEFT
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            lm.model = get_peft_model(lm.model, config)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {section.target_modules!r}: {error}") from error
    return matches


def _going_on(model: Any) -> list[str]:
    """Names of the modules with LoRA in a PEFT model. What PEFT trains of it requires gradients already, unless it was loaded to
    be used (`is_trainable` False): then it does from now on."""
    check_adapters(model.peft_config.values())
    wrapped = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    if not wrapped:
        kind = type(next(iter(model.peft_config.values()))).__name__
        raise ConfigError(f"model.adapter: an adapter of kind {kind} holds no LoRA, and nothing else is trained here")
    if not any(parameter.requires_grad for parameter in adapters_own(model)):
        tuner = model.base_model
        tuner.set_adapter(tuner.active_adapters)
        tuner._mark_only_adapters_as_trainable(tuner.model)
    return wrapped


def check_trained(model: Any) -> None:
    """Raise ValueError where no step would change anything of a model: all is frozen, or its adapter is merged."""
    if any(getattr(layer, "merged", False) is True for layer in model.modules()):
        raise ValueError(
            "model: its adapter is merged into the weights, where it would not be trained; take it out (unmerge_adapter), or "
            "give peft_config for a new one (merge_and_unload)"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model: nothing of it requires gradients, so that nothing would be trained; load an adapter with is_trainable=True "
            "(PeftModel.from_pretrained), switch it on where it is off, or give peft_config"
        )


def adapters_own(model: Any) -> Iterator[Any]:
    """The parameters that PEFT has given to layers of a model: those of LoRA, trained copies of modules, single tokens."""
    for layer in model.modules():
        for name in (*getattr(layer, "adapter_layer_names", ()), *getattr(layer, "other_param_names", ())):
            if isinstance(held := getattr(layer, name, None), torch.nn.Module):
                yield from held.parameters()
