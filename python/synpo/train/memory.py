"""How much memory a training step takes, known before any weight is loaded.

The model is built on torch's meta device, where tensors have shapes and dtypes but no storage, with its LoRA adapter. Then

    weights       Σ numel · itemsize over all parameters and buffers
    gradients     Σ numel · itemsize over the trained ones;   optimizer: its states (optimizers.py)
    activations   what autograd keeps from the forward pass for the backward pass. The decoder's own code runs on meta tensors
                  and every distinct storage that it saves, parameters apart, is added up, layer by layer: S_i. With
                  activation checkpointing only the input X_i of each layer is kept and one layer at a time is run again:
                      plain  Σ_i S_i + rest            checkpointed  Σ_i X_i + max_i S_i + rest
                  Of every n-th layer alone (every_n_layers), the others keep S_i; offloaded, the X_i are on the host but for one.
                  Weights in 4 bits are made whole one at a time: the largest, in the dtype of products.
    backward      gradients in flight in one layer, rows · length · (intermediate + 4 · hidden) · itemsize: what its backward
                  pass makes less what it lets go of on the way (0 to 8 % above the peaks measured on a CPU)
    loss          N completion rows of hidden states and their gradient U, 2 · N · D · itemsize + N · D · 4, and one slice of the
                  logits with its scratch. A head that is trained: its gradient, for SynPO with its sums in fp32 and the
                  probabilities of the pairs that are taken together. Naive, for comparison: rows · length · V ·
                  (itemsize + 4 + 4), the logits, their log-softmax in fp32 and its gradient
    vision        the frozen tower's widest layer over the frames of the micro-batch, without gradients: gone when the decoder
                  starts, so the larger of it and of activations + backward + loss counts. A tower in which something is
                  trained (an adapter's biases, say) counts with all its layers, as activations that stay

What differs between devices is stated here, not guessed from the meta device: attention keeps q, k, v, its output, one fp32
number a query and head, and a mask in the dtype of q where there is one (the fused kernels of `scaled_dot_product_attention`);
dropout keeps one byte a number on CUDA and a full number on a CPU; autocast casts the operands of linear layers.
Flash-attention packages are counted like sdpa, which holds a little more.
`RESERVE` covers the CUDA context and what the allocator cannot use; it is an assumption, not a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from synpo.data.tokenize import Lengths
from synpo.model.meant import meant_for
from synpo.model.packing import install
from synpo.model.quantize import unpacked_bytes, weight_bytes
from synpo.train.optimizers import state_bytes
from synpo_kernels.backends.passes import WORKSPACE
from synpo_kernels.ops.trained_pairs import PAIR_BYTES

RESERVE = 1 << 30


@dataclass(frozen=True)
class Saved:
    """Bytes kept for the backward pass: inside each decoder layer, the input of each, and outside of them."""

    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    outside: int

    def total(self, checkpointing: bool, every_n_layers: int = 1, offload: bool = False) -> int:
        if not checkpointing:
            return sum(self.layers) + self.outside
        again = range(0, len(self.layers), every_n_layers)
        inputs = [self.inputs[i] for i in again]
        whole = sum(size for i, size in enumerate(self.layers) if i not in again)
        return whole + (max(inputs) if offload else sum(inputs)) + max(self.layers[i] for i in again) + self.outside


class SavedBytes:
    """Counts what autograd saves inside `with counter.counting():`, each storage once, parameters not at all.

    `layer` names the part that is being run; bytes are added to `by_layer[layer]`. Works on real tensors and on meta ones.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._seen = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        self._held: list[Tensor] = []  # a storage that is freed could give its address to the next one
        self.layer = -1
        self.by_layer: dict[int, int] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)
            self.by_layer[self.layer] = self.by_layer.get(self.layer, 0) + storage.nbytes()
        return tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        with saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


class _Attention(torch.autograd.Function):
    """What a fused attention kernel keeps; its values are never computed."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, mask)
        return out


class _Dropout(torch.autograd.Function):
    """CUDA's fused dropout: one byte a number is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)


