"""Heads whose weight is spread over processes: which part is where, and one pass over all parts.

    vocabulary parallel   each process holds some rows of W and all hidden states (tensor parallelism); `group` says which
                          processes. Exponents anchored at z_y add up over shards as they do over chunks:
                              z_y = Σ_ranks (own the label ? x W_yᵀ : 0)      s = Σ_ranks s_r      U = Σ_ranks U_r
                          Three sums a pass, all in the forward: (N,) twice, (N, D) once where a gradient is wanted.
    FSDP2                 each process holds a part of W and hidden states of its own, so W is gathered whole (`whole`).
    ZeRO-3                the same, by DeepSpeed's own context (`gathered`).

A DTensor sharded on its rows does not say which of the first two it is: the argument `group` decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import passes
from ..backends.choice import Backend, choose
from ..backends.passes import Forward, Tiles, accumulate
from ..backends.portable import TorchTiles, largest_logits, nothing, put
from ..checks import check_range, inside_op
from ..head import Head, compute_dtype

ELSEWHERE, IGNORED = -1, -2  # in place of a label that another shard owns, and of one that does not count


def local(parameter: Any) -> Tensor:
    """This process's rows of a head that is spread by rows; differentiable.

    Raises:
        ValueError: a DTensor that is spread in another way.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Shard

    if tuple(parameter.placements) != (Shard(0),):
        raise ValueError(
            f"with a group the head must be sharded by rows over one mesh dimension, (Shard(0),), got "
            f"{tuple(parameter.placements)}; leave group out to gather it whole"
        )
    return parameter.to_local()


def partitioned(parameter: Tensor | None) -> bool:
    """Whether ZeRO-3 holds the parameter in parts, leaving nothing here."""
    return parameter is not None and hasattr(parameter, "ds_id") and parameter.numel() == 0


@contextmanager
def gathered(*parameters: Tensor | None) -> Iterator[None]:
    """Hold those of the parameters whole inside the block that ZeRO-3 has partitioned.

    Raises:
        ValueError: DeepSpeed is not installed.
    """
    parts = [p for p in parameters if partitioned(p)]
    if not parts:
        yield
        return
    if find_spec("deepspeed") is None:
        raise ValueError(
            "a parameter is partitioned by ZeRO-3 (numel 0 with a ds_id) but deepspeed cannot be imported to gather it; "
            "install deepspeed, or gather it and pass the full tensor"
        )
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


@contextmanager
def gathered_frozen(*parameters: Tensor | None) -> Iterator[None]:
    """`gathered` for a forward pass alone: the gradient of one that is trained would come when it is gone again.

    Raises:
        ValueError: one that is partitioned is trained.
    """
    if any(p is not None and partitioned(p) and p.requires_grad for p in parameters):
        raise ValueError(
            "a head that is trained cannot be gathered from ZeRO-3 outside its module; freeze it (train LoRA), or use "
            "ZeRO-2 or FSDP2"
        )
    with gathered(*parameters):
        yield


