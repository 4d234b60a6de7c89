"""What the loss needs of a Hugging Face model: the hidden states that enter its output head, and that head. Never its logits.

    hidden, head = hidden_states_and_head(model, **inputs)      then      loss_fn(hidden, head, labels)
    loss = in_place_of_logits(model, function, **inputs)        the same, inside of the model's own forward

Nothing here imports transformers, PEFT or a library that distributes: a model is what has `get_output_embeddings`, under whatever
wraps it. The top-level forward runs as it always does, so that all that wrappers do to it is done; hooks give the head one
position, and take what enters it.

What a model does to what its head gives (a soft cap, a scale) stands under many names in configurations, and some models have
the name and do nothing. So the model is asked: the first time, it gets made-up logits in the place of its head's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .head import Head, layer_head

WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")  # under torch.compile; DDP, DeepSpeed; FSDP1

_transforms: WeakKeyDictionary[nn.Module, tuple[float | None, float]] = WeakKeyDictionary()  # softcap, scale


def hidden_states_and_head(model: Any, /, **inputs: Any) -> tuple[Tensor, Head]:
    """Run a model up to its output head.

        hidden, head = hidden_states_and_head(model, input_ids=ids, attention_mask=mask)
        out = FusedLinearSynPOLoss()(hidden[:, :-1], head, labels[:, 1:])

    Args:
        model: a Hugging Face model with an output head, wrapped or not: by PEFT (LoRA anywhere, the head too), torch.compile,
            DDP, FSDP2, ZeRO-3 (a head that is frozen), accelerate. One that is compiled as a whole runs with its decoder
            compiled instead.
        inputs: what the model's forward takes, without labels.

    Returns:
        (hidden, head): hidden states (B, L, D) in the dtype of the head, differentiable, hidden[t] the state that predicts token
        t + 1; and the head with its bias, soft cap, scale and LoRA, as the loss takes it. Under FSDP2 the losses gather it.

    Raises:
        ValueError: labels are among the inputs; the model has no output head, or does to its logits what the loss does not
            support (it supports W, b, plain LoRA, a scale and a soft cap); it is wrapped by PEFT in a way that adds states to
            a row, or goes past the model's hooks (prompt tuning, AdaLoRA); the head is in pieces out of the forward pass (FSDP1).
    """
    hidden = _run(model, _in_graph, inputs)
    head = head_of(model)
    if head.weight.dim() != 2 and not hasattr(head.weight, "ds_id"):
        raise ValueError(
            f"outside of its forward pass this model holds its head in pieces, of shape {tuple(head.weight.shape)} (FSDP1 does): "
            "compute the loss inside, by in_place_of_logits(model, function, **inputs), or use FSDP2"
        )
    return hidden.to(head.weight.dtype), head


def in_place_of_logits(model: Any, function: Callable[[Tensor, Head], Tensor], /, **inputs: Any) -> Tensor:
    """function(hidden (B, L, D), head), called where the output head would make logits, as what the forward pass gives.

    Everything that a wrapper does to a forward pass is so done to the loss: the head is whole inside `function` under FSDP1,
    FSDP2 and ZeRO-3, trained ones too, and DDP finds it in the graph of the output. A model that has not been looked at runs
    once more before, without gradients.

        def loss(hidden, head):
            return loss_fn(hidden, head, labels).loss

        in_place_of_logits(model, loss, **inputs).backward()

    Args and Raises: as `hidden_states_and_head`. `function` returns one tensor of any shape.
    """
    base = base_of(model)
    if base not in _transforms:
        with torch.no_grad(), torch.random.fork_rng([p.device for p in base.parameters() if p.is_cuda][:1]):
            _run(model, lambda hidden, layer: hidden[:1, :1], inputs)
    return _run(model, lambda hidden, layer: function(hidden, head_of(model)), inputs)


def head_of(model: Any, look: Callable[[], Any] | None = None) -> Head:
    """The output head of a model as it is now: PEFT's trained copy of it, or the original one while adapters are disabled.

    Args:
        look: called where the model was not run by one of the functions above yet; it should do so. None: the head is then one
            that nothing is done to.

    Raises ValueError as `hidden_states_and_head`.
    """
    base = base_of(model)
    if base not in _transforms and look is not None:
        look()
    softcap, scale = _transforms.get(base, (None, 1.0))
    return replace(layer_head(base.get_output_embeddings()), softcap=softcap, logit_scale=scale)


def base_of(model: Any) -> Any:
    """The Hugging Face model under all that wraps it. Raises ValueError where there is none, or it has no output head."""
    return _layers(model)[-1]


def _layers(model: Any) -> list[Any]:
    """`model` and what it wraps, the Hugging Face model itself last."""
    layers = [model]
    while not hasattr(type(layers[-1]), "get_output_embeddings"):
        inner = layers[-1]
        children = vars(inner).get("_modules", {})
        if isinstance(inner, nn.DataParallel):
            raise ValueError(
                "DataParallel copies a model, and its copies have no hooks; run one process a GPU (torchrun, DDP)"
            )
        if hasattr(type(inner), "get_base_model"):  # PEFT
            layers.append(inner.get_base_model())
        elif (name := next((name for name in WRAPPED if name in children), None)) is not None:
            layers.append(children[name])
        else:
            raise ValueError(
                f"expected a Hugging Face model with an output head, got {type(model).__name__}; with a model of your own give "
                "the loss its hidden states and the layer, or the weight, of its head"
            )
    if layers[-1].get_output_embeddings() is None:
        raise ValueError(
            f"{type(layers[-1]).__name__} has no output head; load the model as AutoModelForCausalLM or "
            "AutoModelForImageTextToText"
        )
    return layers


def _run(model: Any, function: Callable[[Tensor, nn.Module], Tensor], inputs: dict[str, Any]) -> Tensor:
    """A forward pass with `function` of the states that enter the head, and of the head's layer, in the place of the logits.

    A model that is not known yet is looked at on the way: whether its head is one that we know, and what it does to its logits.
    """
    if inputs.get("labels") is not None:
        raise ValueError(
            "labels are for the loss, not for the model, which would compute one of its own: leave them out"
        )
    layers = _layers(model)
    base = layers[-1]
    layer, look = base.get_output_embeddings(), _Look() if base not in _transforms else None
    entered: list[Tensor] = []
    results: list[Tensor] = []
    logits: list[Tensor] = []
    handed: list[bool] = []

    def shorten(layer: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if arguments[0].dim() != 3:
            raise ValueError(
                f"{type(base).__name__} gives its output head states of shape {tuple(arguments[0].shape)}, expected (B, L, D): "
                "the fused loss does not know what they are"
            )
        entered.append(arguments[0])
        return (arguments[0][:1, :1], *arguments[1:])

    def compute(layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        logits.append(output.detach())
        if look is not None:
            look.at_head(layer, arguments[0], output)
        results.append(function(entered[-1], layer))
        # what comes after the head expects three dimensions; FSDP2 wants no view
        return results[0].reshape(1, 1, -1).clone()

    def keep(layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if look is not None:
            look.at_hooks(results[0], output)
        results.append(output)
        return logits[0] if look is None else look.asked.clone()  # which the model may change in place

    def hand_out(base: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        handed.append(True)
        if look is not None:
            look.at_logits(type(base).__name__, output.logits)
        output.logits = results[-1]
        return output

    hooks = [
        layer.register_forward_pre_hook(shorten),  # last, when the wrappers have gathered the head
        layer.register_forward_hook(compute, prepend=True),  # first, before they let go of it
        layer.register_forward_hook(keep),
        base.register_forward_hook(hand_out, prepend=True),
    ]
    try:
        with _decoder_compiled_alone(layers):
            output = model(**{**inputs, "use_cache": False})
    finally:
        for hook in hooks:
            hook.remove()
    if len(entered) != 1:
        raise ValueError(
            f"{type(base).__name__} called its output head {len(entered)} times, expected once: the fused loss cannot stand "
            "in the place of its logits"
        )
    if not handed:
        raise ValueError(
            f"{type(model).__name__} runs the forward of {type(base).__name__} past its hooks (AdaLoRA does), so that nothing "
            "can stand in the place of its logits; train LoRA"
        )
    given = next(
        (inputs[name].shape[1] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None
    )
    if given is not None and entered[0].shape[1] > given:
        raise ValueError(
            f"{type(model).__name__} gives its output head {entered[0].shape[1]} states of a row of {given} tokens (prompt "
            "tuning does): it is not known which of them are those of the tokens"
        )
    if look is not None:
        _transforms[base] = look.transform(type(base).__name__)
    return output.logits.view(results[0].shape)


ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""How far logits of a dtype may be from ours, in norm and relative; a single one four times as far, beside their size."""


