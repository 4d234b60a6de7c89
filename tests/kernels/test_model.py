"""Hidden states and head of Hugging Face models, however they are wrapped; the model's own logits are the specification.

The file is its own worker for two processes (gloo): `python test_model.py RANK PORT FOLDER`.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from synpo_kernels import FusedLinearSynPOLoss, hidden_states_and_head, in_place_of_logits, linear_logprobs
from synpo_kernels.model import head_of
from synpo_kernels.reference import naive_synpo
from workers import free_port, run_workers

V = 131
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any], float | None, float]] = {  # class, settings, softcap, scale
    "plain": ("Llama", {}, None, 1.0),
    "soft cap": ("Gemma2", {"final_logit_softcapping": 3.0}, 3.0, 1.0),
    "soft cap of another name": (
        "RecurrentGemma",
        {"logits_soft_cap": 7.0, "lru_width": 32, "num_hidden_layers": 3},
        7.0,
        1.0,
    ),
    "scale": ("Cohere", {"logit_scale": 0.0625}, None, 0.0625),
    "a setting that divides": ("Granite", {"logits_scaling": 13.0}, None, 1 / 13),
    "the same setting, which multiplies": ("HyperCLOVAX", {"logits_scaling": 0.3}, None, 0.3),
    "a setting that does nothing": ("Llama", {"final_logit_softcapping": 3.0, "logit_scale": 2.0}, None, 1.0),
}
IDS = torch.randint(1, V, (4, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(1, V, (4, 6), generator=torch.Generator().manual_seed(1)).index_fill(
    1, torch.tensor([0, 5]), -100
)


def model_of(family: str = "plain", **more: Any) -> Any:
    name, settings, _, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip(f"this release of transformers has no {name}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**(SMALL | settings | more))).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # logits that a cap bends
    return model


def lora_everywhere(model: Any, **options: Any) -> Any:
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "lm_head"], **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return wrapped.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_makes_the_models_own_logits(family: str) -> None:
    model = model_of(family)
    hidden, head = hidden_states_and_head(model, input_ids=IDS)
    with torch.no_grad():
        torch.testing.assert_close(head.logits(hidden), model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (head.softcap, head.logit_scale) == FAMILIES[family][2:]
    again, head = hidden_states_and_head(model, input_ids=IDS)
    assert torch.equal(again, hidden) and (head.softcap, head.logit_scale) == FAMILIES[family][2:]
    assert head_of(model).weight is model.get_output_embeddings().weight
    assert not model._forward_hooks and not model.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize("family", ["soft cap", "scale"])
def test_the_loss_is_that_of_the_models_logits(family: str) -> None:
    model = model_of(family).train()
    hidden, head = hidden_states_and_head(model, input_ids=IDS, attention_mask=torch.ones_like(IDS))
    out = FusedLinearSynPOLoss(alpha=30.0, beta=0.2)(hidden, head, LABELS)
    logits = model(IDS).logits
    expected = naive_synpo(logits, torch.eye(V), LABELS)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    for mine, theirs in zip(ours, torch.autograd.grad(expected.loss, list(model.parameters()))):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    wrong = FusedLinearSynPOLoss()(hidden, head.weight, LABELS).loss  # what a bare weight gives such a model
    assert (wrong - expected.loss).abs() > 1e-3


def test_a_loss_in_the_place_of_logits_is_the_same() -> None:
    model = model_of("soft cap").train()
    hidden, head = hidden_states_and_head(model, input_ids=IDS)
    expected = linear_logprobs(hidden, head, LABELS)
    fresh = copy.deepcopy(model)  # not looked at yet
    inside = in_place_of_logits(fresh, lambda hidden, head: linear_logprobs(hidden, head, LABELS), input_ids=IDS)
    assert torch.equal(inside, expected)
    inside.sum().backward()
    expected.sum().backward()
    for mine, theirs in zip(fresh.parameters(), model.parameters()):
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_lora_on_the_head_comes_along_and_is_trained(options: dict[str, Any]) -> None:
    model = lora_everywhere(model_of("soft cap", tie_word_embeddings=False), **options)
    hidden, head = hidden_states_and_head(model, input_ids=IDS)
    with torch.no_grad():
        torch.testing.assert_close(head.logits(hidden), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    linear_logprobs(hidden, head, LABELS).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    model.train()  # an adapter's dropout draws: nothing can be compared, and nothing complains
    assert hidden_states_and_head(lora_everywhere(model_of(), lora_dropout=0.5).train(), input_ids=IDS)[1].lora
    with model.disable_adapter():
        assert not hidden_states_and_head(model, input_ids=IDS)[1].lora


def test_a_layer_stands_for_its_head() -> None:
    """lm_head in place of lm_head.weight, with its bias, and with PEFT's LoRA on it."""
    hidden = torch.randn(4, 6, 32)
    layer = nn.Linear(32, V)
    expected = linear_logprobs(hidden, layer.weight, LABELS, bias=layer.bias, softcap=5.0)
    assert torch.equal(linear_logprobs(hidden, layer, LABELS, softcap=5.0), expected)
    loss = FusedLinearSynPOLoss(softcap=5.0)
    assert torch.equal(loss(hidden, layer, LABELS).loss, loss(hidden, layer.weight, LABELS, bias=layer.bias).loss)
    model = lora_everywhere(model_of())
    head = hidden_states_and_head(model, input_ids=IDS)[1]
    adapted = model.base_model.model.lm_head
    assert torch.equal(linear_logprobs(hidden, adapted, LABELS), linear_logprobs(hidden, head, LABELS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_and_autocast(dtype: torch.dtype) -> None:
    model = model_of("soft cap")
    exact = linear_logprobs(*hidden_states_and_head(model, input_ids=IDS), LABELS)
    with torch.autocast("cpu", dtype):
        hidden, head = hidden_states_and_head(copy.deepcopy(model), input_ids=IDS)
        assert head.softcap == 3.0
        torch.testing.assert_close(linear_logprobs(hidden, head, LABELS), exact, rtol=0.1, atol=0.1)
    hidden, head = hidden_states_and_head(model.to(dtype), input_ids=IDS)
    assert hidden.dtype == dtype and head.softcap == 3.0
    torch.testing.assert_close(linear_logprobs(hidden, head, LABELS), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks have no place in code that is compiled, and every loss would be compiled anew: the decoder is compiled instead."""
    torch._dynamo.reset()
    plain = model_of("soft cap")
    expected, _ = hidden_states_and_head(plain, input_ids=IDS)
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model: Any = copy.deepcopy(plain)
    if how == "wrapped":
        model = torch.compile(model, backend=backend)
        assert model(IDS).logits.shape == (4, 6, V)  # compiled without our hooks
    else:
        model.compile(backend="eager")  # which does not say how: the decoder gets torch.compile's defaults
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for shift in range(3):
        hidden, head = hidden_states_and_head(model, input_ids=(IDS + shift) % V)
        logps = in_place_of_logits(
            model, lambda hidden, head: linear_logprobs(hidden, head, LABELS), input_ids=(IDS + shift) % V
        )
        torch.testing.assert_close(logps, linear_logprobs(hidden, head, LABELS))
        if shift == 0:
            torch.testing.assert_close(hidden, expected)
            once = len(compiled)
    assert head.softcap == 3.0
    assert len(compiled) == once > 0
    assert model(IDS).logits.shape == (4, 6, V)


def scaled_in_another_way(model: Any) -> None:
    forward = type(model).forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.where(output.logits < 5, -1e4)
        return output

    model.__class__ = type("Masked", (type(model),), {"forward": changed})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.lm_head.register_forward_hook(lambda *a: a[2] * 2), "a forward hook on the output head changes"),
        (scaled_in_another_way, "Masked does something to the logits of its output head that the fused loss does not"),
        (
            lambda m: setattr(m.lm_head, "forward", lambda x: x @ m.lm_head.weight.T + 1),
            "a Linear, gives other logits than",
        ),
        (lambda m: get_peft_model(m, LoHaConfig(r=2, target_modules=["lm_head"])), "the output head trains hada_w1_a"),
        (
            lambda m: get_peft_model(m, LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)),
            "Dora on the output head",
        ),
        (
            lambda m: get_peft_model(m, AdaLoraConfig(target_modules=["q_proj"], total_step=9, task_type="CAUSAL_LM")),
            r"runs the forward of \w+ past its hooks",
        ),
        (
            lambda m: get_peft_model(m, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
            "gives its output head 9 states of a row of 6 tokens",
        ),
    ],
)
def test_heads_that_the_loss_would_get_wrong_are_refused(change: Any, message: str) -> None:
    model = model_of()
    changed = change(model)
    with pytest.raises(ValueError, match=message):
        hidden_states_and_head(changed if isinstance(changed, nn.Module) else model, input_ids=IDS)
    assert not model._forward_hooks and not model._forward_pre_hooks


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.99


class Capped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 20 * torch.tanh(super().forward(x) / 20)


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(V, dtype=x.dtype).index_fill(0, torch.tensor(7), 1.0)


class Wide(nn.Linear):
    """Computes in float32 under weights of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight.float())


UNKNOWN: dict[str, Any] = {  # logits and all hidden states → logits, or a layer
    "a bias for all": lambda z, h: z + 0.1 * torch.arange(V) / V,
    "a bias for one": lambda z, h: z + torch.zeros(V).index_fill(0, torch.tensor(7), 0.01),
    "another cap": lambda z, h: z / (1 + z.abs() / 30),
    "a limit": lambda z, h: z.clamp(-30, 30),
    "a temperature a token": lambda z, h: z * torch.linspace(0.99, 1.0, V),
    "a gate": lambda z, h: z * (1 + 0.01 * h[..., :1].sigmoid()),
    "a second head": lambda z, h: z + 0.01 * (h @ torch.ones(32, V).to(h)),
    "columns left out": lambda z, h: z[..., :100],
    "one token never, in place": lambda z, h: z.index_fill_(-1, torch.tensor(7), torch.finfo(z.dtype).min),  # Chameleon
    "a scale in the head": Scaled,
    "a cap in the head": Capped,
    "a bias in the head": Shifted,
}
KNOWN: dict[str, Any] = {
    "a cap": lambda z, h: 30 * torch.tanh(z / 30),
    "a scale": lambda z, h: 0.99 * z,
    "a divisor": lambda z, h: z / 13.0,
    "a scale, then a cap": lambda z, h: torch.tanh(0.7 * z.float() / 20) * 20,
    "a scale that is a parameter": lambda z, h: z * torch.tensor(0.37, dtype=h.dtype),
    "float32": lambda z, h: z.float(),
    "a scale in place": lambda z, h: z.mul_(0.7),
    "a cap in place": lambda z, h: z.div_(20).tanh_().mul_(20),
    "a head in float32": Wide,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_logits(change: Any, dtype: torch.dtype) -> Any:
    """A model that does `change` to its logits under no name, or has it as the class of its head."""
    model = model_of("plain", tie_word_embeddings=False)
    if isinstance(change, type):
        model.lm_head.__class__ = change
        return model.to(dtype)

    class Changed(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            states = self.model(*args, **kwargs).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=change(self.lm_head(states), states))

    model.__class__ = Changed
    return model.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", UNKNOWN)
def test_what_else_is_done_to_logits_is_refused(change: str, dtype: torch.dtype) -> None:
    with pytest.raises(
        ValueError, match=r"(does something to the logits|makes logits of shape|gives other logits than)"
    ):
        hidden_states_and_head(with_logits(UNKNOWN[change], dtype), input_ids=IDS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", KNOWN)
def test_caps_and_scales_under_any_name_are_right(change: str, dtype: torch.dtype) -> None:
    model = with_logits(KNOWN[change], dtype)
    hidden, head = hidden_states_and_head(model, input_ids=IDS)
    exact = replace(head, weight=head.weight.double()).logits(hidden.double())
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(model(input_ids=IDS).logits.double(), exact, rtol=rounding, atol=rounding)


def test_states_that_are_no_batch_of_sequences_are_refused() -> None:
    model = with_logits(lambda z, h: z, torch.float32)
    model.model.register_forward_hook(lambda m, a, out: setattr(out, "last_hidden_state", out.last_hidden_state[None]))
    with pytest.raises(
        ValueError, match=r"gives its output head states of shape \(1, 4, 6, 32\), expected \(B, L, D\)"
    ):
        hidden_states_and_head(model, input_ids=IDS)


def test_what_is_no_model_with_a_head_is_named() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no output head; load the model as AutoModelForCausalLM"):
        hidden_states_and_head(model_of().model, input_ids=IDS)
    with pytest.raises(ValueError, match="expected a Hugging Face model with an output head, got Linear"):
        hidden_states_and_head(nn.Linear(2, 2), input_ids=IDS)
    with pytest.raises(ValueError, match="labels are for the loss, not for the model"):
        hidden_states_and_head(model_of(), input_ids=IDS, labels=IDS)
    with pytest.raises(ValueError, match="DataParallel copies a model"):
        hidden_states_and_head(nn.DataParallel(model_of()), input_ids=IDS)
    with pytest.raises(
        ValueError, match="a head is a linear layer with a weight .*, got LlamaForCausalLM; of a Hugging"
    ):
        linear_logprobs(torch.randn(4, 6, 32), model_of(), LABELS)
    for nothing in ("lm_head", None, [[0.0]]):
        with pytest.raises(ValueError, match=f"a head is a linear layer .*, got {type(nothing).__name__}; of a"):
            linear_logprobs(torch.randn(4, 6, 32), nothing, LABELS)  # type: ignore[arg-type]
    hidden, head = hidden_states_and_head(model_of("soft cap"), input_ids=IDS)
    for twice in ({"softcap": 3.0}, {"logit_scale": 2.0}, {"bias": torch.zeros(V)}):
        with pytest.raises(
            ValueError, match=f"a head given as Head brings its own {next(iter(twice))}; leave that out"
        ):
            linear_logprobs(hidden, head, LABELS, **twice)


CASES = ("ddp", "ddp, inside", "fsdp2", "fsdp2, head apart", "fsdp2, inside", "fsdp2, head apart, inside")


def loss_of(model: Any, rows: slice, inside: bool) -> Tensor:
    loss_fn, labels = FusedLinearSynPOLoss(), LABELS[rows]
    if inside:
        return in_place_of_logits(model, lambda h, head: loss_fn(h, head, labels).loss, input_ids=IDS[rows])
    hidden, head = hidden_states_and_head(model, input_ids=IDS[rows])
    return loss_fn(hidden, head, labels).loss


def gradients(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def work(rank: int, port: str, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for case in CASES:
            model = model_of("soft cap", tie_word_embeddings=False).train()
            wrapped = model
            if case.startswith("ddp"):
                wrapped = DistributedDataParallel(model, find_unused_parameters=True)
            else:
                mesh = init_device_mesh("cpu", (2,))
                parts = [*model.model.layers, *([model.lm_head] if "apart" in case else []), model]
                for part in parts:
                    fully_shard(part, mesh=mesh)
            for _ in range(2):  # the second one meets a model that is known
                wrapped.zero_grad()
                loss_of(wrapped, slice(rank, None, 2), "inside" in case).backward()
            found = gradients(model)
            if rank == 0:
                torch.save(found, folder / f"{case}.pt")
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
    os._exit(0)  # without the farewell of a process group whose other half may be gone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    run_workers(__file__, range(2), free_port(), str(root), timeout=120)
    for path in root.glob("error-*"):
        pytest.fail(path.read_text(), pytrace=False)
    return root


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_the_head_as_one_does(case: str, folder: Path) -> None:
    """A trained head, and DDP that looks for parameters which are not used: that of the head must not be one of them."""
    model = model_of("soft cap", tie_word_embeddings=False).train()
    (sum(loss_of(model, slice(rank, None, 2), False) for rank in range(2)) / 2).backward()
    found, expected = torch.load(folder / f"{case}.pt", weights_only=True), gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert expected["lm_head.weight"].abs().max() > 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    work(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