def _named(group: str) -> dist.ProcessGroup:
    """The process group of this name (an op takes no group, but takes its name)."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group)  # type: ignore[arg-type]


def aim(labels: Tensor, rows: int, ignore_index: int | None, group: dist.ProcessGroup) -> Tensor:
    """Labels (N,) of the whole vocabulary → rows of this shard (N,), ELSEWHERE or IGNORED, which none is.

    The sizes of the shards are exchanged every time: a memory of them could leave one process waiting for another that
    remembers. The host reads nothing back from a CUDA device.

    Raises:
        ValueError: a label is outside the vocabulary (checked on CPU; on CUDA its log-probability becomes NaN).
    """
    shards = [labels.new_empty(1) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, labels.new_full((1,), rows), group=group)
    sizes = torch.cat(shards)
    if labels.device.type == "cpu":
        check_range(labels, ignore_index, int(sizes.sum()), ", the rows of all shards,")
    mine = labels - sizes[: dist.get_rank(group)].sum()
    mine = mine.where((mine >= 0) & (mine < rows), ELSEWHERE)
    return mine if ignore_index is None else mine.where(labels != ignore_index, IGNORED)


def forward(
    x: Tensor,
    head: Head,
    labels: Tensor,
    ignore_index: int | None,
    backend: str,
    group: str,
    *,
    want_direction: bool,
    workspace: int | None,
) -> tuple[Forward, Tensor]:
    """One pass over all shards; every process gets the same `Forward`, and the labels (N,) of its own shard, as `aim`.

    Args:
        x: (N, D), labels: (N,) of the whole vocabulary, both the same on every process. head: this process's shard, possibly
            without a row. group: name of the process group.
    """
    chosen, size, processes = choose(backend, x), passes.workspace_of(x.device, workspace), _named(group)
    with inside_op(x):
        aimed, found = aim(labels, len(head.weight), ignore_index, processes), nothing(x, want_direction)
        for at in passes.blocks(aimed, IGNORED, passes.block_rows(x, size)):
            put(found, at, _block(x[at], head, aimed[at], chosen, processes, want_direction, size))
    return found, aimed


def _block(
    x: Tensor,
    head: Head,
    labels: Tensor,
    chosen: Backend,
    group: dist.ProcessGroup,
    want_direction: bool,
    workspace: int,
) -> Forward:
    """Some rows, none of them IGNORED.

    A row whose exponential sum overflowed is done again around the largest logit of all shards; to know of it the host
    reads one number back from a CUDA device. A label that no shard owns gives NaN.
    """
    tiles, magnify = chosen.tiles(None), chosen.magnify(x.dtype)
    target, slope = _target_logits(x, head, labels, group)
    at_once = want_direction and magnify == 1.0
    found, total = _around(x, head, labels, target, slope, target, tiles, group, at_once, workspace)
    if want_direction and not at_once:
        anchor = found.normalizer.to(total.dtype) - math.log(magnify)
        _, pull = accumulate(x, head, labels, anchor, tiles, workspace, want_pull=True)
        assert pull is not None
        others = -torch.expm1(found.logps)
        found = replace(found, direction=_direction(x, head, labels, slope, others, pull.div_(magnify), group))
    flagged = (total > passes.OVERFLOW).nonzero().squeeze(1)
    if flagged.numel() == 0:
        return found
    rows, row_labels, row_slope = x[flagged], labels[flagged], None if slope is None else slope[flagged]
    top = largest_logits(rows, head, workspace)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    again = _around(
        rows, head, row_labels, target[flagged], row_slope, top, TorchTiles(), group, want_direction, workspace
    )
    put(found, flagged, again[0])
    return found


def _around(
    x: Tensor,
    head: Head,
    labels: Tensor,
    target: Tensor,
    slope: Tensor | None,
    anchor: Tensor,
    tiles: Tiles,
    group: dist.ProcessGroup,
    want_direction: bool,
    workspace: int,
) -> tuple[Forward, Tensor]:
    """One pass with exponents measured from `anchor`; also returns the sum over v ≠ y, to see whether it overflowed."""
    total, pull = accumulate(x, head, labels, anchor, tiles, workspace, want_pull=want_direction)
    dist.all_reduce(total, group=group)
    excess = target - anchor  # 0 around the target; NaN where the row is not finite, which must stay visible
    everything = total + excess.exp()
    others = total + torch.expm1(excess)
    logps = excess - torch.log1p(others)
    direction = None
    if pull is not None:
        pull.div_(everything[:, None])
        direction = _direction(x, head, labels, slope, total / everything, pull, group)
    return Forward(logps, passes.log_sum_exp(anchor, others), direction), total


def _direction(
    x: Tensor,
    head: Head,
    labels: Tensor,
    slope: Tensor | None,
    others: Tensor,
    pull: Tensor,
    group: dist.ProcessGroup,
) -> Tensor:
    """`passes.directions` from every shard's `pull`, which is overwritten; the owner of a label adds its row of W."""
    pull.neg_()
    if len(head.weight):
        owned = labels >= 0
        coefficient = (others if slope is None else others * slope).where(owned, 0.0)
        toward = head.weight.index_select(0, labels.where(owned, 0)).to(pull.dtype)
        pull.addcmul_(toward, coefficient[:, None])
    dist.all_reduce(pull, group=group)
    return pull.mul_(head.logit_scale).to(x.dtype)


def _target_logits(x: Tensor, head: Head, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor | None]:
    """`passes.target_logits` from whichever shard owns each label; NaN where none does."""
    owned = labels >= 0
    found = x.new_zeros((3, len(x)), dtype=compute_dtype(x.dtype))  # z_y, its slope, owners
    if len(head.weight):
        target, slope = passes.target_logits(x, head, labels.where(owned, 0))
        found[0] = target.where(owned, 0.0)
        found[1] = owned if slope is None else slope.where(owned, 0.0)
        found[2] = owned
    dist.all_reduce(found, group=group)
    target = found[0].where(found[2] == 1, torch.nan)
    return target, None if head.softcap is None else found[1]
