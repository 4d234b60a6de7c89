"""What makes the host wait for a device."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Names the operators run inside it whose results the host has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name().split(".")[0] in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))
