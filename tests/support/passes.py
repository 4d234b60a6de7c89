"""Passes over large tensors: what a step costs on a device whose products are fast and whose memory is not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "view",
    "_unsafe_view",
    "transpose",
    "t",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "select",
    "split",
    "permute",
}
VIEWS |= {"alias", "detach", "as_strided", "unbind", "split_with_sizes", "_reshape_alias"}
MAKES = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear"}


class Passes(TorchDispatchMode):
    """Counts, by operator, the runs inside it that read or write a tensor of `least` numbers or more, and the bytes of those.

    Of one thread: on a CPU the backward pass is in it too.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.runs, self.bytes = least, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        if name not in VIEWS | MAKES:
            touched = torch.utils._pytree.tree_leaves((args, kwargs, result))
            large = [x for x in touched if isinstance(x, Tensor) and x.numel() >= self.least]
            if large:
                self.runs[name] += 1
                self.bytes[name] += sum(x.numel() * x.element_size() for x in large)
        return result

    def products(self) -> int:
        """How many products there were."""
        return sum(count for name, count in self.runs.items() if name in PRODUCTS)

    def others(self) -> dict[str, int]:
        """What else there was, with how often."""
        return {name: count for name, count in self.runs.items() if name not in PRODUCTS}
