"""The trainer: accumulation, metrics, evaluation, checkpoints, and what it refuses."""

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synpo.config import ConfigError
from synpo.data.collate import PairCollator
from synpo.model.adapter import CaptionModel
from synpo.train.arguments import SynPOConfig
from synpo.train.repetition import repetition
from synpo.train.trainer import DivergenceError, SynPOTrainer


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(lm: CaptionModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in lm.model.named_parameters() if p.requires_grad}


def restore(lm: CaptionModel, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if name in values:
                parameter.copy_(values[name])


@pytest.mark.parametrize(("pairs", "size", "accumulation"), [(4, 1, 4), (6, 2, 4), (5, 2, 3), (7, 1, 4)])
@pytest.mark.parametrize("loss_type", ["synpo", "dpo"])
def test_accumulated_steps_equal_whole_ones(
    pairs: int, size: int, accumulation: int, loss_type: str, text_lm: Any, pairs_for: Any, trainer_for: Any
) -> None:
    """Also where the last window has fewer micro-batches and the last micro-batch fewer pairs."""
    data = pairs_for(text_lm, pairs)
    start = trained(text_lm)
    shared = {"optim": "sgd", "max_grad_norm": 0.0, "num_train_epochs": 2, "loss_type": loss_type}
    whole = trainer_for(text_lm, data, "a", per_device_train_batch_size=size * accumulation, **shared)
    whole.train()
    expected = trained(text_lm)
    restore(text_lm, start)
    parts = trainer_for(
        text_lm, data, "b", per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **shared
    )
    parts.train()
    assert parts.state.global_step == whole.state.global_step == 2 * math.ceil(pairs / (size * accumulation))
    for name, value in trained(text_lm).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7)
        assert not torch.equal(value, start[name])
    rows, whole_rows = (read(Path(t.args.output_dir) / "train_log.jsonl") for t in (parts, whole))
    for row, whole_row in zip(rows[:-1], whole_rows[:-1]):
        for name in ("loss", "grad_norm", "synpo/chosen_prob", "synpo/grad_balance/chosen"):
            assert row[name] == pytest.approx(whole_row[name], rel=1e-3), name


