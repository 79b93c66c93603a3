"""Compiles kernels for a Hopper GPU, where there is none: the process is to run without Triton's interpreter.

Launches of the operations compile to machine code and compute nothing, so that results are arbitrary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget('cuda', 90, 32)
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.int32: '*i32'}


def compile_launch(kernel: JITFunction, *_: Any, grid: Any, warmup: bool, **given: Any) -> None:
    """Stands in for `JITFunction.run`. All arguments are keywords, as in every launch of this package."""
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value = given.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constants[(parameter.num,)] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(parameter.num,)] = [['tt.divisibility', 16]]
        else:
            signature[parameter.name] = 'fp32' if isinstance(value, float) else 'i32'
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    triton.compile(source, target=HOPPER, options=given)
    print(kernel.fn.__module__, kernel.fn.__name__)


def main() -> None:
    from titans_pytorch.ops import _dispatch
    from titans_pytorch.ops.memory_batch_scan import triton_on_chip

    _dispatch.compute_capability = lambda device: _dispatch.HOPPER  # type: ignore[assignment]
    # all phases in one launch, as on a GPU
    triton_on_chip._launch = lambda kernel, arguments, states, carried, phases: kernel[(1,)](
        **arguments, **states, **dict.fromkeys(phases, True), first_batch=0, last_batch=1, WAITS=True,
        counters=torch.zeros(1, dtype=torch.int32), launch_cooperative_grid=True,
    )  # fmt: skip
    JITFunction.run = compile_launch  # type: ignore[method-assign]

    import test_gate_products
    import test_gated_heads
    import test_head_norm
    import test_inverse
    import test_linear_memory_scan
    import test_memory_batch_scan
    import test_short_convolution

    with torch.autocast('cpu', torch.bfloat16):
        for steps in (None, 2):
            tensors = test_linear_memory_scan.tensors_of((2, 2, 1, 8), dim=64)
            test_linear_memory_scan.learned(tensors, 1, num_proximal_steps=steps)
        for states, norm, num_proximal_steps in ((1, False, None), (2, True, None), (2, True, 3)):
            tensors = test_memory_batch_scan.problem(1, 2, 1, 16, 64, 128, states, 2, norm)
            scanned = partial(test_memory_batch_scan.scanned, num_proximal_steps=num_proximal_steps)
            test_memory_batch_scan.learned(scanned, test_memory_batch_scan.leaves(tensors))
        x, gamma = test_head_norm.problem(2, 2, 16, 64)
        test_head_norm.learned(test_head_norm.head_norm, x, gamma)
        for kind in test_gated_heads.KINDS:
            test_gated_heads.learned(test_gated_heads.gated_heads, *test_gated_heads.problem(1, 2, 16, 64, *kind))
        tensors = test_short_convolution.problem(1, 20, 2, 1, 64, 4)
        test_short_convolution.learned(test_short_convolution.short_convolution, *tensors, True)
        test_gate_products.learned(test_gate_products.gate_products, test_gate_products.problem(2, 64))
        test_inverse.learned(test_inverse.inverse, test_inverse.problem(2, 64))


if __name__ == '__main__':
    main()
