"""The batch layouts, literally."""

import warnings

import pytest
import torch

from synpo.data.collate import PairCollator
from synpo.data.tokenize import EncodedPair


def encoded(name: str, prompt: list[int], chosen: list[int], rejected: list[int]) -> EncodedPair:
    vision = {"pixels": torch.zeros(1)} if name == "video" else {}
    return EncodedPair(name, torch.tensor(prompt), torch.tensor(chosen), torch.tensor(rejected), vision)


TWO = [encoded("video", [3, 3, 4], [5, 1], [6, 1]), encoded("text", [4], [7, 7, 1], [1])]


def test_the_example_of_the_docstring() -> None:
    pair = encoded("p", [5, 6], [7, 1], [8, 9, 1])
    packed = PairCollator(pad_token_id=0)([pair])
    padded = PairCollator(pad_token_id=0, prefix_sharing=False)([pair])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 1, 8, 9, 1]]
    assert padded["input_ids"].tolist() == [[5, 6, 7, 1, 0], [5, 6, 8, 9, 1]]
    assert packed["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 1]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert packed["lengths"].tolist() == [[2, 2, 3]]  # type: ignore[union-attr]
    assert padded["lengths"] is None
    assert packed["sequences"].tolist() == [[0, 1, 2, 3, -1], [0, 1, 4, 5, 6]]
    assert padded["sequences"].tolist() == [[0, 1, 2, 3, -1], [5, 6, 7, 8, 9]]
    assert packed["rows"].tolist() == [1, 2, 1, 4, 5]
    assert padded["rows"].tolist() == [1, 2, 6, 7, 8]
    for batch in (packed, padded):
        assert batch["targets"].tolist() == [7, 1, 8, 9, 1]
        assert batch["cu_seqlens"].tolist() == [0, 2, 5]
        assert batch["vision"] == [{}]
        assert (batch["pair_ids"], batch["instead"]) == (["p"], [])
        assert batch["tokens"] == int(batch["attention_mask"].sum())
        assert all(v.dtype == torch.int64 for v in batch.values() if isinstance(v, torch.Tensor))


def test_padded_chosen_rows_come_first_and_pairs_share_their_video() -> None:
    batch = PairCollator(pad_token_id=9, prefix_sharing=False)(TWO)
    assert batch["input_ids"].tolist() == [[3, 3, 4, 5, 1], [4, 7, 7, 1, 9], [3, 3, 4, 6, 1], [4, 1, 9, 9, 9]]
    assert batch["rows"].tolist() == [2, 3, 5, 6, 7, 12, 13, 15]
    assert [set(v) for v in batch["vision"]] == [{"pixels"}, set()]


def test_packed_pairs_follow_one_another_without_padding() -> None:
    batch = PairCollator(pad_token_id=9)(TWO)
    assert batch["input_ids"].tolist() == [[3, 3, 4, 5, 1, 6, 1, 4, 7, 7, 1, 1]]
    assert batch["lengths"].tolist() == [[3, 2, 2], [1, 3, 1]]  # type: ignore[union-attr]
    assert batch["sequences"].tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, -1], [0, 1, 2, 5, 6], [7, 11, -1, -1, -1]]
    assert batch["rows"].tolist() == [2, 3, 7, 8, 9, 2, 5, 7]
    assert [set(v) for v in batch["vision"]] == [{"pixels"}, set()]


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_the_places_of_a_sequence_spell_it(prefix_sharing: bool) -> None:
    batch = PairCollator(9, prefix_sharing)(TWO)
    ids = batch["input_ids"].flatten()
    spelt = [ids[place[place >= 0]].tolist() for place in batch["sequences"]]
    assert spelt == [[3, 3, 4, 5, 1], [4, 7, 7, 1], [3, 3, 4, 6, 1], [4, 1]]
    assert batch["targets"].tolist() == [5, 1, 7, 7, 1, 6, 1, 1]  # sequence by sequence
    assert batch["cu_seqlens"].tolist() == [0, 2, 5, 7, 8]
    assert batch["pair_ids"] == ["video", "text"]
    start = 0
    for place, end in zip(batch["sequences"], batch["cu_seqlens"][1:].tolist()):
        place = place[place >= 0]
        count = end - start
        assert torch.equal(batch["rows"][start:end], place[-count - 1 : -1])  # the state before each target
        assert torch.equal(batch["targets"][start:end], ids[place[-count:]])
        start = end


def test_a_batch_beyond_the_window_is_padded_and_says_so() -> None:
    collate = PairCollator(0, longest=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collate(TWO)["lengths"] is not None  # the longest sequence has 5 tokens
    with pytest.warns(UserWarning, match=r"beyond the 5 tokens that all layers of this model see \(here 6\)"):
        assert collate([*TWO, encoded("long", [1, 2, 3], [4], [5, 6, 7])])["lengths"] is None
