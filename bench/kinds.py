"""What kind of work a kernel does, by its name: where the time of a training step goes.

    products · attention · loss · casts and copies · elementwise · other

Triton's names are those of this project's and liger-kernel's functions, the others CUDA libraries' and torch's; on a CPU, where
there are no kernels, torch's operators stand in their place.
"""

from __future__ import annotations

from collections.abc import Iterable

ATTENTION = ("sdpa", "flash", "fmha", "attention", "attn")
LOSS = ("exp_tile", "counted_product", "_rows_kernel", "exact_rows", "sequence_sums", "pair_loss", "scale_kernel")
LOSS += ("synpo", "logprob")
COPIES = ("copy", "memcpy", "memset", "catarray", "aten::cat", "aten::to", "gather", "scatter", "index")
SIMPLE = (
    "elementwise",
    "reduce",
    "rms_norm",
    "norm",
    "swiglu",
    "geglu",
    "silu",
    "rope",
    "dropout",
    "softmax",
    "triton_",
)
SIMPLE += ("aten::mul", "aten::add", "aten::div", "aten::pow", "aten::mean", "aten::sum", "aten::neg", "multi_tensor")
PRODUCTS = ("gemm", "nvjet", "cutlass", "cublas", "matmul", "splitk", "gemv", "mm", "linear", "dequantize")


def kind_of(name: str) -> str:
    """One of the kinds above, of a kernel or operator."""
    low = name.lower()
    for kind, words in (
        ("other", ("nccl",)),
        ("attention", ATTENTION),
        ("loss", LOSS),
        ("products", ("addmm", "gemm", "splitk")),
        ("casts and copies", COPIES),  # before what is elementwise: torch copies with an elementwise kernel
        ("elementwise", SIMPLE),
        ("products", PRODUCTS),
    ):
        if any(word in low for word in words):
            return kind
    return "other"


def by_kind(kernels: Iterable[tuple[str, float, int]]) -> dict[str, tuple[float, int]]:
    """kind → (milliseconds, launches), longest first, of (name, milliseconds, launches) of every kernel."""
    found: dict[str, tuple[float, int]] = {}
    for name, ms, launches in kernels:
        before = found.get(kind := kind_of(name), (0.0, 0))
        found[kind] = before[0] + ms, before[1] + launches
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
