"""First-order linear recurrences h_t = g_t · h_{t−1} + x_t, with all steps at once."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from titans_pytorch.ops._dispatch import LOW_OR_SINGLE, VOLTA, use_kernel
from titans_pytorch.ops.associative_scan import reference
from titans_pytorch.utils.shapes import Float


class AssocScan(reference.AssocScan):
    """Every state of h_t = gates_t · h_{t−1} + inputs_t along dimension 1, by an associative scan.

    Takes the arguments of `assoc_scan.AssocScan`: `gates` (b, n), (b, n, 1) or (b, n, d…), `inputs` (b, n, d…), and
    optionally `prev` (b, d…), the state before the first step. With `remove_prev=False` the result starts with
    `prev` itself and has n + 1 steps; `remove_prev` defaults to whether `prev` is given.

    `use_accelerated=True` runs a Triton kernel on a CUDA device. Cases that it does not support (the CPU, integer or
    complex inputs, `reverse`, `has_no_feature_dim`) run the plain scan; on the CPU, a warning says so. The kernel is
    this package's own: those of `accelerated-scan` take tensors (batch, features, steps) with a gate for each feature
    and no state before the first step, so every call of a memory would have to make transposed and expanded copies.
    """

    def __init__(self, use_accelerated: bool = False, reverse: bool = False, has_no_feature_dim: bool = False):
        super().__init__(use_accelerated=False, reverse=reverse, has_no_feature_dim=has_no_feature_dim)
        self.accelerate = use_accelerated

    def forward(
        self,
        gates: Tensor,
        inputs: Tensor,
        prev: Tensor | None = None,
        remove_prev: bool | None = None,
        return_next: bool = False,
    ) -> Tensor:
        if self.accelerate and not inputs.is_cuda:
            _warn_of_cpu()
        dtypes = (*LOW_OR_SINGLE, torch.float64)
        accelerated = self.accelerate and use_kernel([gates, inputs, prev], capability=VOLTA, dtypes=dtypes)
        if not (accelerated and self._supports(gates, inputs, prev)):
            return super().forward(gates, inputs, prev=prev, remove_prev=remove_prev, return_next=return_next)

        from titans_pytorch.ops.associative_scan import triton

        rows = inputs.flatten(2)
        states = triton.associative_scan(
            gates=gates.flatten(2) if gates.ndim > 2 else gates.unsqueeze(-1),
            inputs=rows,
            prev=rows.new_zeros(rows.shape[0], rows.shape[2]) if prev is None else prev.flatten(1),
        )
        keeps_prev = prev is not None and remove_prev is False
        return states[:, 0 if keeps_prev else 1 :].unflatten(2, inputs.shape[2:])

    def _supports(self, gates: Tensor, inputs: Tensor, prev: Tensor | None) -> bool:
        if self.reverse or self.has_no_feature_dim or inputs.ndim < 3 or inputs.numel() == 0:
            return False
        # the plain scan broadcasts and promotes what differs, or rejects it
        features = inputs.shape[2:]
        same_steps = gates.shape[:2] == inputs.shape[:2] and gates.shape[2:] in ((), (1,), features)
        same_start = prev is None or prev.shape == (len(inputs), *features)
        return same_steps and same_start and all(t.dtype == inputs.dtype for t in (gates, prev) if t is not None)


def coefficient_product(
    coefficients: Float[Tensor, 'bh i j'], updates: Float[Tensor, 'bh j f']
) -> Float[Tensor, 'bh i f']:
    """`coefficients` @ `updates`, for few chunks with many features."""
    if not updates.is_cuda or updates.shape[2] % 512:
        return coefficients @ updates
    # the coefficients' gradient is few numbers, each a sum over all features; summing in parts keeps a GPU busy
    parts = updates.unflatten(2, (-1, 512)).transpose(1, 2)
    return (coefficients.unsqueeze(1) @ parts).transpose(1, 2).flatten(2)


def _warn_of_cpu() -> None:
    message = 'use_accelerated_scan=True: the Triton scan needs a CUDA device; on the CPU the plain scan runs instead.'
    warnings.warn(message, stacklevel=4)
