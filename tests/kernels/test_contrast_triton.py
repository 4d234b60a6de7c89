"""The GPU kernels of contrastive sampling against the definition in torch: same tokens, same log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from contrast_cases import INF, NAN, random_logits
from synpo_kernels.contrast import contrastive_mix, contrastive_sample

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from synpo_kernels.kernels import contrast_sample

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in the interpreter


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A few hundred tokens then make several tiles and many groups; no launch is kept from one test to the next."""
    monkeypatch.setattr(contrast_sample, "BLOCK", 256)
    contrast_sample.bound.cache_clear()
    yield
    contrast_sample.bound.cache_clear()


def assert_agrees(expert: Tensor, amateur: Tensor | None, uniform: Tensor, **options) -> tuple[Tensor, Tensor]:
    tokens, logps = contrastive_sample(expert, amateur, uniform=uniform, backend="triton", **options)
    expected = contrastive_sample(expert, amateur, uniform=uniform, backend="torch", **options)
    assert torch.equal(tokens, expected[0]), options
    torch.testing.assert_close(logps, expected[1], rtol=1e-6, atol=1e-6, equal_nan=True)
    return tokens, logps


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = (
    {"top_k": 32, "top_p": 0.9, "temperature": 0.5},
    {"top_k": 5, "temperature": 0.0},
    {"plausibility": 0.1, "top_k": 8, "top_p": 0.9, "temperature": 0.7},
    {"plausibility": 1.0, "top_k": 2},
    {"alpha": 2.0, "top_p": 0.3, "top_k": 7},
    {"min_p": 0.2, "temperature": 2.0, "top_k": 16},
    {"top_k": 5, "top_p": 0.5, "min_p": 0.9},
    {"alpha": 0.0, "top_k": 3, "temperature": 30.0},
    {"top_k": 1},
)


@pytest.mark.parametrize("which", range(len(OPTIONS)), ids=lambda which: str(OPTIONS[which]))
def test_agrees_with_the_definition(which, device) -> None:
    """The interpreter takes a third of a second a row, most of it for sorting: few rows, few candidates."""
    expert, amateur, uniform = random_logits(1, 1031, which, device, DTYPES[which % 3])
    assert_agrees(expert, amateur, uniform, **OPTIONS[which])
    expert, amateur, uniform = random_logits(1, 77, which, device, DTYPES[(which + 1) % 3])
    assert_agrees(expert, None if which % 2 else amateur, uniform, **OPTIONS[which])


def test_small_vocabularies_need_no_top_k(device) -> None:
    for vocab, top_k in ((1, 0), (1, 5), (7, 0), (16, 16), (33, 10_000)):
        expert, amateur, uniform = random_logits(1, vocab, vocab, device)
        assert_agrees(expert, amateur, uniform, top_k=top_k, top_p=0.8)


def test_ties_and_orders(device) -> None:
    """Ascending, descending, all equal, few levels: ties at the k-th place and across groups go to the lower id."""
    ramp = torch.linspace(-9, 9, 300, device=device)
    rows = torch.stack([ramp, ramp.flip(0), -(ramp * 0.0), (ramp / 3).round(), -ramp.abs()])
    uniform = torch.tensor([0.0, 0.3, 0.5, 0.7, 1 - 1e-9], dtype=torch.float64, device=device)
    assert_agrees(rows, None, uniform, top_k=1)
    assert_agrees(rows, None, uniform, top_k=7)
    assert_agrees(rows, rows.roll(1, 0), uniform, top_k=7, plausibility=0.2)


