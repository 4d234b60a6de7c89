"""Ways to make one training step from a batch of preference pairs, all on the same model: ours, the usual code, TRL's.

The model is a Llama built from its configuration, with LoRA on every projection; B of LoRA is not 0 but drawn from the
parameter's name, so that policy and reference differ. Every pair has P prompt tokens and two answers of A tokens.

On a CPU everyone computes in the weights' dtype and keeps all activations. On a GPU everyone has what their users get by default,
in precision, layers and activation checkpointing: ours as `synpo.train.choices` settles it, TRL's as its DPOConfig does; rows
that end in `, kept` keep all activations, so that those of ours and of TRL's stand on the same settings.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch
from zlib import crc32

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from synpo.data.collate import PairCollator
from synpo.data.tokenize import EncodedPair, Lengths
from synpo.model import liger
from synpo.model.adapter import CaptionModel
from synpo.model.lora_linear import fuse
from synpo.model.tiny import byte_tokenizer
from synpo.train.arguments import SynPOConfig
from synpo.train.choices import half, settle
from synpo.train.layers import prepare
from synpo.train.memory import Batch, MemoryModel
from synpo.train.objective import PairObjective
from synpo_kernels import OBJECTIVES, sequence_stats

BETA = 0.1  # of DPO, everyone's default


@dataclass(frozen=True)
class Size:
    """The model and the pairs. `vocab` words, `layers` layers of width `hidden`; `pairs` a step."""

    hidden: int
    layers: int
    vocab: int
    prompt: int
    answer: int
    pairs: int
    dtype: str

    @property
    def name(self) -> str:
        return (
            f"{self.layers} layers x {self.hidden}, {self.vocab} words, {self.dtype}, {self.pairs} x "
            f"({self.prompt} + 2 x {self.answer}) tokens"
        )

    def small(self) -> Size:
        """A problem of the same kind that is cheap: the correctness gate."""
        return Size(min(self.hidden, 256), 2, min(self.vocab, 4096), 96, 24, 2, self.dtype)


RANK = 16


def lora(rank: int = RANK) -> LoraConfig:
    targets = r".*\.(q|k|v|o|gate|up|down)_proj"
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")


def arithmetic(size: Size, loss_type: str) -> float:
    """Operations that a step cannot do without: every prompt once, nothing computed again, a product of n × m × k 2 n m k.

    Frozen products: forward and the gradient of their input, but for what reads embeddings. LoRA: those and its weights'
    gradients. Attention: every query and key that see each other, two products forward, four backward. Head: its states of the
    answers, twice. A reference without its adapter is one more forward pass.
    """
    heads = max(1, size.hidden // 64)
    width, groups, inner = size.hidden, max(1, heads // 4) * (size.hidden // heads), size.hidden * 11 // 4
    first = [(width, width), (width, groups), (width, groups)]
    shapes = [*first, (width, width), (width, inner), (width, inner), (inner, width)]
    tokens, answers = size.pairs * (size.prompt + 2 * size.answer), size.pairs * 2 * size.answer
    products = 2 * tokens * size.layers * sum(a * b for a, b in shapes)
    low_rank = 2 * tokens * size.layers * sum(RANK * (a + b) for a, b in shapes)
    whole = size.prompt + size.answer
    seen = whole * (whole + 1) // 2 + size.answer * size.prompt + size.answer * (size.answer + 1) // 2
    attention = 4 * size.pairs * size.layers * seen * width
    head = 2 * answers * size.vocab * width
    unread = 2 * tokens * sum(a * b + RANK * a for a, b in first) if size.layers else 0
    step = 2 * products - unread + 3 * low_rank + 3 * attention + 2 * head
    return float(step + (products + attention + head if OBJECTIVES[loss_type].needs_reference else 0))


def base_model(size: Size, device: torch.device) -> Any:
    heads = max(1, size.hidden // 64)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=1 << 15,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with device:  # drawn there: a host takes half a minute for the size a GPU is measured at
        model = LlamaForCausalLM(config)
    return model.to(getattr(torch, size.dtype))


def moved(model: Any) -> Any:
    """`model` with values in LoRA's B, the same for the same name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                key = name[name.index("layers.") :].split(".lora_B")[0]
                draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(crc32(key.encode())))
                parameter.copy_(0.02 * draw)
            elif "lora_A" in name:
                key = name[name.index("layers.") :].split(".lora_A")[0]
                draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(crc32(key.encode()) + 1))
                parameter.copy_(draw * parameter.shape[1] ** -0.5)
    return model.train()


def pairs_of(size: Size) -> list[EncodedPair]:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i in range(size.pairs):
        ids = torch.randint(300, size.vocab, (size.prompt + 2 * size.answer,), generator=generator)
        pairs.append(EncodedPair(str(i), *ids.split([size.prompt, size.answer, size.answer]), {}))
    return pairs


