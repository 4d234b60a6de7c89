"""Contrastive sampling: both backends against a plain float64 loop, against each other, and at the edges."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from synpo_kernels import _ext, contrast
from synpo_kernels.contrast import contrastive_mix, contrastive_sample

INF, NAN = math.inf, math.nan
needs_extension = pytest.mark.skipif(not _ext.available(), reason=f"C++ extension: {_ext.reason}")
BACKENDS = [pytest.param("cpp", marks=needs_extension), "torch"]
LEVELS = ["avx512", "avx2", "portable"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def naive(expert: Tensor, amateur: Tensor | None, u: float, **options: float) -> tuple[int, float]:
    """The definition for one row, one step a line, in Python floats; logits are mixed in fp32 as documented."""
    alpha, plausibility = options.get("alpha", 0.5), options.get("plausibility", 0.0)
    e = expert.float()
    mixed = e if amateur is None or alpha == 0 else e * (1 + alpha) - amateur.float() * alpha
    cutoff = float(e.max() + math.log(plausibility)) if plausibility > 0 else -INF
    left = [(x, v) for v, (x, y) in enumerate(zip(mixed.tolist(), e.tolist())) if y >= cutoff and y > -INF]
    left.sort(key=lambda pair: (-pair[0], pair[1]))
    temperature = options.get("temperature", 1.0)
    if temperature == 0:
        temperature, u = 1.0, 0.0
    left = left[: int(options.get("top_k", 0)) or None]
    weights = [math.exp((x - left[0][0]) / temperature) for x, _ in left]
    mass = [sum(weights[: i + 1]) for i in range(len(weights))]
    nucleus = next(i for i, m in enumerate(mass) if m >= options.get("top_p", 1.0) * mass[-1] or i + 1 == len(mass))
    weights = [w for w in weights[: nucleus + 1] if w >= options.get("min_p", 0.0)]
    total, running = sum(weights), 0.0
    for weight, (_, v) in zip(weights, left):
        running += weight
        if running > u * total:
            return v, math.log(weight / total)
    raise AssertionError("u must be below 1")


def random_logits(
    rows: int, vocab: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    expert = 3 * torch.randn(rows, vocab, generator=generator)
    amateur = expert + torch.randn(rows, vocab, generator=generator)
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    return expert.to(dtype), amateur.to(dtype), uniform


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run with one instruction set; skips where this CPU lacks it."""
    if not _ext.available():
        pytest.skip(_ext.reason)
    from synpo_kernels import _C

    before = _C.simd_level()
    try:
        _C.use_simd_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.use_simd_level(before)


