"""Layers made otherwise than the model's own code makes them: the same training, and runs that go on bit by bit."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

from interpreter_faults import mend
from runs_of_torch import Runs
from synpo.config import ConfigError, LoraSection
from synpo.data.collate import PairCollator
from synpo.data.tokenize import EncodedPair
from synpo.model import liger, packing
from synpo.model.adapter import CaptionModel
from synpo.model.lora_linear import fuse
from synpo.train.arguments import SynPOConfig
from synpo.train.layers import apply_liger, compile_layers, layers_of
from synpo.train.lora import apply_lora
from synpo.train.memory import SavedBytes
from synpo.train.objective import PairObjective

FAMILIES = ("llama", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture
def liger_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """liger-kernel's Triton kernels in Triton's interpreter; what it changes in transformers is put back."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU the interpreter is off, and these models are on the CPU")
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (pip install 'synpo[liger]')")
    from triton import language as tl
    from triton.runtime import interpreter

    mend()
    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:  # a compiled kernel is given fp32 numbers
        if isinstance(argument, float):
            return tl.tensor(
                interpreter.TensorHandle(interpreter.np.array([argument], "float32"), tl.float32), tl.float32
            )
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: tl.rsqrt(x))  # for CUDA's own
    monkeypatch.setattr("liger_kernel.ops.geglu.tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in FAMILIES]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, values in zip(modules, before):
        vars(module).update(values)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., SynPOConfig]:
    return lambda **values: SynPOConfig(output_dir=str(tmp_path / "args"), use_cpu=True, **values)


