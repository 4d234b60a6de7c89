"""Where there is no GPU the Triton kernels run in Triton's interpreter (tests/conftest.py), with three of its faults mended."""

import os
import time
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
INTERPRET = not torch.cuda.is_available()
BEGUN = time.monotonic()


def mend_interpreter() -> None:
    """bf16 products of values, not of bit patterns; fp32 → bf16 rounded to nearest even; loops over run-time bounds."""
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    create_dot, cast_impl, patch_tensor = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor

    def widen(bits: np.ndarray) -> np.ndarray:
        return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def narrow(values: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)

    def as_float(tensor: interpreter.TensorHandle) -> interpreter.TensorHandle:
        return handle(widen(tensor.data), tl.float32) if tensor.dtype.scalar == tl.bfloat16 else tensor

    def mended_dot(self, a, b, d, *args):
        return create_dot(self, as_float(a), as_float(b), d, *args)

    def mended_cast(self, source, target):
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return handle(narrow(source.data.astype(np.float32)), target.scalar)
        if source.dtype.scalar == tl.bfloat16 and target.scalar != tl.bfloat16:
            widened = as_float(source)
            return widened if target.scalar == tl.float32 else cast_impl(self, widened, target)
        return cast_impl(self, source, target)

    def mended_patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor = mended_dot, mended_cast, mended_patch


if INTERPRET:
    mend_interpreter()


def pytest_runtest_setup() -> None:
    """Skip what has not begun $SYNPO_TEST_SECONDS after the start: a run that is short of time ends and reports."""
    if time.monotonic() - BEGUN > float(os.environ.get("SYNPO_TEST_SECONDS", "inf")):
        pytest.skip("the time for tests was spent")


def pytest_runtest_teardown() -> None:
    """After a fault in a kernel a process has no GPU any more: end it, and pytest-xdist starts another for the tests left."""
    if torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def poisoned_scratch() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that a read of scratch that nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    # on a GPU the cumulative sums of contrastive sampling in torch, which have no deterministic version, are to warn only
    torch.use_deterministic_algorithms(True, warn_only=not INTERPRET)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["chunked", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device() -> torch.device:
    """Where both backends run: a CUDA device, or the CPU with the interpreter."""
    return torch.device("cpu" if INTERPRET else "cuda")
