"""The compiled pass of a frozen head, on every instruction set that runs here, against full logits in float64.

An error is bounded by that of the same computation in plain torch at the same dtype, plus rounding.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from synpo_kernels import _ext, contrastive_sample, linear_logprobs
from synpo_kernels.backends import cpu, passes
from synpo_kernels.head import Head
from synpo_kernels.ops import logprobs, scaling
from synpo_kernels.reference import naive_logprobs

if not _ext.available():
    pytest.skip(f"C++ extension: {_ext.reason}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 8e-4}  # of ∂logp/∂x, relative in norm
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 1.7},
}
SHAPES = [  # N, V, D: single numbers, odd tails of tiles, panels and tasks; more than one chunk of tokens, one block of rows
    (1, 1, 1),
    (5, 1, 65),
    (1, 257, 3),
    (5, 257, 1),
    (37, 101, 45),
    (70, 2100, 33),
    (2100, 90, 5),
]


def draw(n: int, v: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D) with logits of deviation about 2, labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (2.0 * torch.randn(n, d, generator=generator)).to(dtype)
    weight = (d**-0.5 * torch.randn(v, d, generator=generator)).to(dtype)
    return hidden, weight, torch.randint(v, (n,), generator=generator)


def solve(
    function, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, bias: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the gradient of Σ g · logp in hidden with g over four orders of magnitude and both signs."""
    leaf = hidden.detach().to(dtype).requires_grad_()
    bias = None if bias is None else bias.to(dtype)
    logps = function(leaf, weight.to(dtype), labels, bias=bias, **options)
    upstream = torch.logspace(-3, 1, len(labels)) * (1 - 2 * (torch.arange(len(labels)) % 2))
    (gradient,) = torch.autograd.grad((logps * upstream).sum(), leaf)
    return logps.detach(), gradient


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """Compare with float64; returns what was found."""
    inputs = (hidden, weight, labels)
    expected, expected_gradient = solve(naive_logprobs, *inputs, torch.float64, bias, **options)
    plain, plain_gradient = solve(naive_logprobs, *inputs, hidden.dtype, bias, **options)
    found, gradient = solve(linear_logprobs, *inputs, hidden.dtype, bias, **options, backend="cpu")
    assert found.dtype == torch.float32 and gradient.dtype == hidden.dtype
    allowed = (plain.double() - expected).abs().amax() + 2e-6 * (1.0 + expected.abs().amax())
    assert (found.double() - expected).abs().amax() <= allowed
    if expected_gradient.norm() > 1e-12:
        assert off(gradient, expected_gradient) <= off(plain_gradient, expected_gradient) + ROUNDING[hidden.dtype]
    else:  # a vocabulary of one
        assert gradient.abs().amax() <= 1e-6
    return found, gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}_V{}_D{}".format(*s))
