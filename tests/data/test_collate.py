"""The batch layout, literally."""

import torch

from synpo.data.collate import PairCollator
from synpo.data.tokenize import EncodedPair


def encoded(name: str, prompt: list[int], chosen: list[int], rejected: list[int]) -> EncodedPair:
    vision = {"pixels": torch.zeros(1)} if name == "video" else {}
    return EncodedPair(name, torch.tensor(prompt), torch.tensor(chosen), torch.tensor(rejected), vision)


def test_the_example_of_the_docstring() -> None:
    batch = PairCollator(pad_token_id=0)([encoded("p", [5, 6], [7, 1], [8, 9, 1])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 0], [5, 6, 8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 7, 1, -100, -100], [-100, 8, 9, 1, -100]]
    assert batch["rows"].tolist() == [1, 2, 6, 7, 8]
    assert batch["cu_seqlens"].tolist() == [0, 2, 5]
    assert batch["vision"] == [{}]
    assert batch["pair_ids"] == ["p"]
    assert all(v.dtype == torch.int64 for v in batch.values() if isinstance(v, torch.Tensor))


def test_chosen_rows_come_first_and_pairs_share_their_video() -> None:
    pairs = [encoded("video", [3, 3, 4], [5, 1], [6, 1]), encoded("text", [4], [7, 7, 1], [1])]
    batch = PairCollator(pad_token_id=9)(pairs)
    assert batch["input_ids"].tolist() == [[3, 3, 4, 5, 1], [4, 7, 7, 1, 9], [3, 3, 4, 6, 1], [4, 1, 9, 9, 9]]
    assert batch["labels"].tolist() == [
        [-100, -100, 5, 1, -100],
        [7, 7, 1, -100, -100],
        [-100, -100, 6, 1, -100],
        [1, -100, -100, -100, -100],
    ]
    assert batch["cu_seqlens"].tolist() == [0, 2, 5, 7, 8]
    flat = batch["labels"].flatten()[batch["rows"]]
    assert flat.tolist() == [5, 1, 7, 7, 1, 6, 1, 1]  # packed: sequence by sequence
    assert [set(v) for v in batch["vision"]] == [{"pixels"}, set()]
    assert batch["pair_ids"] == ["video", "text"]


def test_every_label_is_the_next_input_token() -> None:
    batch = PairCollator(pad_token_id=0)([encoded("a", [5, 6, 7], [8, 1], [9, 9, 1]), encoded("b", [5], [8, 1], [1])])
    for row, label in zip(batch["input_ids"], batch["labels"]):
        for t in (label != -100).nonzero().flatten().tolist():
            assert label[t] == row[t + 1]
