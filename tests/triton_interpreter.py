"""Triton's interpreter, made to compute bfloat16 as a GPU does: it would cut off what is to be rounded, and multiply
matrices of its bits. That of Triton 3.6 also counts loops with NumPy 2.5, which it came before.
"""

import contextlib
from unittest import mock

import torch


@contextlib.contextmanager
def mended():
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot, patch = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def rounded(builder, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(builder, source, target)
        short = torch.from_numpy(source.data.copy()).bfloat16()
        return TensorHandle(short.view(torch.uint16).numpy(), tl.bfloat16)

    def widened(builder, source):
        return cast(builder, source, tl.float32) if source.dtype.scalar == tl.bfloat16 else source

    def multiplied(builder, a, b, *others):
        return dot(builder, widened(builder, a), widened(builder, b), *others)

    def counting(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    arithmetic = mock.patch.multiple(InterpreterBuilder, cast_impl=rounded, create_dot=multiplied)
    with arithmetic, mock.patch.object(interpreter, "_patch_lang_tensor", counting):
        yield
