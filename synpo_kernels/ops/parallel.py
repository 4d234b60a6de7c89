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

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import passes, portable
from ..backends.choice import choose
from ..backends.passes import Forward
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

    A row that overflows is done again around the largest logit of all shards; to know of it the host reads one number back
    from a CUDA device.

    Args:
        x: (N, D), labels: (N,) of the whole vocabulary, both the same on every process. head: this process's shard, possibly
            without a row. group: name of the process group.
    """
    chosen, size, processes = choose(backend, x), passes.workspace_of(x.device, workspace), _named(group)
    with inside_op(x):
        aimed = aim(labels, len(head.weight), ignore_index, processes)
        options: dict[str, Any] = {"tiles": chosen.tiles(None), "magnify": chosen.magnify(x.dtype)}
        options |= {"want_direction": want_direction, "workspace": size, "parts": Shards(processes)}
        return portable.forward(x, head, aimed, IGNORED, **options), aimed


class Shards(passes.Whole):
    """The head's rows spread over a group, this one's perhaps none; labels are those of `aim`, none IGNORED.

    A label that no shard owns gives NaN.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def target_logits(self, x: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        owned = labels >= 0
        found = x.new_zeros((3, len(x)), dtype=compute_dtype(x.dtype))  # z_y, its slope, owners
        if len(head.weight):
            target, slope = passes.target_logits(x, head, labels.where(owned, 0))
            found[0] = target.where(owned, 0.0)
            found[1] = owned if slope is None else slope.where(owned, 0.0)
            found[2] = owned
        self.add_up(found)
        target = found[0].where(found[2] == 1, torch.nan)
        return target, None if head.softcap is None else found[1]

    def add_up(self, sums: Tensor) -> None:
        dist.all_reduce(sums, group=self.group)

    def take_largest(self, values: Tensor) -> None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)

    def directions(self, head: Head, labels: Tensor, slope: Tensor | None, others: Tensor, pull: Tensor) -> Tensor:
        """From every shard's `pull`; the owner of a label adds its row of W."""
        pull.neg_()
        if len(head.weight):
            owned = labels >= 0
            coefficient = (others if slope is None else others * slope).where(owned, 0.0)
            toward = head.weight.index_select(0, labels.where(owned, 0)).to(pull.dtype)
            pull.addcmul_(toward, coefficient[:, None])
        self.add_up(pull)
        return pull.mul_(head.logit_scale).to(head.weight.dtype)
