"""From per-token log-probabilities to the SynPO loss, its statistics and g_t = ∂L/∂logp_t, in two small launches.

    sequence_sums    one program a sequence: T, Σ logp, Σ p, Σ p² over its counted tokens
    pair_loss        every program adds up the pairs (all in one order, so all find the same number of valid ones), then
                     writes g of the sequences it owns; the first writes the loss

All arithmetic is in float64: a few thousand numbers, and no cancellation to think about. Two launches because g depends
on how many pairs are valid, which only the sums of every sequence tell. No atomics: the same bits every run.

Shape legend: S = 2B sequences, chosen first, B pairs, T padded length, N tokens in all.
"""

# A kernel takes pointers and scalars typed at launch.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Bound

BLOCK_T = 1024  # tokens at a time
BLOCK_B = 256  # pairs at a time
PROGRAMS = 512  # of pair_loss at most; each adds up all pairs, so there are not more than fill a GPU
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}  # of both launches
SIZES = ["S", "T", "N"]  # they change from batch to batch, which must not compile anything anew


@triton.jit
def bounds_of(bound_ptr, s, T, N, HAS_BOUNDS: tl.constexpr):
    """First token of sequence s and the one after its last, int64 and inside [0, N] whatever the bounds say."""
    if HAS_BOUNDS:
        first = tl.minimum(tl.maximum(tl.load(bound_ptr + s).to(tl.int64), 0), N)
        last = tl.minimum(tl.maximum(tl.load(bound_ptr + s + 1).to(tl.int64), 0), N)
    else:
        first = s * T
        last = first + T
    return first, last


@triton.jit
def counted_logps(logp_ptr, label_ptr, t, inside, ignore_index, HAS_LABELS: tl.constexpr):
    """(logp float64, 0 where it does not count; whether it counts) of tokens t."""
    counted = inside
    if HAS_LABELS:
        counted = inside & (tl.load(label_ptr + t, mask=inside, other=0) != ignore_index)
    return tl.load(logp_ptr + t, mask=counted, other=0.0).to(tl.float64), counted


@triton.jit
def pair_terms(sums_ptr, i, inside, S, alpha):
    """Of pairs i: (valid 0 or 1, T+, T-, m+, m-, P+, P-, a+, σ(α (P+ - P-))), all float64."""
    pairs = S // 2
    tokens_c = tl.load(sums_ptr + i, mask=inside, other=0.0)
    tokens_r = tl.load(sums_ptr + i + pairs, mask=inside, other=0.0)
    mean_c = tl.load(sums_ptr + S + i, mask=inside, other=0.0) / tl.maximum(tokens_c, 1.0)
    mean_r = tl.load(sums_ptr + S + i + pairs, mask=inside, other=0.0) / tl.maximum(tokens_r, 1.0)
    reward = tl.load(sums_ptr + 2 * S + i, mask=inside, other=0.0) / tl.maximum(tokens_c, 1.0)
    valid = ((tokens_c > 0) & (tokens_r > 0)).to(tl.float64)
    p_c, p_r = tl.exp(mean_c), tl.exp(mean_r)
    preferred = 1.0 / (1.0 + tl.exp(-alpha * (p_c - p_r)))
    return valid, tokens_c, tokens_r, mean_c, mean_r, p_c, p_r, reward, preferred


