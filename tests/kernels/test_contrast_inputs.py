"""Contrastive sampling: layouts, generators, gradients, and input that is refused."""

from __future__ import annotations

import pytest
import torch

from contrast_cases import BACKENDS, INF, NAN, assert_same, random_logits
from synpo_kernels import contrast
from synpo_kernels.contrast import contrastive_mix, contrastive_sample


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