def check_logits(logits: Tensor, expected: Tensor, what: str) -> None:
    """Raise ValueError, beginning with `what`, where a model's logits (…, V) are not ours up to rounding in their dtype, or in
    the coarser one of those that we made of its head: many models widen what their head gives."""
    found, ours = logits.double(), expected.double()
    error, size = (found - ours).abs(), ours.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    relative = error.square().mean().sqrt() / size
    dtype = max(logits.dtype, expected.dtype, key=ROUNDING.__getitem__)
    rounding = ROUNDING[dtype]
    if not (relative <= rounding and (error / (ours.abs() + size)).max() <= 4 * rounding):
        raise ValueError(
            f"{what}: they differ by up to {error.max():.3g} where they are of size {size:.3g}, {relative:.2g} of it on the "
            f"whole ({str(dtype).removeprefix('torch.')} explains {rounding:.2g}). The fused loss supports a linear head "
            "with a bias and LoRA, a scale and a soft cap"
        )


class _Look:
    """What a model's first forward pass tells about its head. Raises ValueError where the fused loss would be another's."""

    asked: Tensor  # (1, 1, V) made-up logits: both signs, from 1e-3 to 1e6
    answered: Tensor  # (1, 1, V) what the model made of them

    def at_head(self, layer: Any, hidden: Tensor, logits: Tensor) -> None:
        """Compare the logits (1, 1, V) of one state (1, 1, D) with ours, up to rounding in their dtype."""
        if not any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in layer.modules()):
            check_logits(
                logits,
                layer_head(layer).logits(hidden),
                f"the output head, a {type(layer).__name__}, gives other logits than its weight, bias and LoRA",
            )
        count = logits.shape[-1]
        sizes = torch.logspace(-3, 6, count, dtype=torch.float32, device=logits.device)
        signs = 1.0 - 2.0 * (torch.arange(count, device=logits.device) % 2)
        self.asked = (sizes * signs).view(logits.shape)

    def at_hooks(self, before: Tensor, after: Tensor) -> None:
        if not torch.equal(before.flatten(), after.flatten()):
            raise ValueError(
                "a forward hook on the output head changes its logits: remove it, the fused loss does not know it"
            )

    def at_logits(self, name: str, logits: Tensor) -> None:
        if logits.shape != self.asked.shape:
            raise ValueError(
                f"{name} makes logits of shape {tuple(logits.shape)} of those of shape {tuple(self.asked.shape)} that its output "
                "head gives: the fused loss knows a scale and a soft cap alone"
            )
        self.answered = logits.detach()

    def transform(self, name: str) -> tuple[float | None, float]:
        """(softcap, scale) with answered = softcap · tanh(scale · asked / softcap), or scale · asked: then softcap is None."""
        x, z = (t.flatten().double().cpu() for t in (self.asked, self.answered))
        eps, slope = torch.finfo(self.answered.dtype).eps, z / x
        if float((slope - 1).abs().max()) <= eps:
            return None, 1.0
        if self.answered.dtype not in (torch.float16, torch.bfloat16):  # in which a factor cannot be read exactly
            if float((slope / slope[0] - 1).abs().max()) <= 8 * eps:
                return None, _plain(float(slope.median()))
            softcap = _plain(float(z.abs().max()))
            share = (z / softcap).abs()
            bent = (share > 0.1) & (share < 0.9)
            found = softcap * torch.atanh(z / softcap) / x
            scale = _plain(float(found[bent].median() if bent.any() else slope[0]))
            if float((z - softcap * torch.tanh(scale * x / softcap)).abs().max()) <= 16 * eps * softcap:
                return softcap, scale
        raise ValueError(
            f"{name} does something to the logits of its output head that the fused loss does not support: it knows a scale and "
            "a soft cap, cap · tanh(scale · logits / cap)"
        )