class _As(TorchFunctionMode):
    """Runs the functions that differ between devices as `device` would, under autocast to `autocast` if that is a dtype."""

    def __init__(self, device: str, autocast: torch.dtype | None) -> None:
        self.device, self.autocast = device, autocast

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (
            function is torch.Tensor.__bool__ and args[0].is_meta
        ):  # asked of masks and positions: is nothing padded, packed?
            return True
        if function is F.scaled_dot_product_attention:
            query, key, value, mask = (*args, kwargs.get("attn_mask"))[:4]
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.empty_like(mask, dtype=query.dtype)
            return _Attention.apply(query, key, value, mask)
        if function is F.dropout and self.device == "cuda":
            p, training = kwargs.get("p", 0.5), kwargs.get("training", True)
            p, training = (*args[1:3], *(p, training)[len(args) - 1 :])[:2]
            return _Dropout.apply(args[0]) if training and p > 0 and args[0].requires_grad else args[0]
        if function is F.linear and self.autocast is not None:
            args = tuple(a.to(self.autocast) if isinstance(a, Tensor) else a for a in args)
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of `pairs` pairs with the same token counts, `padded` or `shared` (see data/collate.py)."""

    pairs: int
    lengths: Lengths
    layout: str

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and their length."""
        n = self.lengths
        if self.layout == "padded":
            return 2 * self.pairs, n.prompt + max(n.chosen, n.rejected)
        return 1, self.pairs * n.shared

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def completion(self) -> int:
        return self.pairs * (self.lengths.chosen + self.lengths.rejected)

    def mask(self) -> Tensor:
        """What goes where an attention mask does: (2B, 1, L, L) without values, or the lengths of packed pairs."""
        if self.layout == "padded":
            rows, length = self.shape
            return torch.empty(rows, 1, length, length, dtype=torch.bool, device="meta")
        n = self.lengths
        return torch.tensor([[n.prompt, n.chosen, n.rejected]] * self.pairs, device="cpu")[None, None]


