"""Contrastive sampling: the C++ op on every instruction set against torch, token for token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from contrast_cases import DTYPES, INF, NAN, assert_same, needs_extension, random_logits
from synpo_kernels import _ext
from synpo_kernels.contrast import contrastive_mix, contrastive_sample

LEVELS = ["avx512", "avx2", "portable"]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run with one instruction set; skips where this CPU lacks it."""
    if not _ext.available():
        pytest.skip(_ext.reason)
    from synpo_kernels import _C

    before = _C.isa()
    try:
        _C.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.use_isa(before)


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
        with pytest.raises(RuntimeError, match=r"^(expert|amateur|logits|uniform)"):
            sample(*arguments, *rest)
