"""First-order linear recurrences h_t = g_t · h_{t−1} + x_t, all steps at once."""

from __future__ import annotations

import warnings

import torch
from assoc_scan import AssocScan as PlainAssocScan
from torch import Tensor

from titans_pytorch.shapes import Float


class AssocScan(PlainAssocScan):
    """Every state of h_t = gates_t · h_{t−1} + inputs_t along dimension 1, by an associative scan.

    Takes what `assoc_scan.AssocScan` takes: `gates` (b, n), (b, n, 1) or (b, n, d…), `inputs` (b, n, d…), and
    optionally `prev` (b, d…), the state before the first step. With `remove_prev=False` the result starts with
    `prev` itself and has n + 1 steps; `remove_prev` defaults to whether `prev` is given.

    `use_accelerated=True` runs a Triton kernel on a CUDA device: ours where a step has one gate (the memory's
    momentum and decay), that of `accelerated-scan` where every feature has its own. What no kernel serves (the CPU,
    integer or complex inputs, `reverse`, `has_no_feature_dim`) runs the plain scan; on the CPU a warning says so.
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
        states = accelerated_scan(gates.flatten(2) if gates.ndim > 2 else gates.unsqueeze(-1), rows, first)

        keeps_prev = prev is not None and remove_prev is False
        return states[:, 0 if keeps_prev else 1 :].unflatten(2, inputs.shape[2:])

    def _kernel_serves(self, gates: Tensor, inputs: Tensor) -> bool:
        if not inputs.is_cuda:
            _say_there_is_no_gpu()
            return False
        plain_shapes = inputs.ndim >= 3 and gates.ndim >= 2 and not (self.reverse or self.has_no_feature_dim)
        return plain_shapes and inputs.numel() > 0 and inputs.is_floating_point()


def accelerated_scan(
    gates: Float[Tensor, 'b n 1'] | Float[Tensor, 'b n d'],
    inputs: Float[Tensor, 'b n d'],
    prev: Float[Tensor, 'b d'],
) -> Float[Tensor, 'b n+1 d']:
    """The scan by a Triton kernel, starting with `prev` itself."""
    if gates.shape[-1] == 1:
        from titans_pytorch.kernels.scan import gated_scan

        return gated_scan(gates.squeeze(-1), inputs, prev)

    from accelerated_scan.scalar import scan

    # `prev` enters as the first step. Each sequence is a batch entry of its own: the kernel's grid counts features
    # along an axis that CUDA limits to 65,535.
    inputs = torch.cat((prev.unsqueeze(1), inputs), dim=1)
    gates = torch.nn.functional.pad(gates, (0, 0, 1, 0), value=1.0)
    batch, _, features = inputs.shape
    columns = (t.mT.flatten(0, 1).unsqueeze(1).float().contiguous() for t in (gates, inputs))
    return scan(*columns).squeeze(1).unflatten(0, (batch, features)).mT.to(inputs.dtype)


def _say_there_is_no_gpu() -> None:
    message = 'use_accelerated_scan=True: the Triton scan needs a CUDA device; on the CPU the plain scan runs instead.'
    warnings.warn(message, stacklevel=4)
