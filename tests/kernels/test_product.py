"""The extension's matrix product, on every instruction set that runs here, against float64; and who uses it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from synpo_kernels import _ext, linear_logprobs
from synpo_kernels.head import add_matmul, taken_whole

if not _ext.available():
    pytest.skip(f"C++ extension: {_ext.reason}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, K, M: single numbers, odd tails of tiles and panels, more than one stretch of the sum, more than one task
SHAPES = [(1, 1, 1), (5, 33, 70), (33, 1100, 31), (300, 64, 97), (0, 3, 4), (3, 0, 4), (3, 4, 0)]


def draw(n: int, k: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(n, k, generator=generator).to(dtype), torch.randn(k, m, generator=generator).to(dtype)
    return torch.randn(n, m, generator=generator), a, b


def strided(matrix: Tensor) -> Iterator[Tensor]:
    """The same numbers, rows contiguous, columns contiguous, and a part of something larger that is not a number."""
    yield matrix
    yield matrix.T.contiguous().T
    larger = matrix.new_full((matrix.shape[0] + 2, matrix.shape[1] + 3), torch.nan)
    larger[1:-1, 1:-2] = matrix
    yield larger[1:-1, 1:-2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_float64(shape, dtype, isa) -> None:
    total, a, b = draw(*shape, dtype)
    expected = total.double() + a.double() @ b.double()
    exact = None
    for left, right in product(strided(a), strided(b)):
        found = torch.full((shape[0], shape[2] + 1), torch.nan)[:, :-1]
        found.copy_(total)
        torch.ops.synpo_kernels.add_product(found, left, right)
        assert (found.double() - expected).norm() <= 2e-6 * expected.norm()
        exact = found if exact is None else exact
        assert torch.equal(found, exact), "the layout changes no bit"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype, isa) -> None:
    total, a, b = draw(150, 1500, 130, dtype)
    threads, runs = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        runs.append(total.clone())
        torch.ops.synpo_kernels.add_product(runs[-1], a, b)
    torch.set_num_threads(threads)
    assert torch.equal(*runs)


def test_what_cannot_be_multiplied_is_refused() -> None:
    total, a, b = draw(4, 6, 8, torch.bfloat16)
    add = torch.ops.synpo_kernels.add_product
    for wrong in ((total, a, b[:5]), (total[:3], a, b), (total, a.float(), b), (total, a[0], b)):
        with pytest.raises(RuntimeError, match="^expected total"):
            add(*wrong)
    for wrong_total in (total.bfloat16(), total.T.contiguous().T):
        with pytest.raises(RuntimeError, match="^total must be float32 with contiguous rows"):
            add(wrong_total, a, b)
    with pytest.raises(RuntimeError, match="^the rows or the columns of a factor must be contiguous"):
        add(total, torch.zeros(8, 12, dtype=torch.bfloat16)[::2, ::2], b)


def test_bf16_is_multiplied_as_it_is_and_rounded_once() -> None:
    """Torch rounds a bf16 product to bf16 on a CPU; the sums here are as exact as after widening, and nothing is widened."""
    _, a, b = draw(40, 700, 50, torch.bfloat16)
    exact = a.double() @ b.double()
    assert taken_whole(a) and not taken_whole(a.half())
    total = torch.zeros(len(a), b.shape[1])
    add_matmul(total, a, b)
    assert (total.double() - exact).norm() < 1e-6 * exact.norm() < 1e-3 * ((a @ b).double() - exact).norm()
    _ext.module().use_isa("portable")
    assert not taken_whole(a), "without vector instructions torch's product after widening is faster"
    add_matmul(total.zero_(), a, b)
    torch.testing.assert_close(total.double(), exact, rtol=1e-4, atol=1e-4)
    _ext.module().use_isa(None)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_portable_backend_takes_bf16_products(trained) -> None:
    """Gradients as exact as where bf16 is widened, but for the rounding of the exponentials."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 64, generator=generator).bfloat16()
    weight = (torch.randn(200, 64, generator=generator) / 4).bfloat16()
    labels = torch.randint(200, (60,), generator=generator)
    found: list[list[Tensor]] = []
    for name in (None, "portable"):
        _ext.module().use_isa(name)
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        logps = linear_logprobs(x, w, labels, backend="chunked")
        found.append([logps, *torch.autograd.grad(logps.sum(), [x, w] if trained else [x])])
    _ext.module().use_isa(None)
    (logps, *gradients), (widened, *expected) = found
    torch.testing.assert_close(logps, widened, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, expected):
        assert not torch.equal(got, want) and (got.float() - want.float()).norm() < 4e-3 * want.float().norm()