def test_odd_shapes(shape, dtype, isa) -> None:
    check(*draw(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_every_head(name, dtype, isa) -> None:
    options = dict(HEADS[name])
    bias = torch.randn(301, generator=torch.Generator().manual_seed(1)) if options.pop("bias", False) else None
    check(*draw(33, 301, 40, dtype), bias=bias, **options)


def test_no_rows(isa) -> None:
    hidden, weight, labels = draw(4, 30, 8, torch.bfloat16)
    for rows in (slice(0, 0), slice(0, 4)):
        leaf = hidden[rows].clone().requires_grad_()
        logps = linear_logprobs(leaf, weight, torch.full_like(labels[rows], -100), backend="cpu")
        assert logps.shape == labels[rows].shape and not logps.any()
        assert not torch.autograd.grad(logps.sum(), leaf)[0].any()
    found = logprobs.forward(hidden[:0], Head(weight), labels[:0], None, "cpu", want_direction=True, workspace=32 << 20)
    assert found.logps.shape == (0,) and found.direction.shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaked_softmax(dtype, isa) -> None:
    """Labels with p near 1, and labels whose logit lies far below the largest."""
    hidden, weight, labels = draw(24, 90, 32, dtype)
    hidden = hidden * 12
    logits = hidden.double() @ weight.double().T
    labels[::2], labels[1::2] = logits.argmax(1)[::2], logits.argmin(1)[1::2]
    found, _ = check(hidden, weight, labels)
    assert found[::2].amax() > -1e-6 and found[1::2].amin() < -80.0, "the problem is not peaked"


def test_long_sums_are_as_exact_as_torchs(isa) -> None:
    """A logit is a sum over D, here long and of large numbers; one running sum of it would be four times as far off."""
    hidden, weight, labels = draw(32, 300, 2048, torch.float32)
    inputs = (3 * hidden, weight, labels)
    expected = solve(naive_logprobs, *inputs, torch.float64)
    plain = solve(naive_logprobs, *inputs, torch.float32)
    found = solve(linear_logprobs, *inputs, torch.float32, backend="cpu")
    for got, usual, exact in zip(found, plain, expected):
        assert off(got, exact) <= 2.5 * off(usual, exact)


def test_probability_close_to_one_keeps_its_digits(isa) -> None:
    hidden, weight = torch.tensor([[30.0]]), torch.tensor([[1.0], [0.0]])
    logps = linear_logprobs(hidden, weight, torch.tensor([0]), backend="cpu")
    assert logps.item() == pytest.approx(-torch.tensor(-30.0).exp().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_logits_very_negative(dtype, isa) -> None:
    hidden, weight = torch.ones(3, 4, dtype=dtype), torch.full((70, 4), -200.0, dtype=dtype)
    logps = linear_logprobs(hidden, weight, torch.tensor([0, 1, 69]), backend="cpu")
    torch.testing.assert_close(logps, torch.tensor(1 / 70).log().expand(3))


def test_masked_vocabulary_entries(isa) -> None:
    """A bias of -inf removes an entry from the softmax."""
    hidden, weight, labels = draw(9, 40, 8, torch.float32)
    labels.clamp_(max=29)
    bias = torch.zeros(40)
    bias[30:] = -torch.inf
    found = solve(linear_logprobs, hidden, weight, labels, torch.float32, bias, backend="cpu")
    expected = solve(naive_logprobs, hidden, weight[:30], labels, torch.float64)
    for got, want in zip(found, expected):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_reach_nothing(dtype, isa) -> None:
    """They hold NaN, which shows wherever it is read."""
    hidden, weight, labels = draw(61, 70, 24, dtype)
    ignored = torch.rand(61, generator=torch.Generator().manual_seed(2)) < 0.6
    labels[ignored] = -100
    expected, _ = check(hidden, weight, labels)
    hidden[ignored] = torch.nan
    found, gradient = solve(linear_logprobs, hidden, weight, labels, dtype, backend="cpu")
    assert torch.equal(found, expected) and not found[ignored].any()
    assert not gradient[ignored].any() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_path(dtype, isa, monkeypatch) -> None:
    """Rows whose sum passes OVERFLOW are done again around their largest logit: here all of them."""
    monkeypatch.setattr(passes, "OVERFLOW", -1.0)
    check(*draw(37, 101, 45, dtype), softcap=4.0)


def test_exponent_overflow_is_exact(isa) -> None:
    """exp(z - z_y) is infinite in fp32 for the middle row alone; its neighbours are untouched."""
    hidden = torch.tensor([[1.0, 0.0], [1000.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weight, labels = torch.tensor([[1.0, 0.5], [-1.0, 0.25], [0.0, 2.0]]), torch.tensor([0, 1, 2])
    logps = linear_logprobs(hidden, weight, labels, backend="cpu")
    assert logps[1].item() == -2000.0
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    assert torch.equal(gradient[1], weight[1] - weight[0])
    double = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(naive_logprobs(double, weight.double(), labels).sum(), double)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 45])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_rows_stay_visible_and_alone(bad, vocabulary, dtype, isa) -> None:
    hidden, weight, labels = draw(6, vocabulary, 20, dtype)
    expected = solve(linear_logprobs, hidden, weight, labels, dtype, backend="cpu")
    hidden[2, 3] = bad
    logps, gradient = solve(linear_logprobs, hidden, weight, labels, dtype, backend="cpu")
    others = torch.arange(6) != 2
    assert logps.isfinite().equal(others) and not gradient[2].isfinite().all()
    assert torch.equal(logps[others], expected[0][others]) and torch.equal(gradient[others], expected[1][others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype, isa) -> None:
    hidden, weight, labels = draw(130, 900, 48, dtype)
    threads, runs = torch.get_num_threads(), []
    for number in (1, 2, 3, 2):
        torch.set_num_threads(number)
        runs.append(solve(linear_logprobs, hidden, weight, labels, dtype, backend="cpu"))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype, isa) -> None:
    """Rows of W apart from each other are read in place; a W whose rows are not contiguous is the portable backend's."""
    hidden, weight, labels = draw(20, 60, 30, dtype)
    apart = torch.full((60, 41), torch.nan, dtype=dtype)
    apart[:, 5:35] = weight
    expected = check(hidden, weight, labels)
    for strided in (apart[:, 5:35], weight.T.contiguous().T):
        for x in (hidden, hidden.T.contiguous().T):
            found = solve(linear_logprobs, x, strided, labels, dtype, backend="cpu")
            if strided.stride(1) == 1:
                assert all(torch.equal(a, b) for a, b in zip(found, expected))
            else:
                assert off(found[1], expected[1].double()) < 2 * ROUNDING[dtype]
    spread = torch.randn(120).to(dtype)
    check(hidden, weight, labels, bias=spread[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_a_block(dtype, isa) -> None:
    """x and the sum of a block of rows take at most 16 MiB, so a large D makes many blocks; a tile of W spans few tokens."""
    check(*draw(70, 20, 40_000, dtype))


def test_without_a_gradient_the_logps_are_the_same(isa) -> None:
    hidden, weight, labels = draw(40, 300, 20, torch.bfloat16)
    loud, _ = solve(linear_logprobs, hidden, weight, labels, torch.bfloat16, backend="cpu", softcap=9.0)
    found = logprobs.forward(
        hidden, Head(weight, softcap=9.0), labels, None, "cpu", want_direction=False, workspace=32 << 20
    )
    assert torch.equal(found.logps, loud) and found.direction is None
    low = linear_logprobs(hidden, weight, labels, softcap=9.0, memory="low", backend="cpu")
    assert torch.equal(low, loud)


def test_a_trained_head_and_low_memory_are_right_too(isa) -> None:
    hidden, weight, labels = draw(30, 80, 16, torch.float32)
    expected = solve(naive_logprobs, hidden, weight, labels, torch.float64)[1]
    assert (
        off(solve(linear_logprobs, hidden, weight, labels, torch.float32, memory="low", backend="cpu")[1], expected)
        < 2e-6
    )
    leaf, double = weight.clone().requires_grad_(), weight.double().requires_grad_()
    linear_logprobs(hidden, leaf, labels, backend="cpu").sum().backward()
    naive_logprobs(hidden.double(), double, labels).sum().backward()
    assert off(leaf.grad, double.grad) < 2e-6


def test_opcheck_and_compile(monkeypatch) -> None:
    hidden, weight, labels = draw(9, 30, 8, torch.bfloat16)
    leaf = hidden.requires_grad_()
    given = (leaf, weight, None, None, labels, None, 1.0, -100, "cpu", None, "", True)
    with monkeypatch.context() as patched:  # opcheck reads again what the op returned
        patched.setattr(scaling, "may_overwrite", lambda kept: False)
        torch.library.opcheck(logprobs.linear_logprobs.op, given)

    def loss(x: Tensor) -> Tensor:
        return linear_logprobs(x, weight, labels, backend="cpu").sum()

    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(leaf), leaf)[0], expected)


def test_the_op_refuses_what_it_cannot_read() -> None:
    hidden, weight, labels = draw(4, 10, 8, torch.float32)

    def run(x=hidden, w=weight, bias=None, y=labels):
        return torch.ops.synpo_kernels.head_pass(x, w, bias, y, 0.0, 1.0, 1 << 20, True)

    run()
    for wrong in (
        {"x": hidden.T.contiguous().T},
        {"x": hidden.double()},
        {"w": weight.bfloat16()},
        {"w": weight[:, :7]},
        {"w": weight.T.contiguous().T},
        {"bias": torch.zeros(9)},
        {"y": labels.int()},
        {"y": torch.tensor([0, 1, 2, 10])},
        {"y": torch.tensor([0, 1, 2, -1])},
    ):
        with pytest.raises(RuntimeError, match="^(x|weight|bias|labels) must"):
            run(**wrong)


@pytest.mark.parametrize("name", ["portable", "riscv", "amx"])
def test_the_instruction_set_by_environment(name, monkeypatch) -> None:
    extension = _ext.module()
    monkeypatch.setenv("SYNPO_CPU_ISA", name)
    extension.use_isa(None)
    if name in extension.isas():
        assert cpu.instruction_set() == name
        assert _ext.build_info()["isa"] == name
    else:
        message = (
            f"SYNPO_CPU_ISA: instruction set '{name}' is unknown or not supported by this CPU; here run .*portable"
        )
        with pytest.raises(ValueError, match=message):
            linear_logprobs(*draw(2, 3, 4, torch.float32), backend="auto")
        with pytest.raises(ValueError, match=message):
            contrastive_sample(torch.zeros(1, 4), torch.zeros(1, 4))
    monkeypatch.undo()
    extension.use_isa(None)


def test_the_choice_of_an_instruction_set_is_a_rule(monkeypatch) -> None:
    """By the CPU's model, not by a timing: a run that is resumed must round as it did. Intel's bf16 dot products are slow."""
    facts = Path("/proc/cpuinfo")
    if not facts.exists():
        pytest.skip("this system does not describe its CPU")
    monkeypatch.delenv("SYNPO_CPU_ISA", raising=False)
    extension = _ext.module()
    extension.use_isa(None)
    unwanted = {"amx-emulated", "avx512_bf16"} if "GenuineIntel" in facts.read_text() else {"amx-emulated"}
    assert extension.isa() == next(name for name in extension.isas() if name not in unwanted)
    monkeypatch.undo()
    extension.use_isa(None)


def run_pass(hidden: Tensor, weight: Tensor, labels: Tensor, workspace: int) -> list[Tensor]:
    return torch.ops.synpo_kernels.head_pass(hidden, weight, None, labels, 0.0, 1.0, workspace, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_workspace_serves(dtype, isa) -> None:
    """From one panel and one tile at a time to everything at once."""
    hidden, weight, labels = draw(200, 700, 70, dtype)
    whole = run_pass(hidden, weight, labels, 1 << 25)
    for workspace in (0, 1 << 14, 1 << 17, 1 << 19):
        found = run_pass(hidden, weight, labels, workspace)
        for got, expected in zip(found, whole):
            torch.testing.assert_close(
                got, expected, rtol=2e-2 if got.dtype == dtype != torch.float32 else 1e-5, atol=1e-5
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mebibytes", [4, 16])
@pytest.mark.parametrize("shape", [(800, 3000, 1024), (3000, 9000, 128)], ids=str)
def test_no_more_than_the_workspace_is_held(shape, mebibytes, dtype) -> None:
    from bench import measure

    hidden, weight, labels = draw(*shape, dtype)

    def run() -> list[Tensor]:
        return run_pass(hidden, weight, labels, mebibytes << 20)

    run()
    peaks = [measure.peak_bytes(run, torch.device("cpu")) for _ in range(2)]
    if None in peaks:
        pytest.skip("this system does not say what a process held at most")
    assert min(peaks) - hidden.nbytes < (mebibytes + 1.5) * 2**20, "beside U, what allocators round up to"


@pytest.mark.parametrize(
    ("shape", "memory", "mebibytes"),
    [((512, 40_000, 128), "default", 16), ((20_000, 3_000, 8), "default", 16), ((3_000, 5_000, 512), "low", 20)],
)
def test_peak_memory(shape, memory, mebibytes) -> None:
    """Beyond inputs and gradient: panels of x, their sum, one chunk of W for each product and its exponentials."""
    from bench import measure

    hidden, weight, labels = draw(*shape, torch.float32)
    leaf = hidden.requires_grad_()
    leaf.grad = torch.zeros_like(leaf)

    def run() -> None:
        linear_logprobs(leaf, weight, labels, backend="cpu", memory=memory).sum().backward()

    run()
    peaks = [
        measure.peak_bytes(run, torch.device("cpu")) for _ in range(3)
    ]  # other allocations of the process disturb some
    if None in peaks:
        pytest.skip("this system does not say what a process held at most")
    peak = min(peaks) - leaf.nbytes  # the gradient before it is added to the leaf's
    assert peak < mebibytes << 20, f"{peak / 2**20:.1f} MiB; the logits take {shape[0] * shape[1] / 2**18:.0f}"
