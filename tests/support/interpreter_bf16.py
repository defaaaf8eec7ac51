"""bfloat16 in Triton's interpreter: correct conversions and products, and an error for any other arithmetic.

The interpreter (Triton 3.6 and 3.9) stores bfloat16 as uint16 bit patterns: it multiplies and adds these
patterns, and its conversion from float32 truncates. The kernels of this project load bfloat16, convert it to
float32, compute and round once at the store; only their tensor-core products take bfloat16 operands. `mend()`
corrects conversions (to nearest, ties to even) and products; all other operations on bfloat16 then raise.
"""

from __future__ import annotations

import functools

import numpy as np
import torch


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bit patterns, rounded as torch does."""
    flat = torch.from_numpy(np.array(values, dtype=np.float32).reshape(-1))
    return flat.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(np.shape(values))


@functools.cache
def mend() -> None:
    """Patch the interpreter in this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, to_float, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def is_bf16(value) -> bool:
        return isinstance(value, handle) and value.dtype.scalar == tl.bfloat16

    def float32(value):
        return handle(widen(value.data), tl.float32) if is_bf16(value) else value

    def cast_impl(self, source, kind):
        if is_bf16(source) and kind.scalar == tl.bfloat16:
            return source
        source = float32(source)
        if kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        if source.dtype.scalar != tl.float32:
            source = cast(self, source, tl.float32)
        return handle(narrow(source.data), tl.bfloat16)

    def create_fp_to_fp(self, source, kind, *rounding):
        if is_bf16(source) or kind.scalar == tl.bfloat16:
            return cast_impl(self, source, kind)
        return to_float(self, source, kind, *rounding)

    def create_dot(self, a, b, accumulator, *rest):
        if is_bf16(accumulator):
            raise NotImplementedError("bfloat16 accumulator in the interpreter")
        return dot(self, float32(a), float32(b), accumulator, *rest)

    def refusing(original):
        @functools.wraps(original)
        def wrapped(self, *args):
            if any(is_bf16(value) for value in args) and np.where not in args:
                raise NotImplementedError(
                    f"{original.__name__} on bfloat16 in the interpreter: convert to float32 first"
                )
            return original(self, *args)

        return wrapped

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    arithmetic = ("binary_op", "ternary_op", "unary_op", "fma", "fabs", "erf", "rsqrt")
    for name in (name if name.endswith("_op") else f"create_{name}" for name in arithmetic):
        setattr(builder, name, refusing(getattr(builder, name)))
