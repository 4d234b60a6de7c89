"""What a run chooses itself where its settings leave it open, by device and weights. A run that goes on keeps what it chose.

    bf16                        products in bfloat16 under autocast: bfloat16 weights, on a GPU that computes in it
    tf32                        what stays float32 multiplied by the tensor cores, to 10 bits: a GPU that has them
    activation_checkpointing    layers run again in the backward pass: a model of more than a billion parameters, on a GPU
    fused_lora                  LoRA layers in as few passes as library products allow (model/lora_linear.py): on a GPU
    use_liger_kernel            liger-kernel's kernels for norms, gates and rotary positions (model/liger.py): on a GPU, where it
                                is installed and nothing is compiled

On other devices it leaves all of them off. DeepSpeed and FSDP have settings of their own for precision and checkpointing, and
hold the weights of LoRA apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from transformers.utils.import_utils import is_torch_tf32_available

from synpo.model import liger
from synpo.model.adapter import CaptionModel

if TYPE_CHECKING:
    from synpo.train.arguments import SynPOConfig

LARGE = 1_000_000_000  # parameters from which on activations are the smaller loss


def settle(
    args: SynPOConfig, lm: CaptionModel, device: str, earlier: Mapping[str, bool] | None = None
) -> dict[str, bool]:
    """Give `args` a value for each of OPEN that it leaves open; nothing is left open afterwards.

    Args:
        lm: the model, its weights on any device. device: "cuda", "cpu", …: where it will be trained.
        earlier: what the run chose when it began; what is not in it was off then.

    Returns:
        name → choice, of those that were open.
    """
    chosen = {}
    for name in args.left_open:
        chosen[name] = RULES[name](args, lm, device) if earlier is None else earlier.get(name, False)
        setattr(args, name, chosen[name])
    if chosen.get("bf16"):
        args.mixed_precision = "bf16"
    args.gradient_checkpointing = args.activation_checkpointing
    args.left_open = ()
    return chosen


def _elsewhere(args: SynPOConfig) -> bool:
    return bool(args.deepspeed or args.fsdp)


def _autocast(args: SynPOConfig, lm: CaptionModel, device: str) -> bool:
    if args.mixed_precision != "no" or args.fp16:  # `accelerate launch --mixed_precision`, say
        return args.mixed_precision == "bf16"
    weights = lm.base.get_input_embeddings().weight.dtype
    here = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cuda" and weights == torch.bfloat16 and here and not _elsewhere(args)


def _tf32(args: SynPOConfig, lm: CaptionModel, device: str) -> bool:
    return device == "cuda" and is_torch_tf32_available()


def _checkpointing(args: SynPOConfig, lm: CaptionModel, device: str) -> bool:
    return device == "cuda" and not _elsewhere(args) and lm.base.num_parameters() > LARGE


def _fused_lora(args: SynPOConfig, lm: CaptionModel, device: str) -> bool:
    return device == "cuda" and not _elsewhere(args) and hasattr(lm.model, "peft_config")


def _liger(args: SynPOConfig, lm: CaptionModel, device: str) -> bool:
    return device == "cuda" and not args.torch_compile and not _elsewhere(args) and liger.installed()


RULES: dict[str, Callable[[SynPOConfig, CaptionModel, str], bool]] = {
    "bf16": _autocast,
    "tf32": _tf32,
    "activation_checkpointing": _checkpointing,
    "fused_lora": _fused_lora,
    "use_liger_kernel": _liger,
}
OPEN = tuple(RULES)


def half(args: SynPOConfig) -> torch.dtype | None:
    """The dtype of autocast, None without."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)


def in_words(args: SynPOConfig, lm: CaptionModel) -> str:
    """Precision and layers of a run whose choices are settled, for people."""
    weights = str(lm.base.get_input_embeddings().weight.dtype).removeprefix("torch.")
    products = str(half(args)).removeprefix("torch.")
    words = [f"{weights} weights, {products} autocast" if half(args) else f"{weights} weights and products"]
    words += ["TF32"] if args.tf32 else []
    words += ["activation checkpointing"] if args.activation_checkpointing else []
    words += ["layers of liger-kernel"] if args.use_liger_kernel else []
    words += ["compiled layers"] if args.torch_compile else []
    return ", ".join(words)
