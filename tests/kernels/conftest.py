"""Where there is no GPU the Triton kernels run in Triton's interpreter (tests/conftest.py), with three of its faults mended."""

import os
import time
from collections.abc import Iterator

import pytest
import torch

from synpo_kernels import _ext

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
INTERPRET = not torch.cuda.is_available()
BEGUN = time.monotonic()

if INTERPRET:
    from interpreter_faults import mend

    mend()


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


@pytest.fixture(params=_ext.module().isas() if _ext.available() else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that runs here, the emulated one too."""
    _ext.module().use_isa(request.param)
    yield request.param
    _ext.module().use_isa(None)


@pytest.fixture
def device() -> torch.device:
    """Where both backends run: a CUDA device, or the CPU with the interpreter."""
    return torch.device("cpu" if INTERPRET else "cuda")
