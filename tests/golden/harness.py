"""Runs a configuration on the `titans_pytorch` that can be imported, the reference's or ours, with the same weights."""

from __future__ import annotations

import inspect
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from golden.configurations import CONFIGURATIONS, Build, Configuration, Random
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn

import titans_pytorch
from titans_pytorch.implicit_mlp_attention import ImplicitMLPAttention
from titans_pytorch.mac_transformer import MemoryAsContextTransformer, SegmentedAttention
from titans_pytorch.nested_attention import NestedAttention

# arguments that some configuration sets to another value than their default, per public function

arguments_set: dict[str, set[str]] = defaultdict(set)

# the public functions by name; constructors by their class

PUBLIC_CLASSES = [
    titans_pytorch.NeuralMemory,
    titans_pytorch.MemoryMLP,
    titans_pytorch.GatedResidualMemoryMLP,
    titans_pytorch.FactorizedMemoryMLP,
    titans_pytorch.MemorySwiGluMLP,
    titans_pytorch.MemoryAttention,
    MemoryAsContextTransformer,
    SegmentedAttention,
    ImplicitMLPAttention,
    NestedAttention,
]
PUBLIC_METHODS = (
    'forward',
    'store_memories',
    'retrieve_memories',
    'init_weights',
    'init_momentum',
    'sample',
)


def public_signatures() -> dict[str, dict[str, str]]:
    """Every argument of every public function, with its default as text."""
    functions = {'mem_state_detach': titans_pytorch.mem_state_detach}
    for cls in PUBLIC_CLASSES:
        functions[cls.__name__] = cls
        own = [name for name in PUBLIC_METHODS if getattr(cls, name, None) is not getattr(nn.Module, name, None)]
        functions |= {f'{cls.__name__}.{name}': getattr(cls, name) for name in own}

    return {
        name: {
            argument.name: 'required' if argument.default is argument.empty else plain(argument.default)
            for argument in inspect.signature(function).parameters.values()
            if argument.name != 'self'
        }
        for name, function in functions.items()
    }


def plain(value: Any) -> str:
    """A default as text that is the same in every run: functions and modules by their kind alone."""
    if isinstance(value, nn.Module):
        return type(value).__name__
    return 'function' if callable(value) else repr(value)


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call, and note which arguments were set."""
    owner = getattr(function, '__self__', None)
    name = function.__name__ if owner is None else f'{type(owner).__name__}.{function.__name__}'

    signature = inspect.signature(function)

    for argument, value in signature.bind(*args, **kwargs).arguments.items():
        default = signature.parameters[argument].default
        is_default = value is default or (isinstance(value, (bool, int, float, str)) and value == default)

        if not is_default:
            arguments_set[name].add(argument)

    return function(*args, **kwargs)


class Run:
    """One run of one configuration: its random numbers, the weights it sets, and all that it yields by name."""

    def __init__(self, name: str, configuration: Configuration):
        self.configuration = configuration
        self.seed = zlib.crc32(name.encode())
        self.rng = np.random.default_rng(self.seed)
        self.values: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}  # everything to take gradients by
        self.objective: list[Tensor] = []

    # inputs

    def random(self, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return torch.from_numpy(np.asarray(self.rng.standard_normal(shape) * scale))

    def input(self, name: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        tensor = self.random(shape, scale).requires_grad_()
        self.leaves[f'input {name}'] = tensor
        return tensor

    def token_ids(self, shape: tuple[int, ...], num_tokens: int) -> Tensor:
        return torch.from_numpy(self.rng.integers(0, num_tokens, shape))

    def resolve(self, name: str, value: Any) -> Any:
        """Argument values as the function wants them."""
        if isinstance(value, Random):
            return self.input(name, *value)
        if isinstance(value, Build):
            cls = getattr(titans_pytorch, value.what) if isinstance(value.what, str) else value.what
            return call(cls, **value.arguments)
        if type(value) is tuple:
            return tuple(self.resolve(f'{name}.{index}', item) for index, item in enumerate(value))
        return value

    def arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: self.resolve(name, value) for name, value in arguments.items()}

    # modules

    def construct(self, init: dict[str, Any]) -> nn.Module:
        cls = CLASSES.get(self.configuration.kind)
        if cls is None:
            init = dict(init)
            cls = getattr(titans_pytorch, init.pop('what'))
        return call(cls, **self.arguments(init))

    def build(self, init: dict[str, Any], prefix: str = '') -> nn.Module:
        """Construct, in float64, with weights that depend on nothing but their names and shapes."""
        module = self.construct(init).double()

        for part in module.modules():
            if isinstance(part, RotaryEmbedding):
                part.cache_if_possible = False  # its cache is of float32 angles

        for name, parameter in trained_parameters(module).items():
            if not name.startswith(self.configuration.keep or '-'):
                rng = np.random.default_rng([self.seed, zlib.crc32(f'{prefix}{name}'.encode())])
                set_parameter(name, parameter, rng)

            self.leaves[f'{prefix}{name}'] = parameter

        return module

    # results

    def note(self, name: str, value: Any) -> None:
        if isinstance(value, Mapping) or hasattr(value, 'items'):
            for key, item in value.items():
                self.note(f'{name} {key}', item)
        elif isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                self.note(f'{name} {index}', item)
        elif value is not None:
            self.values[name] = torch.as_tensor(value)

    def weigh(self, tensor: Tensor, scale: float = 1.0) -> None:
        """Have the objective depend on `tensor`, each of its elements with a random weight."""
        if tensor.requires_grad:
            self.objective.append((tensor * self.random(tensor.shape, scale)).sum())

    def output(self, name: str, tensor: Tensor) -> None:
        self.note(name, tensor)
        self.weigh(tensor)

    def weights_output(self, name: str, weights: Mapping[str, Tensor]) -> None:
        self.note(name, weights)
        for key in sorted(weights.keys()):
            self.weigh(weights[key], 0.1)

    def state(self, name: str, state: Any) -> None:
        seq_index, weights, pending, (last_weights, momentum), updates = state

        self.note(f'{name} seq_index', seq_index)
        self.note(f'{name} weights', weights)
        self.note(f'{name} cache_store_segment', getattr(pending, 'tokens', pending))
        self.weights_output(f'{name} states weights', last_weights)
        self.note(f'{name} states momentum', momentum)
        self.note(f'{name} updates', updates)

    def finish(self) -> dict[str, np.ndarray]:
        if self.objective:
            gradients = torch.autograd.grad(sum(self.objective), list(self.leaves.values()), allow_unused=True)

            for (name, leaf), gradient in zip(self.leaves.items(), gradients):
                gradient = torch.zeros_like(leaf) if gradient is None else gradient
                self.values[f'gradient {name}'] = gradient.reshape(()) if name.endswith(SCALARS) else gradient

        return {name: value.detach().numpy().astype(np.float64) for name, value in self.values.items()}


def trained_parameters(module: nn.Module) -> dict[str, Tensor]:
    """By name. The reference also registers each memory network a second time, untrained, as `memory_model`."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and 'memory_model' not in name.split('.')
    }


