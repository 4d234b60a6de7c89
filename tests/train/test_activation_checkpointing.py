"""Activation checkpointing, around the model's layers and around the whole objective, changes no loss and no gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from synpo.data.collate import PairCollator
from synpo.model.adapter import CaptionModel
from synpo.train.objective import PairObjective


def loss_and_gradients(lm: CaptionModel, objective: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = objective(lm.model, batch)
    loss.backward()
    found = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize(("name", "loss_type"), [("text_lm", "synpo"), ("captioner", "dpo")])
def test_results_are_the_same(name: str, loss_type: str, request: pytest.FixtureRequest, pairs_for: Any) -> None:
    lm: CaptionModel = request.getfixturevalue(name)
    lm.model.train()
    batch = PairCollator(lm.pad_token_id)(pairs_for(lm, 2))
    objective = PairObjective(lm, loss_type, {}, backend="chunked")
    objective(lm.model, batch)  # looks at the model's head, once, which takes a pass of its own
    layers: list[int] = []
    layer = next(m for m in lm.base.get_decoder().modules() if type(m).__name__.endswith("DecoderLayer"))
    count = layer.mlp.register_forward_pre_hook(lambda *_: layers.append(1))

    def plain(model: Any, batch: Any) -> Tensor:
        return objective(model, batch).loss

    def whole(model: Any, batch: Any) -> Tensor:
        return checkpoint(plain, model, batch, use_reentrant=False)

    loss, gradients = loss_and_gradients(lm, plain, batch)
    forwards = len(layers)
    results = {"whole": loss_and_gradients(lm, whole, batch)}
    assert len(layers) > 2 * forwards  # it was computed again
    lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers.clear()
    results["layers"] = loss_and_gradients(lm, plain, batch)
    assert len(layers) > forwards
    count.remove()
    for kind, (again, found) in results.items():
        torch.testing.assert_close(again, loss, rtol=0, atol=0)
        assert found.keys() == gradients.keys()
        for parameter, value in gradients.items():
            torch.testing.assert_close(found[parameter], value, rtol=1e-5, atol=1e-8, msg=f"{kind}: {parameter}")
