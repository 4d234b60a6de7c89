"""Fused kernels for preference tuning: from hidden states and a language-model head to the loss, without the logits.

Needs torch alone; triton is imported where its kernels run.
"""

from . import losses
from .api import FusedLinearSynPOLoss, SynPOOutput, linear_logprobs
from .contrast import contrastive_mix, contrastive_sample
from .head import Head, lora_head
from .losses import OBJECTIVES, Objective, SequenceStats, objective, sequence_stats
from .model import hidden_states_and_head, in_place_of_logits
from .ops.pair_loss import synpo_pairs

__all__ = [
    "OBJECTIVES",
    "FusedLinearSynPOLoss",
    "Head",
    "Objective",
    "SequenceStats",
    "SynPOOutput",
    "contrastive_mix",
    "contrastive_sample",
    "hidden_states_and_head",
    "in_place_of_logits",
    "linear_logprobs",
    "lora_head",
    "losses",
    "objective",
    "sequence_stats",
    "synpo_pairs",
]
