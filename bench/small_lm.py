"""A small language model trained on captions in minutes: a head whose softmax has the tail of a trained one.

Random weights say nothing about methods that skip unlikely tokens, and no checkpoint is fetched here; so this trains one, with
the full vocabulary of a real tokenizer. Two stages: the partition function estimated from a sample of the vocabulary (the
tokens of the batch, and uniform negatives weighted by how many they stand for), then, for the last fifth of the time, the
full softmax, so that every row of the head has been trained against all others.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

CONTEXT = 64
NEGATIVES = 2048
FULL_SHARE = 0.2  # of the time, at the end, with the full softmax
SAVE_EVERY = 20.0  # seconds
RATE, WARM_UP = 2e-3, 30  # AdamW's learning rate and the steps until it is reached
BATCH = 16


@dataclass(frozen=True)
class Size:
    vocab: int
    hidden: int = 384
    layers: int = 2
    heads: int = 6


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.before_attention, self.before_mlp = nn.LayerNorm(size.hidden), nn.LayerNorm(size.hidden)
        self.qkv, self.out = nn.Linear(size.hidden, 3 * size.hidden), nn.Linear(size.hidden, size.hidden)
        self.up, self.down = nn.Linear(size.hidden, 4 * size.hidden), nn.Linear(4 * size.hidden, size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class SmallLM(nn.Module):
    """Decoder with tied embeddings; `head` is its (V, D) matrix."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size.vocab, size.hidden)
        self.position = nn.Parameter(torch.zeros(CONTEXT, size.hidden))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.hidden)
        nn.init.normal_(self.embedding.weight, std=size.hidden**-0.5)

    @property
    def head(self) -> Tensor:
        return self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids → (B, T, D) hidden states."""
        x = self.embedding(tokens) * math.sqrt(self.size.hidden) * 0.5 + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def sampled_loss(hidden: Tensor, head: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Mean -log p with the partition function estimated from the batch's own tokens and `NEGATIVES` others."""
    vocab, device = len(head), head.device
    present = torch.zeros(vocab, dtype=torch.bool, device=device)
    present[labels] = True
    own, others = present.nonzero()[:, 0], (~present).nonzero()[:, 0]
    drawn = others[torch.randperm(len(others), generator=generator)[:NEGATIVES].to(device)]
    weight = math.log(len(others) / max(1, len(drawn))) if len(drawn) else 0.0
    logits = hidden @ head[torch.cat([own, drawn])].T
    logits[:, len(own) :] += weight
    place = torch.empty(vocab, dtype=torch.int64, device=device)
    place[own] = torch.arange(len(own), device=device)
    return F.cross_entropy(logits, place[labels])


def save(model: SmallLM, path: Path, **facts: Any) -> None:
    """Weights and how far training came, replaced at once."""
    part = path.with_name(path.name + ".part")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    facts |= {name: getattr(model.size, name) for name in model.size.__dataclass_fields__}
    save_file(state, part, metadata={name: str(value) for name, value in facts.items()})
    os.replace(part, path)


def load(path: Path) -> tuple[SmallLM, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    model = SmallLM(Size(**{name: int(facts[name]) for name in Size.__dataclass_fields__}))
    model.load_state_dict(state)
    return model, facts


def train(
    tokens: Tensor, size: Size, path: Path, *, seconds: float, device: torch.device | str = "cpu", seed: int = 0
) -> SmallLM:
    """Train on a stream of token ids until `seconds` of training are spent in all; what `path` holds is gone on with.

    A continued training starts with fresh moments of its optimizer.
    """
    torch.manual_seed(seed)
    spent, step = 0.0, 0
    model = SmallLM(size)
    if path.exists():
        model, facts = load(path)
        if model.size != size:
            raise ValueError(f"{path} holds a model of {model.size}, asked for {size}; choose another output folder")
        spent, step = float(facts["seconds"]), int(facts["steps"])
    model, tokens = model.to(device), tokens.to(device)
    generator = torch.Generator().manual_seed(seed + step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    began, last_saved, start = time.monotonic(), spent, step
    offset = torch.arange(CONTEXT + 1)
    with tqdm(total=round(seconds), initial=round(spent), unit="s", disable=not sys.stderr.isatty()) as bar:
        while spent < seconds:
            full = spent > (1 - FULL_SHARE) * seconds
            first = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
            window = tokens[(first + offset).to(device)]
            hidden, labels = model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten()
            loss = (
                F.cross_entropy(hidden @ model.head.T, labels)
                if full
                else sampled_loss(hidden, model.head, labels, generator)
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = (
                RATE * min(1.0, (step - start + 1) / WARM_UP) * max(0.05, 1 - spent / seconds)
            )
            optimizer.step()
            step += 1
            spent = spent + (time.monotonic() - began)
            began = time.monotonic()
            bar.n = round(spent)
            bar.set_postfix(loss=f"{loss.item():.2f}", steps=step)
            if spent - last_saved > SAVE_EVERY:
                save(model, path, seconds=spent, steps=step)
                last_saved = spent
    save(model, path, seconds=spent, steps=step)
    return model
