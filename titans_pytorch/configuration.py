"""Models as data: a configuration that can be stored as JSON, and the model that it describes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from titans_pytorch.lmm import LongTermMemoryModel
from titans_pytorch.mac_transformer import MemoryAsContextTransformer
from titans_pytorch.mag_transformer import MemoryAsGateTransformer
from titans_pytorch.mal_transformer import MemoryAsLayerTransformer
from titans_pytorch.memory_models import NETWORKS
from titans_pytorch.models.base import Transformer
from titans_pytorch.models.hybrid import HybridTransformer
from titans_pytorch.utils.checks import check_keywords, described

ARCHITECTURES: dict[str, type[MemoryAsContextTransformer] | type[HybridTransformer]] = {
    'mac': MemoryAsContextTransformer,
    'mag': MemoryAsGateTransformer,
    'mal': MemoryAsLayerTransformer,
    'lmm': LongTermMemoryModel,
}
"""Architectures by name. The fifth, MAC in the order of the paper, is `'mac'` with `paper_order=True`."""

MEMORY_NETWORKS: dict[str, type[nn.Module]] = {network.__name__: network for network in NETWORKS}
"""Memory networks by class name."""

ACTIVATIONS: dict[str, type[nn.Module]] = {'gelu': nn.GELU, 'relu': nn.ReLU, 'silu': nn.SiLU, 'tanh': nn.Tanh}
"""Activations of queries, keys and values by name."""

NOT_STORED = ('token_emb',)  # modules of the caller


def model_config(architecture: str, **arguments: Any) -> dict[str, Any]:
    """The configuration of a model, as a dict of JSON values that `build_model` accepts.

        config = model_config('mag', num_tokens=256, segment_len=64, **preset('170M'))
        model = build_model(json.loads(json.dumps(config)))

    Args:
        architecture: a key of `ARCHITECTURES`.
        arguments: arguments of its constructor, with two differences. `neural_memory_model` is a dict of a class name,
            under `'type'`, and the arguments of that class: `{'type': 'MemoryMLP', 'dim': 64, 'depth': 2}`. The
            activation in `neural_memory_kwargs` is a key of `ACTIVATIONS` or a module without settings.

    Raises:
        ValueError, TypeError: for an unknown architecture, argument or network, and for a value that JSON cannot hold.
    """
    _check_arguments(architecture, arguments)
    memory_kwargs = {**arguments.get('neural_memory_kwargs', {})}
    if 'activation' in memory_kwargs:
        memory_kwargs['activation'] = _activation_name(memory_kwargs['activation'])
        arguments['neural_memory_kwargs'] = memory_kwargs
    with torch.device('meta'):  # a check, which draws no random numbers
        _network(arguments.get('neural_memory_model'))
    try:
        return json.loads(json.dumps({'architecture': architecture, **arguments}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f'arguments must be JSON values: {error}') from None


def build_model(config: Mapping[str, Any]) -> Transformer:
    """A new model from its configuration, initialised as by its constructor.

    Raises:
        ValueError, TypeError: as `model_config`, and as the constructor.
    """
    check_keywords(config=config)
    arguments = {**config}
    architecture = arguments.pop('architecture', None)
    _check_arguments(architecture, arguments)
    memory_kwargs = {**arguments.pop('neural_memory_kwargs', {})}
    memory_kwargs['activation'] = _activation(memory_kwargs.get('activation'))
    network = _network(arguments.pop('neural_memory_model', None))
    return ARCHITECTURES[architecture](neural_memory_model=network, neural_memory_kwargs=memory_kwargs, **arguments)


def _check_arguments(architecture: Any, arguments: Mapping[str, Any]) -> None:
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(f'architecture must be one of {[*ARCHITECTURES]}, got {described(architecture)}')
    constructor = ARCHITECTURES[architecture]
    accepted = inspect.signature(constructor).parameters.keys() - NOT_STORED
    if unknown := arguments.keys() - accepted:
        expected = f'arguments of {constructor.__name__} that JSON can hold'
        raise TypeError(f'config must hold {expected}, got {", ".join(sorted(unknown))}')
    check_keywords(neural_memory_kwargs=arguments.get('neural_memory_kwargs', {}))


def _network(description: Any) -> nn.Module | None:
    if description is None:
        return None
    check_keywords(neural_memory_model=description)
    arguments = {**description}
    name = arguments.pop('type', None)
    if name not in MEMORY_NETWORKS:
        raise ValueError(f"neural_memory_model['type'] must be one of {[*MEMORY_NETWORKS]}, got {described(name)}")
    return MEMORY_NETWORKS[name](**arguments)


def _activation(name: str | None) -> nn.Module | None:
    if name is None:
        return None
    if name not in ACTIVATIONS:
        raise ValueError(f'activation must be one of {[*ACTIVATIONS]}, got {described(name)}')
    return ACTIVATIONS[name]()


def _activation_name(activation: Any) -> str | None:
    """The name of an activation that is given by name or as a module with its default settings."""
    if activation is None or activation in ACTIVATIONS:
        return activation
    for name, kind in ACTIVATIONS.items():
        if type(activation) is kind and repr(activation) == repr(kind()):
            return name
    raise ValueError(f'activation must be one of {[*ACTIVATIONS]} or such a module, got {described(activation)}')