def saved_by_decoder(model: Any, batch: Batch, *, device: str, autocast: torch.dtype | None = None) -> Saved:
    """Bytes that a batch leaves in the decoder of a model on the meta device.

    Args:
        model: a Hugging Face model without its PEFT wrapper, with sdpa attention; LoRA layers inside it count as they are.
        device: "cuda" or "cpu". autocast: dtype of mixed precision, None without.
    """
    install("sdpa")
    decoder = model.get_decoder()
    embeddings = model.get_input_embeddings().weight
    layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    counter = SavedBytes(model)
    inputs: list[int] = []

    def enter(index: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            counter.layer = index
            inputs.append(_nbytes([args[0] if args else kwargs["hidden_states"]]))

        return hook

    def leave(module: Any, args: Any, output: Any) -> None:
        counter.layer = -1

    hooks = [layer.register_forward_pre_hook(enter(i), with_kwargs=True) for i, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    training = decoder.training
    decoder.train()
    try:
        with torch.enable_grad(), counter.counting(), _As(device, autocast), meant_for(device, autocast):
            decoder(
                inputs_embeds=embeddings.new_empty(*batch.shape, embeddings.shape[1]),
                attention_mask=batch.mask(),
                position_ids=torch.empty(batch.shape, dtype=torch.long, device="meta"),
                use_cache=False,
            )
    finally:
        decoder.train(training)
        for hook in hooks:
            hook.remove()
    return Saved(
        tuple(counter.by_layer.get(i, 0) for i in range(len(layers))), tuple(inputs), counter.by_layer.get(-1, 0)
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step on one device; `naive_loss` is what the same loss takes from full logits, not part of it."""

    weights: int
    trained: int
    activations: int
    backward: int
    loss: int
    vision: int
    naive_loss: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + max(self.vision, self.activations + self.backward + self.loss) + RESERVE


class MemoryModel:
    """Estimates the memory of training a model that stands on the meta device.

    Args:
        model: the model under PEFT or not, requiring gradients where it will be trained.
        optimizer: name of the optimizer as TrainingArguments takes it. device, autocast: as `saved_by_decoder`.
        quantization: how its weights will be held, as in ModelConfig; they stand here unquantized.
        checkpointing: how layers are run again, as TrainingArguments.activation_checkpointing_kwargs: every_n_layers, offload.
        loss_type: the objective; SynPO makes the gradient of a trained head in another way (synpo_kernels.ops.trained_pairs).
    """

    def __init__(
        self,
        model: Any,
        optimizer: str = "adamw_torch",
        device: str = "cuda",
        autocast: torch.dtype | None = None,
        quantization: str = "none",
        loss_type: str = "synpo",
        checkpointing: Mapping[str, Any] | None = None,
    ) -> None:
        self.loss_type, self.optimizer = loss_type, optimizer
        self.how = {
            name: value for name, value in (checkpointing or {}).items() if name in ("every_n_layers", "offload")
        }
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device, self.autocast = device, autocast
        trained = [p for p in model.parameters() if p.requires_grad]
        language = {
            id(p) for part in (self.base.get_decoder(), self.base.get_output_embeddings()) for p in part.parameters()
        }
        self.trains_vision = any(id(p) not in language for p in trained)
        self.weights = weight_bytes(model, quantization)
        self.unpacked = unpacked_bytes(model, quantization)
        self.trained = _nbytes(trained) + state_bytes(optimizer, trained)
        self._saved: dict[tuple[Lengths, str], tuple[Saved, Saved]] = {}

    def saved(self, batch: Batch, checkpointing: bool) -> int:
        """Bytes of activations; they grow by the same amount with every pair, so two runs tell all."""
        key = (batch.lengths, batch.layout)
        if key not in self._saved:
            one, two = (
                saved_by_decoder(self.base, replace(batch, pairs=n), device=self.device, autocast=self.autocast)
                for n in (1, 2)
            )
            self._saved[key] = one, two
        first, second = (saved.total(checkpointing, **self.how) for saved in self._saved[key])
        return first + (batch.pairs - 1) * (second - first)

    def step(self, batch: Batch, checkpointing: bool = False) -> Memory:
        """The memory of one micro-batch."""
        config = self.base.config.get_text_config()
        head = self.base.get_output_embeddings().weight
        size = (self.autocast or head.dtype).itemsize
        vocabulary, hidden = head.shape
        intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
        n = batch.completion
        tower, depth = self._vision(batch.pairs * batch.lengths.visual)
        return Memory(
            weights=self.weights,
            trained=self.trained,
            activations=self.saved(batch, checkpointing) + (tower * depth if self.trains_vision else 0),
            backward=batch.tokens * (intermediate + 4 * hidden) * size + self.unpacked,
            loss=2 * n * hidden * size + self._logits(n),
            vision=tower,
            naive_loss=batch.tokens * vocabulary * (size + 4 + 4),
        )

    def _logits(self, n: int) -> int:
        """The loss's workspace for N completion rows; of a trained head also its gradient, on its way to where it is kept."""
        head = self.base.get_output_embeddings().weight
        (vocabulary, hidden), dtype = head.shape, self.autocast or head.dtype
        workspace = WORKSPACE.get(self.device, WORKSPACE["cpu"])
        slice_ = min(workspace, 4 * n * (vocabulary + hidden))
        if not head.requires_grad:
            return slice_
        sums, whole = 4 * n * hidden, head.numel() * dtype.itemsize
        # under autocast a copy of the head, and the gradient in the head's own dtype
        copy, widened = (0, 0) if dtype == head.dtype else (whole, head.nbytes)
        if self.loss_type != "synpo":
            chunk = min(4 * head.numel(), 4 * workspace // dtype.itemsize)
            return sums + slice_ + copy + whole + max(chunk, widened)
        pairs, allowed = n * vocabulary * dtype.itemsize, PAIR_BYTES.get(self.device, PAIR_BYTES["cpu"])
        if self.device == "cuda" and dtype.itemsize == 2 and pairs <= allowed + 4 * head.numel():  # ∂L/∂W written once
            return sums + copy + max(whole + pairs, 2 * whole + widened)
        rounded = whole if dtype.itemsize < 4 else 0
        return sums + copy + max(4 * head.numel() + max(min(pairs, allowed), rounded), 2 * whole + widened)

    def _vision(self, visual: int) -> tuple[int, int]:
        """One layer of the tower over four patches a visual token (2 × 2 are merged), its pixels in fp32, the features; and how
        many layers there are."""
        vision = getattr(self.base.config, "vision_config", None)
        if vision is None or not visual:
            return 0, 0
        width = getattr(vision, "hidden_size", None) or vision.embed_dim
        intermediate = getattr(vision, "intermediate_size", None) or 4 * width
        size = self.base.get_input_embeddings().weight.itemsize
        patch = vision.patch_size  # InternVL writes height and width
        pixels = 3 * (math.prod(patch) if isinstance(patch, list | tuple) else patch**2) * 4
        features = self.base.config.get_text_config().hidden_size
        depth = getattr(vision, "num_hidden_layers", None) or vision.depth
        return 4 * visual * ((intermediate + 4 * width) * size + pixels) + visual * features * size, depth


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