def _side(size: Size, side: str) -> Tensor:
    """Ids (B, P + A) of every prompt with one of its answers."""
    return torch.stack([torch.cat([p.prompt, getattr(p, side)]) for p in pairs_of(size)])


@dataclass
class Step:
    """One provider ready to run: `loss()` is the forward pass, `parameters` are trained, by name without wrappers."""

    loss: Callable[[], Tensor]
    parameters: dict[str, Tensor]
    optimizer: Any
    planned: int | None = None  # bytes beyond weights and optimizer, as `synpo plan` estimates them; ours only

    def __call__(self) -> Tensor:
        """Forward, backward and optimizer step; the loss, detached."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def step_of(loss: Callable[[], Tensor], model: Any) -> Step:
    trained = {n[n.index("layers.") :]: p for n, p in model.named_parameters() if p.requires_grad}
    return Step(loss, trained, torch.optim.AdamW(trained.values(), lr=1e-6))


def _on(device: torch.device, batch: Any) -> Any:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def settled(lm: CaptionModel, device: torch.device, **said: Any) -> SynPOConfig:
    """The settings of a run of ours on a device: what is said, and what it chooses itself."""
    with tempfile.TemporaryDirectory() as folder:
        args = SynPOConfig(output_dir=folder, use_cpu=device.type == "cpu", **said)
    settle(args, lm, device.type)
    return args


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()


def checkpoint(model: Any, on: bool) -> None:
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False}) if on else base.gradient_checkpointing_disable()


def _ours(
    loss_type: str, prefix_sharing: bool, size: Size, model: Any, device: torch.device, kept: bool = False
) -> Step:
    lm = CaptionModel(model, byte_tokenizer(), None)
    args = (
        settled(lm, device, **({"activation_checkpointing": False} if kept else {})) if device.type == "cuda" else None
    )
    dtype = half(args) if args else None
    if args:
        prepare(lm, args)
    objective = PairObjective(lm, loss_type, {"beta": BETA} if loss_type == "dpo" else {})
    collated = PairCollator(lm.pad_token_id, prefix_sharing)(pairs_of(size))
    batch = _on(device, collated)
    if prefix_sharing:  # the lengths stay on the host, as in the trainer
        batch["lengths"] = collated["lengths"].pin_memory() if device.type == "cuda" else collated["lengths"]

    def loss() -> Tensor:
        if args:  # the model is everyone's of ours
            checkpoint(model, bool(args.activation_checkpointing))
        with autocast(device, dtype):
            return objective(model, batch).loss

    step = step_of(loss, model)
    if loss_type == "synpo":
        step.planned = planned(size, "shared" if prefix_sharing else "padded", device, args)
    return step


def planned(size: Size, layout: str, device: torch.device, args: SynPOConfig | None) -> int:
    """Bytes that `synpo plan` expects of one step beyond the weights and the optimizer's states: gradients and all else."""
    with torch.device("meta") as meta:
        model = get_peft_model(base_model(size, meta), lora())
    if args and args.fused_lora:
        fuse(model)
    if args and args.use_liger_kernel:
        liger.stand_in(model.get_base_model().get_decoder())
    lengths = Lengths(visual=0, text=size.prompt, chosen=size.answer, rejected=size.answer)
    estimate = MemoryModel(model, optimizer="sgd", device=device.type, autocast=half(args) if args else None)
    memory = estimate.step(Batch(size.pairs, lengths, layout), bool(args and args.activation_checkpointing))
    return memory.trained + memory.activations + memory.backward + memory.loss


