"""Models as data: a configuration that can be stored as JSON, and the model that it describes."""

from __future__ import annotations

import inspect
import json
import operator
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
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.utils.checks import check_bound, check_keywords, described

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

NOT_STORED = ('token_emb',)  # a module of the caller's own


def model_config(architecture: str, **arguments: Any) -> dict[str, Any]:
    """The configuration of a model, as a dict of JSON values that `build_model` accepts.

        config = model_config('mag', num_tokens=256, segment_len=64, **preset('170M'))
        model = build_model(json.loads(json.dumps(config)))

    Args:
        architecture: a key of `ARCHITECTURES`.
        arguments: arguments of its constructor, with two differences. `neural_memory_model` is a dict with a class name
            under `'type'` and the arguments of that class: `{'type': 'MemoryMLP', 'dim': 64, 'depth': 2}`. The
            activation in `neural_memory_kwargs` is a key of `ACTIVATIONS`, or one of their modules with its default
            settings.

    Raises:
        ValueError, TypeError: for an unknown architecture, argument or network, and for a value that JSON cannot hold.
    """
    _check_arguments(architecture, arguments)
    if 'neural_memory_kwargs' in arguments:
        arguments['neural_memory_kwargs'] = memory_config(**arguments['neural_memory_kwargs'])
    _check_network('neural_memory_model', arguments.get('neural_memory_model'))
    return _as_json({'architecture': architecture, **arguments})


def build_model(config: Mapping[str, Any]) -> Transformer:
    """Build a new model from its configuration, initialised as by its constructor.

    Raises:
        ValueError, TypeError: as for `model_config`, and as for the constructor.
    """
    check_keywords(config=config)
    arguments = {**config}
    architecture = arguments.pop('architecture', None)
    _check_arguments(architecture, arguments)
    memory_kwargs = memory_arguments(arguments.pop('neural_memory_kwargs', {}))
    network = _network('neural_memory_model', arguments.pop('neural_memory_model', None))
    arguments |= {'neural_memory_model': network, 'neural_memory_kwargs': memory_kwargs}
    check_bound('config', ARCHITECTURES[architecture], arguments)
    return ARCHITECTURES[architecture](**arguments)


def memory_config(**arguments: Any) -> dict[str, Any]:
    """Arguments of `NeuralMemory` as a dict of JSON values, which `memory_arguments` turns back into arguments.

    `activation` is given as for `model_config`, and `model` as `neural_memory_model` is there.

    Raises:
        ValueError, TypeError: for an unknown argument, activation or network, and for a value that JSON cannot hold.
    """
    _check_names(NeuralMemory, arguments)
    if 'activation' in arguments:
        arguments['activation'] = _activation_name(arguments['activation'])
    _check_network('model', arguments.get('model'))
    return _as_json(arguments)


def memory_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `NeuralMemory` from their JSON values, with a new activation and a new memory network."""
    arguments = {**config}
    if (activation := arguments.get('activation')) is not None:
        arguments['activation'] = ACTIVATIONS[_activation_name(activation)]()
    if (network := arguments.get('model')) is not None:
        arguments['model'] = _network('model', network)
    return arguments


def _check_arguments(architecture: Any, arguments: Mapping[str, Any]) -> None:
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(f'architecture must be one of {[*ARCHITECTURES]}, got {described(architecture)}')
    constructor = ARCHITECTURES[architecture]
    _check_names(constructor, arguments, NOT_STORED)
    check_keywords(neural_memory_kwargs=arguments.get('neural_memory_kwargs', {}))


def _check_names(constructor: type, arguments: Mapping[str, Any], left_out: tuple[str, ...] = ()) -> None:
    """Check that all `arguments` are those of a constructor, and none is in `left_out`, which JSON cannot hold."""
    accepted = inspect.signature(constructor).parameters.keys() - {*left_out}
    if unknown := arguments.keys() - accepted:
        but_none = f', but none of {sorted(left_out)}, which JSON cannot hold' if left_out else ''
        came = ', '.join(sorted(map(str, unknown)))
        raise TypeError(f'config must hold arguments of {constructor.__name__}{but_none}; got {came}')


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    stored = {}
    for name, value in config.items():
        try:
            # NumPy's integers count as integers, as they do in the constructors
            stored[name] = json.loads(json.dumps(value, allow_nan=False, default=operator.index))
        except (TypeError, ValueError):
            raise TypeError(f'{name} must be a value that JSON can hold, got {described(value)}') from None
    return stored


def _check_network(argument: str, description: Any) -> None:
    with torch.device('meta'):  # draws no random numbers
        _network(argument, description)


def _network(argument: str, description: Any) -> nn.Module | None:
    if description is None:
        return None
    check_keywords(**{argument: description})
    arguments = {**description}
    name = arguments.pop('type', None)
    if name not in [*MEMORY_NETWORKS]:
        raise ValueError(f"{argument}['type'] must be one of {[*MEMORY_NETWORKS]}, got {described(name)}")
    check_bound(argument, MEMORY_NETWORKS[name], arguments)
    return MEMORY_NETWORKS[name](**arguments)


def _activation_name(activation: Any) -> Any:
    """The name of an activation given by name, or as a module with its default settings; `None` for none."""
    if activation is None or activation in [*ACTIVATIONS]:
        return activation
    for name, kind in ACTIVATIONS.items():
        if type(activation) is kind and repr(activation) == repr(kind()):
            return name
    raise ValueError(f'activation must be one of {[*ACTIVATIONS]} or such a module, got {described(activation)}')
