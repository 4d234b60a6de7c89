"""The LoRA layer in few passes against PEFT's own, in float64 and under autocast, and when it leaves a layer to PEFT."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from passes import Passes
from synpo.model.lora_linear import fuse, lora_linear
from synpo.model.meant import meant_for
from synpo.train.memory import SavedBytes

N, D, E = 37, 48, 80


class OtherLinear(nn.Linear):
    """A linear layer with a kernel of its own, as one in 4 bits has."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T.to(x.dtype)


def layer_of(kind: Callable[..., nn.Module] = nn.Linear, bias: bool = True, **settings: Any) -> Any:
    """A LoRA layer whose B is not 0."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(D, E, bias=bias))
    config = LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": ["0"]} | settings)
    model = get_peft_model(model, config)  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return layer.train()


def run(layer: Any, x: Tensor, upstream: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Output and gradients."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(seed)
    y = layer(x)
    y.backward(upstream.to(y.dtype))
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **found}


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", [nn.Linear, OtherLinear])
@pytest.mark.parametrize(
    ("bias", "dropout", "autocast"), [(True, 0.0, False), (False, 0.3, False), (False, 0.0, True), (True, 0.3, True)]
)
def test_results_are_no_further_from_float64_than_pefts(kind: Any, bias: bool, dropout: float, autocast: bool) -> None:
    theirs = layer_of(kind, bias and kind is nn.Linear, lora_dropout=dropout)
    x, upstream = torch.randn(3, N, D), torch.randn(3, N, E)
    if autocast:
        theirs.base_layer.bfloat16()
        x = x.bfloat16().float()
    drawn: list[Tensor] = []  # the same mask in every precision
    mask = (torch.rand(3 * N, D) >= dropout) / (1 - dropout)

    def drop(module: Any, arguments: Any, output: Tensor) -> Tensor:
        drawn.append(output)
        return arguments[0] * mask.view_as(arguments[0]).to(arguments[0].dtype)

    if dropout:
        theirs.lora_dropout["default"].register_forward_hook(drop)
    ours = deepcopy(theirs)
    assert fuse(ours) == 1
    exact = run(deepcopy(theirs).double(), x.double(), upstream.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert lora_linear(ours, x) is not None
        given = x.bfloat16() if autocast else x
        found, peft = run(ours, given, upstream), run(theirs, given, upstream)
    assert found.keys() == peft.keys() == exact.keys() and len(found) == 4
    for name, value in exact.items():
        assert found[name].dtype == peft[name].dtype and found[name].shape == peft[name].shape
        assert error(found[name], value) <= 1.1 * error(peft[name], value) + (1e-3 if autocast else 1e-6), name


def test_dropout_draws_what_pefts_does() -> None:
    theirs = layer_of(lora_dropout=0.4)
    ours = deepcopy(theirs)
    fuse(ours)
    x, upstream = torch.randn(N, D), torch.randn(N, E)
    for name, value in run(theirs, x, upstream).items():
        torch.testing.assert_close(run(ours, x, upstream)[name], value, rtol=1e-5, atol=1e-5)
    assert not torch.equal(run(ours, x, upstream, 1)["y"], run(ours, x, upstream, 2)["y"])
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def merged(layer: Any) -> None:
    layer.merge()


def off(layer: Any) -> None:
    layer.enable_adapters(False)


def two(layer: Any) -> None:
    layer.update_layer("other", 4, lora_alpha=8, init_lora_weights=False, config=LoraConfig(r=4))
    layer.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    ("change", "settings"),
    [(merged, {}), (off, {}), (two, {}), (None, {"use_dora": True}), (None, {"lora_bias": True})],
    ids=["merged", "off", "two adapters", "DoRA", "bias of B"],
)
def test_what_is_not_plain_lora_is_left_to_peft(change: Any, settings: dict[str, Any]) -> None:
    theirs = layer_of(**settings)
    ours = deepcopy(theirs)
    fuse(ours)
    for layer in (theirs, ours):
        if change is not None:
            change(layer)
    x = torch.randn(N, D)
    assert lora_linear(ours, x) is None
    assert torch.equal(ours(x), theirs(x))


def test_two_precisions_without_autocast_are_left_to_peft() -> None:
    ours = layer_of(bias=False)
    ours.base_layer.bfloat16()
    fuse(ours)
    x = torch.randn(N, D).bfloat16()
    assert lora_linear(ours, x) is None and ours(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear(ours, x) is not None


def test_nothing_but_products_passes_over_what_is_large() -> None:
    ours = layer_of()
    ours.base_layer.bfloat16()
    fuse(ours)
    x, upstream = torch.randn(N, D).bfloat16().requires_grad_(), torch.randn(N, E).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), Passes(N * D) as forward:
        y = ours(x)
    assert (forward.products(), forward.others()) == (3, {})
    with Passes(N * D) as backward:
        y.backward(upstream)
    assert (backward.products(), backward.others()) == (5, {})


def test_a_gradient_that_nobody_needs_is_not_computed() -> None:
    """As in the first layer: what it reads are embeddings, which are not trained."""
    ours = layer_of()
    fuse(ours)
    y = ours(torch.randn(N, D))
    with Passes(N * 4) as backward:
        y.sum().backward()
    assert backward.products() == 3  # u, and the gradients of A and B


def test_hooks_of_the_frozen_layer_are_called() -> None:
    ours = layer_of()
    fuse(ours)
    called: list[int] = []
    ours.base_layer.register_forward_hook(lambda *_: called.append(1))
    x, upstream = torch.randn(N, D), torch.randn(N, E)
    run(ours, x, upstream)
    assert called == [1]


def test_it_is_planned_as_it_runs() -> None:
    """What is kept on the meta device, under autocast, is what is kept on a CPU."""
    counts = []
    for device in ("cpu", "meta"):
        ours = layer_of(bias=False, lora_dropout=0.0)
        ours.base_layer.bfloat16()
        ours = ours.to(device)
        fuse(ours)
        counter = SavedBytes(ours)
        x = torch.empty(N, D, dtype=torch.bfloat16, device=device, requires_grad=True)
        with (
            torch.autocast("cpu", torch.bfloat16),
            meant_for("cuda", torch.bfloat16),
            counter.counting(),
        ):
            assert ours(x).shape == (N, E)
        counts.append(counter.by_layer[-1])
    assert counts[0] == counts[1] == 2 * (N * D + N * 4 + 4 * D + 4 * E)