def test_every_step_is_logged_with_the_metrics(captioner: CaptionModel, pairs_for: Any, trainer_for: Any) -> None:
    trainer = trainer_for(captioner, pairs_for(captioner), num_train_epochs=2)
    trainer.train()
    rows = read(Path(trainer.args.output_dir) / "train_log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]
    expected = {
        *(f"rewards/{n}" for n in ("chosen", "rejected", "accuracies", "margins")),
        *(f"logps/{n}" for n in ("chosen", "rejected")),
        *(f"synpo/{n}" for n in ("chosen_prob", "rejected_prob", "margin", "saturation", "language_reward")),
        *(f"synpo/grad_balance/{n}" for n in ("chosen", "rejected")),
        *("loss", "grad_norm", "learning_rate", "epoch", "num_tokens"),
    }
    assert all(expected <= row.keys() for row in rows[:-1])
    assert rows[-1].keys() >= {"train_runtime", "train_loss"}
    sizes = [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in trainer.train_dataset]
    assert rows[1]["num_tokens"] == sum(sizes)
    for row in rows[:-1]:
        assert row["synpo/margin"] == pytest.approx(row["synpo/chosen_prob"] - row["synpo/rejected_prob"], abs=1e-6)


@pytest.mark.parametrize("loss_type", ["synpo", "dpo", "sft"])
def test_training_does_what_the_objective_asks(
    loss_type: str, captioner: Any, pairs_for: Any, trainer_for: Any
) -> None:
    trainer = trainer_for(captioner, pairs_for(captioner), num_train_epochs=20, loss_type=loss_type)
    trainer.train()
    rows = read(Path(trainer.args.output_dir) / "train_log.jsonl")
    first, last = rows[0], rows[-2]
    assert last["loss"] < first["loss"]
    assert last["synpo/margin"] > first["synpo/margin"]
    if loss_type != "dpo":
        assert last["synpo/chosen_logp"] > first["synpo/chosen_logp"] + 0.2


def test_evaluation_is_the_mean_over_pairs_also_of_a_partial_batch(
    text_lm: CaptionModel, pairs_for: Any, trainer_for: Any
) -> None:
    data = pairs_for(text_lm, 3)
    trainer = trainer_for(text_lm, data, per_device_eval_batch_size=2)
    metrics = trainer.evaluate(data)
    with torch.no_grad():
        outcome = trainer.pair_objective(text_lm.model.eval(), PairCollator(text_lm.pad_token_id)(data))
    assert metrics["eval_loss"] == pytest.approx(float(outcome.loss), rel=1e-5)
    assert metrics["eval_synpo/chosen_prob"] == pytest.approx(
        float(outcome.statistics["synpo/chosen_prob"].mean()), rel=1e-5
    )
    assert "eval_synpo/grad_balance/chosen" not in metrics


def test_what_other_passes_saw_is_not_in_an_evaluation(text_lm: Any, pairs_for: Any, trainer_for: Any) -> None:
    data = pairs_for(text_lm, 3)
    trainer = trainer_for(text_lm, data)
    expected = trainer.evaluate(data)["eval_synpo/margin"]
    found = trainer.predict(data[:1]).metrics
    assert found["test_loss"] == pytest.approx(float(trainer.predict(data[:1]).metrics["test_loss"]))
    assert found["test_synpo/margin"] != expected
    assert trainer.evaluate(data[:1], metric_key_prefix="other")["other_synpo/margin"] == found["test_synpo/margin"]
    assert trainer.evaluate(data)["eval_synpo/margin"] == expected


def test_greedy_samples_are_greedy_whatever_the_model_asks_for(text_lm: Any, pairs_for: Any) -> None:
    pairs = pairs_for(text_lm, 2)
    plain = repetition(text_lm, pairs, 40)
    assert plain > 0.1
    text_lm.base.generation_config.update(repetition_penalty=50.0, no_repeat_ngram_size=2)
    assert repetition(text_lm, pairs, 40) == plain


def with_dropout(lm: CaptionModel) -> CaptionModel:
    for module in lm.model.modules():
        if type(module).__name__ == "Dropout":
            raise AssertionError("the fixture should have no dropout")
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return lm


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(
    text_lm: CaptionModel, pairs_for: Any, trainer_for: Any
) -> None:
    """Random numbers (dropout, order of pairs), optimizer and schedule all come back in the middle of an epoch."""
    data, start = pairs_for(with_dropout(text_lm), 6), trained(text_lm)
    shared = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    trainer_for(text_lm, data, "whole", **shared).train()
    expected = trained(text_lm)

    restore(text_lm, start)
    first = trainer_for(text_lm, data, "killed", **shared)
    folder = Path(first.args.output_dir)

    class Kill(Exception):
        pass

    def stop(*args: Any, **kwargs: Any) -> Any:
        if first.state.global_step == 3:
            raise Kill
        return SynPOTrainer.training_step(first, *args, **kwargs)

    first.training_step = stop
    with pytest.raises(Kill):
        first.train()
    assert [row["step"] for row in read(folder / "train_log.jsonl")] == [1, 2, 3]

    restore(text_lm, start)
    torch.manual_seed(1234)
    trainer_for(text_lm, data, "killed", **shared).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    rows, whole = read(folder / "train_log.jsonl"), read(folder.parent / "whole" / "train_log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    for row, other in zip(rows[:-1], whole[:-1]):
        for name in ("loss", "learning_rate", "grad_norm", "synpo/chosen_logp", "num_tokens"):
            assert row[name] == other[name], (row["step"], name)
    for name, value in trained(text_lm).items():
        assert torch.equal(value, expected[name]), name


def test_batches_of_tokens_are_those_of_their_epoch_when_a_run_goes_on(
    text_lm: CaptionModel, pairs_for: Any, trainer_for: Any
) -> None:
    data, start = pairs_for(text_lm, 7), trained(text_lm)
    tokens = {p.id: len(p.prompt) + len(p.chosen) + len(p.rejected) for p in data}
    budget = max(tokens.values()) + min(tokens.values())
    shared = {"tokens_per_batch": budget, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    seen: list[list[str]] = []
    for checkpoint in (None, "checkpoint-3"):
        restore(text_lm, start)
        trainer = trainer_for(text_lm, data, "run", save_total_limit=None, **shared)
        folder = Path(trainer.args.output_dir)
        compute = trainer.compute_loss

        def watched(model: Any, inputs: Any, *args: Any, compute: Any = compute, **kwargs: Any) -> Any:
            seen.append(inputs["pair_ids"])
            assert inputs["tokens"] <= budget
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = watched
        trainer.train(resume_from_checkpoint=str(folder / checkpoint) if checkpoint else None)
        rows = read(folder / "train_log.jsonl")
        losses = [row["loss"] for row in rows if "loss" in row]
        steps = len(losses)
        if checkpoint is None:
            whole = losses
    assert losses == whole and steps % 2 == 0 and steps > 6
    first, again = seen[:steps], seen[steps:]
    assert again == first[3:]
    for epoch in (first[: steps // 2], first[steps // 2 :]):
        assert sorted(name for batch in epoch for name in batch) == sorted(tokens)
        assert {len(batch) for batch in epoch} != {1}
    assert first[: steps // 2] != first[steps // 2 :]


def test_a_step_of_unequal_batches_is_the_mean_over_its_pairs(text_lm: Any, pairs_for: Any, trainer_for: Any) -> None:
    data, start = pairs_for(text_lm, 4), trained(text_lm)
    tokens = sorted(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in data)
    found = []
    for settings in (
        {"tokens_per_batch": tokens[-1] + tokens[0], "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4},
    ):
        restore(text_lm, start)
        trainer = trainer_for(text_lm, data, max_grad_norm=0.0, optim="sgd", **settings)
        sizes = [len(batch["pair_ids"]) for batch in trainer.get_train_dataloader()]
        assert sizes == [4] if found else 1 < len(sizes) <= 4
        trainer.train()
        found.append(trained(text_lm))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"tokens_per_batch": 10},
            r"train\.tokens_per_batch: a pair has \d+ tokens, more than the 10 of a batch; raise it",
        ),
        ({"tokens_per_batch": 0}, r"expected at least 1,"),
        ({"tokens_per_batch": 500, "auto_find_batch_size": True}, r"no train\.auto_find_batch_size"),
        ({"tokens_per_batch": 500, "prefix_sharing": False}, r"counts tokens of packed rows"),
    ],
)
def test_budgets_of_tokens_that_cannot_be_are_refused(
    settings: dict[str, Any], words: str, text_lm: Any, pairs_for: Any, trainer_for: Any
) -> None:
    with pytest.raises(ConfigError, match=words):
        trainer_for(text_lm, pairs_for(text_lm, 2), **settings)


def test_a_new_run_in_the_same_folder_starts_its_log_anew(text_lm: Any, pairs_for: Any, trainer_for: Any) -> None:
    for _ in range(2):
        trainer = trainer_for(text_lm, pairs_for(text_lm, 2))
        trainer.train()
    assert len(read(Path(trainer.args.output_dir) / "train_log.jsonl")) == 2


@pytest.mark.parametrize("loss_type", ["synpo", "simpo"])
def test_a_loss_that_is_not_finite_stops_and_names_the_pairs(
    loss_type: str, text_lm: Any, pairs_for: Any, trainer_for: Any
) -> None:
    trainer = trainer_for(text_lm, pairs_for(text_lm), loss_type=loss_type, per_device_train_batch_size=4)
    order = [p.id for p in pairs_for(text_lm)]
    step = trainer.training_step

    def poisoned(model: Any, inputs: Any, *args: Any) -> Any:
        pair = inputs["pair_ids"].index("pair-2")
        position = int(inputs["rows"][inputs["cu_seqlens"][pair] + 1])

        def poison(module: Any, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, position] = float("nan")
            return output

        text_lm.base.model.norm.register_forward_hook(poison)
        return step(model, inputs, *args)

    trainer.training_step = poisoned
    before = trained(text_lm)
    with pytest.raises(DivergenceError, match=r"step 0: .* not finite for pairs pair-2; lower train.learning_rate"):
        trainer.train()
    assert "pair-2" in order
    assert all(torch.equal(value, before[name]) for name, value in trained(text_lm).items())


def test_lora_dropout_is_on_in_training_and_off_in_evaluation(text_lm: Any, pairs_for: Any, trainer_for: Any) -> None:
    data = pairs_for(with_dropout(text_lm), 2)
    trainer = trainer_for(text_lm, data, learning_rate=1e-30, num_train_epochs=3)
    trainer.train()
    losses = [row["loss"] for row in read(Path(trainer.args.output_dir) / "train_log.jsonl")[:-1]]
    assert len(set(losses)) == 3
    assert trainer.evaluate(data)["eval_loss"] == trainer.evaluate(data)["eval_loss"]


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    args = SynPOConfig(output_dir=str(tmp_path))
    assert args.learning_rate == 5e-6
    assert args.lr_scheduler_type == "linear"
    assert args.get_warmup_steps(1000) == 100
    assert args.num_train_epochs == 5
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    assert (args.loss_type, args.loss_parameters["alpha"]) == ("synpo", None)
    assert not args.logging_nan_inf_filter


def test_objective_settings_are_checked_when_the_config_is_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'dpo'"):
        SynPOConfig(output_dir=str(tmp_path), loss_type="dppo")
    with pytest.raises(ConfigError, match="simpo has no such parameter"):
        SynPOConfig(output_dir=str(tmp_path), loss_type="simpo", alpha=3.0)


def test_full_training_without_an_adapter(pairs_for: Any, trainer_for: Any) -> None:
    from synpo.model.tiny import byte_tokenizer, tiny_text_model

    tokenizer = byte_tokenizer()
    lm = CaptionModel(tiny_text_model(tokenizer), tokenizer, None)
    before = lm.head().weight.detach().clone()
    trainer = trainer_for(lm, pairs_for(lm), num_train_epochs=3)
    trainer.train()
    assert not torch.equal(before, lm.head().weight)
    with pytest.raises(ConfigError, match="no adapter"):
        trainer_for(lm, pairs_for(lm), loss_type="ipo", reference="base")


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_bf16_is_close_to_fp32(half: str, captioner: CaptionModel, pairs_for: Any, trainer_for: Any) -> None:
    data = pairs_for(captioner)
    shared = {"loss_type": "dpo", "per_device_train_batch_size": 4, "num_train_epochs": 3}
    rows = []
    for precision, lm in (("full", deepcopy(captioner)), (half, captioner)):
        if precision == "weights":
            for parameter in lm.model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
        trainer = trainer_for(lm, data, precision, bf16=precision == "autocast", **shared)
        trainer.train()
        rows.append(read(Path(trainer.args.output_dir) / "train_log.jsonl"))
    for exact, close in zip(*rows):
        for name in ("synpo/chosen_logp", "synpo/rejected_logp"):
            if name in exact:
                assert close[name] == pytest.approx(exact[name], rel=0.02)
                assert close[name] != exact[name]


def test_float16_without_loss_scaling_is_refused(text_lm: CaptionModel, pairs_for: Any, trainer_for: Any) -> None:
    text_lm.model.half()
    with pytest.raises(ConfigError, match="without loss scaling lose most gradients: set train.fp16"):
        trainer_for(text_lm, pairs_for(text_lm))