def loss_and_gradients(lm: CaptionModel, pairs: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    lm.model.zero_grad()
    outcome = PairObjective(lm, "synpo", {}, "chunked")(lm.model, PairCollator(lm.pad_token_id)(pairs))
    outcome.loss.backward()
    return outcome.loss.detach(), {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}


def assert_same(found: Any, expected: Any) -> None:
    assert float((found[0] - expected[0]).abs() / expected[0].abs()) <= 1e-5
    assert found[1].keys() == expected[1].keys()
    largest = max(float(g.norm()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        error = float((found[1][name] - gradient).norm())
        assert error <= 2e-5 * max(float(gradient.norm()), 1e-2 * largest), (name, error, float(gradient.norm()))


def a_pair(lm: CaptionModel) -> list[EncodedPair]:
    frames = torch.arange(2 * 3 * 48 * 48).view(2, 3, 48, 48).to(torch.uint8) if lm.sees_video else None
    prompt = lm.prompt("Describe.", frames)
    return [EncodedPair("p", prompt.input_ids, lm.completion("A star."), lm.completion("No."), prompt.vision)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2_5_vl"])
def test_ligers_kernels_change_nothing(family: str, family_lm: Any, settings: Any, liger_kernel: None) -> None:
    lm = family_lm(family)
    pairs = a_pair(lm)
    expected = loss_and_gradients(lm, pairs)
    args = settings(use_liger_kernel=True)
    apply_liger(lm, args)
    decoder = lm.base.get_decoder()
    patched = [type(m).__name__ for m in decoder.modules() if "forward" in vars(m)]
    assert len([name for name in patched if "Norm" in name]) == 5 + 4 * (family == "qwen3") and len(patched) % 2
    assert hasattr(sys.modules[type(decoder).__module__].apply_rotary_pos_emb, "of_liger")
    assert_same(loss_and_gradients(lm, pairs), expected)
    assert not any(args.liger_kernel_config.values())  # transformers has nothing left to do


class OffsetRMSNorm(nn.Module):
    """As in Gemma: weights are offsets from 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(0.1 * torch.randn(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * (x.float().pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)).type_as(x)


class HalfRMSNorm(OffsetRMSNorm):
    """Of a form that no kernel has."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Gated(nn.Module):
    def __init__(self, activation: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Shifted(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_a_part_of_another_form_stays_as_it_is(liger_kernel: None) -> None:
    torch.manual_seed(0)
    parts = nn.Sequential(
        OffsetRMSNorm(16),
        HalfRMSNorm(16),
        Gated(nn.SiLU()),
        Gated(nn.GELU("tanh")),
        Gated(nn.ReLU()),
        Shifted(nn.SiLU()),
    )
    x = torch.randn(5, 16)
    expected = [part(x) for part in parts]
    for kinds, count in (({"norm": False, "gate": False}, [0, 0]), ({}, [1, 2])):
        found = liger.apply(parts, {"rope": False} | kinds)
        assert [found["norm"], found["gate"]] == count
    assert ["forward" in vars(part) for part in parts] == [True, False, True, True, False, False]
    for part, value in zip(parts, expected):
        torch.testing.assert_close(part(x), value)


def test_what_liger_cannot_do_is_said(text_lm: Any, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"rope": False, "fused_linear_cross_entropy": True}
    with pytest.raises(ConfigError, match="fused_linear_cross_entropy is not among rms_norm.*place of the fused one"):
        apply_liger(text_lm, settings(use_liger_kernel=True, liger_kernel_config=wrong))
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"liger-kernel is not installed: pip install 'synpo\[liger\]'"):
        apply_liger(text_lm, settings(use_liger_kernel=True))
    monkeypatch.setattr(liger, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="run on a GPU alone"):
        apply_liger(text_lm, settings(use_liger_kernel=True))


def test_ligers_kernels_are_planned_as_they_run(text_lm: Any, settings: Any, liger_kernel: None) -> None:
    """What norms and gate of a layer keep: on the CPU, and what stands in for them where nothing is computed."""
    counts = []
    for device in ("cpu", "meta"):
        lm = text_lm
        if device == "cpu":
            apply_liger(lm, settings(use_liger_kernel=True))
        else:
            lm.model.to("meta")
            liger.stand_in(lm.base.get_decoder())
        (first, *_) = layers_of(lm.base.get_decoder())
        hidden = torch.zeros(1, 12, first.input_layernorm.weight.numel(), device=device, requires_grad=True)
        counter = SavedBytes(lm.base)
        with counter.counting():
            first.mlp(first.post_attention_layernorm(first.input_layernorm(hidden)))
        counts.append(counter.by_layer[-1])
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_parts_of_layers_are_compiled_once_for_all_lengths_and_layers(
    text_lm: Any, pairs_for: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo import reset
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.testing import CompileCounterWithBackend

    reset()
    counter = CompileCounterWithBackend("aot_eager")
    assert lookup_backend(counter) is counter
    lm = text_lm
    fuse(lm.model)
    rows = [pairs_for(lm, 3)[:1], pairs_for(lm, 3), pairs_for(lm, 4)[2:]]
    expected = [loss_and_gradients(lm, pairs) for pairs in rows]
    args = settings()
    args.torch_compile_backend = counter
    compile_layers(lm, args)
    for pairs, values in zip(rows, expected):
        assert_same(loss_and_gradients(lm, pairs), values)
    assert 2 <= counter.frame_count <= 3  # norms and gated products, the first norm perhaps apart
    lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    lm.model.train()
    for pairs, values in zip(rows, expected):
        assert_same(loss_and_gradients(lm, pairs), values)
    assert counter.frame_count <= 8
    reset()


@pytest.mark.parametrize(
    ("checkpointing", "made"),
    [
        (True, {"fused_lora": True}),
        (True, {"torch_compile_backend": "aot_eager", "fused_lora": True}),
        (False, {"use_liger_kernel": True, "fused_lora": True}),
    ],
    ids=["lora", "compiled", "liger"],
)
def test_a_run_with_dropout_goes_on_where_it_was(
    checkpointing: bool,
    made: dict[str, Any],
    text_lm: Any,
    pairs_for: Any,
    trainer_for: Any,
    request: pytest.FixtureRequest,
) -> None:
    """Bit by bit; and it learns what the model's own layers learn, whose random numbers are the same."""
    if "use_liger_kernel" in made:
        request.getfixturevalue("liger_kernel")
    lm = text_lm
    for module in lm.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.2)
    data = pairs_for(lm, 4)
    shared = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "bf16": True}
    if "use_liger_kernel" in made:  # slow in the interpreter, and bfloat16 numbers are multiplied as integers there
        ids = torch.arange(20, 30).split([3, 2, 2, 3])
        data = [EncodedPair(str(i), ids[i], ids[i + 1], ids[i + 2], {}) for i in range(2)]
        shared |= {"bf16": False, "per_device_train_batch_size": 1, "prefix_sharing": False}
    start = {n: p.detach().clone() for n, p in lm.model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Any]] = {}
    for name, how, resume in (("peft", {}, None), ("ours", made, None), ("again", made, "checkpoint-2")):
        with torch.no_grad():
            for parameter, value in lm.model.named_parameters():
                if parameter in start:
                    value.copy_(start[parameter])
        trainer = trainer_for(
            lm,
            data,
            "run",
            activation_checkpointing=checkpointing,
            **shared,
            **how,
        )
        folder = Path(trainer.args.output_dir)
        trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
        lines = (folder / "train_log.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines][:-1]
    for name in ("loss", "grad_norm", "synpo/chosen_logp"):
        ours, again, peft = ([row[name] for row in rows[run]] for run in ("ours", "again", "peft"))
        assert ours == again and len(set(ours)) == 4
        assert ours == pytest.approx(peft, rel=5e-2 if shared["bf16"] else 1e-3)


def tied(lm: CaptionModel) -> CaptionModel:
    lm.base.get_output_embeddings().weight = lm.base.get_input_embeddings().weight
    return lm


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
@pytest.mark.parametrize("autocast", [False, True])
def test_all_of_it_together_is_the_plain_step(
    family: str, autocast: bool, family_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA in few passes, one attention call a layer, prompts once and layers run again, against padded rows in float64 with
    PEFT's layers; the text model's head is tied. Under autocast no further off than what is plain but for autocast."""
    lm = family_lm(family)
    lm = tied(lm) if family == "qwen2" else lm
    apply_lora(lm, LoraSection(r=4, alpha=8, dropout=0.0))
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    pairs = [*a_pair(lm), EncodedPair("q", *torch.arange(20, 60).split([23, 9, 8]), {})]

    def step(lm: CaptionModel, shared: bool) -> tuple[Tensor, dict[str, Tensor]]:
        lm.model.zero_grad()
        batch = PairCollator(lm.pad_token_id, shared)(pairs)
        on = autocast and lm.model.dtype != torch.float64
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = PairObjective(lm, "synpo", {}, "chunked")(lm.model, batch).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}

    def errors(found: Any, exact: Any) -> tuple[float, float]:
        names = sorted(exact[1])
        assert found[1].keys() == exact[1].keys()
        a, b = (torch.cat([g[1][n].double().flatten() for n in names]) for g in (found, exact))
        return float((found[0] - exact[0]).abs() / exact[0].abs()), float((a - b).norm() / b.norm())

    vision, whole = lm.vision, deepcopy(lm.model).double()
    exact_lm = CaptionModel(
        whole, lm.tokenizer, None if vision is None else type(vision)(whole.get_base_model(), vision.processor)
    )
    for pair in pairs if vision is not None else []:
        pair.vision.update({k: v.double() for k, v in pair.vision.items() if v.is_floating_point()})
    exact = step(exact_lm, False)
    for pair in pairs:
        pair.vision.update({k: v.float() for k, v in pair.vision.items() if v.is_floating_point()})
    plain = errors(step(lm, False), exact)

    kernel = Runs()
    monkeypatch.setattr(packing, "one_call", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    assert fuse(lm.model) == 14
    lm.base.gradient_checkpointing_enable({"use_reentrant": False})
    lm.model.train()
    found = errors(step(lm, True), exact)
    assert kernel.calls == 4  # forward, and again for the backward pass
    for ours, theirs, least in zip(found, plain, (2e-3, 1e-2) if autocast else (1e-5, 1e-5)):
        assert ours <= 1.2 * theirs + least, (found, plain)
