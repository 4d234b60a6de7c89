"""Per-token log-probabilities → per-sequence statistics → the loss of one objective.

    logps (2B, T) or (N,)  →  SequenceStats (2B,), chosen first  →  per-pair loss (B,)  →  scalar

An objective is one function of the statistics, registered in `OBJECTIVES` by its decorator. Plain torch, differentiable,
no loop over pairs and no host synchronisation. A pair with an empty completion contributes nothing and is counted in
`SequenceStats.empty_pairs`; a value that is not finite is carried into the loss and counted in `nonfinite_pairs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class SequenceStats:
    """Statistics of S sequences, (S,) each; of 2B sequences the first B are the chosen, the last B the rejected.

    An empty sequence has tokens 0 and every other statistic 0.
    """

    logps: Tensor  # Σ_t logp_t
    mean_logps: Tensor  # m = Σ_t logp_t / T
    mean_probs: Tensor  # a = Σ_t exp(logp_t) / T
    tokens: Tensor  # T, in the dtype of the others

    @property
    def chosen(self) -> SequenceStats:
        return self._half(0)

    @property
    def rejected(self) -> SequenceStats:
        return self._half(1)

    @property
    def valid_pairs(self) -> Tensor:
        """(B,) bool: both completions have a token."""
        return (self.chosen.tokens > 0) & (self.rejected.tokens > 0)

    @property
    def empty_pairs(self) -> Tensor:
        """() int64: pairs whose chosen or rejected completion has no token."""
        return (~self.valid_pairs).sum()

    @property
    def nonfinite_pairs(self) -> Tensor:
        """(B,) bool: pairs in which some log-probability is NaN or infinite."""
        return ~(torch.isfinite(self.chosen.logps) & torch.isfinite(self.rejected.logps))

    def detach(self) -> SequenceStats:
        return SequenceStats(*(getattr(self, name).detach() for name in self.__dataclass_fields__))

    def _half(self, which: int) -> SequenceStats:
        if self.tokens.shape[0] % 2:
            raise ValueError(f"pairs need an even number of sequences, chosen first; got {self.tokens.shape[0]}")
        return SequenceStats(*(getattr(self, name).chunk(2)[which] for name in self.__dataclass_fields__))


def sum_by_sequence(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums over each sequence: (S, T) → (S,); packed (N,) with cu_seqlens (S + 1,) → (S,). Rows past the last bound drop."""
    if cu_seqlens is None:
        return values.sum(-1)
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, initial=0, unsafe=True)


