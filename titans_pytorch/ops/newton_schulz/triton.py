"""Newton–Schulz kernels for many small matrices: each matrix stays on chip through all iterations, forward and
backward.

A program owns one matrix x, transposed if necessary so that it has no more rows than columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import TRITON_DTYPES, multiply_add, tile_size


@triton.jit
def _multiply_add_transposed(acc, left, right, PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + left · rightᵀ; rounded before transposing, so that one copy in shared memory serves both layouts."""
    return tl.dot(left.to(OPERAND), tl.trans(right.to(OPERAND)), acc, input_precision=PRECISION)


@triton.jit
def _symmetric(x, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """x + xᵀ, with both terms rounded alike."""
    x = x.to(OPERAND)
    return x.to(tl.float32) + tl.trans(x).to(tl.float32)


@triton.jit
def _inverse_norm(matrix, eps):  # type: ignore[no-untyped-def]
    """1 over the Frobenius norm of a matrix, or over `eps` if that is larger; and whether the norm was used."""
    norm = tl.sqrt(tl.sum(tl.sum(matrix * matrix, axis=1), axis=0))
    return 1.0 / tl.maximum(norm, eps), norm >= eps


@triton.jit
def _polynomial(gram, b, c, PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    # symmetric matrices are written as transposed right operands here and below: tensor cores read TF32 in that order
    return _multiply_add_transposed(b * gram, c * gram, gram, PRECISION, OPERAND)


@triton.jit
def iterate(x, a, b, c, zeros, PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    gram = _multiply_add_transposed(zeros, x, x, PRECISION, OPERAND)
    return multiply_add(a * x, _polynomial(gram, b, c, PRECISION, OPERAND), x, PRECISION, OPERAND)


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
    offset = row * row_stride + column * column_stride
    out_offset = row * out_row_stride + column * out_column_stride
    zeros = tl.zeros((ROWS, ROWS), tl.float32)

    x = tl.load(matrices + matrix * matrix_stride + offset, mask=inside, other=0.0).to(tl.float32)
    inverse, _ = _inverse_norm(x, eps)
    x *= inverse
    for _ in range(steps):
        x = iterate(x, a, b, c, zeros, PRECISION, OPERAND)
    tl.store(outputs + matrix * rows * columns + out_offset, x, mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    matrices, d_outputs, d_matrices,
    matrix_stride, steps, eps, a, b, c,
    rows: tl.constexpr, columns: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    out_row_stride: tl.constexpr, out_column_stride: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Iterate on a matrix and, beside it, on the gradient, so that no iterate has to be kept for a backward pass.

    All steps together are a polynomial of odd powers x(xᵀx)ᵏ. Its derivative in a direction e is a sum of terms (xxᵀ)ⁱ
    e (xᵀx)ʲ and (xxᵀ)ⁱx eᵀ x(xᵀx)ʲ, where i and j may be exchanged. So the derivative is its own adjoint: the gradient
    of x is the derivative in the direction of the output's gradient.
    """
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    matrix = tl.program_id(0).to(tl.int64)
    source = matrices + matrix * matrix_stride + row * row_stride + column * column_stride
    out_offset = matrix * rows * columns + row * out_row_stride + column * out_column_stride
    zeros = tl.zeros((ROWS, ROWS), tl.float32)

    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    d_x = tl.load(d_outputs + out_offset, mask=inside, other=0.0).to(tl.float32)
    inverse, divides = _inverse_norm(x, eps)
    x *= inverse
    for _ in range(steps):
        # x ← a·x + P·x with P = b·G + c·G² and G = x·xᵀ, so dG = dx·xᵀ + x·dxᵀ, dP = b·dG + c·(dG·G + G·dG) and dx ←
        # a·dx + P·dx + dP·x
        before = x
        gram = _multiply_add_transposed(zeros, x, x, PRECISION, OPERAND)
        polynomial = _polynomial(gram, b, c, PRECISION, OPERAND)
        x = multiply_add(a * x, polynomial, x, PRECISION, OPERAND)
        d_gram = _symmetric(_multiply_add_transposed(zeros, d_x, before, PRECISION, OPERAND), OPERAND)
        d_x = multiply_add(a * d_x, polynomial, d_x, PRECISION, OPERAND)
        # G·dG is the transpose of dG·G
        half = _multiply_add_transposed(0.5 * b * d_gram, c * d_gram, gram, PRECISION, OPERAND)
        d_x = multiply_add(d_x, _symmetric(half, OPERAND), before, PRECISION, OPERAND)

    # at first x = m / max(|m|, eps): where the norm divides, the gradient loses its component along m
    m = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    along = tl.where(divides, tl.sum(tl.sum(d_x * m, axis=1), axis=0) * inverse * inverse, 0.0)
    tl.store(d_matrices + out_offset, (d_x - along * m) * inverse, mask=inside)


def _outputs(matrices: Tensor, *settings: Any) -> Tensor:
    return matrices.new_empty(matrices.shape)


def orthogonalise(
    matrices: Tensor,  # n i j
    steps: int,
    eps: float,
    a: float,
    b: float,
    c: float,
    operands: torch.dtype,  # of the products: float32, or the precision of autocast
) -> Tensor:  # n i j
    outputs = _outputs(matrices)
    sizes = _matrix_sizes(matrices, outputs)
    _forward_kernel[(len(matrices),)](
        matrices=matrices, outputs=outputs, steps=steps, eps=eps, a=a, b=b, c=c,
        **sizes, **pytorch_precision(operands), num_warps=warps_of(sizes['ROWS'], sizes['COLUMNS']), num_stages=1,
    )  # fmt: skip
    return outputs


def orthogonalise_backward(
    d_outputs: Tensor,  # n i j
    matrices: Tensor,  # n i j
    steps: int,
    eps: float,
    a: float,
    b: float,
    c: float,
    operands: torch.dtype,
) -> list[Tensor]:
    d_outputs = d_outputs.contiguous()
    d_matrices = matrices.new_empty(matrices.shape)
    sizes = _matrix_sizes(matrices, d_matrices)
    _backward_kernel[(len(matrices),)](
        matrices=matrices, d_outputs=d_outputs, d_matrices=d_matrices, steps=steps, eps=eps, a=a, b=b, c=c,
        **sizes, **pytorch_precision(operands), num_warps=warps_of(sizes['ROWS'], sizes['COLUMNS']), num_stages=1,
    )  # fmt: skip
    return [d_matrices]


newton_schulz = register_kernel('newton_schulz', orthogonalise, orthogonalise_backward, outputs=_outputs)


def _matrix_sizes(matrices: Tensor, outputs: Tensor) -> dict[str, int]:
    """Sizes and strides of the matrices as programs see them: no more rows than columns."""
    wide, wide_outputs = (t.mT if t.shape[-2] > t.shape[-1] else t for t in (matrices, outputs))
    _, rows, columns = wide.shape
    matrix_stride, row_stride, column_stride = wide.stride()
    _, out_row_stride, out_column_stride = wide_outputs.stride()
    return dict(
        matrix_stride=matrix_stride, rows=rows, columns=columns, row_stride=row_stride, column_stride=column_stride,
        out_row_stride=out_row_stride, out_column_stride=out_column_stride,
        ROWS=tile_size(rows), COLUMNS=tile_size(columns),
    )  # fmt: skip


def pytorch_precision(operands: torch.dtype) -> dict[str, Any]:
    """Constants of `multiply_add`: full float32, unless PyTorch may use TF32. Unlike in a recurrence, errors do not
    accumulate here."""
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.fp32_precision == 'tf32' if hasattr(matmul, 'fp32_precision') else matmul.allow_tf32
    return {'PRECISION': 'tf32' if tf32 else _in_full(), 'OPERAND': TRITON_DTYPES[operands]}


def _in_full() -> str:
    """Precision of full float32 products: six products of bfloat16 where Triton has them. They are more accurate than
    three of TF32, whose parts take so much shared memory that a multiprocessor can hold only one program."""
    version = tuple(map(int, triton.__version__.split('.')[:2]))
    return 'bf16x6' if version >= (3, 6) and not triton.knobs.runtime.interpret else 'tf32x3'


def warps_of(rows: int, columns: int) -> int:
    """Number of warps of a program that owns a matrix of this size, padded to powers of two."""
    # with 64 rows or more, four warps share one tensor-core instruction; further warps would compute the same rows
    return rows // 16 if rows >= 64 else min(8, max(1, rows * columns // 512))
