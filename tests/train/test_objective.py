"""The objective on hidden states against the naive computation from full logits, for every loss and both kinds of model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from synpo.config import ConfigError
from synpo.data.collate import PairCollator
from synpo.model.adapter import CaptionModel
from synpo.model.tiny import byte_tokenizer, tiny_text_model
from synpo.train.objective import PairObjective, parameters_of
from synpo_kernels import OBJECTIVES, Objective, sequence_stats


@pytest.fixture(params=["captioner", "text_lm"])
def lm(request: pytest.FixtureRequest) -> CaptionModel:
    return request.getfixturevalue(request.param)


def naive_logps(lm: CaptionModel, pair: Any, answer: Tensor) -> Tensor:
    """One sequence alone, from the model's own full logits."""
    ids = torch.cat([pair.prompt, answer])[None]
    inputs = {"input_ids": ids}
    if pair.vision:
        inputs["pixel_values_videos"] = pair.vision["pixels"][None]
    logps = lm.model(**inputs).logits[0].log_softmax(-1)
    first = len(pair.prompt) - 1
    return logps[first : first + len(answer)].gather(1, answer[:, None])[:, 0]


def naive_stats(lm: CaptionModel, pairs: list[Any]) -> Any:
    rows = [naive_logps(lm, p, p.chosen) for p in pairs] + [naive_logps(lm, p, p.rejected) for p in pairs]
    bounds = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0)
    return sequence_stats(torch.cat(rows), cu_seqlens=bounds)


def gradients(lm: CaptionModel) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    return found


@pytest.mark.parametrize("loss_type", sorted(OBJECTIVES))
def test_loss_and_gradients_equal_those_from_full_logits(loss_type: str, lm: CaptionModel, pairs_for: Any) -> None:
    pairs = pairs_for(lm)
    outcome = PairObjective(lm, loss_type, {})(lm.model, PairCollator(lm.pad_token_id)(pairs))
    outcome.loss.backward()
    fused = gradients(lm)

    reference = []
    if OBJECTIVES[loss_type].needs_reference:
        with torch.no_grad(), lm.model.disable_adapter():
            reference = [naive_stats(lm, pairs)]
    stats = naive_stats(lm, pairs)
    loss = OBJECTIVES[loss_type](stats, *reference)
    loss.backward()
    expected = gradients(lm)

    torch.testing.assert_close(outcome.loss, loss, rtol=1e-4, atol=1e-5)
    assert fused.keys() == expected.keys()
    assert any(g.abs().max() > 1e-6 for g in fused.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(fused[name], gradient, rtol=2e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7)
    statistics = outcome.statistics
    torch.testing.assert_close(statistics["logps/chosen"], stats.chosen.logps.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics["logps/rejected"], stats.rejected.logps.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics["synpo/chosen_logp"], stats.chosen.mean_logps.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        statistics["synpo/language_reward"], stats.chosen.mean_probs.detach(), rtol=1e-4, atol=1e-6
    )
    assert all(v.shape == (len(pairs),) and not v.requires_grad for v in statistics.values())
    assert not outcome.nonfinite.any()


@pytest.mark.parametrize("loss_type", sorted(OBJECTIVES))
def test_gradient_balance_is_the_gradient_of_each_pairs_own_loss(
    loss_type: str, text_lm: CaptionModel, pairs_for: Any
) -> None:
    pairs = pairs_for(text_lm, 3)
    outcome = PairObjective(text_lm, loss_type, {})(text_lm.model, PairCollator(0)(pairs))
    for i, pair in enumerate(pairs):
        rows = [naive_logps(text_lm, pair, a).detach().requires_grad_() for a in (pair.chosen, pair.rejected)]
        bounds = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0)
        reference = []
        if OBJECTIVES[loss_type].needs_reference:
            with torch.no_grad(), text_lm.model.disable_adapter():
                reference = [naive_stats(text_lm, [pair])]
        OBJECTIVES[loss_type](sequence_stats(torch.cat(rows), cu_seqlens=bounds), *reference).backward()
        for side, row in zip(("chosen", "rejected"), rows):
            norm = outcome.statistics[f"synpo/grad_balance/{side}"][i]
            expected = torch.zeros(()) if row.grad is None else row.grad.norm()
            torch.testing.assert_close(norm, expected, rtol=1e-3, atol=1e-7)
    if loss_type == "sft":
        assert outcome.statistics["synpo/grad_balance/rejected"].max() == 0


def test_the_generic_balance_agrees_with_the_fused_losses_own(text_lm: CaptionModel, pairs_for: Any) -> None:
    batch = PairCollator(0)(pairs_for(text_lm))
    objective = PairObjective(text_lm, "synpo", {"alpha": 5.0})
    fused = objective(text_lm.model, batch)
    hidden = objective._forward(text_lm.model, batch, batch["vision"], lambda hidden, head: hidden)
    generic = objective._any(hidden, text_lm.head(), batch["targets"], batch["cu_seqlens"], None)
    torch.testing.assert_close(generic.loss, fused.loss)
    for name, value in generic.statistics.items():
        torch.testing.assert_close(fused.statistics[name], value, rtol=1e-4, atol=1e-7)


