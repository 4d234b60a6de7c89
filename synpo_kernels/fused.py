"""The Triton backend: the passes of `passes.py` over kernel tiles, and the exact kernel for overflowed rows.

bf16 and fp32 take one pass, P̂ in the input's own format (bf16 has the exponent range of fp32). fp16 cannot hold P̂: its
sums come from a first pass that writes nothing, and a second one, around the log-sum-exp, holds 2¹⁴ · p. The host reads
nothing back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import passes
from .head import Head
from .kernels import exact_rows, exp_tile
from .kernels.configs import exact_config, tile_config
from .passes import Forward, Gradients, accumulate, directions, target_logits

FP16_MAGNIFY = 2.0**14


def _major(device: torch.device) -> int | None:
    """Major compute capability; None in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


def _precision() -> str:
    """How the kernels multiply fp32, following torch.set_float32_matmul_precision."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class TritonTiles:
    """A slice of exponentials by one kernel; see `passes.Tiles`."""

    def operand(self, matrix: Tensor) -> Tensor:
        return matrix

    def slice_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def __call__(
        self, x: Tensor, part: Head, labels: Tensor, anchor: Tensor, at_target: Tensor | None, keep: bool, out: Tensor
    ) -> Tensor:
        config = tile_config(_major(x.device), x.element_size(), part.softcap is not None)
        tiles_v = -(-part.weight.shape[0] // config.block_v)
        sums = torch.empty(tiles_v, x.shape[0], dtype=torch.float32, device=x.device)
        if x.shape[0]:
            exp_tile.launch(
                x,
                part.weight,
                part.bias,
                labels,
                anchor,
                at_target,
                out,
                sums,
                logit_scale=part.logit_scale,
                softcap=part.softcap,
                write=keep,
                precision=_precision(),
                config=config,
            )
        return sums.sum(0)


TILES = TritonTiles()


def forward(x: Tensor, head: Head, labels: Tensor, *, want_direction: bool) -> Forward:
    """Log-probabilities (N,) of `labels` and, if wanted, U (N, D) = ∂logp/∂x; see `passes`."""
    twice = x.dtype == torch.float16
    target, slope = target_logits(x, head, labels)
    total, pull = accumulate(x, head, labels, target, TILES, want_pull=want_direction and not twice)
    logps = (target - target) - torch.log1p(total)  # the difference is 0, or NaN where the row is not finite
    direction = None
    if pull is not None:
        everything = 1.0 + total
        direction = directions(head, labels, slope, total / everything, pull.div_(everything[:, None]))
    if x.shape[0]:
        exact_rows.launch(
            x,
            head.weight,
            head.bias,
            labels,
            (total > passes.OVERFLOW).to(torch.int8),
            target,
            slope,
            logps,
            direction,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            precision=_precision(),
            config=exact_config(_major(x.device)),
        )
    if want_direction and twice:
        anchor = target - logps - math.log(FP16_MAGNIFY)
        _, pull = accumulate(x, head, labels, anchor, TILES, want_pull=True)
        assert pull is not None
        direction = directions(head, labels, slope, -torch.expm1(logps), pull.div_(FP16_MAGNIFY))
    return Forward(logps, target - logps, direction)


def gradients(
    x: Tensor, head: Head, labels: Tensor, forward: Forward, upstream: Tensor, *, want: tuple[bool, bool, bool]
) -> Gradients:
    """Gradients through a trained head; see `passes.gradients`."""
    magnify = FP16_MAGNIFY if x.dtype == torch.float16 else 1.0
    return passes.gradients(x, head, labels, forward, upstream, TILES, want=want, magnify=magnify)