# parameters that the reference has without a dimension, and we with one

SCALARS = ('transition_gate', 'h_post_scale')

# how large weights are, by parts of their names: memories stay tame, residual streams differ enough to tell them apart

SCALES = {
    'memory_model_parameters': 0.4,
    'token_emb': 1.0,
    'stream_embed': 1.0,
    'alpha': 1.0,
    'beta': 1.0,
    'pre_branch_scale': 1.0,
    'residual_scale': 1.0,
}


def set_parameter(name: str, parameter: Tensor, rng: np.random.Generator) -> None:
    scale = next((scale for part, scale in SCALES.items() if part in name), 0.2)
    value = rng.standard_normal(parameter.shape) * scale

    if parameter.ndim == 1 and name.split('.')[-1] == 'weight':
        value += 1.0  # the gain of an RMSNorm

    # by `data`: the reference's parameters per head are expanded views, which cannot be written to

    parameter.data = torch.from_numpy(np.asarray(value))


# one class and one function per kind

CLASSES: dict[str, type[nn.Module]] = {
    'memory': titans_pytorch.NeuralMemory,
    'parts': titans_pytorch.NeuralMemory,
    'attention': SegmentedAttention,
    'implicit': ImplicitMLPAttention,
    'nested': NestedAttention,
    'transformer': MemoryAsContextTransformer,
}


def run_memory(run: Run) -> None:
    configuration, init, shape = run.configuration, run.configuration.init, run.configuration.shape

    memory = run.build(init)
    seq = run.input('seq', shape)
    arguments = run.arguments(configuration.call)

    if init.get('accept_weight_residual'):
        arguments['prev_weights'] = previous_weights(run, memory, seq)

    *_, length, _ = shape
    pieces = (length,) if configuration.pieces is None else configuration.pieces
    pieces = (*pieces, *(1,) * configuration.single_tokens)
    assert sum(pieces) == length

    state = None

    for index, piece in enumerate(seq.split(pieces, dim=-2)):
        if index >= len(pieces) - configuration.single_tokens:
            piece = piece.squeeze(-2)

        if state is not None:
            arguments['state'] = call(titans_pytorch.mem_state_detach, state) if configuration.detach_between else state

        retrieved, state, *surprises = call(memory.forward, piece, **arguments)

        run.output(f'retrieved {index}', retrieved)
        run.note(f'surprises {index}', surprises)

    run.state('state', state)


def previous_weights(run: Run, memory: nn.Module, seq: Tensor) -> Any:
    """Weights over time of another memory that saw the same sequence, or random ones."""
    configuration = run.configuration

    if configuration.previous_memory:
        init = {name: value for name, value in configuration.init.items() if name != 'accept_weight_residual'}
        _, state = run.build(init, prefix='previous ')(seq)
        return state.updates

    num_chunks = configuration.shape[-2] // configuration.init['chunk_size']

    weights = memory.init_weights(configuration.shape[-3])
    return type(weights)(
        {
            name: run.input(f'prev_weights {name}', (weight.shape[0], num_chunks + 1, *weight.shape[1:]), 0.2)
            for name, weight in sorted(weights.items())
        }
    )


