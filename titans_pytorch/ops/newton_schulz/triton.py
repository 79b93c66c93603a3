"""Newton–Schulz on many small matrices at once: each stays on chip through all iterations, forward and backward.

A program owns one matrix x, wide way round: no more rows than columns. The plain twin is the loop in
`orthogonalize.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import differentiated_once
from titans_pytorch.ops._triton import plus

# rows and columns that fit on chip beside the products of the backward pass, by what the products are computed in
HALF = [(64, 256), (128, 128)]
MOST = {torch.float32: [(64, 128)], torch.bfloat16: HALF, torch.float16: HALF}
OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _plus_t(acc, left, right, PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + left · rightᵀ. Rounded before it is turned, so that one copy in shared memory serves both ways round."""
    return tl.dot(left.to(OPERAND), tl.trans(right.to(OPERAND)), acc, input_precision=PRECISION)


@triton.jit
def _unit(pointers, inside, eps):  # type: ignore[no-untyped-def]
    """The matrix at `pointers` over its Frobenius norm, or over `eps` if that is more; the norm."""
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(tl.sum(x * x, axis=1), axis=0))
    return x / tl.maximum(norm, eps), norm


@triton.jit
def _polynomial(gram, b, c, PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    # symmetric matrices stand transposed on the right here and below: the order in which tensor cores read TF32
    return _plus_t(b * gram, c * gram, gram, PRECISION, OPERAND)


@triton.jit
def _iterated(x, a, b, c, nothing, PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    gram = _plus_t(nothing, x, x, PRECISION, OPERAND)
    return plus(a * x, _polynomial(gram, b, c, PRECISION, OPERAND), x, PRECISION, OPERAND)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    matrices, outputs,
    matrix_stride, steps, eps, a, b, c,
    rows: tl.constexpr, columns: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    out_row_stride: tl.constexpr, out_column_stride: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    place = row * row_stride + column * column_stride
    out_place = row * out_row_stride + column * out_column_stride
    nothing = tl.zeros((ROWS, ROWS), tl.float32)

    x, _ = _unit(matrices + matrix * matrix_stride + place, inside, eps)
    for _ in range(steps):
        x = _iterated(x, a, b, c, nothing, PRECISION, OPERAND)
    tl.store(outputs + matrix * rows * columns + out_place, x, mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    matrices, d_outputs, d_matrices, iterates,
    matrix_stride, count, steps, eps, a, b, c,
    rows: tl.constexpr, columns: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    out_row_stride: tl.constexpr, out_column_stride: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    place = row * row_stride + column * column_stride
    out_place = row * out_row_stride + column * out_column_stride
    nothing = tl.zeros((ROWS, ROWS), tl.float32)
    # this program's own scratch, its padding included: small enough to stay in the cache
    iterates += tl.program_id(0).to(tl.int64) * tl.maximum(1, steps) * (ROWS * COLUMNS) + row * COLUMNS + column

    for matrix in range(tl.program_id(0).to(tl.int64), count, tl.num_programs(0)):
        source = matrices + matrix * matrix_stride + place
        out_start = matrix * rows * columns

        x, _ = _unit(source, inside, eps)
        tl.store(iterates, x.to(OPERAND))
        for step in range(1, steps):
            x = _iterated(x, a, b, c, nothing, PRECISION, OPERAND)
            tl.store(iterates + step * (ROWS * COLUMNS), x.to(OPERAND))
        tl.debug_barrier()

        d_x = tl.load(d_outputs + out_start + out_place, mask=inside, other=0.0).to(tl.float32)
        for back in range(steps):
            before = tl.load(iterates + (steps - 1 - back) * (ROWS * COLUMNS))
            gram = _plus_t(nothing, before, before, PRECISION, OPERAND)
            # y = a·x + P·x with P = b·G + c·G² and G = x·xᵀ, so dP = dy·xᵀ, and only D = dP + dPᵀ is needed:
            # dx = a·dy + P·dy + (dG + dGᵀ)·x with dG + dGᵀ = b·D + c·(D·G + G·D).
            # Sums with transposes are products of their own: a transposed result as left operand is what Triton
            # 3.4 to 3.7 gets wrong on Hopper (fla-org/flash-linear-attention, issue 640)
            d_polynomial = _plus_t(nothing, d_x, before, PRECISION, OPERAND)
            d_polynomial = _plus_t(d_polynomial, before, d_x, PRECISION, OPERAND)
            d_gram = _plus_t(b * d_polynomial, c * d_polynomial, gram, PRECISION, OPERAND)
            d_gram = _plus_t(d_gram, c * gram, d_polynomial, PRECISION, OPERAND)
            polynomial = _polynomial(gram, b, c, PRECISION, OPERAND)
            # the barrier keeps this load where it is: until here the iterate takes no registers
            tl.debug_barrier()
            before = tl.load(iterates + (steps - 1 - back) * (ROWS * COLUMNS))
            d_x = plus(a * d_x, polynomial, d_x, PRECISION, OPERAND)
            d_x = plus(d_x, d_gram, before, PRECISION, OPERAND)

        # x = m / max(|m|, eps): where the norm divides, what points along x is lost
        x, norm = _unit(source, inside, eps)
        along = tl.where(norm >= eps, tl.sum(tl.sum(d_x * x, axis=1), axis=0), 0.0)
        tl.store(d_matrices + out_start + out_place, (d_x - along * x) / tl.maximum(norm, eps), mask=inside)
        # the next matrix writes over these iterates
        tl.debug_barrier()


@torch.library.custom_op('titans_pytorch::newton_schulz', mutates_args=())
def newton_schulz(
    matrices: Tensor,  # n i j
    steps: int,
    eps: float,
    a: float,
    b: float,
    c: float,
    operands: torch.dtype,  # of the products; float32, or what autocast lowers to
) -> Tensor:  # n i j
    """Each matrix over its Frobenius norm, then `steps` times x ← a·x + (b·xxᵀ + c·(xxᵀ)²)·x; differentiable once."""
    outputs = matrices.new_empty(matrices.shape)
    wide, wide_outputs = _wide(matrices), _wide(outputs)
    sizes = _sizes(wide)
    _forward_kernel[(len(matrices),)](
        matrices, outputs,
        wide.stride(0), steps, eps, a, b, c,
        *wide.shape[1:], *wide.stride()[1:], *wide_outputs.stride()[1:],
        *sizes, *_precision(operands), num_warps=_warps(sizes), num_stages=1,
    )  # fmt: skip
    return outputs


@torch.library.custom_op('titans_pytorch::newton_schulz_backward', mutates_args=())
def newton_schulz_backward(
    matrices: Tensor,  # n i j
    d_outputs: Tensor,  # n i j
    steps: int,
    eps: float,
    a: float,
    b: float,
    c: float,
    operands: torch.dtype,
) -> Tensor:  # n i j
    """The gradient of `matrices`."""
    d_outputs = d_outputs.contiguous()
    d_matrices = matrices.new_empty(matrices.shape)
    wide, wide_outputs = _wide(matrices), _wide(d_matrices)
    sizes = _sizes(wide)
    warps = _warps(sizes)
    programs = min(len(matrices), _programs(matrices.device, warps))
    iterates = matrices.new_empty(programs, max(1, steps), *sizes, dtype=operands)
    _backward_kernel[(programs,)](
        matrices, d_outputs, d_matrices, iterates,
        wide.stride(0), len(matrices), steps, eps, a, b, c,
        *wide.shape[1:], *wide.stride()[1:], *wide_outputs.stride()[1:],
        *sizes, *_precision(operands), num_warps=warps, num_stages=1,
    )  # fmt: skip
    return d_matrices


@newton_schulz.register_fake
def _(matrices: Tensor, *settings: Any) -> Tensor:
    return matrices.new_empty(matrices.shape)


@newton_schulz_backward.register_fake
def _(matrices: Tensor, d_outputs: Tensor, *settings: Any) -> Tensor:
    return matrices.new_empty(matrices.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    matrices, *ctx.settings = inputs
    ctx.save_for_backward(matrices)


def _gradients(ctx: Any, d_outputs: Tensor) -> tuple[Tensor | None, ...]:
    d_matrices = newton_schulz_backward(*ctx.saved_tensors, d_outputs, *ctx.settings)
    return d_matrices, *[None for _ in ctx.settings]


newton_schulz.register_autograd(_gradients, setup_context=_keep_inputs)
differentiated_once(newton_schulz_backward)


def serves(matrices: Tensor, operands: torch.dtype) -> bool:
    """Whether a matrix stays on chip, with all that is computed from it."""
    rows, columns = _wide(matrices).shape[-2:]
    fits = any(rows <= most_rows and columns <= most_columns for most_rows, most_columns in MOST.get(operands, []))
    return fits and matrices.numel() > 0


def _wide(matrices: Tensor) -> Tensor:
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices


def _padded(size: int) -> int:
    # the least that Triton multiplies
    return max(16, triton.next_power_of_2(size))


def _sizes(wide: Tensor) -> tuple[int, int]:
    return _padded(wide.shape[-2]), _padded(wide.shape[-1])


def _precision(operands: torch.dtype) -> tuple[str, tl.dtype]:
    """How products are computed: as PyTorch's own would be, float32 in full unless TF32 is allowed."""
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.fp32_precision == 'tf32' if hasattr(matmul, 'fp32_precision') else matmul.allow_tf32
    return 'tf32' if tf32 else 'tf32x3', OPERANDS[operands]


def _warps(sizes: tuple[int, int]) -> int:
    # from 64 rows on, four warps share one instruction of a tensor core; registers ask for the rest
    rows, columns = sizes
    return min(8, max(4, rows * columns // 2048) if rows >= 64 else rows * columns // 512)


def _programs(device: torch.device, warps: int) -> int:
    """As many as run at once: 16 warps on each multiprocessor. Few on the CPU, so that tests see one take several."""
    if device.type != 'cuda':
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count * (16 // warps)
