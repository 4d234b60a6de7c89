"""Encoded pairs → one batch, in one of two layouts, each with its labels aligned to the states that predict them.

packed    all pairs in one row, [ prompt | chosen | rejected ] each: the prompt is computed once (model/packing.py)
padded    2B rows, [ prompt | answer ] each, the chosen ones first: for models that cannot share a prefix
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from synpo.data.tokenize import EncodedPair
from synpo.model.adapter import pad_rows


class PairBatch(TypedDict):
    """B pairs: 2B sequences with N completion tokens, the chosen sequences first; i and B + i belong to pair i.

    Rows hold L tokens: one row packed, 2B rows padded.
    """

    input_ids: Tensor  # (1, L) or (2B, L) int64, right-padded
    attention_mask: Tensor  # of the same shape, 1 on tokens
    lengths: Tensor | None  # (B, 3) int64 tokens of prompt, chosen, rejected; None in the padded layout
    sequences: Tensor  # (2B, S) int64, place of every token of a sequence in the flattened rows, -1 behind its end
    rows: Tensor  # (N,) int64, place of the state that predicts each target
    targets: Tensor  # (N,) int64, completion tokens, sequence by sequence
    cu_seqlens: Tensor  # (2B + 1,) int64, bounds of each sequence's part of `rows` and `targets`
    vision: list[Any]  # B visual parts; empty for text
    pair_ids: list[str]  # B
    tokens: int  # of all rows, without padding
    instead: list[str]  # what is said of the pairs that stand in for others


class PairCollator:
    """Packs or stacks pairs.

    Args:
        pad_token_id: what padded rows are filled with.
        prefix_sharing: packed layout, otherwise padded.
        longest: sequences longer than this send their whole batch to the padded layout (layers with a sliding window).

    With prompt [5, 6], chosen [7, 1], rejected [8, 9, 1] and padding token 0:

    >>> pair = EncodedPair("p", torch.tensor([5, 6]), torch.tensor([7, 1]), torch.tensor([8, 9, 1]), {})
    >>> PairCollator(pad_token_id=0)([pair])                 # PairCollator(0, prefix_sharing=False)([pair]) has
    {'input_ids':      tensor([[5, 6, 7, 1, 8, 9, 1]]),      # [[5, 6, 7, 1, 0], [5, 6, 8, 9, 1]]
     'attention_mask': tensor([[1, 1, 1, 1, 1, 1, 1]]),      # [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
     'lengths':        tensor([[2, 2, 3]]),                  # None
     'sequences':      tensor([[0, 1, 2, 3, -1],             # [[0, 1, 2, 3, -1],
                               [0, 1, 4, 5, 6]]),            #  [5, 6, 7, 8, 9]]
     'rows':           tensor([1, 2, 1, 4, 5]),              # [1, 2, 6, 7, 8]
     'targets':        tensor([7, 1, 8, 9, 1]),              # the same
     'cu_seqlens':     tensor([0, 2, 5]),
     'vision':         [{}],
     'pair_ids':       ['p'],
     'tokens':         7,                                    # 9
     'instead':        []}
    """

    def __init__(self, pad_token_id: int, prefix_sharing: bool = True, longest: int | None = None) -> None:
        self.pad_token_id, self.prefix_sharing, self.longest = pad_token_id, prefix_sharing, longest

    def __call__(self, pairs: Sequence[EncodedPair]) -> PairBatch:
        packed = self.prefix_sharing and self._fits(pairs)
        answers = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        if packed:
            ids, mask = pad_rows([torch.cat([t for p in pairs for t in (p.prompt, p.chosen, p.rejected)])], 0)
        else:
            ids, mask = pad_rows([torch.cat(answer) for answer in answers], self.pad_token_id)
        lengths = torch.tensor([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs])
        places = _packed(lengths) if packed else _padded(lengths, ids.shape[1])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "lengths": lengths if packed else None,
            "sequences": pad_rows(places, -1)[0],
            "rows": torch.cat([place[len(prompt) - 1 : -1] for place, (prompt, _) in zip(places, answers)]),
            "targets": torch.cat([answer for _, answer in answers]),
            "cu_seqlens": torch.tensor([0, *(len(answer) for _, answer in answers)]).cumsum(0),
            "vision": [p.vision for p in pairs],
            "pair_ids": [p.id for p in pairs],
            "tokens": int(mask.sum()),
            "instead": [p.instead for p in pairs if p.instead],
        }

    def _fits(self, pairs: Sequence[EncodedPair]) -> bool:
        most = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
        if self.longest is None or most <= self.longest:
            return True
        warnings.warn(
            f"batches with sequences beyond the {self.longest} tokens that all layers of this model see (here {most}) are "
            "trained without prefix sharing",
            stacklevel=2,
        )
        return False


def _padded(lengths: Tensor, width: int) -> list[Tensor]:
    """Places (P + answer,) of every sequence, each in its own row of `width`."""
    sizes = torch.cat([lengths[:, 0] + lengths[:, 1], lengths[:, 0] + lengths[:, 2]]).tolist()
    return [torch.arange(row * width, row * width + size) for row, size in enumerate(sizes)]


def _packed(lengths: Tensor) -> list[Tensor]:
    """Places (P + answer,) of every sequence, all in one row."""
    starts = (lengths.sum(1).cumsum(0) - lengths.sum(1)).tolist()
    chosen, rejected = [], []
    for start, (p, c, r) in zip(starts, lengths.tolist()):
        place = torch.arange(start, start + p + c + r)
        chosen.append(place[: p + c])
        rejected.append(torch.cat([place[:p], place[p + c :]]))
    return chosen + rejected
