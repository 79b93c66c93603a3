"""Helpers that the kernels of several operations share, inside a kernel and around its launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._dispatch import HOPPER, has_constant_weights, nvidia_capability

# Precision of products of float32: full, even if PyTorch may use TF32, as rounding errors accumulate in a recurrence
EXACT = tl.constexpr('tf32x3')
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# When a kernel begins: after the kernel before it has ended;
AFTERWARDS = tl.constexpr(0)
# while the one before is running, waiting for its end immediately;
OVERLAPPING = tl.constexpr(1)
# or while the one before is running, waiting for its end after reading constants
READING_CONSTANTS = tl.constexpr(2)


@triton.jit
def let_next_begin(START: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first statement of a kernel that is launched with `overlapping`."""
    if START != AFTERWARDS:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(START: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the preceding kernel to end. Until then a kernel must not write; if it started with `begin`, it may read
    constants and nothing else."""
    if START != AFTERWARDS:
        tl.extra.cuda.gdc_wait()


@triton.jit
def begin(START: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first statement of such a kernel that goes on to read constants before it waits for its inputs."""
    let_next_begin(START)
    if START == OVERLAPPING:  # constants may just have been written here
        wait_for_inputs(START)


@triton.jit
def prefetch(pointers, START: tl.constexpr):  # type: ignore[no-untyped-def]
    """Make the cache fetch the lines that some pointers point into. Because nothing is read, this may come before
    `wait_for_inputs`, whatever is written there."""
    if START != AFTERWARDS:
        tl.inline_asm_elementwise(
            'prefetch.global.L2 [$1]; mov.u32 $0, 0;', '=r,l', [pointers.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def multiply_add(acc, left, right, PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + left · right"""
    return tl.dot(left.to(OPERAND), right.to(OPERAND), acc, input_precision=PRECISION)


@triton.jit
def rotary_angles(positions, frequencies):  # type: ignore[no-untyped-def]
    """Angles of positions modulo 2π, computed in float64: near a million, float32 numbers are a sixteenth apart."""
    revolutions = positions.to(tl.float64) * frequencies.to(tl.float64) * 0.15915494309189535
    return ((revolutions - tl.floor(revolutions)) * 6.283185307179586).to(tl.float32)


@triton.jit
def select(which: tl.constexpr, a, b, c, d):  # type: ignore[no-untyped-def]
    """The one of four arguments with this index, which is known at compile time."""
    chosen = a
    if which == 1:
        chosen = b
    if which == 2:
        chosen = c
    if which == 3:
        chosen = d
    return chosen


@triton.jit
def divide_by_sums(x, AXIS: tl.constexpr, EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Half an iteration of Sinkhorn's: x divided by its sums along an axis, each at least `EPS`; and the sums."""
    sums = tl.sum(x, axis=AXIS, keep_dims=True)
    # sums that are NaN stay NaN
    inverse_root = tl.rsqrt(tl.maximum(sums, EPS, propagate_nan=tl.PropagateNan.ALL))
    return x * (inverse_root * inverse_root), sums  # faster than a division in a long chain


@triton.jit
def divide_by_sums_backward(d_log, y, sums, AXIS: tl.constexpr, EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Given y = x / sums and the gradient of log y, the gradient of log x; and x, recovered from y."""
    d_log -= y * tl.where(sums < EPS, 0.0, tl.sum(d_log, axis=AXIS, keep_dims=True))
    return d_log, y * tl.where(sums < EPS, EPS, sums)


@triton.jit
def eliminate(rows, first, count):  # type: ignore[no-untyped-def]
    """Gauss–Jordan elimination in place of the first `count` of (n, r, c) rows, with pivots from column `first` on.

    Square matrices, from column 0 on, become their inverses; they must need no pivoting. Where only a part is
    eliminated, the rest must be that of the identity, or zero, and stays so.
    """
    row, column = tl.arange(0, rows.shape[1])[None, :, None], tl.arange(0, rows.shape[2])[None, None, :]
    for pivot in range(count):
        of_row = tl.sum(tl.where(row == pivot, rows, 0.0), axis=1, keep_dims=True)
        of_column = tl.sum(tl.where(column == first + pivot, rows, 0.0), axis=2, keep_dims=True)
        reciprocal = 1.0 / tl.sum(tl.where(column == first + pivot, of_row, 0.0), axis=2, keep_dims=True)
        # from here on, the eliminated column holds a column of the inverse
        scaled = tl.where(column == first + pivot, reciprocal, of_row * reciprocal)
        rest = tl.where(column == first + pivot, 0.0, rows) - of_column * scaled
        rows = tl.where(row == pivot, scaled, rest)
    return rows


# rows that are eliminated together; no side of a product in Triton is shorter
_TOGETHER = tl.constexpr(16)


@triton.jit
def invert(matrix, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse of a (SIZE, SIZE) matrix, as by `eliminate`, a block of rows at a time."""
    if SIZE <= _TOGETHER:
        matrix = tl.reshape(eliminate(matrix[None, :, :], 0, count), (SIZE, SIZE))
    else:
        BLOCKS: tl.constexpr = SIZE // _TOGETHER
        eliminated = tl.arange(0, SIZE)[None, :] // _TOGETHER
        of_rows, of_columns = tl.arange(0, BLOCKS)[:, None, None], tl.arange(0, BLOCKS)[None, :, None]
        for block in tl.static_range(BLOCKS):
            first = block * _TOGETHER
            by_columns = tl.reshape(matrix, (SIZE, BLOCKS, _TOGETHER))
            down = tl.sum(tl.where(of_columns == block, by_columns, 0.0), axis=1)
            by_rows = tl.reshape(matrix, (BLOCKS, _TOGETHER, SIZE))
            across = tl.sum(tl.where(of_rows == block, by_rows, 0.0), axis=0)
            across = eliminate(across[None, :, :], first, tl.minimum(count - first, _TOGETHER))
            # without tensor cores: equal rows make rounding errors grow a thousandfold
            matrix = tl.where(eliminated == block, 0.0, matrix)
            matrix = multiply_add(matrix, -down, tl.reshape(across, (_TOGETHER, SIZE)), 'ieee', tl.float32)
            by_rows = tl.reshape(matrix, (BLOCKS, _TOGETHER, SIZE))
            matrix = tl.reshape(tl.where(of_rows == block, across, by_rows), (SIZE, SIZE))
    return matrix


def tile_size(size: int) -> int:
    """The smallest power of two that holds `size` entries; at least 16, the shortest side of a product in Triton."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def own_rows(count, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """With groups of `count` rows: the index of the group, and the rows in it, that a program owns. All programs are on
    one axis of the grid, because the other axes have a limit of 65,535."""
    blocks = tl.cdiv(count, ROWS)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    return tl.program_id(0) // blocks, row.to(tl.int64)


# entries held by a program that goes over rows and holds all features of each
_ENTRIES_OF_ROWS = 4096


def whole_rows(count: int, dim: int) -> dict[str, int]:
    """Constants of a program that holds several of `count` rows with all their features: DIM, ROWS and warps."""
    features = triton.next_power_of_2(dim)
    rows = max(1, min(_ENTRIES_OF_ROWS // features, triton.next_power_of_2(count)))
    return {'DIM': features, 'ROWS': rows, 'num_warps': 4}


def overlapping(t: Tensor, *constants: Tensor | None) -> dict[str, Any]:
    """Arguments of a launch, on the device of `t`, that begins while the kernel before it is still running, if the GPU
    can do that (programmatic dependent launch, from Hopper on). The programs start, and then wait for their inputs.

    This pays for kernels that take a few microseconds, as long as a launch.

    Args:
        constants: tensors that the kernel reads before it waits, within `constant_weights`, if all of them are
            contiguous. (The kernel before may be the one that makes a contiguous copy.)
    """
    if not t.is_cuda or nvidia_capability(t.device) < HOPPER:
        return {'START': AFTERWARDS.value}
    unwritten = all(constant is None or constant.is_contiguous() for constant in constants)
    early = bool(constants) and unwritten and has_constant_weights()
    return {'START': (READING_CONSTANTS if early else OVERLAPPING).value, 'launch_pdl': True}


def cache_lines(t: Tensor, count: int) -> dict[str, int]:
    """Constants of a kernel that fetches `count` consecutive entries of `t`: entries per line, and lines, padded."""
    line = 128 // t.element_size()
    return {'LINE': line, 'LINES': triton.next_power_of_2(triton.cdiv(count, line))}


def norm_eps(eps: float | None) -> float:
    """ε of a norm; for `None`, that of `nn.RMSNorm` in float32, the precision in which kernels compute norms."""
    return torch.finfo(torch.float32).eps if eps is None else eps


def contiguous_inside(t: Tensor, axes: int) -> Tensor:
    """`t` with its last one or two axes contiguous; earlier axes may have any strides, including zero."""
    strides = (t.shape[-1], 1)[-axes:]
    return t if t.stride()[-axes:] == strides else t.contiguous()


def named_strides(name: str, t: Tensor | None, axes: str) -> dict[str, int]:
    """A tensor's first strides as keyword arguments `<name>_<axis>`; 0 for an absent tensor, which no kernel reads."""
    names = [f'{name}_{axis}' for axis in axes.split()]
    return dict.fromkeys(names, 0) if t is None else dict(zip(names, t.stride()))


def taken_by(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The `arguments` that a kernel accepts."""
    return {name: value for name, value in arguments.items() if name in kernel.arg_names}


def numbered(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Up to four values as arguments of a kernel, `<name>_0` to `<name>_3`, for `select`; missing ones are not read."""
    return {f'{name}_{index}': values[index] if index < len(values) else values[0] for index in range(4)}


def product_precision(operands: torch.dtype) -> dict[str, Any]:
    """Constants of `multiply_add` for factors in this precision."""
    return {'PRECISION': EXACT.value, 'OPERAND': TRITON_DTYPES[operands]}


# rows of a program: with more rows, weights are read less often. Below 64 rows, Triton uses the older tensor-core
# instructions, which can read matrices in either orientation
MOST_ROWS = 32
# if there would be fewer programs than this, each gets 16 rows, or columns
ENOUGH_PROGRAMS = 128
# entries of a program's rows that eight warps can hold; in full float32, products take twice the registers
ENTRIES, ENTRIES_IN_FULL = 4096, 2048


def rows_per_program(heads: int, rows: int, columns: int, in_full: bool) -> tuple[int, int]:
    """Rows and warps of a program that holds this many columns of each row on chip; `in_full`: float32 without TF32."""
    entries = ENTRIES_IN_FULL if in_full else ENTRIES
    own = max(16, min(MOST_ROWS, entries // columns))
    own = own if heads * triton.cdiv(rows, own) >= ENOUGH_PROGRAMS else 16
    return own, 4 if 2 * own * columns <= entries else 8


# a memory MLP


@triton.jit
def normal_cdf(h):  # type: ignore[no-untyped-def]
    """Φ, the normal distribution"""
    return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def normal_pdf(h):  # type: ignore[no-untyped-def]
    """φ, its density"""
    return 0.3989422804014327 * tl.exp(-0.5 * h * h)


@triton.jit
def gelu_derivative(h):  # type: ignore[no-untyped-def]
    """gelu = h Φ, so gelu′ = Φ + h φ"""
    return normal_cdf(h) + h * normal_pdf(h)


@triton.jit
def gelu_second_derivative(h):  # type: ignore[no-untyped-def]
    """gelu″ = (2 − h²) φ"""
    return (2.0 - h * h) * normal_pdf(h)


@triton.jit
def row_mean(x, dim: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(x, axis=1)[:, None] / dim


@triton.jit
def standardize(y, inside, eps, dim: tl.constexpr):  # type: ignore[no-untyped-def]
    """x̂ and r"""
    centred = tl.where(inside, y - row_mean(y, dim), 0.0)
    inverse = 1.0 / tl.sqrt(row_mean(centred * centred, dim) + eps)
    return centred * inverse, inverse


@triton.jit
def project_out(u, x, inside, dim: tl.constexpr):  # type: ignore[no-untyped-def]
    """P(u) = u − mean u − x̂ · mean(u ∘ x̂)"""
    return tl.where(inside, u - row_mean(u, dim) - x * row_mean(u * x, dim), 0.0)


@triton.jit
def sum_rows(start, count, feature, dim: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of `count` rows."""
    total = tl.zeros((DIM,), tl.float32)
    for first_row in range(0, count, 16):
        row = first_row + tl.arange(0, 16)
        inside = (row < count)[:, None] & (feature < dim)[None, :]
        total += tl.sum(tl.load(start + row[:, None] * dim + feature[None, :], mask=inside, other=0.0), axis=0)
    return total