def test_rewards_are_relative_to_the_reference_where_there_is_one(text_lm: CaptionModel, pairs_for: Any) -> None:
    pairs = pairs_for(text_lm)
    batch = PairCollator(0)(pairs)
    statistics = PairObjective(text_lm, "dpo", {"beta": 0.5})(text_lm.model, batch).statistics
    with torch.no_grad():
        policy = naive_stats(text_lm, pairs)
        with text_lm.model.disable_adapter():
            reference = naive_stats(text_lm, pairs)
    chosen = 0.5 * (policy.chosen.logps - reference.chosen.logps)
    torch.testing.assert_close(statistics["rewards/chosen"], chosen, rtol=1e-3, atol=1e-4)
    assert statistics["rewards/chosen"].abs().max() > 1e-2
    with text_lm.model.disable_adapter():
        same = PairObjective(text_lm, "dpo", {})(text_lm.model, batch).statistics
    assert torch.equal(same["rewards/chosen"], torch.zeros(len(pairs)))


def test_an_objective_with_a_reference_needs_no_beta(text_lm: CaptionModel, pairs_for: Any, monkeypatch: Any) -> None:
    def gap(stats: Any, reference: Any, *, reduction: str = "mean") -> Tensor:
        """L = - [(log π+ - log π-) - (log π_ref+ - log π_ref-)]"""
        rewards = stats.logps - reference.logps
        return -(rewards.chunk(2)[0] - rewards.chunk(2)[1]).mean()

    monkeypatch.setitem(OBJECTIVES, "gap", Objective("gap", gap, True, True))
    outcome = PairObjective(text_lm, "gap", {})(text_lm.model, PairCollator(0)(pairs_for(text_lm)))
    torch.testing.assert_close(outcome.statistics["rewards/margins"].mean(), -outcome.loss.detach())


def test_the_reference_sees_no_dropout_and_training_mode_comes_back(text_lm: CaptionModel, pairs_for: Any) -> None:
    batch = PairCollator(0)(pairs_for(text_lm))
    objective = PairObjective(text_lm, "dpo", {})
    for module in text_lm.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5  # the base model's own dropout, which switching LoRA off leaves on
    text_lm.model.train()
    noisy = [objective._forward(text_lm.model, batch, batch["vision"], lambda hidden, head: hidden) for _ in range(2)]
    assert not torch.equal(*noisy)
    first, second = (objective._reference(text_lm.model, batch, batch["vision"]) for _ in range(2))
    assert torch.equal(first.logps, second.logps)
    assert text_lm.model.training


def test_the_vision_tower_runs_once_a_pair(captioner: CaptionModel, pairs_for: Any) -> None:
    frames = []
    tower = captioner.base.model.vision_tower
    hook = tower.register_forward_hook(lambda module, inputs, output: frames.append(len(inputs[0])))
    pairs = pairs_for(captioner)
    PairObjective(captioner, "dpo", {})(captioner.model, PairCollator(0)(pairs))
    hook.remove()
    assert sum(frames) == sum(len(p.vision["pixels"]) for p in pairs)  # policy, reference and both answers share it


def test_nan_in_one_pairs_hidden_states_is_named(text_lm: CaptionModel, pairs_for: Any) -> None:
    batch = PairCollator(0)(pairs_for(text_lm))
    position = int(batch["rows"][batch["cu_seqlens"][2] + 1])  # second token of pair 2's chosen answer

    def poison(module: Any, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, position] = float("nan")
        return output

    hook = text_lm.base.model.norm.register_forward_hook(poison)
    for loss_type in ("synpo", "simpo"):
        outcome = PairObjective(text_lm, loss_type, {})(text_lm.model, batch)
        assert outcome.nonfinite.tolist() == [False, False, True, False]
        assert outcome.loss.isnan()
    hook.remove()


def test_settings_left_out_are_the_objectives_own() -> None:
    assert parameters_of("synpo", {"beta": 0.5, "alpha": None}) == {"alpha": 30.0, "beta": 0.5}
    assert parameters_of("simpo", {}) == {"beta": 2.0, "gamma": 1.0}
    assert parameters_of("sft", {"alpha": None}) == {}


@pytest.mark.parametrize(
    ("loss_type", "given", "message"),
    [
        ("sympo", {}, r"train\.loss_type: unknown objective 'sympo'; did you mean 'synpo'"),
        ("dpo", {"alpha": 1.0}, r"train\.alpha: dpo has no such parameter; it has beta = 0\.1"),
        ("sft", {"beta": 1.0}, r"train\.beta: sft has no such parameter; it has none"),
    ],
)
def test_unknown_objectives_and_parameters_are_refused(loss_type: str, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parameters_of(loss_type, given)


def test_a_reference_is_what_the_model_can_give(pairs_for: Any) -> None:
    tokenizer = byte_tokenizer()
    lm = CaptionModel(tiny_text_model(tokenizer), tokenizer, None)
    with pytest.raises(ConfigError, match=r"train\.reference: base .* this model has no adapter; set start"):
        PairObjective(lm, "dpo", {}, reference="base")
    with pytest.raises(ConfigError, match=r"train\.reference: unknown reference 'bas'; did you mean 'base'"):
        PairObjective(lm, "dpo", {}, reference="bas")
    objective = PairObjective(lm, "dpo", {})
    assert (objective.reference, PairObjective(lm, "synpo", {}).reference) == ("start", "")
    with pytest.raises(ConfigError, match=r"what the reference, .*, says of pairs pair-0, pair-1 is not known"):
        objective(lm.model, PairCollator(lm.pad_token_id)(pairs_for(lm, 2)))
