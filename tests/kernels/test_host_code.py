"""The host side of the Triton path, traced for a CUDA device that need not exist.

FakeTensorMode runs what happens between the kernels on tensors with a shape, a dtype and a device but no data, and each
kernel is replaced by a check of its arguments. So a tensor on the wrong device, a value or a size that the host would have to
read back, and a call that does not fit its kernel are errors here, on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from synpo_kernels import contrast
from synpo_kernels.backends import gpu
from synpo_kernels.kernels import contrast_sample, exact_rows, exp_tile, product, rows
from synpo_kernels.kernels import pair_loss as pair_loss_kernels
from synpo_kernels.ops import logprobs, pair_loss, trained_pairs

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a CUDA build of torch (no GPU)")

KERNELS = (
    (exp_tile, "exp_tile_kernel"),
    (exact_rows, "exact_rows_kernel"),
    (product, "counted_product_kernel"),
    (rows, "partition_kernel"),
    (rows, "begin_rows_kernel"),
    (rows, "finish_rows_kernel"),
    (rows, "scale_rows_kernel"),
    (pair_loss_kernels, "sequence_sums_kernel"),
    (pair_loss_kernels, "pair_loss_kernel"),
    (contrast_sample, "expert_peaks_kernel"),
    (contrast_sample, "group_bests_kernel"),
    (contrast_sample, "draw_kernel"),
)
LAUNCH_OPTIONS = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion"}
N, D, V, R = 96, 16, 1000, 16
HEADS = {  # dtype, with a bias, softcap
    "bf16": (torch.bfloat16, False, None),
    "fp16 bias": (torch.float16, True, None),
    "fp32 softcap": (torch.float32, False, 30.0),
}


class Watched:
    """Stands for a kernel: each parameter given once, pointers to the GPU and nothing else a tensor, a grid that is not empty."""

    def __init__(self, kernel: Any, launched: set[str], name: str) -> None:
        self.parameters, self.launched, self.name = list(kernel.arg_names), launched, name
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(size, int) and size > 0 for size in grid), grid
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> None:
        given = dict(zip(self.parameters, arguments, strict=False))
        assert len(given) == len(arguments) and not given.keys() & options.keys()
        given |= {name: value for name, value in options.items() if name not in LAUNCH_OPTIONS}
        assert given.keys() == set(self.parameters)
        for name, value in given.items():
            value = getattr(value, "base", value)  # of a tensor descriptor
            assert isinstance(value, Tensor) == name.endswith("_ptr"), (self.name, name, value)
            assert not isinstance(value, Tensor) or value.is_cuda, (self.name, name, value.device)
        self.launched.add(self.name)


class OnTheGPU(TorchDispatchMode):
    """Nothing but single numbers, which CUDA ops take as they are, may lie in the host's memory, and none may be copied."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.addmm.dtype_out:  # torch 2.11 has no rule for its shape that works
            result, (total, a, b, dtype) = kwargs["out"], args
            assert a.dtype == b.dtype and total.dtype == result.dtype == dtype
            assert result.shape == total.shape == (len(a), b.shape[1])
        else:
            result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        assert all(tensor.is_cuda or not tensor.dim() for tensor in tensors), (function, tensors)
        copied = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        assert not copied or len({tensor.device for tensor in tensors}) == 1, (function, tensors)
        return result


