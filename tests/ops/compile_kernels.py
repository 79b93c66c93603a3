"""Compiles all kernels for a GPU, where there is none; to be run without Triton's interpreter.

    python tests/ops/compile_kernels.py 90      (the compute capability)

Launches of the operations compile to machine code and compute nothing, so that results are arbitrary. For each kernel a
line has its file, its name and the bytes of shared memory of its largest launch.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from titans_pytorch import MemoryAsContextTransformer, MemoryMLP, NeuralMemory
from titans_pytorch.generation.stepper import Stepper
from titans_pytorch.ops._triton import READING_CONSTANTS
from titans_pytorch.ops.token_choice import token_choice
from titans_pytorch.ops.token_linear import token_linear
from titans_pytorch.presets import memory_settings

TYPES = {torch.float32: 'fp32', torch.bfloat16: 'bf16', torch.int32: 'i32', torch.int64: 'i64'}
shared: dict[tuple[str, str], int] = {}


def compile_launch(target: GPUTarget, kernel: JITFunction, *_: Any, grid: Any, warmup: bool, **given: Any) -> None:
    """Stands in for `JITFunction.run`. All arguments are keywords, as in every launch of this package."""
    signature, constants, attributes = {}, {}, {}
    if 'START' in given and target.arch >= 90:
        given |= {'START': READING_CONSTANTS, 'launch_pdl': True}
    for parameter in kernel.params:
        value = given.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(parameter.num,)] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f'*{TYPES[value.dtype]}'
            attributes[(parameter.num,)] = [['tt.divisibility', 16]]
        elif value == 1 and isinstance(value, int) and not parameter.do_not_specialize:
            signature[parameter.name], constants[(parameter.num,)] = 'constexpr', 1
        else:
            signature[parameter.name] = 'fp32' if isinstance(value, float) else 'i32'
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(parameter.num,)] = [['tt.divisibility', 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options=given)
    file = Path(kernel.fn.__code__.co_filename)
    name = f'{file.parent.name}/{file.name}', kernel.fn.__name__
    shared[name] = max(shared.get(name, 0), compiled.metadata.shared)


def learn(model: torch.nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """Forward and backward."""
    out = model(*inputs, **kwargs)
    (out if isinstance(out, torch.Tensor) else out[0]).float().sum().backward()


def store(chunk: int, batch: int | None, width: int = 64, depth: int = 2, **kwargs: Any) -> None:
    model = MemoryMLP(width, depth=depth, expansion_factor=4.0)
    settings = {'dim_head': width, 'heads': 2, 'model': model, 'chunk_size': chunk, 'batch_size': batch, **kwargs}
    learn(NeuralMemory(dim=64, **settings), torch.randn(1, 256, 64))


def memories() -> None:
    """Memories with heads in sizes of training, of 64 and 128."""
    linear = {**memory_settings(2, 64, 16), 'depth': 1}
    store(16, 16, **linear)
    store(1, 1, 128, 1, mem_model_norm_add_residual=False)
    store(4, 128, qk_rmsnorm=True)
    store(64, 64, qk_rmsnorm=True)
    store(4, None, qk_rmsnorm=True, per_parameter_lr_modulation=True)
    store(16, 128, spectral_norm_surprises=True)


def memories_in_full() -> None:
    """Memories in float32, whose tiles take the most shared memory."""
    store(4, 128, qk_rmsnorm=True)
    store(64, 64, qk_rmsnorm=True)


def models() -> None:
    """A model with all that has kernels around the memory, in training and in sampling."""
    model = MemoryAsContextTransformer(
        num_tokens=256,
        dim=64,
        depth=2,
        segment_len=16,
        num_persist_mem_tokens=4,
        num_longterm_mem_tokens=4,
        neural_memory_layers=(2,),
        neural_memory_segment_len=4,
        neural_memory_batch_size=16,
        neural_memory_qkv_receives_diff_views=True,
        neural_mem_weight_residual=True,
        neural_memory_kwargs={'dim_head': 32, 'heads': 2, 'spectral_norm_surprises': True},
    )
    learn(model, torch.randint(0, 256, (2, 65)), return_loss=True)
    with torch.no_grad(), torch.autocast('cpu', enabled=False):
        _, cache = model(torch.randint(0, 256, (2, 20)), return_cache=True)
        step = Stepper.of(model, cache, cuda_graphs=None)
        for _ in range(4):  # up to the end of a chunk
            step(torch.zeros(2, dtype=torch.long))
        token_linear(torch.zeros(8, 1, 64), torch.zeros(256, 64), norm=(torch.ones(64), None), gated=True)
        token_choice(torch.zeros(2, 256), torch.zeros(2, 256), 1.0, 0.1)


def operations() -> None:
    """Kernels that nothing launches on a CPU, or not in the sizes of a GPU."""
    import test_associative_scan
    import test_attention_inputs
    import test_deep_memory_scan
    import test_inverse
    import test_linear_memory_scan
    import test_memory_batch_scan
    import test_sinkhorn

    from titans_pytorch.ops.associative_scan.triton import associative_scan
    from titans_pytorch.ops.deep_memory_scan import triton as deep_scan
    from titans_pytorch.ops.linear_memory_scan import triton as linear_scan
    from titans_pytorch.ops.memory_batch_scan import triton_on_chip
    from titans_pytorch.ops.sinkhorn.triton import sinkhorn

    # all phases in one launch, as on a GPU
    triton_on_chip._launch = lambda kernel, arguments, states, carried: kernel[(1,)](
        **arguments, **states, BEFORE_SUM=True, AFTER_SUM=True, first_batch=0, last_batch=1, WAITS=True,
        counters=torch.zeros(1, dtype=torch.int32), launch_cooperative_grid=True,
    )  # fmt: skip
    for states, norm in ((1, False), (2, True)):
        tensors = test_memory_batch_scan.problem(1, 2, 1, 16, 64, 128, states, 2, norm)
        for of in (test_memory_batch_scan.leaves, test_memory_batch_scan.frozen):
            test_memory_batch_scan.learned(test_memory_batch_scan.scanned, of(tensors))
    deep_scan._over_batches = lambda kernel, arguments, phases: lambda block: kernel[(1,)](
        **deep_scan._taken_by(kernel, arguments), block=block, first_batch=0, last_batch=1, PHASE=-1, WAITS=True,
        counters=torch.zeros(1, dtype=torch.int32), launch_cooperative_grid=True,
    )  # fmt: skip
    for rows, norm, num_proximal_steps in ((16, False, None), (64, True, 1)):
        tensors = test_deep_memory_scan.problem(1, 1, 64 // rows, 1, rows, 64, 256, 2, 3, norm)
        scanned = partial(test_deep_memory_scan.scanned, chunks=1, num_proximal_steps=num_proximal_steps)
        test_deep_memory_scan.learned(scanned, test_deep_memory_scan.leaves(tensors))
    linear_scan.ENOUGH_PROGRAMS = 0  # as for many heads
    for sizes, low in (({'dim': 128, 'orders': 1}, True), ({'dim': 64, 'orders': 3}, True), ({'dim': 64}, False)):
        of_rows = test_linear_memory_scan.tensors_of((1, 4, 1, 16), **sizes)
        with torch.autocast('cpu', torch.bfloat16, enabled=low):
            test_linear_memory_scan.learned(of_rows, 1, num_proximal_steps=2)
    projected, frequencies, options = test_attention_inputs.problem(2, 40, 2, 64, 4, torch.bfloat16)
    test_attention_inputs.learned(projected, 2, frequencies, 0, options)
    for m in (7, 64):
        test_inverse.learned(test_inverse.inverse, test_inverse.problem(2, m))
    test_sinkhorn.with_gradient(sinkhorn, test_sinkhorn.problem(2, 4, 4), 20, test_sinkhorn.EPS)
    gates, inputs, prev = test_associative_scan.problem(2, 16, 64, 1, dtype=torch.float32)
    test_associative_scan.with_gradients(associative_scan, gates, inputs, prev)


def main() -> None:
    from titans_pytorch.ops import _dispatch

    capability = int(sys.argv[1])
    target = GPUTarget('cuda', capability, 32)
    _dispatch.compute_capability = lambda device: capability // 10  # type: ignore[assignment]
    # a function, not a partial, to become a method
    JITFunction.run = lambda *args, **kwargs: compile_launch(target, *args, **kwargs)  # type: ignore[method-assign]
    with torch.autocast('cpu', torch.bfloat16):
        memories()
        models()
        operations()
    if capability < 90:
        memories_in_full()
    for (file, name), size in shared.items():
        print(file, name, size)


if __name__ == '__main__':
    main()