@pytest.mark.parametrize("seed", range(8))
def test_anything_agrees(seed, device) -> None:
    """Rows drawn from a few odd values, NaN and infinities among them, under random settings."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    odd = torch.tensor([0.0, -0.0, 1.0, -1.0, 3.5, INF, -INF, NAN, 65504.0, -65504.0, 6e-8, 2.5, -7.0])
    for _ in range(3):
        rows, vocab, dtype = pick(1, 2), pick(1, 5, 33, 300), pick(*DTYPES)
        few = odd[torch.randint(len(odd), (pick(1, 3, 9),), generator=generator)]
        expert, amateur = (
            few[torch.randint(len(few), (rows, vocab), generator=generator)].to(device, dtype) for _ in range(2)
        )
        options = {
            "alpha": pick(0.0, 0.5, 1.3),
            "plausibility": pick(0.0, 0.1, 1.0),
            "temperature": pick(0.0, 1e-12, 0.5, 1.0, 30.0),
            "top_k": pick(1, 2, 6),
            "top_p": pick(1.0, 0.9, 0.5, 1e-9),
            "min_p": pick(0.0, 0.1, 1.0),
        }
        if pick(True, False):
            history = torch.randint(-2, vocab + 2, (rows, 6), generator=generator).to(device)
            options |= {"repetition_penalty": pick(0.5, 1.1), "history": history}
        uniform = torch.rand(rows, dtype=torch.float64, generator=generator).to(device)
        assert_agrees(expert, pick(amateur, None), uniform, **options)


def test_repetition_penalty(device) -> None:
    expert, amateur, uniform = random_logits(2, 300, 4, device)
    history = torch.randint(-1, 301, (2, 150), generator=torch.Generator().manual_seed(1)).to(device)
    for penalty in (1.3, 0.7):
        assert_agrees(expert, amateur, uniform, top_k=5, repetition_penalty=penalty, history=history)
        assert_agrees(expert, amateur, uniform, top_k=5, repetition_penalty=penalty, history=history, plausibility=0.1)


def test_a_nan_counts_only_where_it_is_looked_at(device) -> None:
    expert = torch.full((1, 600), -9.0, device=device)
    expert[0, 3], amateur = 3.0, torch.zeros(1, 600, device=device)
    amateur[0, 500] = NAN
    uniform = torch.zeros(1, dtype=torch.float64, device=device)
    assert assert_agrees(expert, amateur, uniform, top_k=4)[1].isnan().all()
    assert assert_agrees(expert, amateur, uniform, top_k=4, plausibility=0.1)[1].isfinite().all()
    expert[0, 599] = NAN  # in the expert it counts wherever it is, also in a tile without a plausible token
    assert assert_agrees(expert, amateur, uniform, top_k=4, plausibility=0.1)[1].isnan().all()


def test_strided_rows_and_extreme_uniforms(device) -> None:
    expert, amateur, _ = random_logits(8, 300, 9, device)
    uniform = torch.tensor([-1.0, NAN, 2.0, 1 - 2**-53], dtype=torch.float64, device=device)
    assert_agrees(expert[::2], amateur[1::2], uniform, top_k=4, temperature=3.0)
    thin = expert[:1, :4].T  # V = 1 with an odd stride
    assert_agrees(thin, None, uniform, top_k=4)
    whole = torch.cat([expert, amateur], 1).view(8, 2, 300)
    assert_agrees(whole[:4, -1], whole[:4, 0], uniform, top_k=4)


def test_empty_batch(device) -> None:
    empty = torch.zeros(0, 9, device=device)
    tokens, logps = contrastive_sample(empty, empty, top_k=3, backend="triton")
    assert tokens.shape == logps.shape == (0,) and tokens.dtype == torch.int64 and logps.dtype == torch.float32


def test_what_the_kernels_do_not_take(device) -> None:
    expert, amateur, uniform = random_logits(2, 400, 0, device)
    for options, message in (
        ({}, "at most 64 candidates"),
        ({"top_k": 65}, "at most 64 candidates"),
        ({"top_k": 3, "temperature": 1e-31}, "temperature of 0 or from"),
    ):
        with pytest.raises(ValueError, match=message):
            contrastive_sample(expert, amateur, uniform=uniform, backend="triton", **options)
        contrastive_sample(expert, amateur, uniform=uniform, **options)  # others do
    assert torch.equal(
        contrastive_mix(expert, amateur, backend="triton"), contrastive_mix(expert, amateur, backend="torch")
    )


def test_no_host_read_of_the_settings_or_the_result(monkeypatch) -> None:
    """On meta tensors, which have no values to read, every launch counted in place of run."""
    launched = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.arg_names = name, kernel.arg_names

        def __getitem__(self, grid):
            return lambda *_, **__: launched.append((self.name, grid))

    for name in ("expert_peaks_kernel", "group_bests_kernel", "draw_kernel"):
        monkeypatch.setattr(contrast_sample, name, Counted(name, getattr(contrast_sample, name)))
    logits = torch.zeros(70_000, 300, device="meta", dtype=torch.bfloat16)
    uniform = torch.zeros(70_000, device="meta", dtype=torch.float64)
    contrast_sample.launch(logits, logits, uniform, 0.5, 0.1, 0.7, 32, 0.9, 0.0, None, 1.0)
    assert launched == [  # rows in the first dimension of the grid, which has no limit of 65,535
        ("expert_peaks_kernel", (70_000, 2)),
        ("group_bests_kernel", (70_000, 2)),
        ("draw_kernel", (70_000,)),
    ]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_two_candidates_at_least_are_sorted(top_k, monkeypatch) -> None:
    """tl.topk of triton 3.6 cannot take one: it reduces its operand to a scalar and then asks for its shape."""
    widths = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.arg_names = kernel.arg_names

        def __getitem__(self, grid):
            return lambda *_, **options: widths.append(options.get("K"))

    for name in ("group_bests_kernel", "draw_kernel"):
        monkeypatch.setattr(contrast_sample, name, Counted(getattr(contrast_sample, name)))
    logits = torch.zeros(2, 300, device="meta")
    uniform = torch.zeros(2, device="meta", dtype=torch.float64)
    contrast_sample.launch(logits, logits, uniform, 0.5, 0.0, 0.7, top_k, 0.9, 0.0, None, 1.0)
    assert widths == [None, 4 if top_k == 3 else 2]


def test_three_parts_make_a_double() -> None:
    for number in (1.0, 1 / 3, 0.1, 1e30, 1e-9, 1 - 2**-53, math.pi * 1e17):
        assert sum(contrast_sample._parts("x", number).values()) == number