@pytest.fixture(params=[8, 9], ids=["sm_80", "sm_90"])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of the kernels that were launched, on a GPU of this generation."""
    names: set[str] = set()
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Watched(getattr(module, name), names, name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (request.param, 0))
    monkeypatch.setattr(gpu, "_major", lambda device: request.param)
    monkeypatch.setattr(gpu, "_processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: 256, raising=False)
    for kept in (contrast_sample.bound, pair_loss_kernels.bound):
        kept.cache_clear()
    with FakeTensorMode(), OnTheGPU():
        yield names
    for kept in (contrast_sample.bound, pair_loss_kernels.bound):
        kept.cache_clear()


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    return HEADS[request.param]


@pytest.fixture(params=[-100, None], ids=["some ignored", "all counted"])
def ignore_index(request: pytest.FixtureRequest) -> int | None:
    return request.param


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def inputs(head: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor | None, Tensor, float | None, float]:
    """x, W, b, labels, softcap, logit_scale as the ops take them."""
    dtype, biased, softcap = head
    bias = empty(V, dtype=dtype) if biased else None
    return empty(N, D, dtype=dtype), empty(V, D, dtype=dtype), bias, empty(N, dtype=torch.int64), softcap, 1.5


def body(op: Any) -> Any:
    """What a custom op runs; called by name it would answer FakeTensorMode with shapes alone."""
    return op.run


def test_frozen_head(launched, head, ignore_index) -> None:
    x, w, b, labels, *scale = inputs(head)
    options = (*scale, ignore_index, "auto", None, "", True)
    logps, _, direction, _ = body(logprobs.linear_logprobs)(x, w, None, b, labels, *options)
    assert logps.shape == (N,) and direction.shape == x.shape and direction.dtype == x.dtype
    assert {"begin_rows_kernel", "exp_tile_kernel", "finish_rows_kernel", "exact_rows_kernel"} <= launched


@pytest.mark.parametrize("workspace", [None, 1 << 16])
def test_trained_head(launched, head, ignore_index, workspace) -> None:
    x, w, b, labels, *scale = inputs(head)
    options = (*scale, ignore_index, "auto", workspace)
    logps, normalizer, *_ = body(logprobs.linear_logprobs)(x, w, None, b, labels, *options, "", False)
    known = (x, w, None, b, labels, logps, normalizer, torch.empty_like(logps), *options)
    for want in ((True, False, False, False), (True, True, False, b is not None), (False, True, False, False)):
        found = body(logprobs.linear_logprobs_gradients)(*known, want)
        shapes = zip(want, (x.shape, w.shape, (0,), w.shape[:1]), strict=True)
        assert [each.shape for each in found] == [shape if wanted else (0,) for wanted, shape in shapes]
    assert launched


@pytest.mark.parametrize("workspace", [None, 1 << 16])
def test_lora_head(launched, head, workspace) -> None:
    x, w, b, labels, *scale = inputs(head)
    x, extra = torch.cat([x, empty(N, R, dtype=x.dtype)], 1), empty(V, R, dtype=x.dtype)
    options = (*scale, -100, "auto", workspace)
    logps, normalizer, *_ = body(logprobs.linear_logprobs)(x, w, extra, b, labels, *options, "", True)
    known = (x, w, extra, b, labels, logps, normalizer, torch.empty_like(logps), *options)
    _, _, d_extra, _ = body(logprobs.linear_logprobs_gradients)(*known, (False, False, True, b is not None))
    assert d_extra.shape == extra.shape and launched


@pytest.mark.parametrize("held_rows", [N, N // 2, 1])
def test_pairs_under_a_trained_head(launched, head, ignore_index, held_rows, monkeypatch) -> None:
    x, w, b, labels, *scale = inputs(head)
    monkeypatch.setitem(trained_pairs.PAIR_BYTES, "cuda", held_rows * V * x.element_size())
    options = (*scale, ignore_index, "auto", (True, True, b is not None))
    found = body(trained_pairs.synpo_trained)(x, w, b, labels, None, 4, 10.0, 0.2, "mean", *options)
    assert [each.shape for each in found] == [
        (),
        (len(pair_loss.FIELDS), 2),
        (),
        (2,),
        x.shape,
        w.shape,
        (0,) if b is None else (V,),
    ]
    assert launched


def test_packed_pairs_under_a_trained_head(launched, head, ignore_index, monkeypatch) -> None:
    """All at once the host reads nothing; in groups it reads the bounds, as `Batch.bounds` says."""
    x, w, b, labels, *scale = inputs(head)
    bounds = empty(5, dtype=torch.int32)
    options = (bounds, 4, 10.0, 0.2, "mean", *scale, ignore_index, "auto", (True, True, b is not None))
    body(trained_pairs.synpo_trained)(x, w, b, labels, *options)
    assert launched
    if x.dtype != torch.float16:
        monkeypatch.setitem(trained_pairs.PAIR_BYTES, "cuda", N // 2 * V * x.element_size())
        with pytest.raises(DataDependentOutputException):
            body(trained_pairs.synpo_trained)(x, w, b, labels, *options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_epilogue(launched, packed, ignore_index, backend) -> None:
    shape = (N,) if packed else (4, N // 4)
    labels = None if ignore_index is None else empty(*shape, dtype=torch.int64)
    bounds = empty(5, dtype=torch.int32) if packed else None
    loss, g, fields, *_ = body(pair_loss.pairs)(
        empty(*shape, dtype=torch.float32), labels, bounds, 10.0, 0.2, ignore_index, "mean", backend
    )
    assert loss.shape == () and g.shape == shape and fields.shape == (len(pair_loss.FIELDS), 2)
    assert launched == ({"sequence_sums_kernel", "pair_loss_kernel"} if backend == "auto" else set())


@pytest.mark.parametrize("top_k", [0, 20], ids=["torch", "kernels"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("plausibility", [0.0, 0.1])
def test_sampling(launched, top_k, temperature, plausibility) -> None:
    expert, amateur, history = empty(3, 2, V)[:, -1], empty(3, 2, V)[:, -1], empty(3, 7, dtype=torch.int64)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": 0.9, "min_p": 0.01}
    for other in (amateur, None):
        tokens, logps = contrast.contrastive_sample(
            expert, other, plausibility=plausibility, repetition_penalty=1.2, history=history, **settings
        )
        assert tokens.shape == logps.shape == (3,)
        assert contrast.contrastive_mix(expert, other, plausibility=plausibility).shape == (3, V)
    assert ("draw_kernel" in launched) == (top_k > 0)


@pytest.mark.parametrize("fault", ["host memory", "host index", "read back", "argument"])
def test_faults_are_seen(launched, fault, monkeypatch) -> None:
    """That these tests can fail."""
    x, w, b, labels, *scale = inputs(HEADS["bf16"])
    count = empty(1, dtype=torch.int32)[0]
    orders = {
        "host memory": lambda labels: torch.arange(N),
        "host index": lambda labels: labels[torch.zeros(N, dtype=torch.int64)],
        "read back": lambda labels: labels * labels.amax().item(),
    }
    if fault in orders:
        monkeypatch.setattr(gpu, "partition", lambda labels, _: (orders[fault](labels), count))
    else:
        monkeypatch.setattr(exp_tile.exp_tile_kernel, "parameters", exp_tile.exp_tile_kernel.parameters[:-1])
    with pytest.raises((AssertionError, DataDependentOutputException, RuntimeError)):
        body(logprobs.linear_logprobs)(x, w, None, b, labels, *scale, -100, "auto", None, "", True)
