"""The reference computed once: the same training, nothing computed again that is known, nothing stale believed."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synpo.config import Config, ConfigError, ModelConfig
from synpo.data.collate import PairCollator
from synpo.data.tokenize import EncodedPair
from synpo.model.adapter import CaptionModel, load
from synpo.train.lora import make_trainable
from synpo.train.objective import PairObjective
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


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


class Counting:
    def __init__(self) -> None:
        self.pairs: list[list[str]] = []

    def __call__(self, pairs: list[EncodedPair]) -> SequenceStats:
        self.pairs.append([p.id for p in pairs])
        values = [float(p.chosen.sum()) + 0.1 for p in pairs] + [float(p.rejected.sum()) for p in pairs]
        return SequenceStats(*(torch.tensor(values) * factor for factor in (1, 2, 3, 4)))


def test_a_killed_run_goes_on_and_changes_are_noticed(tmp_path: Path) -> None:
    pairs = [pair("a"), pair("b"), pair("c", 6), pair("d")]
    first = Counting()
    ReferenceStore(tmp_path, "weights").fill(pairs[:2], first, batch_size=2, progress=False)
    file = tmp_path / "reference-0.jsonl"
    file.write_bytes(file.read_bytes()[:-7])  # killed in the middle of a line
    again = Counting()
    store = ReferenceStore(tmp_path, "weights")
    store.fill(pairs, again, batch_size=2, progress=False)
    assert (first.pairs, again.pairs) == ([["a", "b"]], [["b", "c"], ["d"]])
    assert all(json.loads(line) for line in file.read_text().splitlines())
    stats = store.stats(["c", "a"], torch.device("cpu"))
    assert stats.logps.tolist() == pytest.approx([9.1, 8.1, 4.0, 4.0])
    assert stats.tokens.tolist() == pytest.approx([36.4, 32.4, 16.0, 16.0])
    assert store.holds(["a", "d"]) and not store.holds(["a", "e"])

    changed = Counting()
    other = [replace(pairs[0], chosen=torch.tensor([7, 3])), replace(pairs[1], vision={"pixels": torch.ones(2)})]
    ReferenceStore(tmp_path, "weights").fill([*other, pairs[3]], changed, batch_size=4, progress=False)
    assert changed.pairs == [["a", "b"]]
    rounded = Counting()
    ReferenceStore(tmp_path, "other weights").fill(pairs, rounded, batch_size=4, progress=False)
    assert rounded.pairs == [["a", "b", "c", "d"]]


def test_processes_share_the_work_and_read_one_another(tmp_path: Path) -> None:
    pairs = [pair(name) for name in "abcde"]
    other, own = Counting(), Counting()
    ReferenceStore(tmp_path, "weights", 1, 2).fill(pairs[:0], other, batch_size=2, progress=False)

    def wait() -> None:  # until then the other one has done its share
        second = ReferenceStore(tmp_path, "weights", 1, 2)
        with pytest.raises(KeyError):
            second.fill(pairs + [pair("f"), pair("g")], other, batch_size=2, progress=False)

    store = ReferenceStore(tmp_path, "weights", 0, 2)
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
    with_adapter = fingerprint(text_lm, adapters=True)
    with torch.no_grad():
        next(p for n, p in text_lm.model.named_parameters() if "lora_A" in n)[0] += 1e-3
    assert fingerprint(text_lm, adapters=True) != with_adapter
    with torch.no_grad():
        frozen = next(p for p in text_lm.model.parameters() if not p.requires_grad)
        frozen[:2] = frozen[:2].flip(0)  # sums are the same
    assert fingerprint(text_lm) != before


def test_a_reference_that_is_not_finite_is_named_and_not_kept(tmp_path: Path) -> None:
    def broken(pairs: list[EncodedPair]) -> SequenceStats:
        return SequenceStats(*(torch.tensor([1.0, 1.0, 1.0, float("nan")]) for _ in range(4)))

    with pytest.raises(ValueError, match="the reference gives pair b log-probabilities that are not finite"):
        ReferenceStore(tmp_path, "weights").fill([pair("a"), pair("b")], broken, batch_size=2, progress=False)
    assert not list(tmp_path.iterdir())


def test_one_id_for_two_pairs_is_refused(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, "weights")
    with pytest.raises(ValueError, match="two different pairs have the id a"):
        store.fill([pair("a"), pair("a", 7)], Counting(), batch_size=4, progress=False)


def test_what_another_process_wrote_is_not_computed_again(tmp_path: Path) -> None:
    """A run may go on with another number of processes."""
    pairs = [pair(name) for name in "abc"]
    ReferenceStore(tmp_path, "weights").fill(pairs, Counting(), batch_size=2, progress=False)
    (tmp_path / "reference-0.jsonl").rename(tmp_path / "reference-1.jsonl")
    again = Counting()
    ReferenceStore(tmp_path, "weights").fill([*pairs, pair("d")], again, batch_size=2, progress=False)
    assert again.pairs == [["d"]]


@pytest.fixture
def whole(tiny_captioner_path: Path) -> CaptionModel:
    """A captioner that is trained itself, its vision frozen, without an adapter."""
    lm = load(ModelConfig(path=str(tiny_captioner_path), device="cpu"))
    make_trainable(lm, replace(Config(), lora=None))
    return lm


@pytest.mark.parametrize("loss_type", ["dpo", "ipo"])
def test_a_whole_model_is_compared_with_what_it_was(
    loss_type: str, whole: CaptionModel, pairs_for: Any, trainer_for: Any
) -> None:
    """With all pairs in every step, rewards are β times what the log-likelihoods moved since the first step."""
    pairs = pairs_for(whole)
    shared = {"loss_type": loss_type, "beta": 0.3, "num_train_epochs": 4, "per_device_train_batch_size": 4}
    trainer = trainer_for(whole, pairs, learning_rate=1e-3, **shared)
    seen = forwards(whole)
    trainer.train()
    assert len(seen) == 1 + 4
    first, *later = (row for row in trainer.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2) if loss_type == "dpo" else 1 / 0.6**2, rel=1e-5)
    for row in later:
        for side in ("chosen", "rejected"):
            moved = row[f"logps/{side}"] - first[f"logps/{side}"]
            assert row[f"rewards/{side}"] == pytest.approx(0.3 * moved, rel=1e-3, abs=1e-4)
            assert abs(moved) > 0.1


def test_the_stored_reference_has_the_precision_of_training(
    whole: CaptionModel, pairs_for: Any, trainer_for: Any
) -> None:
    """In bfloat16 the log-likelihoods of the answers are off by more than the first rewards may be."""
    batch = PairCollator(whole.pad_token_id)(pairs_for(whole))
    exact = PairObjective(whole, "dpo", {}).reference_stats(batch).chosen.logps.mean()
    trainer = trainer_for(whole, pairs_for(whole), loss_type="dpo", per_device_train_batch_size=4, bf16=True)
    inside: list[bool] = []
    layer = next(m for m in whole.base.model.vision_tower.modules() if isinstance(m, torch.nn.Linear))
    layer.register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert len(inside) == 6 and all(inside)  # three lengths of clips, for the reference and for the step
    assert abs(0.1 * (first["logps/chosen"] - float(exact))) > 1e-4


def test_a_run_that_goes_on_never_takes_its_own_weights_for_the_reference(
    whole: CaptionModel, pairs_for: Any, trainer_for: Any, tmp_path: Path
) -> None:
    pairs = pairs_for(whole)
    start = deepcopy(whole.model.state_dict())
    saves = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    shared = {"loss_type": "dpo", "num_train_epochs": 3, **saves}
    full = trainer_for(whole, pairs, "full", **shared)
    full.train()
    expected = losses(full)

    def again(lm: CaptionModel, data: Any) -> Any:
        trainer = trainer_for(lm, data, "full", **shared)
        trainer.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-2"))
        return trainer

    with pytest.raises(
        ConfigError, match=r"the reference of 4 of 4 pairs \(the first is pair-0\) is not in .*Put back"
    ):
        again(whole, pairs)  # trained three epochs by now
    full.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-2"))  # it knows what it began with
    assert losses(full) == expected
    whole.model.load_state_dict(start)
    assert losses(again(whole, pairs)) == expected
    whole.model.load_state_dict(start)
    with pytest.raises(ConfigError, match=r"the reference of 1 of 4 pairs \(the first is pair-3\)"):
        again(whole, [*pairs[:3], replace(pairs[3], chosen=pairs[2].chosen)])
    (tmp_path / "full" / "reference" / "reference-0.jsonl").unlink()
    with pytest.raises(ConfigError, match="the reference of 4 of 4 pairs"):
        again(whole, pairs)
