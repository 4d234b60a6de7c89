"""Fused kernels for preference tuning: from hidden states and a language-model head to the loss, without the logits."""

from . import losses
from .api import FusedLinearSynPOLoss, SynPOOutput, linear_logprobs
from .losses import OBJECTIVES, Objective, SequenceStats, sequence_stats

__all__ = [
    "OBJECTIVES",
    "FusedLinearSynPOLoss",
    "Objective",
    "SequenceStats",
    "SynPOOutput",
    "linear_logprobs",
    "losses",
    "sequence_stats",
]
