"""Encoded pairs → one padded batch: 2B rows, the chosen ones first, labels already aligned to the row that predicts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from synpo.data.tokenize import EncodedPair
from synpo.model.adapter import pad_rows

IGNORE_INDEX = -100


class PairBatch(TypedDict):
    """B pairs as 2B rows of L tokens with N completion tokens among them; row i and row B + i belong to pair i."""

    input_ids: Tensor  # (2B, L) int64, right-padded
    attention_mask: Tensor  # (2B, L) int64
    labels: Tensor  # (2B, L) int64; labels[i, t] is the token that position t predicts, -100 where none counts
    rows: Tensor  # (N,) int64, positions of the counted labels in the flattened (2B·L)
    cu_seqlens: Tensor  # (2B + 1,) int64, bounds of each row's part of `rows`
    vision: list[Any]  # B visual parts, each shared by the two rows of its pair; empty for text
    pair_ids: list[str]  # B


class PairCollator:
    """Stacks pairs. With prompt [5, 6], chosen [7, 1], rejected [8, 9, 1] and padding token 0:

    >>> pair = EncodedPair("p", torch.tensor([5, 6]), torch.tensor([7, 1]), torch.tensor([8, 9, 1]), {})
    >>> PairCollator(pad_token_id=0)([pair])
    {'input_ids':      tensor([[5, 6, 7, 1, 0],
                               [5, 6, 8, 9, 1]]),
     'attention_mask': tensor([[1, 1, 1, 1, 0],
                               [1, 1, 1, 1, 1]]),
     'labels':         tensor([[-100, 7, 1, -100, -100],
                               [-100, 8, 9, 1, -100]]),
     'rows':           tensor([1, 2, 6, 7, 8]),
     'cu_seqlens':     tensor([0, 2, 5]),
     'vision':         [{}],
     'pair_ids':       ['p']}
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, pairs: Sequence[EncodedPair]) -> PairBatch:
        answers = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        ids, mask = pad_rows([torch.cat(answer) for answer in answers], self.pad_token_id)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for row, (prompt, answer) in zip(labels, answers):
            row[len(prompt) - 1 : len(prompt) - 1 + len(answer)] = answer
        lengths = torch.tensor([0, *(len(answer) for _, answer in answers)])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "rows": (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1),
            "cu_seqlens": lengths.cumsum(0),
            "vision": [p.vision for p in pairs],
            "pair_ids": [p.id for p in pairs],
        }
