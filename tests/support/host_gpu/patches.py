"""What Python asks of CUDA: torch.cuda in a build without it, Triton's interpreter, flash attention, a quick draw of tokens."""

from __future__ import annotations

import importlib.util
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import host_gpu

GIGABYTES = 80
BYTES = GIGABYTES << 30

_found = importlib.util.spec_from_file_location("host_gpu_device", host_gpu.library())
assert _found is not None and _found.loader is not None
device = importlib.util.module_from_spec(_found)
_found.loader.exec_module(device)


def _index(of: Any = None) -> int:
    if of is None or (isinstance(of, int) and of < 0):
        return device.current_device()
    found = of if isinstance(of, int) else torch.device(of).index
    return device.current_device() if found is None else found


class Stream:
    """The one stream of a device, on which everything is done at once."""

    device_type, stream_id, cuda_stream, priority = 1, 0, 0, 0

    def __init__(self, of: Any = None, **_: Any) -> None:
        self.device_index = _index(of)
        self.device = torch.device("cuda", self.device_index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.device == self.device

    def __hash__(self) -> int:
        return hash(self.device)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


class Event:
    """A time of the host's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.time - self.time)

    def synchronize(self) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True


def _statistics(index: int) -> dict[str, Any]:
    held = {"current": device.allocated(index), "peak": device.peak(index), "allocated": 0, "freed": 0}
    kinds = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")
    return {kind: {"all": dict(held)} for kind in kinds} | {"num_alloc_retries": 0, "num_ooms": 0}


def torch_cuda() -> None:
    """torch.cuda as it is with two H100s that hold `GIGABYTES`."""
    c: Any = torch._C
    cuda: Any = torch.cuda
    c._cuda_getDeviceCount = device.device_count
    c._cuda_getDevice = cuda.current_device = device.current_device
    c._cuda_setDevice = lambda index: device.exchange_device(index) and None
    # functions in Python, each its own: torch.compile keeps a table of them
    cuda._exchange_device = c._cuda_exchangeDevice = lambda index: device.exchange_device(index)
    cuda._maybe_exchange_device = c._cuda_maybeExchangeDevice = lambda index: device.exchange_device(index)
    c._cuda_synchronize = lambda: None
    c._cuda_emptyCache = lambda: None
    c._cuda_memoryStats = _statistics
    c._cuda_resetPeakMemoryStats = device.reset_peak
    c._cuda_set_sync_debug_mode = device.set_sync_debug_mode
    c._cuda_getArchFlags = lambda: "sm_90"
    c._cuda_getCompiledVersion = lambda: 13000
    c._cuda_getCurrentRawStream = lambda index: 0
    c._cuda_isInBadFork = cuda._is_in_bad_fork = lambda: False
    cuda._initialized = True
    cuda.is_available = lambda: True
    cuda.device_count = cuda._device_count_nvml = device.device_count
    cuda.default_generators = tuple(map(device.default_generator, range(device.device_count())))
    properties = SimpleNamespace(
        name="host memory as a GPU",
        major=9,
        minor=0,
        total_memory=BYTES,
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        regs_per_multiprocessor=65536,
        warp_size=32,
    )
    cuda.get_device_properties = lambda of=None: properties
    cuda.get_device_capability = lambda of=None: (9, 0)
    cuda.get_device_name = lambda of=None: properties.name
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.mem_get_info = cuda.memory.mem_get_info = lambda of=None: (BYTES - device.allocated(_index(of)), BYTES)
    cuda.synchronize = lambda of=None: None
    cuda.current_stream = cuda.default_stream = Stream
    cuda.stream = lambda stream: stream or Stream()
    cuda.Stream, cuda.Event = Stream, Event
    torch.version.cuda = "13.0"

    # storages go through tensors, which know the device
    storage: Any = torch.UntypedStorage
    to = storage.to

    def flat(of: Any) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=of.device).set_(of)

    def moved(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        if torch.device(device).type == "cuda":
            return flat(self).to(device, copy=True).untyped_storage()
        return to(self, device=device, non_blocking=non_blocking)

    storage.to = moved
    storage.cuda = lambda self, of=None, non_blocking=False: moved(self, device=torch.device("cuda", _index(of)))
    storage.clone = lambda self: flat(self).clone().untyped_storage()


def triton_interpreter() -> None:
    """Triton's interpreter, mended, on the device's memory itself instead of on copies; refuses tensors of the host."""
    from triton.runtime import interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    from interpreter_faults import mend

    def as_they_are(self: Any, arguments: Any, options: Any) -> tuple[list[Any], dict[str, Any]]:
        for argument in (*arguments, *options.values()):
            tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
            if isinstance(tensor, Tensor) and not tensor.is_cuda:
                raise ValueError(f"Pointer argument cannot be accessed from Triton (cpu tensor?) in {self.fn}")
        return list(arguments), dict(options)

    mend()
    interpreter.GridExecutor._init_args_hst = as_they_are
    interpreter.GridExecutor._restore_args_dev = lambda self, *_: None


def attention() -> None:
    """Flash attention over runs of unequal length, made of torch."""
    from torch.nn.attention import varlen

    from runs_of_torch import Runs

    varlen.varlen_attn = Runs(device.host)  # type: ignore[assignment]
    torch.backends.cuda.is_flash_attention_available = lambda: True


def sampling() -> None:
    """The kernels of contrastive sampling take a second a token in the interpreter: the CPU's op draws the same ones."""
    from synpo_kernels.kernels import contrast_sample

    def host(tensor: Tensor | None) -> Tensor | None:
        assert tensor is None or tensor.is_cuda
        return None if tensor is None else device.host(tensor)

    def launch(expert: Tensor, amateur: Tensor | None, uniform: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
        *settings, seen, penalty = settings
        history = None if seen is None else torch.arange(expert.size(1)).where(host(seen) != 0, -1)
        numbers = torch.zeros(len(expert), dtype=torch.float64) if uniform is None else host(uniform)
        op = torch.ops.synpo_kernels.contrastive_sample.default
        drawn = op(host(expert), host(amateur), numbers, *settings, history, penalty)
        tokens, logps = (torch.empty(len(d), dtype=d.dtype, device=expert.device) for d in drawn)
        for there, found in zip((tokens, logps), drawn):
            device.host(there).copy_(found)
        return tokens, logps

    contrast_sample.launch = launch