def sequence_stats(
    logps: Tensor,
    labels: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> SequenceStats:
    """Reduce per-token log-probabilities to per-sequence statistics.

    Args:
        logps: (S, T), or (N,) with `cu_seqlens`; floating.
        labels: same shape; tokens equal to `ignore_index` do not count. None: every token counts.
        cu_seqlens: (S + 1,) int bounds of the packed sequences, 0 first and N last; equal neighbours are an empty sequence.

    Raises:
        ValueError: shapes disagree, or (checked on CPU only, where it costs nothing) bounds are not ascending from 0 to N.
    """
    check_layout(logps, labels, cu_seqlens)
    counted = torch.ones_like(logps, dtype=torch.bool)
    if labels is not None and ignore_index is not None:
        counted = labels != ignore_index
    columns = (logps.where(counted, 0.0), logps.exp().where(counted, 0.0), counted.to(logps.dtype))
    total, probs, tokens = (sum_by_sequence(values, cu_seqlens) for values in columns)
    divisor = tokens.clamp(min=1.0)
    return SequenceStats(total, total / divisor, probs / divisor, tokens)


def check_layout(values: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError unless `values` is (S, T), or (N,) with cu_seqlens (S + 1,), and labels has its shape."""
    if labels is not None and labels.shape != values.shape:
        raise ValueError(f"labels must have one entry a token, shape {tuple(values.shape)}, got {tuple(labels.shape)}")
    if cu_seqlens is None:
        if values.dim() != 2:
            raise ValueError(
                f"without cu_seqlens per-token values must be (sequences, tokens), got shape {tuple(values.shape)}; "
                "pass cu_seqlens for packed rows"
            )
        return
    if values.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"packed per-token values must be (N,) with cu_seqlens (sequences + 1,), got {tuple(values.shape)} and "
            f"{tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.device != values.device:
        raise ValueError(
            f"cu_seqlens must be int32 or int64 on {values.device}, got {cu_seqlens.dtype} on {cu_seqlens.device}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ascending = bool((cu_seqlens.diff() >= 0).all())
        if not ascending or cu_seqlens[0] != 0 or cu_seqlens[-1] != values.shape[0]:
            raise ValueError(f"cu_seqlens must ascend from 0 to {values.shape[0]} rows, got {cu_seqlens.tolist()}")


def token_norms(
    coefficients: Tensor,
    *,
    labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """‖g‖₂ over the tokens of each completion: per-token coefficients → (chosen (B,), rejected (B,)).

    With g = torch.autograd.grad(loss, logps) this is the gradient balance of any objective; layout as `sequence_stats`.
    """
    check_layout(coefficients, labels, cu_seqlens)
    squares = coefficients.square()
    if labels is not None:
        squares = squares.where(labels != ignore_index, 0.0)
    chosen, rejected = sum_by_sequence(squares, cu_seqlens).sqrt().chunk(2)
    return chosen, rejected


def reduce_pairs(per_pair: Tensor, counted: Tensor, reduction: str = "mean") -> Tensor:
    """(B,) losses → their mean over the pairs that count ("mean"), their sum ("sum"), or (B,) with 0 elsewhere ("none").

    Multiplies by the mask, so that a NaN stays a NaN. No counted pair gives a zero that is connected to the graph.
    """
    weights = counted.to(per_pair.dtype)
    masked = per_pair * weights
    if reduction == "none":
        return masked
    if reduction == "sum":
        return masked.sum()
    if reduction == "mean":
        return masked.sum() / weights.sum().clamp(min=1.0)
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def check_parameters(
    *, positive: Mapping[str, float] | None = None, least_zero: Mapping[str, float] | None = None
) -> None:
    """Raise ValueError for the first parameter of an objective that is not a positive, or not a non-negative, finite number."""
    for name, value in (positive or {}).items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    for name, value in (least_zero or {}).items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative, got {value}")


@dataclass(frozen=True)
class Objective:
    """A loss by name and what it needs besides the statistics of the policy."""

    name: str
    function: Callable[..., Tensor]
    needs_reference: bool  # call function(stats, reference_stats, ...)
    needs_rejected: bool  # False: the rejected halves may be empty

    def __call__(self, stats: SequenceStats, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(stats, *args, **kwargs)


OBJECTIVES: dict[str, Objective] = {}


def objective(
    *, reference: bool = False, rejected: bool = True
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: register function(stats, **parameters, reduction="mean") -> () under its own name in `OBJECTIVES`.

    Args:
        reference: it takes the statistics of a reference model as its second argument.
        rejected: it needs both completions of a pair; False: the chosen one alone.

    Its keyword arguments with defaults are its parameters; `reduction` is as in `reduce_pairs`.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        OBJECTIVES[function.__name__] = Objective(function.__name__, function, reference, rejected)
        return function

    return register


@objective()
def synpo(stats: SequenceStats, *, alpha: float = 30.0, beta: float = 0.2, reduction: str = "mean") -> Tensor:
    """L = -[ σ(α (P+ - P-)) + β a+ ], P = exp(m) the geometric, a the arithmetic mean of the token probabilities.

    SynPO, https://arxiv.org/abs/2506.00835. Raises ValueError unless alpha > 0 and beta >= 0.
    """
    check_parameters(positive={"alpha": alpha}, least_zero={"beta": beta})
    margin = stats.chosen.mean_logps.exp() - stats.rejected.mean_logps.exp()
    per_pair = -(torch.sigmoid(alpha * margin) + beta * stats.chosen.mean_probs)
    return reduce_pairs(per_pair, stats.valid_pairs, reduction)


@objective(rejected=False)
def sft(stats: SequenceStats, *, reduction: str = "mean") -> Tensor:
    """L = -m+, the mean negative log-likelihood of the chosen completion; each completion weighs the same."""
    return reduce_pairs(-stats.chosen.mean_logps, stats.chosen.tokens > 0, reduction)


@objective(reference=True)
def dpo(stats: SequenceStats, reference: SequenceStats, *, beta: float = 0.1, reduction: str = "mean") -> Tensor:
    """L = -log σ(β [ (log π - log π_ref)(y+) - (log π - log π_ref)(y-) ]), sums of log-probabilities.

    DPO, https://arxiv.org/abs/2305.18290, equation 7. Raises ValueError unless beta > 0.
    """
    check_parameters(positive={"beta": beta})
    chosen = stats.chosen.logps - reference.chosen.logps
    rejected = stats.rejected.logps - reference.rejected.logps
    return reduce_pairs(-F.logsigmoid(beta * (chosen - rejected)), stats.valid_pairs, reduction)


@objective(reference=True)
def ipo(stats: SequenceStats, reference: SequenceStats, *, beta: float = 0.1, reduction: str = "mean") -> Tensor:
    """L = ( (m - m_ref)(y+) - (m - m_ref)(y-) - 1/(2β) )², with log-likelihoods averaged over tokens.

    IPO, https://arxiv.org/abs/2310.12036, equation 17 (β is its τ); averaged so that 1/(2β) does not depend on length.
    Raises ValueError unless beta > 0.
    """
    check_parameters(positive={"beta": beta})
    chosen = stats.chosen.mean_logps - reference.chosen.mean_logps
    rejected = stats.rejected.mean_logps - reference.rejected.mean_logps
    return reduce_pairs((chosen - rejected - 0.5 / beta).square(), stats.valid_pairs, reduction)


@objective()
def simpo(stats: SequenceStats, *, beta: float = 2.0, gamma: float = 1.0, reduction: str = "mean") -> Tensor:
    """L = -log σ(β (m+ - m-) - γ).

    SimPO, https://arxiv.org/abs/2405.14734, equation 6. Raises ValueError unless beta > 0 and gamma >= 0.
    """
    check_parameters(positive={"beta": beta}, least_zero={"gamma": gamma})
    margin = beta * (stats.chosen.mean_logps - stats.rejected.mean_logps) - gamma
    return reduce_pairs(-F.logsigmoid(margin), stats.valid_pairs, reduction)


@objective()
def cpo(stats: SequenceStats, *, beta: float = 0.1, weight: float = 1.0, reduction: str = "mean") -> Tensor:
    """L = -log σ(β (log π(y+) - log π(y-))) - weight · m+: sums in the preference term, the mean in the likelihood term.

    CPO, https://arxiv.org/abs/2401.08417, equations 4-5. Raises ValueError unless beta > 0 and weight >= 0.
    """
    check_parameters(positive={"beta": beta}, least_zero={"weight": weight})
    preference = -F.logsigmoid(beta * (stats.chosen.logps - stats.rejected.logps))
    return reduce_pairs(preference - weight * stats.chosen.mean_logps, stats.valid_pairs, reduction)


@objective()
def orpo(stats: SequenceStats, *, beta: float = 0.1, reduction: str = "mean") -> Tensor:
    """L = -m+ - β log σ(log odds(y+) - log odds(y-)), odds = P / (1 - P) with P = exp(m).

    ORPO, https://arxiv.org/abs/2403.07691, equations 4-7 (β is its λ). m is held below -1e-6, where odds are 1e6.
    Raises ValueError unless beta >= 0.
    """
    check_parameters(least_zero={"beta": beta})
    chosen, rejected = (half.mean_logps.clamp(max=-1e-6) for half in (stats.chosen, stats.rejected))
    log_odds = (chosen - torch.log(-torch.expm1(chosen))) - (rejected - torch.log(-torch.expm1(rejected)))
    return reduce_pairs(-stats.chosen.mean_logps - beta * F.logsigmoid(log_odds), stats.valid_pairs, reduction)


def synpo_coefficients(
    stats: SequenceStats,
    logps: Tensor,
    labels: Tensor | None,
    *,
    alpha: float = 30.0,
    beta: float = 0.2,
    cu_seqlens: Tensor | None = None,
    ignore_index: int | None = IGNORE_INDEX,
) -> Tensor:
    """∂L/∂logp_t of `synpo` with reduction "sum", in the shape of `logps`; 0 at ignored tokens and in empty pairs.

    labels: None, or ignore_index None: every token counts, as in `sequence_stats`.

    chosen:   -( α σ'(u) P+ + β exp(logp_t) ) / T+        rejected:   +α σ'(u) P- / T-        u = α (P+ - P-)
    """
    p_chosen, p_rejected = stats.chosen.mean_logps.exp(), stats.rejected.mean_logps.exp()
    s = torch.sigmoid(alpha * (p_chosen - p_rejected))
    pull = alpha * s * (1.0 - s) * stats.valid_pairs
    divisor = stats.tokens.clamp(min=1.0)
    constant = torch.cat([-pull * p_chosen, pull * p_rejected]) / divisor
    reward = torch.cat([stats.valid_pairs * -beta, torch.zeros_like(pull)]) / divisor
    if cu_seqlens is None:
        constant, reward = constant[:, None], reward[:, None]
    else:
        lengths = cu_seqlens.diff()
        constant = constant.repeat_interleave(lengths, output_size=logps.shape[0])
        reward = reward.repeat_interleave(lengths, output_size=logps.shape[0])
    coefficients = constant + reward * logps.exp()
    if labels is None or ignore_index is None:
        return coefficients
    return coefficients.where(labels != ignore_index, 0.0)
