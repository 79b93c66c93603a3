"""Checks of everything that users pass to a memory: constructor arguments, inputs, states and weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor
from torch.func import vmap
from torch.nn import Module
from torch.utils._pytree import tree_map

from titans_pytorch.memory.fast_weights import FastWeights, MemoryWeights
from titans_pytorch.memory.packing import PackedDocuments
from titans_pytorch.memory.reference import default_loss_fn
from titans_pytorch.memory.state import NeuralMemState, OpenState, PendingSegment
from titans_pytorch.utils.checks import (
    check_biases,
    check_callable,
    check_flags,
    check_floating,
    check_integer,
    check_keywords,
    check_module,
    check_multiple,
    check_not_negative,
    check_number,
    check_origin,
    check_positive,
    check_shape,
    check_tensor,
    checked_carried,
    checked_mask,
    checked_state,
    defaults_of,
    described,
    first_line,
    flags_among,
)
from titans_pytorch.utils.functional import is_traced, keeping_random_state, on_cpu, outside_inference, replaced
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Bool, Float


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
    """The arguments of a constructor of `NeuralMemory`, by name.

    Raises:
        ValueError, TypeError: for an argument that is of the wrong kind or contradicts another.
    """

    def optional(name: str, check: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        value = arguments[name]
        return None if value is None else check(name, value, *args, **kwargs)

    dim = arguments['dim']
    sizes = {name: arguments[name] for name in ('dim', 'dim_head', 'heads', 'num_kv_per_token', 'momentum_order')}
    sizes['dim_head'] = dim if sizes['dim_head'] is None else sizes['dim_head']
    dim, dim_head, heads, num_kv_per_token, momentum_order = check_positive(**sizes)
    retrieve_chunk_size, store_chunk_size = _checked_chunk_sizes(arguments['chunk_size'])
    batch_size = optional('batch_size', check_multiple, 'chunk_size', store_chunk_size)

    check_flags(**flags_among(arguments, constructor))
    check_module(model=arguments['model'], activation=arguments['activation'])
    check_callable(store_memory_loss_fn=arguments['store_memory_loss_fn'])
    if arguments['adaptive_step_transform'] is not None:
        check_callable(adaptive_step_transform=arguments['adaptive_step_transform'])
        _check_step_transform(arguments['adaptive_step_transform'], heads)
    check_keywords(default_model_kwargs=arguments['default_model_kwargs'])
    max_step_size = check_number(
        'default_step_transform_max_lr', arguments['default_step_transform_max_lr'], at_least=0
    )
    max_modulation = check_number('max_mem_layer_modulation', arguments['max_mem_layer_modulation'], above=0)
    max_grad_norm = optional('max_grad_norm', check_number, above=0)
    check_biases(**{name: arguments[name] for name in ('init_adaptive_step_bias', 'init_momentum_bias')})
    if arguments['init_decay_bias'] != -math.inf:  # a memory that never forgets
        check_biases(init_decay_bias=arguments['init_decay_bias'])
    settings = Settings(
        dim=dim,
        dim_head=dim_head,
        heads=heads,
        num_kv_per_token=num_kv_per_token,
        momentum_order=momentum_order,
        retrieve_chunk_size=retrieve_chunk_size,
        store_chunk_size=store_chunk_size,
        batch_size=batch_size,
        max_step_size=max_step_size,
        max_modulation=max_modulation,
        max_grad_norm=max_grad_norm,
        conv_kernel=optional('conv_kernel', check_integer, 1),
        checkpoint_every=optional('checkpoint_every', check_integer, 1),
    )
    _check_combinations(settings, arguments)
    _warn_of_unused(arguments, defaults_of(constructor))
    if (activation := arguments['activation']) is not None:
        for features in {dim_head * heads, dim_head * heads * num_kv_per_token}:
            _check_activation(activation, features)
    return settings


def _check_activation(activation: Module, features: int) -> None:
    """Tries a copy on random numbers: it must keep the shape, and treat tokens separately, or results would depend on
    how a sequence is split."""
    if any(t.is_meta for t in (*activation.parameters(), *activation.buffers())):
        return
    with on_cpu(), torch.no_grad():
        x = torch.randn(2, 3, features, generator=torch.Generator().manual_seed(0))
        copy = deepcopy(activation).to('cpu', x.dtype).eval()  # dropout would hide the rest
        try:
            out = copy(x.clone())
            mixes = out.shape == x.shape and _mixes_tokens(copy, x)
        except Exception as cause:
            raise ValueError(f'activation must take {tuple(x.shape)}, but fails: {first_line(cause)}') from cause
    if out.shape != x.shape:
        raise ValueError(f'activation must keep the shape {tuple(x.shape)}, but returned {tuple(out.shape)}')
    if mixes:
        raise ValueError('activation must treat tokens separately, but its result for a token depends on other ones')


def _check_step_transform(transform: Callable[[Tensor], Any], heads: int) -> None:
    """Tries it on random numbers, if it works on a CPU: each step size must depend on its own logit alone."""
    with on_cpu(), torch.no_grad():
        logits = torch.randn(2 * heads, 6, generator=torch.Generator().manual_seed(0))
        own = deepcopy(transform).to('cpu').eval() if isinstance(transform, Module) else transform
        try:
            mixes = _mixes_tokens(own, logits)
        except Exception:
            return  # of its results, every call checks the shape
    if mixes:
        raise ValueError(
            'adaptive_step_transform must treat tokens separately, but its result for a token depends on other ones'
        )


def _mixes_tokens(function: Callable[[Tensor], Any], x: Float[Tensor, 'b n ...']) -> bool:
    """True if the result for a token depends on other tokens; false for random results, which cannot be compared."""
    out, again, *parts = (function(own.clone()) for own in (x, x, x[:, :2], x[:, 2:]))
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
    """Warn of arguments that others leave without effect. They are no errors, as the reference accepts them."""
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
    """Whatever changes a step afterwards, or adds up more of them than are known, could make it overshoot."""
    needs = 'proximal_steps needs'
    if settings.batch_size is None:
        # without one the steps of a whole sequence are added up
        raise ValueError(f'{needs} batch_size, or in a model neural_memory_batch_size')
    if arguments['store_memory_loss_fn'] is not default_loss_fn:
        raise ValueError(f'{needs} the default store_memory_loss_fn, the mean squared error')
    if settings.max_grad_norm is not None:
        raise ValueError(f'{needs} max_grad_norm=None, which would change the size of a step again')
    if settings.max_modulation > 1:
        raise ValueError(f'{needs} max_mem_layer_modulation of at most 1, got {settings.max_modulation}')


def _check_lookahead(settings: Settings, arguments: Mapping[str, Any]) -> None:
    """Refuse options with which momentum does not hand on all that it holds, or its weights are taken back."""
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
    """The chunk sizes for retrieving and storing, from one for both or from a pair."""
    pair = [*chunk_size] if isinstance(chunk_size, (tuple, list)) else [chunk_size] * 2
    if len(pair) != 2:
        raise ValueError(f'chunk_size must be an integer or a pair (retrieve, store), got {described(chunk_size)}')
    retrieve, store = (check_integer('chunk_size', size, 1) for size in pair)
    return retrieve, store


class Call(NamedTuple):
    """Inputs of one call, checked and in one layout."""

    queries: Float[Tensor, 'b n d']
    to_store: Float[Tensor, 'b n d'] | Float[Tensor, 'v b n d']
    mask: Bool[Tensor, 'b n'] | None
    batch_size: int | None
    stores: bool = True
    """False if the memory is only read; `to_store` is then empty."""
    resets: Bool[Tensor, 'b c'] | None = None
    """`PackedDocuments.resets`"""

    def of_documents(self, documents: PackedDocuments) -> Call:
        """This call with zeros for the padding of `documents`, as before a first token."""
        queries, to_store = (t.masked_fill(~documents.real.unsqueeze(-1), 0.0) for t in (self.queries, self.to_store))
        return replaced(self, queries=queries, to_store=to_store, resets=documents.resets)

    def read_only(self) -> Call:
        """This call with nothing to store."""
        return replaced(self, to_store=self.to_store[..., :0, :], mask=None, stores=False)

    def pieces(self, length: int) -> Iterator[Call]:
        """This call as several calls of `length` tokens each."""
        for start in range(0, max(self.queries.shape[1], 1), length):
            span = slice(start, start + length)
            mask = None if self.mask is None else self.mask[:, span]
            yield replaced(self, queries=self.queries[:, span], to_store=self.to_store[..., span, :], mask=mask)


class MemoryLayout(NamedTuple):
    """Sizes of a memory. Methods check tensors against them and raise a ValueError or TypeError if they do not fit."""

    dim: int
    heads: int
    chunk_size: int
    momentum_orders: int
    """0 without momentum."""
    different_views: bool
    """True if queries, keys and values have inputs of their own."""
    conv_context: int
    """Tokens before a token that a convolution sees; 0 without convolutions."""
    dtype: torch.dtype
    """Precision of the parameters, and so of the inputs."""
    parameters: Mapping[str, tuple[int, ...]]
    """Shape of each parameter of the memory network, without heads."""

    def call(
        self, seq: Any, store_seq: Any, store_mask: Any, ttt_batch_size: int | None, batch_size: int | None
    ) -> Call:
        """The arguments of a call as a `Call`; a single token gets its length axis."""
        seq = self._with_length('seq', seq)
        if self.different_views:
            # beside `store_seq` the queries suffice
            views = 1 if store_seq is not None and seq.shape[:1] == (1,) else 3
            check_shape('seq', seq, views=views, batch=None, length=None, dim=self.dim)
            queries, to_store = seq[0], seq[1:]
        else:
            check_shape('seq', seq, batch=None, length=None, dim=self.dim)
            queries, to_store = seq, seq

        if store_seq is not None:
            to_store = self._with_length('store_seq', store_seq)
            self.check_store('store_seq', to_store, queries.shape[0])
            if to_store.shape[-2] != queries.shape[1]:
                raise ValueError(
                    f'store_seq must have a token for each of the {queries.shape[1]} tokens of seq, which read the '
                    f'chunks that are complete by then, got {to_store.shape[-2]}; to ask about a sequence after all of '
                    f'it is stored, pass the questions in a further call with store=False'
                )
        mask = self.checked_mask('store_mask', store_mask, to_store)
        if ttt_batch_size is not None:
            batch_size = check_multiple('ttt_batch_size', ttt_batch_size, 'chunk_size', self.chunk_size)
        return Call(queries, to_store, mask, batch_size)

    def check_rows(self, name: str, seq: Any) -> None:
        """Check a sequence (batch, length, dim)."""
        check_floating(name, seq, self.dtype)
        check_shape(name, seq, batch=None, length=None, dim=self.dim)

    def _with_length(self, name: str, seq: Any) -> Tensor:
        check_floating(name, seq, self.dtype)
        return seq.unsqueeze(-2) if seq.ndim == (3 if self.different_views else 2) else seq

    def check_store(self, name: str, store: Any, batch: int | None = None) -> None:
        check_floating(name, store, self.dtype)
        views = {'views': 2} if self.different_views else {}
        check_shape(name, store, **views, batch=batch, length=None, dim=self.dim)

    def checked_mask(self, name: str, mask: Any, store: Tensor) -> Bool[Tensor, 'b n'] | None:
        return None if mask is None else checked_mask(name, mask, store.shape[-3], store.shape[-2])

    def opened(
        self,
        state: Any,
        seq: Float[Tensor, 'b n d'],
        init_weights: Callable[[int], Mapping[str, Tensor]],
        init_momentum: Callable[[int], Mapping[str, Tensor]],
        names: tuple[str, str, str] = ('state.seq_index', 'state.weights', 'state.states'),
    ) -> OpenState:
        """`state` with missing parts filled in, to continue from at `seq`; the two functions create initial weights and
        momentum for a batch size.

        `names`: the names under which the user passed `seq_index`, `weights` and `states`, for error messages.
        """
        batch = seq.shape[0]
        index_name, weights_name, states_name = names
        state = checked_state('state', state, NeuralMemState)
        (seq_index,) = check_not_negative(**{index_name: state.seq_index})
        if seq_index % self.chunk_size:
            raise ValueError(
                f'{index_name} must be a multiple of chunk_size={self.chunk_size}, as in states of such a memory, '
                f'got {seq_index}'
            )
        base = init_weights(batch) if state.weights is None else state.weights
        self._check_weights(weights_name, base, (batch * self.heads,), seq.device)
        newest, momentum = base, None
        if state.states is not None:
            if not isinstance(state.states, (tuple, list)) or len(state.states) != 2:
                raise TypeError(f'{states_name} must be a pair of weights and momentum, got {described(state.states)}')
            newest, momentum = state.states
            self._check_weights(f'{states_name}[0]', newest, (batch * self.heads,), seq.device)
        if momentum is None:
            momentum = init_momentum(batch)
        elif not self.momentum_orders:
            _check_zero(f'{states_name}[1]', momentum)
            momentum = init_momentum(batch)
        else:
            self._check_weights(f'{states_name}[1]', momentum, (self.momentum_orders, batch * self.heads), seq.device)
        pending = self._checked_pending(state.cache_store_segment, seq)
        weights = MemoryWeights(_plain(base), _plain(newest), _plain(momentum))
        return OpenState(seq_index, weights, pending, at_rest=state.states is None)

    def _checked_pending(self, pending: Any, seq: Float[Tensor, 'b n d']) -> PendingSegment:
        """The open chunk of a state."""
        name, batch = 'state.cache_store_segment', seq.shape[0]
        if pending is None:
            return self.no_pending(seq)
        if isinstance(pending, Tensor):
            pending = PendingSegment(pending)
        tokens, mask, queries, before = checked_state(name, pending, PendingSegment)

        check_floating(name, tokens)
        stored = (2, batch) if self.different_views else (batch,)
        if tokens.shape[:-2] != stored or tokens.shape[-1] != self.dim or tokens.shape[-2] >= self.chunk_size:
            raise ValueError(
                f'{name} must be ({"views=2, " if self.different_views else ""}batch={batch}, '
                f'fewer than chunk_size={self.chunk_size}, dim={self.dim}), got {tuple(tokens.shape)}'
            )
        if mask is not None:
            check_tensor(f'{name}.mask', mask)
            if mask.dtype != torch.bool or mask.shape != (batch, tokens.shape[-2]):
                raise ValueError(f'{name}.mask must be booleans, one for each token, got {described(mask)}')
        for part, rows, leading in (('queries', queries, (batch,)), ('before', before, stored)):
            if rows is None:
                continue
            check_floating(f'{name}.{part}', rows)
            fits = rows.shape[:-2] == leading and rows.shape[-1] == self.dim
            if not fits or (part == 'before' and rows.shape[-2] != self.conv_context):
                raise ValueError(
                    f'{name}.{part} must come from a memory with the same settings, got {tuple(rows.shape)}'
                )
        carried = partial(checked_carried, dtype=self.dtype, device=seq.device)
        return PendingSegment(
            tokens=carried(name, tokens),
            mask=None if mask is None else outside_inference(mask),
            queries=None if queries is None else carried(f'{name}.queries', queries),
            before=None if before is None else carried(f'{name}.before', before),
        )

    def no_pending(self, like: Float[Tensor, 'b n d']) -> PendingSegment:
        tokens = like[:, :0]
        return PendingSegment(torch.stack((tokens, tokens)) if self.different_views else tokens)

    def _check_weights(
        self, name: str, weights: Mapping[str, Tensor], leading: tuple[int, ...], device: torch.device
    ) -> None:
        """Check that `weights` belong to this memory's network, each parameter with the axes `leading` in front."""
        expected = {key: (*leading, *shape) for key, shape in self.parameters.items()}
        _check_tensors(name, weights)
        came = {str(key): tuple(t.shape) for key, t in weights.items()}
        # key by key: the compiler cannot compare dictionaries of shapes
        if came.keys() != expected.keys() or any(came[key] != shape for key, shape in expected.items()):
            *orders, of_batch = leading
            rows = next(iter(came.values()), ())[len(orders) : len(leading)]
            if came == {key: (*orders, *rows, *shape) for key, shape in self.parameters.items()}:
                batch, other = of_batch // self.heads, rows[0] // self.heads
                raise ValueError(
                    f'{name} must be of a batch of {batch}, as the sequence is, got one of {other}: '
                    'see NeuralMemState.select'
                )
            raise ValueError(f'{name} must hold the weights of this memory, {expected}, got {came}')
        for key, t in weights.items():
            check_origin(f'{name}[{key!r}]', t, self.dtype, device)

    def over_time(self, name: str, weights: Mapping[str, Tensor], batch: int, device: torch.device) -> FastWeights:
        """Weights passed by a user, (bh, n, …), (bh, …) or without these axes, as weights over time."""
        _check_tensors(name, weights)
        if {*weights.keys()} != {*self.parameters}:
            raise ValueError(f'{name} must hold the parameters {[*self.parameters]}, got {[*weights.keys()]}')

        for key, w in (weights.final if isinstance(weights, FastWeights) else weights).items():
            check_origin(f'{name}[{key!r}]', w, self.dtype, device)
        bh, tensors = batch * self.heads, {}
        if isinstance(weights, FastWeights):
            came = {key: tuple(w.shape) for key, w in weights.final.items()}
            if came != {key: (bh, *shape) for key, shape in self.parameters.items()}:
                raise ValueError(f'{name} must be the weights of a memory like this one, got {came}')
            return tree_map(outside_inference, weights)
        for key, shape in self.parameters.items():
            w = weights[key]
            # the number of axes first, so that a dynamic length is not compared with the size of another axis
            if w.ndim == len(shape) and tuple(w.shape) == shape:
                w = w.expand(bh, *shape)
            elif w.ndim == len(shape) + 1 and tuple(w.shape) == (self.heads, *shape):
                w = repeat(w, 'h ... -> (b h) ...', b=batch)
            if w.ndim == len(shape) + 1 and tuple(w.shape) == (bh, *shape):
                w = w.unsqueeze(1)
            if w.ndim != len(shape) + 2 or w.shape[0] != bh or tuple(w.shape[2:]) != shape:
                sizes = ', '.join([f'batch·heads={bh}', 'chunks', *map(str, shape)])
                raise ValueError(f'{name}[{key!r}] must be ({sizes}), got {tuple(w.shape)}')
            tensors[key] = outside_inference(w)
        lengths = [w.shape[1] for w in tensors.values()]
        if any(length != lengths[0] for length in lengths):
            raise ValueError(f'{name} must hold equally many steps of each parameter, got {sorted({*lengths})}')
        return FastWeights.of(tensors)

    @staticmethod
    def first_step(name: str, weights: FastWeights, first_chunk: int, num_chunks: int) -> int:
        """The step of `weights` before the first chunk of a call.

        The call completes `num_chunks` chunks, of which the first has number `first_chunk` over all calls. Weights over
        the call have a step before each of its chunks and, like `state.updates`, one after the last. Weights over the
        whole sequence begin before chunk 0 and may extend beyond this call.
        """
        if num_chunks <= weights.num_steps <= num_chunks + 1:
            return 0
        end = first_chunk + num_chunks
        if weights.num_steps > end:
            return first_chunk
        raise ValueError(
            f'{name} must hold weights for each of the {num_chunks} chunks that this call completes '
            f'({num_chunks + 1} steps), or for all {end} chunks up to its end (at least {end + 1} steps), '
            f'got {weights.num_steps}'
        )


def _check_tensors(name: str, weights: Any) -> None:
    """Check that `weights` map names to tensors; a `TensorDict` does."""
    if not hasattr(weights, 'items'):
        raise TypeError(f'{name} must map the names of parameters to tensors, got {described(weights)}')
    if not isinstance(weights, FastWeights):  # whose items would be formed
        for key, w in weights.items():
            check_floating(f'{name}[{key!r}]', w)


def _check_zero(name: str, momentum: Any) -> None:
    """Refuse momentum for a memory that has none and would drop it; states of the reference hold zeros there."""
    _check_tensors(name, momentum)
    # only states of the reference have any, and so read values here that may be on a GPU
    if any(t.any() for t in momentum.values() if not (t.is_meta or is_traced())):
        raise ValueError(f'{name} must hold no momentum, or zeros, as this memory has none')


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {str(name): outside_inference(at_least_float32(w)) for name, w in weights.items()}


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
    if any('_orig_mod' in module._modules for module in model.modules()):  # as `torch.compile` wraps a module
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