def _sequences(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Log-probabilities (B, A) of the answers, from the logits of every position, as a plain trainer computes them."""
    logps = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return logps.gather(-1, ids[:, 1:, None])[:, prompt - 1 :, 0]


def _usual(loss_type: str, size: Size, model: Any, device: torch.device) -> Step:
    """Two forward passes, one a side, with full logits, and the loss in torch."""
    sides = [_side(size, side).to(device) for side in ("chosen", "rejected")]
    objective = OBJECTIVES[loss_type]

    def stats() -> Any:
        return sequence_stats(torch.cat([_sequences(model, ids, size.prompt) for ids in sides]))

    def loss() -> Tensor:
        with autocast(device, torch.bfloat16 if device.type == "cuda" else None):
            if not objective.needs_reference:
                return objective(stats())
            with torch.no_grad(), model.disable_adapter():
                reference = stats()
            return objective(stats(), reference, beta=BETA)

    return step_of(loss, model)


def _trl(size: Size, model: Any, device: torch.device, **how: bool) -> Step:
    """TRL's step on a model of its own; `how` as `trl_step`."""
    tokens = torch.cat([_side(size, "chosen"), _side(size, "rejected")])
    return trl_step(base_model(size, device), tokens, size.prompt, device, lora(), **how)


def trl_step(
    model: Any,
    tokens: Tensor,
    prompt: int,
    device: torch.device,
    adapter: LoraConfig,
    rows: bool = False,
    kept: bool = False,
    liger_kernel: bool = False,
) -> Step:
    """TRL's DPOTrainer, its own loss on ids (2B, P + A): both sides in one forward, the head fused, reference = adapter off.

    Its head scores the answers alone where Triton runs, and every position elsewhere; `rows` makes a CPU do as a GPU does. On a
    GPU it has its defaults, bfloat16 autocast and activation checkpointing; `kept`: without the latter; `liger_kernel`: with its
    layers.
    """
    import pyarrow
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    class Trainer(DPOTrainer):
        """It is given ids, so that the pairs are everyone's."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    ids = Dataset(pyarrow.table({f"{part}_ids": [[3]] for part in ("prompt", "chosen", "rejected")}), fingerprint="ids")
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            beta=BETA,
            report_to="none",
            use_cpu=not on_gpu,
            disable_tqdm=True,
            logging_steps=1000,
            **({} if on_gpu else {"bf16": False}),
            **({} if on_gpu and not kept else {"gradient_checkpointing": False}),
            **({"use_liger_kernel": True} if liger_kernel else {}),
        )
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=ids,
            processing_class=byte_tokenizer(),
            peft_config=adapter,
        )
    checkpoint(trainer.model, args.gradient_checkpointing)  # as its train() would, with the next
    if liger_kernel:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(trainer.model, args.liger_kernel_config)
    moved(trainer.model)
    completion = torch.zeros_like(tokens)
    completion[:, prompt:] = 1
    batch = _on(device, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "completion_mask": completion})

    def loss() -> Tensor:
        trainer._metrics["train"].clear()
        with (
            autocast(device, torch.bfloat16 if args.bf16 else None),
            patch.object(utils, "_use_triton", lambda device: True) if rows else nullcontext(),
        ):
            return trainer.compute_loss(trainer.model, dict(batch))

    return step_of(loss, trainer.model)


@dataclass(frozen=True)
class Provider:
    """One way to make a step; `build(size, model, device)` may raise whatever a missing package raises."""

    name: str
    objective: str
    build: Callable[[Size, Any, torch.device], Step]
    note: str
    own_layers: bool = False  # it changes the layers of its model
    equal: str = ""  # TRL's row on the same settings


def providers(device: str = "cpu") -> Iterator[Provider]:
    """All of them, ours first."""
    shared, padded = "prompt computed once, all pairs in one row", "2B padded rows, fused loss"
    usual = "two forward passes, full logits: the authors' way"
    trl = "trl.DPOTrainer.compute_loss with its fused head"
    if device != "cuda":
        yield Provider("synpo shared", "synpo", partial(_ours, "synpo", True), shared)
        yield Provider("synpo padded", "synpo", partial(_ours, "synpo", False), padded)
        yield Provider("synpo usual", "synpo", partial(_usual, "synpo"), usual)
        yield Provider("dpo shared", "dpo", partial(_ours, "dpo", True), shared)
        yield Provider("dpo trl", "dpo", _trl, trl)
        rows = "the same, scoring answers alone as it does on a GPU"
        yield Provider("dpo trl rows", "dpo", partial(_trl, rows=True), rows)
        return
    kept = {"own_layers": True, "equal": "dpo trl, kept"}
    for objective in ("synpo", "dpo"):
        yield Provider(f"{objective} shared", objective, partial(_ours, objective, True), shared, True, "dpo trl")
        again = partial(_ours, objective, True, kept=True)
        yield Provider(f"{objective} shared, kept", objective, again, f"{shared}; no checkpointing", **kept)
    yield Provider("synpo padded, kept", "synpo", partial(_ours, "synpo", False, kept=True), padded, **kept)
    yield Provider("synpo usual, kept", "synpo", partial(_usual, "synpo"), f"{usual}, under autocast")
    yield Provider("dpo trl", "dpo", _trl, f"{trl}, at its defaults: autocast, checkpointing, padded rows")
    yield Provider("dpo trl, kept", "dpo", partial(_trl, kept=True), f"{trl}; no checkpointing")
    yield Provider("dpo trl, liger", "dpo", partial(_trl, liger_kernel=True), "its defaults, and liger-kernel's layers")


def reference(loss_type: str, size: Size, model: Any, device: torch.device) -> Step:
    """What the others are checked against."""
    return _usual(loss_type, size, model, device)


def adapted(size: Size, device: torch.device) -> Any:
    return moved(get_peft_model(base_model(size, device), lora()))
