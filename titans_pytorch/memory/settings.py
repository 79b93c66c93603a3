"""The constructor arguments of a memory: checked, and converted to Python's own numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import Module

from titans_pytorch.memory.reference import default_loss_fn
from titans_pytorch.utils.checks import (
    check_biases,
    check_callable,
    check_flags,
    check_integer,
    check_keywords,
    check_module,
    check_multiple,
    check_number,
    check_positive,
    defaults_of,
    described,
    first_line,
    flags_among,
)
from titans_pytorch.utils.functional import keeping_random_state, on_cpu
from titans_pytorch.utils.shapes import Float


class Settings(NamedTuple):
    """Constructor arguments of `NeuralMemory`, checked and converted to Python's own numbers."""

    dim: int
    dim_head: int
    heads: int
    num_kv_per_token: int
    momentum_order: int
    retrieve_chunk_size: int
    store_chunk_size: int
    batch_size: int | None
    max_step_size: float
    max_modulation: float
    max_grad_norm: float | None
    conv_kernel: int | None
    checkpoint_every: int | None


def checked_settings(arguments: Mapping[str, Any], constructor: Callable[..., Any]) -> Settings:
    """Check the arguments of `constructor`, which is that of `NeuralMemory`, given by name, and return them as
    settings.

    Raises:
        ValueError, TypeError: for an argument of the wrong kind, or one that contradicts another.
    """

    def optional(name: str, check: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        value = arguments[name]
        return None if value is None else check(name, value, *args, **kwargs)

    def number(name: str, **bounds: float) -> float:
        return check_number(name, arguments[name], **bounds)

    sizes = {name: arguments[name] for name in ('dim', 'dim_head', 'heads', 'num_kv_per_token', 'momentum_order')}
    sizes['dim_head'] = sizes['dim'] if sizes['dim_head'] is None else sizes['dim_head']
    dim, dim_head, heads, num_kv_per_token, momentum_order = check_positive(**sizes)
    retrieve_chunk_size, store_chunk_size = _checked_chunk_sizes(arguments['chunk_size'])
    batch_size = optional('batch_size', check_multiple, 'chunk_size', store_chunk_size)
    _check_kinds(arguments, constructor)
    settings = Settings(
        dim=dim,
        dim_head=dim_head,
        heads=heads,
        num_kv_per_token=num_kv_per_token,
        momentum_order=momentum_order,
        retrieve_chunk_size=retrieve_chunk_size,
        store_chunk_size=store_chunk_size,
        batch_size=batch_size,
        max_step_size=number('default_step_transform_max_lr', at_least=0),
        max_modulation=number('max_mem_layer_modulation', above=0),
        max_grad_norm=optional('max_grad_norm', check_number, above=0),
        conv_kernel=optional('conv_kernel', check_integer, 1),
        checkpoint_every=optional('checkpoint_every', check_integer, 1),
    )
    _check_combinations(settings, arguments)
    _warn_of_unused(arguments, defaults_of(constructor))
    if (transform := arguments['adaptive_step_transform']) is not None:
        _check_step_transform(transform, heads)
    if (activation := arguments['activation']) is not None:
        for features in {dim_head * heads, dim_head * heads * num_kv_per_token}:
            _check_activation(activation, features)
    return settings


def _check_kinds(arguments: Mapping[str, Any], constructor: Callable[..., Any]) -> None:
    """Check the arguments that are not sizes."""
    check_flags(**flags_among(arguments, constructor))
    check_module(model=arguments['model'], activation=arguments['activation'])
    check_callable(store_memory_loss_fn=arguments['store_memory_loss_fn'])
    if arguments['adaptive_step_transform'] is not None:
        check_callable(adaptive_step_transform=arguments['adaptive_step_transform'])
    check_keywords(default_model_kwargs=arguments['default_model_kwargs'])
    biases = ['init_adaptive_step_bias', 'init_momentum_bias']
    if arguments['init_decay_bias'] != -math.inf:  # −inf means a memory that never forgets
        biases.append('init_decay_bias')
    check_biases(**{name: arguments[name] for name in biases})


def _check_activation(activation: Module, features: int) -> None:
    """Try a copy on random numbers: it must keep the shape and treat tokens separately, because results would otherwise
    depend on how a sequence is split."""
    if any(t.is_meta for t in (*activation.parameters(), *activation.buffers())):
        return
    with on_cpu(), torch.no_grad():
        x = torch.randn(2, 3, features, generator=torch.Generator().manual_seed(0))
        copy = deepcopy(activation).to('cpu', x.dtype).eval()  # dropout would hide any difference
        try:
            out = copy(x.clone())
            mixes = out.shape == x.shape and _mixes_tokens(*_of_whole_and_parts(copy, x))
        except Exception as cause:
            raise ValueError(f'activation must take {tuple(x.shape)}, but fails: {first_line(cause)}') from cause
    if out.shape != x.shape:
        raise ValueError(f'activation must keep the shape {tuple(x.shape)}, but returned {tuple(out.shape)}')
    if mixes:
        raise ValueError('activation must treat tokens separately, but its result for a token depends on other ones')


def _check_step_transform(transform: Callable[[Tensor], Any], heads: int) -> None:
    """Try it on random numbers: each step size may depend only on its own logit. Calls check the shape."""
    with on_cpu(), torch.no_grad():
        logits = torch.randn(2 * heads, 6, generator=torch.Generator().manual_seed(0))
        own = deepcopy(transform).to('cpu').eval() if isinstance(transform, Module) else transform
        try:
            results = _of_whole_and_parts(own, logits)
        except Exception:
            return  # this may not be its fault: it may need a GPU, or as many rows as the memory stores
        keeps_shape = all(isinstance(out, Tensor) for out in results) and results[0].shape == logits.shape
        mixes = keeps_shape and _mixes_tokens(*results)
    if mixes:
        raise ValueError(
            'adaptive_step_transform must treat tokens separately, but its result for a token depends on other ones'
        )


def _of_whole_and_parts(function: Callable[[Tensor], Any], x: Float[Tensor, 'b n ...']) -> list[Any]:
    """Results for a sequence, for the same sequence again, and for two parts of it."""
    return [function(own.clone()) for own in (x, x, x[:, :2], x[:, 2:])]


def _mixes_tokens(out: Tensor, again: Tensor, *parts: Tensor) -> bool:
    """True if a token's results depend on other tokens; false for random results, which cannot be compared."""
    return torch.equal(out, again) and not torch.allclose(torch.cat(parts, dim=1), out)


def _check_combinations(settings: Settings, arguments: Mapping[str, Any]) -> None:
    if settings.heads == 1 and settings.dim_head != settings.dim:
        raise ValueError(f'dim_head must equal dim={settings.dim} when heads is 1, got {settings.dim_head}')
    if arguments['attn_pool_chunks'] and settings.store_chunk_size == 1:
        raise ValueError('attn_pool_chunks needs a chunk_size above 1: a chunk of one token has nothing to pool')
    momentum = arguments['momentum']
    if arguments['learned_momentum_combine'] and not (momentum and settings.momentum_order > 1):
        raise ValueError(
            'learned_momentum_combine needs momentum=True and momentum_order of at least 2, '
            f'got momentum={momentum}, momentum_order={settings.momentum_order}'
        )
    if arguments['qk_l2norm'] and arguments['qk_rmsnorm']:
        raise ValueError('qk_l2norm needs qk_rmsnorm=False: they are alternatives')
    if arguments['normalized_momentum'] and not momentum:
        raise ValueError('normalized_momentum needs momentum=True')
    for name in ('proximal_steps', 'normalized_momentum'):
        if arguments[name] and arguments['spectral_norm_surprises']:
            raise ValueError(f'{name} needs spectral_norm_surprises=False, as orthogonal updates have one size')
    if arguments['proximal_steps']:
        _check_proximal(settings, arguments)
    if arguments['lookahead_gradients']:
        _check_lookahead(settings, arguments)
    if settings.checkpoint_every is not None and arguments['accept_weight_residual']:
        raise ValueError('checkpoint_every keeps no weights over time, which accept_weight_residual needs')
    if arguments['init_momentum_bias'] is not None and not momentum:
        raise ValueError('init_momentum_bias needs momentum=True')
    if arguments['store_with_lookahead_value'] and settings.store_chunk_size * settings.num_kv_per_token == 1:
        warnings.warn('store_with_lookahead_value with chunks of a single row stores nothing', stacklevel=4)


def _warn_of_unused(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Warn of arguments that have no effect beside others. They are not errors, because the reference accepts them."""
    unused = {}
    if arguments['adaptive_step_transform'] is not None:
        unused['default_step_transform_max_lr'] = 'adaptive_step_transform'
    if not arguments['momentum']:
        unused['momentum_order'] = 'momentum=False'
    if not arguments['learned_momentum_combine']:
        unused['learned_combine_include_zeroth'] = 'learned_momentum_combine=False'
    for name, other in unused.items():
        if arguments[name] != defaults[name]:
            warnings.warn(f'{name} has no effect with {other}', stacklevel=4)


def _check_proximal(settings: Settings, arguments: Mapping[str, Any]) -> None:
    """Refuse what could make proximal steps overshoot: changing them afterwards, or adding up more than planned."""
    needs = 'proximal_steps needs'
    if settings.batch_size is None:
        # without memory batches, the steps of a whole sequence add up
        raise ValueError(f'{needs} batch_size, or in a model neural_memory_batch_size')
    if arguments['store_memory_loss_fn'] is not default_loss_fn:
        raise ValueError(f'{needs} the default store_memory_loss_fn, the mean squared error')
    if settings.max_grad_norm is not None:
        raise ValueError(f'{needs} max_grad_norm=None, which would change the size of a step again')
    if settings.max_modulation > 1:
        raise ValueError(f'{needs} max_mem_layer_modulation of at most 1, got {settings.max_modulation}')


def _check_lookahead(settings: Settings, arguments: Mapping[str, Any]) -> None:
    """Refuse options under which momentum does not hand on all that it holds, or its effect is taken back."""
    needs = 'lookahead_gradients needs'
    if settings.batch_size is None:
        # all gradients are taken at the initial weights
        raise ValueError(f'{needs} batch_size, or in a model neural_memory_batch_size')
    if not arguments['normalized_momentum']:
        raise ValueError(f'{needs} normalized_momentum=True, whose momentum adds up to one step')
    if arguments['learned_momentum_combine']:
        raise ValueError(f'{needs} learned_momentum_combine=False, so that each order hands on all that it holds')
    if arguments['gated_transition']:
        raise ValueError(f'{needs} gated_transition=False, which takes back part of what momentum has handed on')


def _checked_chunk_sizes(chunk_size: Any) -> tuple[int, int]:
    """The chunk sizes for retrieving and storing, given as one number for both or as a pair."""
    pair = [*chunk_size] if isinstance(chunk_size, (tuple, list)) else [chunk_size] * 2
    if len(pair) != 2:
        raise ValueError(f'chunk_size must be an integer or a pair (retrieve, store), got {described(chunk_size)}')
    retrieve, store = (check_integer('chunk_size', size, 1) for size in pair)
    return retrieve, store


def check_memory_loss(loss_fn: Callable[[Tensor, Tensor], Any], shape: tuple[int, int]) -> None:
    """Check that a memory's loss function maps predictions and targets, (rows, dim_head), to one loss per row."""
    if loss_fn is default_loss_fn:
        return
    parameters = loss_fn.parameters() if isinstance(loss_fn, Module) else ()
    rows = torch.zeros(shape, device=next((p.device for p in parameters), None))
    try:
        losses = loss_fn(rows, rows)
    except Exception as cause:
        message = first_line(cause)
        raise ValueError(f'store_memory_loss_fn must accept two tensors {shape}, it raised: {message}') from cause
    if not isinstance(losses, Tensor) or losses.shape != shape[:1]:
        raise ValueError(
            f'store_memory_loss_fn must return one loss a row, {shape[:1]} for two tensors {shape}, '
            f'got {described(losses)}'
        )
    try:
        vmap(loss_fn, randomness='different')(rows.unsqueeze(0), rows.unsqueeze(0))
    except Exception as cause:
        message = first_line(cause)
        raise ValueError(f'store_memory_loss_fn must work under torch.func.vmap, it raised: {message}') from cause


def check_memory_model(model: Module, dim_head: int, name: str = 'model') -> None:
    """Check that a memory network keeps the shape of its input, has parameters and has no buffers."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f'{name} must be a module of Python code, got a scripted one: pass the module it was made from')
    if any('_orig_mod' in module._modules for module in model.modules()):  # as in modules wrapped by `torch.compile`
        raise TypeError(f'{name} must not be compiled by itself: compile the memory, or the model around it')
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if buffers:
        raise ValueError(f'{name} must have no buffers, got {buffers}')
    first = next((p for p in model.parameters() if p.requires_grad), None)
    if first is None:
        raise ValueError(f'{name} must have parameters that are not frozen: they are the memory')

    rows = torch.zeros(3, 2, dim_head, dtype=first.dtype, device=first.device)
    try:
        with keeping_random_state(first.device), torch.no_grad():
            out = model(rows)
    except Exception as cause:
        message = first_line(cause)
        raise ValueError(f'{name} must accept a tensor of shape {tuple(rows.shape)}, it raised: {message}') from cause
    if not isinstance(out, Tensor):
        raise TypeError(f'{name} must return a tensor, got {described(out)}')
    if out.shape != rows.shape:
        raise ValueError(
            f'{name} must keep the shape of its input, (…, dim_head={dim_head}): '
            f'it gave {tuple(out.shape)} for {tuple(rows.shape)}'
        )
