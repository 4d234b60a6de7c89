"""What makes the host wait for a device."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Names the operators run inside it whose results the host has to know, and copies of one number from its memory.

    Such a copy is what an element set to a Python number becomes (`tensor[0] = 3`); a slice (`tensor[:1] = 3`) is filled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split(".")[0]
        number = name == "aten::copy_" and not args[0].dim() and not args[1].dim()
        if number or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))
