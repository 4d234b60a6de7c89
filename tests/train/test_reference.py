"""The reference computed once: the same training, nothing computed again that is known, nothing stale believed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synpo.data.tokenize import EncodedPair
from synpo.model.adapter import CaptionModel
from synpo.train.reference import ReferenceStore, fingerprint
from synpo_kernels import SequenceStats


def trained(lm: CaptionModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in lm.model.named_parameters() if p.requires_grad}


def forwards(lm: CaptionModel) -> list[int]:
    """Grows by one with every pass through the language model."""
    seen: list[int] = []
    lm.base.get_decoder().register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("loss_type", ["dpo", "ipo"])
@pytest.mark.parametrize("kind", ["text_lm", "captioner"])
def test_training_is_the_same_and_the_reference_runs_once(
    loss_type: str, kind: str, request: pytest.FixtureRequest, pairs_for: Any, trainer_for: Any
) -> None:
    lm = request.getfixturevalue(kind)
    pairs = pairs_for(lm)
    start = trained(lm)
    shared = {"loss_type": loss_type, "num_train_epochs": 3, "optim": "sgd"}
    trainer_for(lm, pairs, "live", **shared).train()
    expected = trained(lm)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    trainer = trainer_for(lm, pairs, "stored", precompute_reference=True, **shared)
    seen = forwards(lm)
    trainer.train()
    assert len(seen) == 2 + 3 * 2  # the reference in 2 batches, then 3 epochs of 2 steps
    for name, value in trained(lm).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, start[name])
    again = trainer_for(lm, pairs, "stored", precompute_reference=True, **shared)
    del seen[:]
    again.train()
    assert len(seen) == 3 * 2  # the file is there: weights under an adapter do not move


def pair(name: str, token: int = 5) -> EncodedPair:
    return EncodedPair(name, torch.tensor([1, 2]), torch.tensor([token, 3]), torch.tensor([4]), {})


class Counting:
    def __init__(self) -> None:
        self.pairs: list[list[str]] = []

    def __call__(self, pairs: list[EncodedPair]) -> SequenceStats:
        self.pairs.append([p.id for p in pairs])
        values = [float(p.chosen.sum()) + 0.1 for p in pairs] + [float(p.rejected.sum()) for p in pairs]
        return SequenceStats(*(torch.tensor(values) * factor for factor in (1, 2, 3, 4)))


def test_a_killed_run_goes_on_and_changes_are_noticed(text_lm: CaptionModel, tmp_path: Path) -> None:
    pairs = [pair("a"), pair("b"), pair("c", 6), pair("d")]
    first = Counting()
    ReferenceStore(tmp_path, text_lm).fill(pairs[:2], first, batch_size=2, progress=False)
    file = tmp_path / "reference-0.jsonl"
    file.write_bytes(file.read_bytes()[:-7])  # killed in the middle of a line
    again = Counting()
    store = ReferenceStore(tmp_path, text_lm)
    store.fill(pairs, again, batch_size=2, progress=False)
    assert (first.pairs, again.pairs) == ([["a", "b"]], [["b", "c"], ["d"]])
    assert all(json.loads(line) for line in file.read_text().splitlines())
    stats = store.stats(["c", "a"], torch.device("cpu"))
    assert stats.logps.tolist() == pytest.approx([9.1, 8.1, 4.0, 4.0])
    assert stats.tokens.tolist() == pytest.approx([36.4, 32.4, 16.0, 16.0])
    assert store.holds(["a", "d"]) and not store.holds(["a", "e"])

    changed = Counting()
    other = [replace(pairs[0], chosen=torch.tensor([7, 3])), replace(pairs[1], vision={"pixels": torch.ones(2)})]
    ReferenceStore(tmp_path, text_lm).fill([*other, pairs[3]], changed, batch_size=4, progress=False)
    assert changed.pairs == [["a", "b"]]
    rounded = Counting()
    ReferenceStore(tmp_path, text_lm, precision="bf16").fill(pairs, rounded, batch_size=4, progress=False)
    assert rounded.pairs == [["a", "b", "c", "d"]]


def test_processes_share_the_work_and_read_one_another(text_lm: CaptionModel, tmp_path: Path) -> None:
    pairs = [pair(name) for name in "abcde"]
    other, own = Counting(), Counting()
    ReferenceStore(tmp_path, text_lm, 1, 2).fill(pairs[:0], other, batch_size=2, progress=False)

    def wait() -> None:  # until then the other one has done its share
        second = ReferenceStore(tmp_path, text_lm, 1, 2)
        with pytest.raises(KeyError):
            second.fill(pairs + [pair("f"), pair("g")], other, batch_size=2, progress=False)

    store = ReferenceStore(tmp_path, text_lm, 0, 2)
    store.fill(pairs, own, batch_size=2, wait=wait, progress=False)
    assert own.pairs == [["a", "c"], ["e"]]
    assert other.pairs == [["b", "d"], ["f"]]
    assert store.holds(list("abcde"))


def test_the_fingerprint_is_of_the_weights_under_the_adapter(text_lm: CaptionModel) -> None:
    before = fingerprint(text_lm)
    with torch.no_grad():
        for parameter in text_lm.model.parameters():
            if parameter.requires_grad:
                parameter += 1.0
    assert fingerprint(text_lm) == before
    with torch.no_grad():
        next(p for p in text_lm.model.parameters() if not p.requires_grad)[0] += 1e-3
    assert fingerprint(text_lm) != before
