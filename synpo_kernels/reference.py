"""The specification: SynPO from full logits, one sequence at a time, in the simplest torch that says it.

Every other implementation is tested against this one in float64. It holds the (N, V) logits and loops over sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NaiveSynPO:
    """Loss () and statistics (B,) of `naive_synpo`; the statistics of a pair with an empty completion are 0."""

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_prob: Tensor
    rejected_prob: Tensor
    language_reward: Tensor
    empty_pairs: int


def naive_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """logp_t = log_softmax(z_t)[y_t] from full logits z (..., V); 0 at ignored rows. Shapes as `linear_logprobs`."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = labels != ignore_index
    index = labels.where(kept, 0)
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0].where(kept, 0.0)


def naive_synpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    alpha: float = 30.0,
    beta: float = 0.2,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> NaiveSynPO:
    """L = -mean over pairs of σ(α (P+ - P-)) + β a+; layouts as `FusedLinearSynPOLoss`. arXiv 2506.00835."""
    logps = naive_logprobs(
        hidden, weight, labels, bias=bias, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index
    )
    if cu_seqlens is None:
        sequences = list(zip(logps, labels))
    else:
        bounds = cu_seqlens.tolist()
        sequences = [(logps[a:b], labels[a:b]) for a, b in zip(bounds, bounds[1:])]
    tokens = [row[kept != ignore_index] for row, kept in sequences]
    pairs = list(zip(tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]))
    zero = logps.sum() * 0.0
    rows, losses = [], []
    for chosen, rejected in pairs:
        if len(chosen) == 0 or len(rejected) == 0:
            rows.append([zero] * 5)
            continue
        m_chosen, m_rejected = chosen.mean(), rejected.mean()
        p_chosen, p_rejected, reward = m_chosen.exp(), m_rejected.exp(), chosen.exp().mean()
        losses.append(-(torch.sigmoid(alpha * (p_chosen - p_rejected)) + beta * reward))
        rows.append([m_chosen, m_rejected, p_chosen, p_rejected, reward])
    loss = torch.stack(losses).mean() if losses else zero
    m_chosen, m_rejected, p_chosen, p_rejected, reward = (torch.stack(column).detach() for column in zip(*rows))
    return NaiveSynPO(loss, m_chosen, m_rejected, p_chosen, p_rejected, reward, len(pairs) - len(losses))
