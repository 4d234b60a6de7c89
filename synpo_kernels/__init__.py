"""Fused kernels for preference tuning: from hidden states and a language-model head to the loss, without the logits.

Needs torch alone; triton is imported where its kernels run.
"""

from . import losses
from .api import FusedLinearSynPOLoss, SynPOOutput, linear_logprobs, lora_head
from .contrast import contrastive_mix, contrastive_sample
from .losses import OBJECTIVES, Objective, SequenceStats, objective, sequence_stats
from .ops.pair_loss import synpo_pairs

__all__ = [
    "OBJECTIVES",
    "FusedLinearSynPOLoss",
    "Objective",
    "SequenceStats",
    "SynPOOutput",
    "contrastive_mix",
    "contrastive_sample",
    "linear_logprobs",
    "lora_head",
    "losses",
    "objective",
    "sequence_stats",
    "synpo_pairs",
]
