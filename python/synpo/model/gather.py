"""A model that ZeRO-3 has partitioned, before and after its engine runs it: what is looked at first, and what is saved.

DeepSpeed partitions weights as they are loaded, and gathers them only once its engine is there. Until then a layer is whole
inside `gathering` alone, for as long as its forward takes. All processes have to run the same passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from synpo_kernels.ops.parallel import gathered, partitioned


def is_partitioned(model: Any) -> bool:
    """Whether ZeRO-3 holds the weights of `model` in parts."""
    return any(partitioned(parameter) for parameter in model.parameters())


@contextmanager
def gathering(model: Any) -> Iterator[None]:
    """Inside, every module holds its own parameters whole while its forward runs. Nothing for a model that is whole."""
    if not is_partitioned(model):
        yield
        return
    whole: dict[Any, ExitStack] = {}

    def gather(module: Any, arguments: Any) -> None:
        whole[module] = ExitStack()
        whole[module].enter_context(gathered(*module.parameters(recurse=False)))

    def release(module: Any, arguments: Any, output: Any) -> None:
        whole.pop(module).close()

    with ExitStack() as stack:
        for module in model.modules():
            if any(partitioned(p) for p in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(gather).remove)
                stack.callback(module.register_forward_hook(release, always_call=True).remove)
        yield


def whole_state(model: Any, keep: bool, trained_alone: bool) -> dict[str, Tensor]:
    """Weights by name, on the CPU, gathered one after the other; all processes take part, and those that `keep` get them.

    `trained_alone`: only those that require gradients; else what is no parameter too.
    """
    state = {n: v.cpu() for n, v in model.state_dict().items() if v.numel()} if keep and not trained_alone else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained_alone:
            with gathered(parameter):
                if keep:
                    state[name] = parameter.detach().cpu().clone()
    return state
