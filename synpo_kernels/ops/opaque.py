"""An op that whatever traces sees whole, and that costs a plain call where nothing does.

torch.compile, fake tensors, dispatch modes and torch.func meet an op of `torch.library`, with its fake implementation and its
autograd. The dispatcher takes longer over one that is written in Python than a small kernel runs (LOG.md), and is passed by
where it would only have handed the arguments on: then autograd alone sees the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


class Op:
    """A function of tensors, numbers and strings, by position, whose annotations give its schema."""

    def __init__(self, run: Callable[..., Any], name: str, mutates: tuple[str, ...]) -> None:
        self.run = run  # what the op does, without autograd
        self.op = torch.library.custom_op(f"synpo_kernels::{name}", run, mutates_args=mutates)
        self.register_fake = self.op.register_fake
        self._function: type[torch.autograd.Function] | None = None

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As of torch.library's ops."""

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = self.run(*arguments)
            setup_context(ctx, arguments, output)
            return output

        self.op.register_autograd(backward, setup_context=setup_context)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self.run.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *arguments: Any) -> Any:
        if _traced(arguments):
            return self.op(*arguments)
        if self._function is None or not torch.is_grad_enabled():
            return self.run(*arguments)
        return self._function.apply(*arguments)


def op(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: the function as the op synpo_kernels::name, which writes to the arguments named in `mutates`."""
    return lambda run: Op(run, name, mutates)


def _traced(arguments: tuple[Any, ...]) -> bool:
    """Whether somebody has to see the op itself: a tracer, a mode, a transform, or a tensor of a class or device without data."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(isinstance(each, Tensor) and (type(each) not in PLAIN or each.is_meta) for each in arguments)
    )
