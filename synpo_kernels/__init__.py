"""Fused kernels for preference tuning: from hidden states and a language-model head to the loss, without the logits.

Needs torch alone; triton is imported where its kernels run.
"""

from . import losses
from .api import FusedLinearSynPOLoss, SynPOOutput, linear_logprobs, lora_head
from .certified import CertifiedLogprobs, CertifiedSynPOOutput, certified_logprobs
from .contrast import contrastive_mix, contrastive_sample
from .epilogue import synpo_pairs
from .losses import OBJECTIVES, Objective, SequenceStats, objective, sequence_stats

__all__ = [
    "OBJECTIVES",
    "CertifiedLogprobs",
    "CertifiedSynPOOutput",
    "FusedLinearSynPOLoss",
    "Objective",
    "SequenceStats",
    "SynPOOutput",
    "certified_logprobs",
    "contrastive_mix",
    "contrastive_sample",
    "linear_logprobs",
    "lora_head",
    "losses",
    "objective",
    "sequence_stats",
    "synpo_pairs",
]
