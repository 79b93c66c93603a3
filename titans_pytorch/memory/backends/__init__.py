"""Backends: how chunks are stored in a memory network. All give the same numbers."""

from __future__ import annotations

from torch.nn import Module

from titans_pytorch.memory.backends.base import Backend, StoreInputs
from titans_pytorch.memory.backends.dense import DenseBackend
from titans_pytorch.memory.backends.dual import DualBackend
from titans_pytorch.memory.backends.spectral import SpectralBackend
from titans_pytorch.memory.backends.trial import Trial, is_built_in
from titans_pytorch.utils.checks import described

__all__ = ['Backend', 'DenseBackend', 'DualBackend', 'SpectralBackend', 'StoreInputs', 'choose_backend']


def choose_backend(
    requested: str, network: Module, dim: int, rows: int, spectral_norm: bool, proximal_steps: bool = False
) -> type[Backend]:
    """Choose the backend for a network of width `dim` that receives up to `rows` rows at a time.

    Args:
        requested: the argument `engine` of `NeuralMemory`; 'auto' is 'dual' for every network that it can serve.

    Raises:
        ValueError: for a network that the requested backend, or with 'auto' any backend, cannot serve.
    """
    if not isinstance(requested, str) or requested not in ('auto', 'dual', 'dense'):
        raise ValueError(f"engine must be 'auto', 'dual' or 'dense', got {described(requested)}")
    dual = SpectralBackend if spectral_norm else DualBackend
    if proximal_steps and not getattr(network, 'rowwise', False):
        raise ValueError('proximal_steps needs a model that treats rows separately, and says so by `rowwise = True`')
    if is_built_in(network):
        return DenseBackend if requested == 'dense' else dual
    trial = Trial.of(network, dim, rows)
    obstacle_to_all = trial.obstacle_to_dense(network)
    if obstacle_to_all is not None:
        raise ValueError(
            'model must run under torch.func.vmap and torch.func.grad, by which the memory is computed, with weights '
            'that it accesses through `self`: write what fails there as plain operations on tensors, such as products '
            f'of matrices. It failed: {obstacle_to_all}'
        )
    unseen = trial.unseen_rows(getattr(network, 'rowwise', False))
    if unseen is not None:
        raise ValueError(f'model {unseen}')
    if requested == 'dense' and not proximal_steps:
        return DenseBackend
    obstacle = trial.obstacle_to_dual(network)
    if obstacle is None:
        return DenseBackend if requested == 'dense' else dual
    if proximal_steps:
        raise ValueError(f'proximal_steps needs a model that the dual engine can serve: {obstacle}')
    if requested == 'dual':
        raise ValueError(f"engine='dual' cannot serve this model: {obstacle}; use engine='dense'")
    return DenseBackend
