"""One batch of pairs → the loss of an objective and what is worth logging about every pair.

    PairBatch → vision tower (once a pair) → wrapped top-level forward [ hidden states of the completion rows only (N, D)
              → fused log-probabilities (the logits never exist) → statistics of 2B sequences → loss ], statistics (B,)

The loss is computed inside that forward, in the place of the head: the head's parameters are whole there under FSDP and
ZeRO-3, and DDP finds them in the graph of what the forward returns.

The objectives are those of `synpo_kernels.losses.OBJECTIVES`: a function registered there is a `loss_type` here. Its
parameters are the settings of the same name (alpha, beta, gamma, weight); those left out keep the function's defaults.

Rewards are β (log π − log π_ref) where the objective has a reference, β = 1 where it has no such parameter, and the mean
log-likelihood of a token where it has none. Everything under `synpo/` is the same for every objective, so that runs can be
compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from synpo.config import ConfigError, suggest
from synpo.data.collate import PairBatch
from synpo.model.adapter import CaptionModel, evaluating
from synpo.model.packing import packed_inputs
from synpo.model.peft_kinds import base_is_kept
from synpo.train.reference import ReferenceStore, kind_of
from synpo_kernels import (
    OBJECTIVES,
    FusedLinearSynPOLoss,
    Head,
    SequenceStats,
    in_place_of_logits,
    linear_logprobs,
    sequence_stats,
)
from synpo_kernels.losses import Objective, token_norms


@dataclass(frozen=True)
class Outcome:
    """What one batch gave.

    Attributes:
        loss: () mean over the pairs, differentiable.
        statistics: name → (B,) detached, one value a pair.
        nonfinite: (B,) bool, pairs in which a log-probability is NaN or infinite; any of them makes the loss NaN too.
    """

    loss: Tensor
    statistics: dict[str, Tensor]
    nonfinite: Tensor


def parameters_of(loss_type: str, given: Mapping[str, float | None]) -> dict[str, float]:
    """All parameters of an objective: those given, and the defaults of the rest.

    Raises ConfigError for an unknown objective, a parameter that is given but that it does not have, and a value it refuses.
    """
    if loss_type not in OBJECTIVES:
        raise ConfigError(f"train.loss_type: unknown objective {loss_type!r}; {suggest(loss_type, OBJECTIVES)}")
    signature = inspect.signature(OBJECTIVES[loss_type].function).parameters
    known = {
        name: float(p.default)
        for name, p in signature.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and name != "reduction"
    }
    for name, value in given.items():
        if value is None:
            continue
        if name not in known:
            has = ", ".join(f"{k} = {v:g}" for k, v in known.items()) or "none"
            raise ConfigError(f"train.{name}: {loss_type} has no such parameter; it has {has}")
        known[name] = float(value)
    _try(OBJECTIVES[loss_type], known)
    return known


def _try(objective: Objective, parameters: Mapping[str, float]) -> None:
    """Call an objective once, on one pair: what it raises of its parameters is a ConfigError, before anything is loaded."""
    stats = SequenceStats(*(torch.tensor([[-2.0, -4.0], [-1.0, -2.0], [0.4, 0.2], [2.0, 2.0]])))
    try:
        objective(stats, *([stats] if objective.needs_reference else []), **parameters)
    except ValueError as error:
        raise ConfigError(f"train: {objective.name}: {error}") from error


class PairObjective:
    """The loss of `loss_type` on batches of pairs.

    Args:
        lm: the model to train.
        loss_type: a name in `OBJECTIVES`. parameters: as `parameters_of`. backend: as `synpo_kernels.linear_logprobs`.
        reference: what dpo and ipo compare with, see reference.py: base, start, or auto.

    Attributes:
        reference: base or start, "" for an objective without a reference.
        autocast: gives the context of mixed precision for what runs outside of the model's own forward, the vision tower. It
            ends before that forward: autocast would keep weights that it cast without gradients.
        references: what the reference gave before training; it has to know every pair where `reference` is start.

    Raises ConfigError as `synpo.train.reference.kind_of`.
    """

    def __init__(
        self,
        lm: CaptionModel,
        loss_type: str,
        parameters: Mapping[str, float | None],
        backend: str = "auto",
        reference: str = "auto",
    ) -> None:
        self.lm, self.backend = lm, backend
        self.parameters = parameters_of(loss_type, parameters)
        self.objective = OBJECTIVES[loss_type]
        self.references: ReferenceStore | None = None
        self.autocast: Callable[[], AbstractContextManager[None]] = nullcontext
        self.reference = kind_of(reference, base_is_kept(lm.model)) if self.objective.needs_reference else ""

    def __call__(self, model: Any, batch: PairBatch) -> Outcome:
        """Loss and statistics of `batch`; `model` is `lm.model` as its trainer wrapped it."""
        # a tower that is trained runs inside the model's forward, where its gradients pass
        with self.autocast():
            visions = self.lm.encode_vision(batch["vision"]) if self.lm.vision_frozen else batch["vision"]
        reference = self._reference(model, batch, visions) if self.objective.needs_reference else None
        outcomes: list[Outcome] = []

        def score(hidden: Tensor, head: Head) -> Tensor:
            if self.objective.name == "synpo":
                outcomes.append(self._synpo(hidden, head, batch["targets"], batch["cu_seqlens"]))
            else:
                outcomes.append(self._any(hidden, head, batch["targets"], batch["cu_seqlens"], reference))
            return outcomes[-1].loss

        loss = self._forward(model, batch, visions, score)
        return replace(outcomes[-1], loss=loss)

    def _forward(
        self, model: Any, batch: PairBatch, visions: list[Any], function: Callable[[Tensor, Head], Tensor]
    ) -> Tensor:
        """`function`, inside the forward, of the rows (N, D) that predict completion tokens, in the dtype of the head, and it."""
        if batch["lengths"] is None:
            inputs = self.lm.forward_kwargs(batch["input_ids"], batch["attention_mask"], [*visions, *visions])
        else:
            inputs = packed_inputs(self.lm, batch["input_ids"], batch["lengths"], batch["sequences"], visions)

        def completion_rows(hidden: Tensor, head: Head) -> Tensor:
            rows = hidden.flatten(0, 1).index_select(0, batch["rows"])
            return function(rows.to(head.weight.dtype), head)

        return in_place_of_logits(model, completion_rows, **inputs)

    def _logprobs(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        return linear_logprobs(hidden, head, targets, ignore_index=None, backend=self.backend)

    def reference_stats(self, batch: PairBatch) -> SequenceStats:
        """Statistics of the 2B answers under the reference model, outside of training (start: before it); of an objective
        without a reference, under the model as it is."""
        return self._run_reference(self.lm.model, batch, self.lm.encode_vision(batch["vision"]))

    def _reference(self, model: Any, batch: PairBatch, visions: list[Any]) -> SequenceStats:
        """Statistics under the reference, known ones first."""
        if self.references is not None and self.references.holds(batch["pair_ids"]):
            return self.references.stats(batch["pair_ids"], batch["input_ids"].device)
        if self.reference == "start":
            raise ConfigError(
                f"what the reference, the model before the first step, says of pairs {', '.join(batch['pair_ids'])} is not "
                "known: SynPOTrainer.train() asks it about its train and eval dataset; elsewhere fill "
                "PairObjective.references (a ReferenceStore) before training"
            )
        return self._run_reference(model, batch, visions)

    @torch.no_grad()
    def _run_reference(self, model: Any, batch: PairBatch, visions: list[Any]) -> SequenceStats:
        """Statistics under the model without its dropout, and with its adapter off where the reference is base."""
        off = self.lm.model.disable_adapter() if self.reference == "base" else nullcontext()
        with off, evaluating(model):
            logps = self._forward(model, batch, visions, lambda h, head: self._logprobs(h, head, batch["targets"]))
        return sequence_stats(logps, cu_seqlens=batch["cu_seqlens"])

    def _synpo(self, hidden: Tensor, head: Head, targets: Tensor, cu_seqlens: Tensor) -> Outcome:
        fused = FusedLinearSynPOLoss(
            self.parameters["alpha"], self.parameters["beta"], ignore_index=None, backend=self.backend
        )
        out = fused(hidden, head, targets, cu_seqlens=cu_seqlens)
        means = torch.cat([out.chosen_logps, out.rejected_logps])
        statistics = _statistics(means, means * cu_seqlens.diff(), means, out.language_reward)
        if torch.is_grad_enabled():
            statistics |= _balance(out.chosen_grad_norm, out.rejected_grad_norm)
        s = torch.sigmoid(self.parameters["alpha"] * out.margin)
        statistics["synpo/saturation"] = 1 - 4 * s * (1 - s)
        return Outcome(out.loss, statistics, out.nonfinite_pairs)

    def _any(
        self, hidden: Tensor, head: Head, targets: Tensor, cu_seqlens: Tensor, reference: SequenceStats | None
    ) -> Outcome:
        logps = self._logprobs(hidden, head, targets)
        stats = sequence_stats(logps, cu_seqlens=cu_seqlens)
        loss = self.objective(stats, *([] if reference is None else [reference]), **self.parameters)
        now = stats.detach()
        rewards = now.mean_logps
        if reference is not None:
            rewards = self.parameters.get("beta", 1.0) * (now.logps - reference.logps)
        statistics = _statistics(now.mean_logps, now.logps, rewards, now.chosen.mean_probs)
        if logps.requires_grad:
            # in a graph of its own, which activation checkpointing does not take apart: that would run the model again
            with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
                apart = logps.detach().requires_grad_()
                stats = sequence_stats(apart, cu_seqlens=cu_seqlens)
                twin = self.objective(stats, *([] if reference is None else [reference]), **self.parameters)
                (coefficients,) = torch.autograd.grad(twin, apart)
            statistics |= _balance(*token_norms(coefficients, cu_seqlens=cu_seqlens))
        return Outcome(loss, statistics, now.nonfinite_pairs)


def _statistics(mean_logps: Tensor, logps: Tensor, rewards: Tensor, language_reward: Tensor) -> dict[str, Tensor]:
    """The logged values (B,) from those of 2B sequences, chosen first. Names without `synpo/` mean what they mean in TRL."""
    (chosen, rejected), (chosen_reward, rejected_reward) = mean_logps.chunk(2), rewards.chunk(2)
    return {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/accuracies": (chosen_reward > rejected_reward).to(rewards.dtype),
        "rewards/margins": chosen_reward - rejected_reward,
        "logps/chosen": logps.chunk(2)[0],
        "logps/rejected": logps.chunk(2)[1],
        "synpo/chosen_logp": chosen,
        "synpo/rejected_logp": rejected,
        "synpo/chosen_prob": chosen.exp(),
        "synpo/rejected_prob": rejected.exp(),
        "synpo/margin": chosen.exp() - rejected.exp(),
        "synpo/language_reward": language_reward,
    }


def _balance(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Gradient balance (B,): ‖∂l/∂logp‖₂ over the tokens of each side, l the loss of that pair alone (not of the mean)."""
    pairs = len(chosen)
    return {"synpo/grad_balance/chosen": pairs * chosen, "synpo/grad_balance/rejected": pairs * rejected}
