"""Layers of the language model made otherwise than its own code makes them, once the choices of a run are settled.

    tf32                what stays float32 is multiplied by the tensor cores
    fused_lora          model/lora_linear.py
    use_liger_kernel    model/liger.py
    torch_compile       what a layer does beside attention (norms, the gated product) compiled, once for all layers and lengths

Only the decoder is touched: a frozen vision tower runs once a video, without gradients.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.import_utils import enable_tf32

from synpo.config import ConfigError
from synpo.model import liger
from synpo.model.adapter import CaptionModel, evaluating
from synpo.model.gather import is_partitioned
from synpo.model.lora_linear import fuse

if TYPE_CHECKING:
    from synpo.train.arguments import SynPOConfig


def prepare(lm: CaptionModel, args: SynPOConfig) -> None:
    """Change the layers of `lm` as `args` says. Raises ConfigError where one cannot be."""
    if args.tf32:
        multiply_with_tf32(lm.model)
    if args.fused_lora:
        if args.fsdp or is_partitioned(lm.model):
            raise ConfigError(
                "train.fused_lora reads the weights of LoRA, which FSDP and ZeRO-3 hold apart: set it to false"
            )
        fuse(lm.model)
    if args.use_liger_kernel:
        apply_liger(lm, args)
    if args.torch_compile:
        compile_layers(lm, args)


def multiply_with_tf32(model: Any) -> None:
    """Let float32 products use the tensor cores, but for rotary angles: positions beyond 2048 have more than their 10 bits."""
    enable_tf32(True)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.register_forward_pre_hook(lambda *_: enable_tf32(False))
            module.register_forward_hook(lambda *_: enable_tf32(True), always_call=True)


def apply_liger(lm: CaptionModel, args: SynPOConfig) -> None:
    """Give the decoder liger-kernel's kernels where they fit; args.liger_kernel_config may leave some out."""
    given = args.liger_kernel_config or {}
    if wrong := [name for name, value in given.items() if name not in liger.SETTINGS and value]:
        raise ConfigError(
            f"train.liger_kernel_config: {', '.join(wrong)} is not among {', '.join(liger.SETTINGS)}; liger-kernel's losses "
            "would take the place of the fused one"
        )
    if not liger.installed():
        raise ConfigError(
            "train.use_liger_kernel: liger-kernel is not installed: pip install 'synpo[liger]', or set it to false"
        )
    if args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("train.use_liger_kernel: liger-kernel's kernels run on a GPU alone; set it to false")
    with evaluating(lm.model):
        liger.apply(lm.base.get_decoder(), {liger.SETTINGS[name]: value for name, value in given.items()})
    # all is done: transformers would put in its losses, too
    args.liger_kernel_config = dict.fromkeys((*liger.SETTINGS, "cross_entropy", "fused_linear_cross_entropy"), False)


def compile_layers(lm: CaptionModel, args: SynPOConfig) -> None:
    """Compile what layers do beside attention, which is told of changing lengths, for rows of any length."""
    for layer in layers_of(lm.base.get_decoder()):
        for part in layer.children():
            if "Attention" not in type(part).__name__:
                part.compile(
                    dynamic=True, backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode
                )


def layers_of(decoder: nn.Module) -> list[Any]:
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
