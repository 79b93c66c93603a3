"""First-order linear recurrences h_t = g_t · h_{t−1} + x_t, all steps at once."""

from __future__ import annotations

import warnings

from assoc_scan import AssocScan as PlainAssocScan
from torch import Tensor

from titans_pytorch.ops import _dispatch
from titans_pytorch.utils.shapes import Float


class AssocScan(PlainAssocScan):
    """Every state of h_t = gates_t · h_{t−1} + inputs_t along dimension 1, by an associative scan.

    Takes what `assoc_scan.AssocScan` takes: `gates` (b, n), (b, n, 1) or (b, n, d…), `inputs` (b, n, d…), and
    optionally `prev` (b, d…), the state before the first step. With `remove_prev=False` the result starts with
    `prev` itself and has n + 1 steps; `remove_prev` defaults to whether `prev` is given.

    `use_accelerated=True` runs a Triton kernel on a CUDA device. What it does not serve (the CPU, integer or complex
    inputs, `reverse`, `has_no_feature_dim`) runs the plain scan; on the CPU a warning says so.
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
        if not (self.accelerate and self._kernel_serves(gates, inputs)):
            return super().forward(gates, inputs, prev=prev, remove_prev=remove_prev, return_next=return_next)

        rows = inputs.flatten(2)
        first = rows.new_zeros(rows.shape[0], rows.shape[2]) if prev is None else prev.flatten(1).to(rows.dtype)
        # imported where it is used: without a GPU there need be no Triton
        from titans_pytorch.ops.associative_scan.triton import gated_scan

        states = gated_scan(gates.flatten(2) if gates.ndim > 2 else gates.unsqueeze(-1), rows, first)
        keeps_prev = prev is not None and remove_prev is False
        return states[:, 0 if keeps_prev else 1 :].unflatten(2, inputs.shape[2:])

    def _kernel_serves(self, gates: Tensor, inputs: Tensor) -> bool:
        if not inputs.is_cuda:
            _say_there_is_no_gpu()
            return False
        plain_shapes = inputs.ndim >= 3 and gates.ndim >= 2 and not (self.reverse or self.has_no_feature_dim)
        return _dispatch.kernels_are_on() and plain_shapes and inputs.numel() > 0 and inputs.is_floating_point()


def gate_products(log_gates: Float[Tensor, '... n']) -> Float[Tensor, '... n n']:
    """L[c, j] = g_{j+1} · … · g_c for j ≤ c, else 0: what is left at step c of what came in at step j.

    Each entry sums the logarithms of its own range: the difference of two long sums would cancel.
    """
    n = log_gates.shape[-1]
    sums = log_gates.unsqueeze(-1).expand(*log_gates.shape, n).tril(-1).cumsum(dim=-2)
    return sums.exp().tril()


def _say_there_is_no_gpu() -> None:
    message = 'use_accelerated_scan=True: the Triton scan needs a CUDA device; on the CPU the plain scan runs instead.'
    warnings.warn(message, stacklevel=4)