@triton.jit(do_not_specialize=SIZES)
def sequence_sums_kernel(
    logp_ptr,
    label_ptr,
    bound_ptr,
    sums_ptr,
    S,
    T,
    N,
    ignore_index,
    HAS_LABELS: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid: (S,); a program owns one sequence.

    Pointers: logp (N,), label (N,) int64, bound (S + 1,) int, sums (4, S) float64: T, Σ logp, Σ p, Σ p². label and bound
    are touched only with HAS_LABELS, HAS_BOUNDS; without bounds a sequence is T tokens in a row.
    """
    s = tl.program_id(0).to(tl.int64)
    first, last = bounds_of(bound_ptr, s, T, N, HAS_BOUNDS)
    tokens = tl.zeros((BLOCK_T,), dtype=tl.float64)
    logps = tl.zeros((BLOCK_T,), dtype=tl.float64)
    probs = tl.zeros((BLOCK_T,), dtype=tl.float64)
    squares = tl.zeros((BLOCK_T,), dtype=tl.float64)
    for at in range(first, last, BLOCK_T):
        t = at + tl.arange(0, BLOCK_T)
        logp, counted = counted_logps(logp_ptr, label_ptr, t, t < last, ignore_index, HAS_LABELS)
        p = tl.where(counted, tl.exp(logp), 0.0)
        tokens += counted.to(tl.float64)
        logps += logp
        probs += p
        squares += p * p
    tl.store(sums_ptr + s, tl.sum(tokens, 0))
    tl.store(sums_ptr + S + s, tl.sum(logps, 0))
    tl.store(sums_ptr + 2 * S + s, tl.sum(probs, 0))
    tl.store(sums_ptr + 3 * S + s, tl.sum(squares, 0))


@triton.jit(do_not_specialize=SIZES)
def pair_loss_kernel(
    logp_ptr,
    label_ptr,
    bound_ptr,
    sums_ptr,
    g_ptr,
    field_ptr,
    nonfinite_ptr,
    empty_ptr,
    loss_ptr,
    S,
    T,
    N,
    alpha,
    beta,
    ignore_index,
    HAS_LABELS: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Grid: (P,); program p owns sequences p, p + P, ... and, where they are chosen ones, the statistics of their pairs.

    Pointers beside those of `sequence_sums_kernel`: g (N,), field (8, B) in the order of `ops.pair_loss.FIELDS`, nonfinite (B,)
    bool, empty () int64, loss (). g is 0 where nothing counts and at tokens before the first bound or past the last.
    """
    pairs = S // 2
    losses = tl.zeros((BLOCK_B,), dtype=tl.float64)
    valids = tl.zeros((BLOCK_B,), dtype=tl.float64)
    for first_pair in range(0, pairs, BLOCK_B):
        j = first_pair + tl.arange(0, BLOCK_B).to(tl.int64)
        counts, _, _, _, _, _, _, rewards, preferences = pair_terms(sums_ptr, j, j < pairs, S, alpha)
        losses -= (preferences + beta * rewards) * counts
        valids += counts
    count = tl.sum(valids, 0)
    scale = 1.0
    if MEAN:
        scale = 1.0 / tl.maximum(count, 1.0)
    if tl.program_id(0) == 0:
        tl.store(loss_ptr, (tl.sum(losses, 0) * scale).to(loss_ptr.dtype.element_ty))
        tl.store(empty_ptr, (pairs - count).to(tl.int64))

    for s in range(tl.program_id(0).to(tl.int64), S, tl.num_programs(0)):
        i = s % pairs
        valid, tokens_c, tokens_r, mean_c, mean_r, p_c, p_r, reward, preferred = pair_terms(sums_ptr, i, True, S, alpha)
        push = alpha * preferred * (1.0 - preferred) * valid * scale
        each_c = -push * p_c / tl.maximum(tokens_c, 1.0)  # g_t = each + by_prob · p_t
        each_r = push * p_r / tl.maximum(tokens_r, 1.0)
        by_prob = -beta * valid * scale / tl.maximum(tokens_c, 1.0)
        each = tl.where(s < pairs, each_c, each_r)
        slope = tl.where(s < pairs, by_prob, 0.0)
        first, last = bounds_of(bound_ptr, s, T, N, HAS_BOUNDS)
        start = tl.where(s == 0, 0, first)  # the first and the last sequence clear what lies outside all
        stop = tl.where(s == S - 1, N, last)
        for at in range(start, stop, BLOCK_T):
            t = at + tl.arange(0, BLOCK_T)
            inside = (t >= first) & (t < last)
            logp, counted = counted_logps(logp_ptr, label_ptr, t, inside, ignore_index, HAS_LABELS)
            g = tl.where(counted, each + slope * tl.exp(logp), 0.0)
            tl.store(g_ptr + t, g.to(g_ptr.dtype.element_ty), mask=t < stop)
        if s < pairs:
            # every term of the sum of squares is positive: nothing cancels
            probs = tl.load(sums_ptr + 2 * S + i)
            squares = tl.load(sums_ptr + 3 * S + i)
            norm_c = tl.sqrt(each_c * each_c * tokens_c + 2.0 * each_c * by_prob * probs + by_prob * by_prob * squares)
            norm_r = tl.sqrt(each_r * each_r * tokens_r)
            type_ = field_ptr.dtype.element_ty
            tl.store(field_ptr + i, (mean_c * valid).to(type_))
            tl.store(field_ptr + pairs + i, (mean_r * valid).to(type_))
            tl.store(field_ptr + 2 * pairs + i, (p_c * valid).to(type_))
            tl.store(field_ptr + 3 * pairs + i, (p_r * valid).to(type_))
            tl.store(field_ptr + 4 * pairs + i, (reward * valid).to(type_))
            tl.store(field_ptr + 5 * pairs + i, ((p_c - p_r) * valid).to(type_))
            tl.store(field_ptr + 6 * pairs + i, norm_c.to(type_))
            tl.store(field_ptr + 7 * pairs + i, norm_r.to(type_))
            unbounded = (tl.abs(mean_c) < float("inf")) & (tl.abs(mean_r) < float("inf"))  # False for NaN too
            tl.store(nonfinite_ptr + i, tl.where(unbounded, 0, 1).to(tl.int8))


def launch(
    logps: Tensor,
    labels: Tensor | None,
    bounds: Tensor | None,
    loss: Tensor,
    g: Tensor,
    fields: Tensor,
    empty: Tensor,
    nonfinite: Tensor,
    *,
    alpha: float,
    beta: float,
    ignore_index: int | None,
    mean: bool,
) -> None:
    """Both kernels; (S, T) log-probabilities, or (N,) with `bounds` (S + 1,); nonfinite is bool, the results are as torch
    allocates them. See the kernels for the rest."""
    assert logps.is_contiguous() and (labels is None or labels.is_contiguous())
    sequences, ignored = 2 * len(nonfinite), 0 if ignore_index is None else ignore_index
    sums = torch.empty(4, sequences, dtype=torch.float64, device=logps.device)
    settings = (float(alpha), float(beta), ignored, mean)
    add_up, finish = bound(logps.device, _layout(logps), _layout(labels), _layout(bounds), *settings)
    inputs = (logps, logps if labels is None else labels, logps if bounds is None else bounds, sums)
    sizes = {"S": sequences, "T": logps.shape[-1], "N": logps.numel()}
    add_up((sequences,), *inputs, **sizes)
    finish((min(sequences, PROGRAMS),), *inputs, g, fields, nonfinite, empty, loss, **sizes)


def _layout(tensor: Tensor | None) -> tuple[torch.dtype, bool] | None:
    """What a kernel is compiled for of a tensor."""
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0)


@lru_cache(256)
def bound(
    device: torch.device,
    logps: tuple[torch.dtype, bool],
    labels: tuple[torch.dtype, bool] | None,
    bounds: tuple[torch.dtype, bool] | None,
    alpha: float,
    beta: float,
    ignore_index: int,
    mean: bool,
) -> tuple[Bound, Bound]:
    """What does not change from batch to batch, found once."""
    shared = {
        **dict.fromkeys(SIZES),
        "ignore_index": ignore_index,
        "HAS_LABELS": labels is not None,
        "HAS_BOUNDS": bounds is not None,
        "BLOCK_T": BLOCK_T,
    }
    own = {"alpha": alpha, "beta": beta, "MEAN": mean, "BLOCK_B": BLOCK_B}
    return Bound(sequence_sums_kernel, shared, OPTIONS), Bound(pair_loss_kernel, shared | own, OPTIONS)