# ---- the definition


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.5, "top_k": 32, "top_p": 0.9},
        {"plausibility": 0.1, "temperature": 0.5, "top_k": 32, "top_p": 0.9},
        {"plausibility": 1.0},
        {"alpha": 2.0, "top_p": 0.3},
        {"min_p": 0.2, "temperature": 2.0},
        {"top_k": 5, "top_p": 0.5, "min_p": 0.9},
        {"alpha": 0.0, "top_k": 3},
        {"top_k": 1},
        {"top_k": 10_000},
    ],
    ids=str,
)
def test_matches_the_naive_loop(options: dict[str, float], dtype: torch.dtype, backend: str) -> None:
    for vocab in (1, 7, 252, 1031):
        expert, amateur, uniform = random_logits(3, vocab, seed=vocab, dtype=dtype)
        for other in (amateur, None):
            tokens, logps = contrastive_sample(expert, other, uniform=uniform, backend=backend, **options)  # type: ignore[arg-type]
            for row in range(3):
                one = None if other is None else other[row]
                token, logp = naive(expert[row], one, float(uniform[row]), **options)
                assert tokens[row] == token
                assert logps[row] == pytest.approx(logp, rel=1e-6, abs=1e-6)
    assert tokens.dtype == torch.int64 and logps.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies_are_the_probabilities(backend: str) -> None:
    expert, amateur, _ = random_logits(1, 50, seed=3)
    n = 4000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, _ = contrastive_sample(
        expert.expand(n, -1), amateur.expand(n, -1), temperature=2.0, uniform=grid, backend=backend
    )
    expected = torch.softmax((1.5 * expert - 0.5 * amateur)[0] / 2, -1)
    torch.testing.assert_close(tokens.bincount(minlength=50) / n, expected, rtol=0, atol=1.01 / n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"plausibility": 1e-300},
        {"repetition_penalty": 1.1, "history": torch.zeros(8, 1, dtype=torch.int64)},
        {"top_p": 1 - 1e-12},
    ],
    ids=["plain", "plausibility", "penalty", "top_p"],
)
def test_the_last_number_draws_what_it_stands_for(options: dict, backend: str) -> None:
    """The largest number below 1 leaves 1.1e-16 of the mass behind it, however the sum of the weights was rounded."""
    uniform = torch.full((8,), 1 - 2.0**-53, dtype=torch.float64)
    for vocab in (60, 200, 5000, 20_000):
        expert = 8 * torch.randn(8, vocab, generator=torch.Generator().manual_seed(vocab))
        _, logps = contrastive_sample(expert, None, uniform=uniform, backend=backend, **options)
        assert logps.min() > math.log(2.0**-54) - 0.01  # what a running sum can feel


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_counts_the_tail_in_its_nucleus(backend: str) -> None:
    """Nine of ten equal tokens are 0.9 of the mass, but not with two improbable ones beside them."""
    logits = torch.tensor([0.0] * 10 + [-23.0] * 2)
    options = {"temperature": 0.0, "top_p": 0.9}
    token, logp = contrastive_sample(logits[None], None, backend=backend, **options)  # type: ignore[arg-type]
    expected = naive(logits, None, 0.0, **options)
    assert (int(token), float(logp)) == (expected[0], pytest.approx(expected[1]))
    assert expected[1] == pytest.approx(-math.log(10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mix_is_the_formula(backend: str) -> None:
    expert, amateur, _ = random_logits(3, 1031, seed=5, dtype=torch.bfloat16)
    e, a = expert.float(), amateur.float()
    assert torch.equal(contrastive_mix(expert, amateur, alpha=0.7, backend=backend), e * 1.7 - a * 0.7)
    kept = e >= e.amax(-1, keepdim=True) + math.log(0.1)
    expected = torch.where(kept, e * 1.5 - a * 0.5, -INF)
    assert torch.equal(contrastive_mix(expert, amateur, plausibility=0.1, backend=backend), expected)
    assert torch.equal(contrastive_mix(expert, None, backend=backend), e)


# ---- C++ against torch, token for token


@needs_extension
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_agree(level: str, dtype: torch.dtype, threads: int) -> None:
    """Rows long enough to be cut into slices, one a thread, and lists long enough for the selection by weight."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, vocab in ((1, 40_000), (2, 32_003), (7, 20_011)):
            expert, amateur, uniform = random_logits(rows, vocab, seed=rows, dtype=dtype)
            history = torch.randint(-1, vocab + 1, (rows, 300), generator=torch.Generator().manual_seed(rows))
            for options in (
                {"top_k": 32, "top_p": 0.9, "temperature": 0.5},
                {"plausibility": 0.1, "top_k": 32},
                {"temperature": 5.0},
                {"temperature": 5.0, "top_p": 0.7},
                {"temperature": 0.0},
                {"top_k": 1000, "temperature": 9.0, "repetition_penalty": 1.3, "history": history},
                {"temperature": 0.7, "repetition_penalty": 0.5, "history": history},
            ):
                calls = [
                    contrastive_sample(expert, amateur, uniform=uniform, backend=backend, **options)  # type: ignore[arg-type]
                    for backend in ("cpp", "torch")
                ]
                assert_same(*calls)
    finally:
        torch.set_num_threads(before)


@needs_extension
def test_any_order_of_the_logits_agrees(level: str) -> None:
    """Ascending logits make every token a new best; equal ones tie everywhere, also at the k-th place."""
    vocab = 5000
    ramp = torch.linspace(-9, 9, vocab)
    rows = torch.stack([ramp, ramp.flip(0), torch.zeros(vocab), (ramp * 3).round(), -ramp.abs()])
    uniform = torch.tensor([0.0, 0.3, 0.5, 0.7, 1 - 1e-9], dtype=torch.float64)
    for top_k in (0, 1, 40, 4999):
        for other in (None, rows.roll(1, 0)):
            calls = [contrastive_sample(rows, other, top_k=top_k, uniform=uniform, backend=b) for b in ("cpp", "torch")]
            assert_same(*calls)


ODD = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.5, INF, -INF, NAN, 65504.0, -65504.0, 6e-8])
LOGIT = st.one_of(st.floats(-20, 20, width=16), ODD)


@needs_extension
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_anything_agrees(data: st.DataObject) -> None:
    rows, vocab = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 150))
    dtype = data.draw(st.sampled_from(DTYPES))

    def logits() -> Tensor:
        few = data.draw(st.lists(LOGIT, min_size=1, max_size=12))
        order = data.draw(st.integers(0, 2**31))
        picks = torch.randint(len(few), (rows, vocab), generator=torch.Generator().manual_seed(order))
        return torch.tensor(few)[picks].to(dtype)

    expert, amateur = logits(), data.draw(st.booleans()) and logits()
    amateur = None if isinstance(amateur, bool) else amateur
    options = {
        "alpha": data.draw(st.sampled_from([0.0, 0.5, 1.3])),
        "plausibility": data.draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "temperature": data.draw(st.sampled_from([0.0, 1e-12, 0.5, 1.0, 30.0])),
        "top_k": data.draw(st.sampled_from([0, 1, 2, 32, 1000])),
        "top_p": data.draw(st.sampled_from([1.0, 0.9, 0.5, 1e-9])),
        "min_p": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
    }
    if data.draw(st.booleans()):
        ids = st.lists(st.integers(-2, vocab + 1), min_size=4, max_size=4)
        history = torch.tensor([data.draw(ids) for _ in range(rows)], dtype=torch.int64).reshape(rows, 4)
        options |= {"repetition_penalty": data.draw(st.sampled_from([0.5, 1.1, 1.2])), "history": history}
    numbers = data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=rows, max_size=rows))
    uniform = torch.tensor(numbers, dtype=torch.float64)
    assert_same(
        contrastive_sample(expert, amateur, uniform=uniform, backend="cpp", **options),
        contrastive_sample(expert, amateur, uniform=uniform, backend="torch", **options),
    )
    mixes = [
        contrastive_mix(expert, amateur, alpha=options["alpha"], plausibility=options["plausibility"], backend=b)
        for b in ("cpp", "torch")
    ]
    torch.testing.assert_close(*mixes, rtol=0, atol=0, equal_nan=True)


@needs_extension
def test_the_op_is_well_registered() -> None:
    expert, amateur, uniform = random_logits(3, 40, seed=1)
    history = torch.tensor([[1, 2], [3, -1], [39, 40]])
    arguments = (expert, amateur, uniform, 0.5, 0.1, 0.7, 5, 0.9, 0.0, history, 1.2)
    torch.library.opcheck(torch.ops.synpo_kernels.contrastive_sample.default, arguments)
    torch.library.opcheck(torch.ops.synpo_kernels.contrastive_mix.default, (expert, amateur, 0.5, 0.1))


@needs_extension
def test_the_op_refuses_what_it_cannot_read() -> None:
    expert, amateur, uniform = random_logits(2, 8, seed=1)
    rest = (0.5, 0.0, 1.0, 0, 1.0, 0.0, None, 1.0)
    sample = torch.ops.synpo_kernels.contrastive_sample
    for arguments in (
        (expert.T, None, uniform),
        (expert.double(), None, uniform),
        (expert, amateur[:, :7], uniform),
        (expert, amateur.half(), uniform),
        (expert, amateur, uniform.float()),
        (expert, amateur, uniform[:1]),
    ):
        with pytest.raises(RuntimeError, match=r"expert|amateur|logits|uniform"):
            sample(*arguments, *rest)


# ---- special values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"plausibility": 0.01}, {"temperature": 0.0}], ids=str)
class TestSpecialValues:
    def draw(
        self, expert: list, amateur: list | None, options: dict, backend: str, u: float = 0.999
    ) -> tuple[int, float]:
        other = None if amateur is None else torch.tensor([amateur])
        uniform = torch.tensor([u], dtype=torch.float64)
        tokens, logps = contrastive_sample(torch.tensor([expert]), other, uniform=uniform, backend=backend, **options)
        return int(tokens), float(logps)

    def test_token_masked_in_both_streams_is_masked(self, options: dict, backend: str) -> None:
        token, logp = self.draw([-INF, 1.0, -INF], [-INF, 0.0, 2.0], options, backend)
        assert (token, logp) == (1, 0.0)

    def test_infinite_logits_share_the_mass(self, options: dict, backend: str) -> None:
        token, logp = self.draw([0.0, INF, 5.0, INF], None, options, backend)
        assert token == (1 if options.get("temperature") == 0 else 3)
        assert logp == pytest.approx(math.log(0.5))

    def test_nan_is_reported_and_never_drawn(self, options: dict, backend: str) -> None:
        token, logp = self.draw([NAN, 1.0, NAN], [0.0, 0.0, 0.0], options, backend)
        assert token == 1 and math.isnan(logp)

    def test_nothing_left_is_reported(self, options: dict, backend: str) -> None:
        for hopeless in (-INF, NAN):
            token, logp = self.draw([hopeless] * 3, None, options, backend)
            assert token == 0 and math.isnan(logp)

    def test_one_token(self, options: dict, backend: str) -> None:
        assert self.draw([-3.0], [2.0], options, backend) == (0, 0.0)

    def test_empty_batch(self, options: dict, backend: str) -> None:
        tokens, logps = contrastive_sample(torch.zeros(0, 9), torch.zeros(0, 9), backend=backend, **options)
        assert tokens.shape == logps.shape == (0,)
        assert tokens.dtype == torch.int64 and logps.dtype == torch.float32
        assert contrastive_mix(torch.zeros(0, 9), None, backend=backend).shape == (0, 9)

    def test_extreme_numbers_stay_inside(self, options: dict, backend: str) -> None:
        for u, expected in ((0.0, 2), (-1.0, 2), (NAN, 2)):
            assert self.draw([1.0, -40.0, 1.5], None, options, backend, u)[0] == expected
        assert self.draw([1.0, -4000.0, 1.5], None, options | {"top_k": 0}, backend, 2.0)[0] == (
            2 if options.get("temperature") == 0 else 0
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_the_cutoff_hides_does_not_matter(backend: str) -> None:
    expert, amateur = torch.tensor([[3.0, 2.9, -9.0]]), torch.tensor([[0.0, 0.0, NAN]])
    assert contrastive_sample(expert, amateur, backend=backend)[1].isnan().all()
    assert contrastive_sample(expert, amateur, plausibility=0.1, backend=backend)[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_id(backend: str) -> None:
    logits = torch.tensor([[0.0, 2.0, -0.0, 2.0, 2.0, 0.0]])
    for u, expected in ((0.0, 1), (0.4, 3), (0.7, 4)):
        uniform = torch.tensor([u])
        token, logp = contrastive_sample(logits, None, top_k=3, uniform=uniform, backend=backend)
        assert int(token) == expected and float(logp) == pytest.approx(-math.log(3))
    token, _ = contrastive_sample(torch.tensor([[-0.0, 0.0, -1.0]]), None, temperature=0.0, backend=backend)
    assert int(token) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_repetition_penalty(backend: str) -> None:
    logits = torch.tensor([[4.0, 3.0, -1.0, -2.0]])
    history = torch.tensor([[0, 0, 2, -1, 99]])
    token, logp = contrastive_sample(
        logits, None, temperature=0.0, repetition_penalty=2.0, history=history, backend=backend
    )
    assert int(token) == 1  # 4 / 2 < 3
    expected = torch.log_softmax(torch.tensor([2.0, 3.0, -2.0, -2.0]), -1)[1]
    assert float(logp) == pytest.approx(float(expected), rel=1e-6)
    mild = torch.tensor([[0.8, 0.5, 0.0, -0.5]])
    for row in (mild, -mild):
        _, logp = contrastive_sample(
            row, None, uniform=torch.zeros(1), repetition_penalty=4.0, history=torch.tensor([[0, 3]]), backend=backend
        )
        expected = torch.where(row > 0, row / 4, row * 4)[0]
        penalised = torch.stack([expected[0], row[0, 1], row[0, 2], expected[3]])
        assert float(logp) == pytest.approx(float(penalised.log_softmax(-1).max()), rel=1e-6)
    # Below 1 it favours repetition: the seen token comes back although it is not among the largest.
    token, _ = contrastive_sample(
        logits, None, temperature=0.0, top_k=1, repetition_penalty=0.1, history=torch.tensor([[1]]), backend=backend
    )
    assert int(token) == 1


# ---- inputs


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    wide, other, uniform = random_logits(12, 300, seed=9)
    expert, amateur = wide.view(4, 3, 300)[:, -1], other.view(4, 3, 300)[:, -1]
    assert not expert.is_contiguous()
    plain = contrastive_sample(expert.contiguous(), amateur.contiguous(), top_k=9, uniform=uniform[:4], backend=backend)
    assert_same(contrastive_sample(expert, amateur, top_k=9, uniform=uniform[:4], backend=backend), plain)
    columns = expert.T.contiguous().T
    assert_same(contrastive_sample(columns, amateur, top_k=9, uniform=uniform[:4], backend=backend), plain)
    repeated = contrastive_sample(
        expert[:1].expand(4, -1), amateur[:1].expand(4, -1), uniform=torch.zeros(4), backend=backend
    )
    assert len(set(repeated[0].tolist())) == 1
    thin = torch.zeros(1, 5).T  # V = 1 with an odd stride
    assert contrastive_sample(thin, None, backend=backend)[0].tolist() == [0] * 5


def test_torch_path_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expert, amateur, uniform = random_logits(5, 64, seed=2)
    history = torch.arange(10).view(5, 2)
    options = {"top_k": 7, "repetition_penalty": 1.5, "history": history, "uniform": uniform, "backend": "torch"}
    whole = contrastive_sample(expert, amateur, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(contrast, "BLOCK_LOGITS", 128)
    assert_same(contrastive_sample(expert, amateur, **options), whole)  # type: ignore[arg-type]


def test_generator_reproduces_and_greedy_draws_nothing() -> None:
    expert, amateur, _ = random_logits(6, 500, seed=4)
    draws = [
        contrastive_sample(expert, amateur, temperature=3.0, generator=torch.Generator().manual_seed(s))[0]
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    contrastive_sample(expert, amateur, temperature=0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_differentiable() -> None:
    expert, amateur, _ = random_logits(2, 30, seed=4)
    expert.requires_grad_()
    assert not contrastive_sample(expert, amateur)[1].requires_grad
    assert not contrastive_mix(expert, amateur).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": torch.zeros(4)}, r"\(B, V\)"),
        ({"expert": torch.zeros(2, 0), "amateur": None}, r"0 < V"),
        ({"expert": torch.zeros(2, 8, dtype=torch.float64), "amateur": None}, "float64"),
        ({"expert": torch.zeros(2, 8, dtype=torch.int64), "amateur": None}, "int64"),
        ({"amateur": torch.zeros(2, 7)}, r"\(2, 7\)"),
        ({"amateur": torch.zeros(2, 8, dtype=torch.float16)}, "float16"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": NAN}, "alpha"),
        ({"plausibility": 1.5}, "plausibility"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": INF}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0, "history": torch.zeros(2, 1, dtype=torch.int64)}, "repetition_penalty"),
        ({"repetition_penalty": 1.2}, "history"),
        ({"repetition_penalty": 1.2, "history": torch.zeros(3, 1, dtype=torch.int64)}, "history"),
        ({"repetition_penalty": 1.2, "history": torch.zeros(2, 1)}, "history"),
        ({"uniform": torch.zeros(3)}, "uniform"),
        ({"uniform": torch.zeros(2, dtype=torch.int64)}, "uniform"),
        ({"uniform": torch.zeros(2), "generator": torch.Generator()}, "not both"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    arguments = {"expert": torch.zeros(2, 8), "amateur": torch.zeros(2, 8)} | change
    with pytest.raises(ValueError, match=message):
        contrastive_sample(arguments.pop("expert"), arguments.pop("amateur"), **arguments)


def test_devices_must_match() -> None:
    with pytest.raises(ValueError, match="meta"):
        contrastive_sample(torch.zeros(2, 8), torch.zeros(2, 8, device="meta"))
    with pytest.raises(ValueError, match="CPU tensors"):
        contrastive_mix(torch.zeros(2, 8, device="meta"), None, backend="cpp")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_draws_the_tokens_of_the_cpu() -> None:
    expert, amateur, uniform = random_logits(8, 32_000, seed=6)
    for options in ({"top_k": 32, "top_p": 0.9, "temperature": 0.5}, {"plausibility": 0.1}, {"temperature": 0.0}):
        cpu = contrastive_sample(expert, amateur, uniform=uniform, **options)  # type: ignore[arg-type]
        cuda = contrastive_sample(expert.cuda(), amateur.cuda(), uniform=uniform.cuda(), **options)  # type: ignore[arg-type]
        assert_same((cuda[0].cpu(), cuda[1].cpu()), cpu)
