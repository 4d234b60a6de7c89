"""Three faults of Triton's interpreter, mended for tests that run kernels in it."""

from typing import Any


def mend() -> None:
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

    def mended_dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
        return create_dot(self, as_float(a), as_float(b), d, *args)

    def mended_cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return handle(narrow(source.data.astype(np.float32)), target.scalar)
        if source.dtype.scalar == tl.bfloat16 and target.scalar != tl.bfloat16:
            widened = as_float(source)
            return widened if target.scalar == tl.float32 else cast_impl(self, widened, target)
        return cast_impl(self, source, target)

    def mended_patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor = mended_dot, mended_cast, mended_patch
