"""The problems that are measured: shapes, sweeps, and inputs that look like a trained model's.

Inputs. Rows of W are random directions of length about 1. A hidden state is a multiple of its label's row plus noise, so
that the other logits spread with a standard deviation of 2.5, as in language models. For most tokens the multiple puts the
label's probability near 1; for a noisy share (a quarter) it lies anywhere from hopeless to likely. The tail of such a
softmax is thin and the same for no two rows: enough to see overflow, cancellation and rounding, not to judge methods that
skip unlikely tokens, whose gain hangs on a trained model's tail.

Peaked inputs (a spread of 20): a fifth to a third of the exponentials of z - z_y lies where fp32 has denormal numbers alone,
with which some CPUs compute twenty times more slowly.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

IGNORE_INDEX = -100
SPREAD, PEAKED = 2.5, 20.0  # standard deviation of the logits of other tokens


@dataclass(frozen=True)
class Case:
    """One problem: N = 2 · pairs · T rows, V vocabulary, D hidden size."""

    rows: int
    vocab: int
    hidden: int
    dtype: str = "bfloat16"
    pairs: int = 2
    ignored: float = 0.0  # share of the rows whose label is ignored, at the start of each sequence as a prompt is
    noisy: float = 0.25
    spread: float = SPREAD

    def __post_init__(self) -> None:
        if self.rows % (2 * self.pairs):
            raise ValueError(f"{self.rows} rows do not divide into {self.pairs} pairs of equally long sequences")

    @property
    def name(self) -> str:
        ignored = f" {self.ignored:.0%} ignored" if self.ignored else ""
        peaked = " peaked" if self.spread > SPREAD else ""
        return f"{self.rows}x{self.vocab}x{self.hidden} {self.dtype}{ignored}{peaked}"

    @property
    def kept(self) -> int:
        """Rows whose label counts."""
        length = self.rows // (2 * self.pairs)
        return 2 * self.pairs * (length - round(self.ignored * length))

    @property
    def product(self) -> float:
        """Operations of one product of the kept rows with the head, G = 2·N·V·D."""
        return 2.0 * self.kept * self.vocab * self.hidden

    def small(self) -> Case:
        """A problem of the same kind that float64 solves in no time: the correctness gate."""
        return replace(self, rows=256, vocab=4224, hidden=min(self.hidden, 512), pairs=2, ignored=0.125)


@dataclass(frozen=True)
class Problem:
    """Inputs of a case, S = 2 · pairs sequences of T rows, chosen first."""

    case: Case
    hidden: Tensor  # (S, T, D) leaf, requires a gradient
    weight: Tensor  # (V, D) leaf
    labels: Tensor  # (S, T) int64

    @property
    def trained(self) -> bool:
        return self.weight.requires_grad

    def with_head(self, trained: bool) -> Problem:
        """The same inputs, gradients not yet there, with a trained or a frozen head."""
        return Problem(
            self.case, self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(trained), self.labels
        )


def make(case: Case, device: torch.device, *, seed: int = 0) -> Problem:
    """Draw the inputs of `case` with a frozen head."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    sequences = 2 * case.pairs
    length = case.rows // sequences
    weight = torch.randn(case.vocab, case.hidden, generator=generator, device=device).mul_(case.hidden**-0.5).to(dtype)
    labels = torch.randint(case.vocab, (sequences, length), generator=generator, device=device)
    # with the label's own logit this far above the sum of the others, its probability is 1 / (1 + exp(-lead))
    noisy = torch.rand(labels.shape, generator=generator, device=device) < case.noisy
    lead = torch.randn(labels.shape, generator=generator, device=device)
    lead = torch.where(noisy, 4.0 * lead - 2.0, lead + 4.0)
    logit = _sum_of_others(case) + lead
    noise = torch.randn(sequences, length, case.hidden, generator=generator, device=device).mul_(case.spread)
    hidden = (noise + logit[..., None] * weight[labels].float()).to(dtype)
    labels[:, : round(case.ignored * length)] = IGNORE_INDEX
    return Problem(case, hidden.requires_grad_(), weight, labels)


def _sum_of_others(case: Case) -> float:
    """Log of the sum of the others' exponentials: on average, or where few of them make it up, about the largest logit."""
    edge = math.sqrt(2 * math.log(case.vocab))
    return edge**2 / 2 + case.spread**2 / 2 if case.spread < edge else case.spread * edge


def _sweep(dtype: str, *shapes: tuple[int, int, int]) -> list[Case]:
    return [Case(rows, vocab, hidden, dtype, pairs=max(2, rows // 2048)) for rows, vocab, hidden in shapes]


SWEEPS: dict[str, list[Case]] = {
    # what the speed of this library is judged by
    "gpu": _sweep("bfloat16", (8192, 152064, 3584), (1024, 152064, 3584), (1024, 32000, 4096)),
    "gpu-sweep": [
        *_sweep("bfloat16", (2048, 152064, 3584), (4096, 152064, 3584), (16384, 152064, 3584)),
        *_sweep("bfloat16", (8192, 32000, 4096), (8192, 128256, 4096), (8192, 256000, 2304), (8192, 152064, 896)),
        Case(8192, 152064, 3584, pairs=4, ignored=0.875),  # video: few rows are completion
    ],
    "gpu-formats": [Case(1024, 152064, 3584, "float16"), Case(1024, 152064, 3584, "float32")],
    "cpu": [
        Case(1024, vocab, hidden, dtype)
        for vocab, hidden in ((32000, 2048), (151936, 896))
        for dtype in ("float32", "bfloat16")
    ],
    "cpu-peaked": [
        Case(1024, 32000, 2048, dtype, noisy=0.0, spread=spread)
        for dtype in ("float32", "bfloat16")
        for spread in (SPREAD, PEAKED)
    ],
    "smoke": [Case(128, 1024, 64, "float32"), Case(128, 1024, 64, "bfloat16", ignored=0.5)],
}
NUMBERS = r"(\d+(?:,\d+)*)"
SHAPE = re.compile(f"{NUMBERS}x{NUMBERS}x{NUMBERS}" + r"(?::(\w+))?")


def parse(text: str) -> list[Case]:
    """Cases of a sweep by name, or written NxVxD or NxVxD:dtype (bfloat16 where none is given).

    Several numbers, as in 256,1024x32000x512,2048, give every combination.

    Raises:
        ValueError: neither; or N is no multiple of 4 (2 pairs).
    """
    if text in SWEEPS:
        return SWEEPS[text]
    found = SHAPE.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} is neither a sweep ({', '.join(SWEEPS)}) nor a shape such as 1024x32000x4096:bfloat16"
        )
    dtype = found[4] or "bfloat16"
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"{dtype!r} in {text!r} is not a dtype; take float32, bfloat16 or float16")
    numbers = [[int(number) for number in found[place].split(",")] for place in (1, 2, 3)]
    return _sweep(dtype, *((n, v, d) for n, v, d in product(*numbers)))
