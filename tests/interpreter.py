"""Triton's interpreter, by which GPU kernels run on CPU tensors, and what versions 3.5 to 3.7 need mended.

`conftest.py` asks for the interpreter before anything imports Triton, on machines without a CUDA GPU.
"""

from __future__ import annotations

import os

import numpy as np
import torch


def ask_for_interpreter() -> None:
    """Without a GPU; Triton reads the variable as it is imported."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def mend_interpreter() -> None:
    """Numbers of tensors as numpy 2.4 wants them (3.5, 3.6); bfloat16 rounded as on GPUs, not multiplied as integers;
    less work a call.
    """
    from triton import language
    from triton.runtime import interpreter

    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot
    convert = interpreter._convert_float
    patched: set[str] = set()  # modules; Triton patches its language anew with every call of a function of a kernel

    def patch_tensor_and_index(tensor, *scope) -> None:  # 3.5 has no scope, whose end takes patches back
        patch_tensor(tensor, *scope)
        set_attr = scope[0].set_attr if scope else setattr
        set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle):
        if handle.dtype.scalar != language.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), language.float32)

    def convert_and_round(numbers, source, target, rounding_mode):
        if (source, target, rounding_mode) != (language.float32, language.bfloat16, None):
            return convert(numbers, source, target, rounding_mode)
        rounded = torch.from_numpy(np.array(numbers, np.float32)).bfloat16()  # to the nearest, as without this none is
        return rounded.view(torch.int16).numpy().view(np.uint16)

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    interpreter._convert_float = convert_and_round
    interpreter.InterpretedFunction.__call__ = call