def run_parts(run: Run) -> None:
    memory = run.build(run.configuration.init)
    batch = run.configuration.shape[0]

    weights = call(memory.init_weights, batch)
    momentum = call(memory.init_momentum, batch)

    run.note('init_weights', weights)
    run.note('init_momentum', momentum)

    def near(name: str, tensors: Any) -> Any:
        moved = {key: t.detach() + run.input(f'{name} {key}', t.shape, 0.2) for key, t in sorted(tensors.items())}
        return type(tensors)({key: moved[key] for key, _ in tensors.items()})

    seq = run.input('seq', run.configuration.shape)
    arguments = run.arguments(run.configuration.call)

    if memory.to_learned_weight_residual_mix is not None:
        arguments['prev_weights'] = previous_weights(run, memory, seq)

    updates, state, *surprises = call(
        memory.store_memories,
        seq,
        near('weights', weights),
        past_state=(near('past weights', weights), near('past momentum', momentum)),
        seq_index=4,
        **arguments,
    )

    run.weights_output('updates', updates)
    run.state('state', state)
    run.note('surprises', surprises)
    run.output('retrieved', call(memory.retrieve_memories, seq, updates))


def run_model(run: Run) -> None:
    model = run.build(run.configuration.init)
    run.output('output', call(model.forward, run.input('x', run.configuration.shape)))


def run_attention(run: Run) -> None:
    attention = run.build(run.configuration.init)
    seq = run.input('seq', run.configuration.shape)

    output, (values, cache) = call(attention.forward, seq, **run.arguments(run.configuration.call))

    run.output('output', output)
    run.output('value residual', values[..., : seq.shape[-2], :])  # without the reference's padding
    for index, cached in enumerate(cache):
        run.output(f'cache {index}', cached)


def run_experiment(run: Run) -> None:
    attention = run.build(run.configuration.init)

    output, cache = call(attention.forward, run.input('tokens', run.configuration.shape), return_kv_cache=True)

    run.output('output', output)
    run.note('cache', cache)


def run_transformer(run: Run) -> None:
    configuration = run.configuration
    model = run.build(configuration.init)

    ids = run.token_ids(configuration.shape, configuration.init['num_tokens'])
    arguments = run.arguments(configuration.call)

    if configuration.single_tokens:
        run_cached_transformer(run, model, ids)
    else:
        output = call(model.forward, ids, **arguments)
        run.note('output', output)
        run.weigh(output, 100.0 if output.ndim == 0 else 1.0)  # a loss, a mean, has small gradients

    if configuration.sample is not None:
        prompt_len = configuration.sample.get('prompt_len', 6)
        arguments = {name: value for name, value in configuration.sample.items() if name != 'prompt_len'}
        run.note('sampled', call(model.sample, ids[:, :prompt_len], **arguments))


def run_cached_transformer(run: Run, model: nn.Module, ids: Tensor) -> None:
    """Logits of a prompt, then of one token at a time."""
    length = ids.shape[-1]
    axial_dims = model.axial_pos_emb.maybe_derive_outer_dim(length, (model.neural_memory_segment_len,))
    factorized_pos_emb = model.axial_pos_emb(axial_dims, return_factorized=True)

    cache = None

    for known in range(length - run.configuration.single_tokens, length + 1):
        logits, cache = call(
            model.forward, ids[:, :known], cache=cache, return_cache=True, factorized_pos_emb=factorized_pos_emb
        )
        run.output(f'logits {known}', logits)


KINDS: dict[str, Callable[[Run], None]] = {
    'memory': run_memory,
    'parts': run_parts,
    'model': run_model,
    'attention': run_attention,
    'implicit': run_experiment,
    'nested': run_experiment,
    'transformer': run_transformer,
}


def run(name: str, configuration: Configuration) -> dict[str, np.ndarray]:
    """All that the configuration yields, by name, in float64."""
    one = Run(name, configuration)

    # hyper-connections asks for float32 whatever comes, and its small gradients then are mostly rounding. Let it have
    # float64, on both sides

    with patch.object(torch.Tensor, 'float', torch.Tensor.double):
        KINDS[configuration.kind](one)
        return one.finish()


def construct(name: str) -> nn.Module:
    """The module of a configuration, as its constructor leaves it."""
    configuration = CONFIGURATIONS[name]
    return Run(name, configuration).construct(configuration.init)


# comparison


def relative_error(ours: np.ndarray, golden: np.ndarray) -> float:
    """Largest difference relative to the largest value, or to 1e-5, below which values may be rounding errors."""
    if ours.shape != golden.shape:
        raise AssertionError(f'shape {ours.shape}, where the reference has {golden.shape}')
    if golden.size == 0:
        return 0.0

    error = np.abs(ours - golden).max() / max(1e-5, np.abs(golden).max())
    return float('inf') if np.isnan(error) else float(error)