def _plain(number: float) -> float:
    """The number with few digits, or one over such, that `number` is up to rounding; else itself."""
    near = [float(f"{number:.5g}"), 1 / float(f"{1 / number:.5g}")] if 0 < abs(number) < math.inf else []
    return next((n for n in near if abs(n / number - 1) < 1e-6), number)


class _InGraph(torch.autograd.Function):
    """hidden as it is, in a graph in which `parameters` are too; their gradients come from elsewhere."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *[None] * ctx.parameters


def _in_graph(hidden: Tensor, layer: nn.Module) -> Tensor:
    """`hidden`; DDP, where it looks for parameters that are not used, finds those of the head in its graph."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    return _InGraph.apply(hidden, *trained) if torch.is_grad_enabled() and trained else hidden


@contextmanager
def _decoder_compiled_alone(layers: list[Any]) -> Iterator[None]:
    """Where a model is compiled as a whole, run its top level as it is and compile its decoder instead.

    Code that is compiled has no place for our hooks, and would be compiled again for every loss.
    """
    whole_ones = [m for m in layers if "_orig_mod" in m._modules or m._compiled_call_impl is not None]
    if whole_ones and (decoder := layers[-1].get_decoder()) is not layers[-1] and decoder._compiled_call_impl is None:
        as_set = next((vars(m)["dynamo_ctx"] for m in whole_ones if "dynamo_ctx" in vars(m)), torch.compile)
        decoder._compiled_call_impl = as_set(decoder._call_impl)
    before = [(m, m.forward, m._compiled_call_impl) for m in whole_ones]
    try:
        for m in whole_ones:
            m._compiled_call_impl = None
            if "_orig_mod" in m._modules:
                m.forward = m._orig_mod.__call__
        yield
    finally:
        for m, forward, implementation in before:
            m._compiled_call_impl = implementation
            if "_orig_mod" in m._modules:
                m.forward = forward
