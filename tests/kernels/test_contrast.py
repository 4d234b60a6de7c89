"""Contrastive sampling: both CPU backends against a plain float64 loop, and what becomes of special values."""

from __future__ import annotations

import math

import pytest
import torch

from contrast_cases import BACKENDS, DTYPES, INF, NAN, assert_same, naive, random_logits
from synpo_kernels.contrast import contrastive_mix, contrastive_sample


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_tokens_of_the_cpu() -> None:
    expert, amateur, uniform = random_logits(8, 32_000, seed=6)
    for options in ({"top_k": 32, "top_p": 0.9, "temperature": 0.5}, {"plausibility": 0.1}, {"temperature": 0.0}):
        cpu = contrastive_sample(expert, amateur, uniform=uniform, **options)  # type: ignore[arg-type]
        cuda = contrastive_sample(expert.cuda(), amateur.cuda(), uniform=uniform.cuda(), **options)  # type: ignore[arg-type]
        assert_same((cuda[0].cpu(), cuda[1].cpu()), cpu)
