"""The sizes of a memory, and whether the tensors that a user gives fit them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map

from titans_pytorch.memory.fast_weights import FastWeights
from titans_pytorch.memory.state import NeuralMemState, OpenState, PendingSegment, outside_inference
from titans_pytorch.utils.checks import (
    check_floating,
    check_multiple,
    check_not_negative,
    check_shape,
    check_tensor,
    checked_mask,
    checked_state,
    described,
)
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Bool, Float


class Call(NamedTuple):
    """The inputs of one call, checked and in one layout."""

    queries: Float[Tensor, 'b n d']
    store: Float[Tensor, 'b n d'] | Float[Tensor, 'v b n d']
    mask: Bool[Tensor, 'b n'] | None
    batch_size: int | None

    def read_only(self) -> Call:
        """This call with nothing to store."""
        return self._replace(store=self.store[..., :0, :], mask=None)

    def pieces(self, length: int) -> Iterator[Call]:
        """This call as several, of so many tokens each."""
        total = self.queries.shape[1]
        if self.store.shape[-2] not in (0, total):
            raise ValueError(
                f'checkpoint_every needs a store_seq as long as seq, {total} tokens, got {self.store.shape[-2]}'
            )
        for start in range(0, max(total, 1), length):
            span = slice(start, start + length)
            mask = None if self.mask is None else self.mask[:, span]
            yield Call(self.queries[:, span], self.store[..., span, :], mask, self.batch_size)


class MemoryLayout(NamedTuple):
    """Sizes of a memory. Every method raises a ValueError or TypeError where something does not fit."""

    dim: int
    heads: int
    chunk_size: int
    momentum_orders: int
    """0 without momentum."""
    different_views: bool
    """Whether queries, keys and values come from inputs of their own."""
    conv_reach: int
    """Tokens before a token that a convolution sees; 0 without one."""
    dtype: torch.dtype
    """Of the parameters, and so of the inputs."""
    parameters: Mapping[str, tuple[int, ...]]
    """Shape of each parameter of the memory network, without heads."""

    def call(
        self, seq: Any, store_seq: Any, store_mask: Any, ttt_batch_size: int | None, batch_size: int | None
    ) -> Call:
        """The arguments of a call, a single token given its length axis, queries and what to store told apart."""
        seq = self._with_length('seq', seq)
        if self.different_views:
            views = 3 if store_seq is None else max(1, seq.shape[0])
            check_shape('seq', seq, views=views, batch=None, length=None, dim=self.dim)
            queries, store = seq[0], seq[1:]
        else:
            check_shape('seq', seq, batch=None, length=None, dim=self.dim)
            queries, store = seq, seq

        if store_seq is not None:
            store = self._with_length('store_seq', store_seq)
            self.check_store('store_seq', store, queries.shape[0])
        mask = self.checked_mask('store_mask', store_mask, store)
        if ttt_batch_size is not None:
            batch_size = check_multiple('ttt_batch_size', ttt_batch_size, 'chunk_size', self.chunk_size)
        return Call(queries, store, mask, batch_size)

    def check_rows(self, name: str, seq: Any) -> None:
        """Of (batch, length, dim)."""
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
        """`state` to go on from at `seq`; what it leaves out is made by the two functions, from the batch size.

        `names` are those under which a user gave its parts.
        """
        batch = seq.shape[0]
        of_index, of_weights, of_states = names
        state = checked_state('state', state, NeuralMemState)
        (seq_index,) = check_not_negative(**{of_index: state.seq_index})
        if seq_index % self.chunk_size:
            raise ValueError(
                f'state must come from a memory of chunk_size={self.chunk_size}: '
                f'its seq_index must be a multiple of it, got {seq_index}'
            )
        base = init_weights(batch) if state.weights is None else state.weights
        self._check_weights(of_weights, base, (batch * self.heads,))
        last, momentum = base, None
        if state.states is not None:
            if not isinstance(state.states, (tuple, list)) or len(state.states) != 2:
                raise TypeError(f'{of_states} must be a pair of weights and momentum, got {described(state.states)}')
            last, momentum = state.states
            self._check_weights(f'{of_states}[0]', last, (batch * self.heads,))
        if momentum is None or not self.momentum_orders:
            momentum = init_momentum(batch)
        else:
            self._check_weights(f'{of_states}[1]', momentum, (self.momentum_orders, batch * self.heads))
        pending = self._checked_pending(state.cache_store_segment, seq)
        return OpenState(seq_index, _plain(base), _plain(last), _plain(momentum), pending)

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
            if not fits or (part == 'before' and rows.shape[-2] != self.conv_reach):
                raise ValueError(f'{name}.{part} must be that of a memory like this one, got {tuple(rows.shape)}')
        mask, queries, before = (None if t is None else outside_inference(t) for t in (mask, queries, before))
        return PendingSegment(outside_inference(tokens), mask, queries, before)

    def no_pending(self, like: Float[Tensor, 'b n d']) -> PendingSegment:
        tokens = like[:, :0]
        return PendingSegment(torch.stack((tokens, tokens)) if self.different_views else tokens)

    def _check_weights(self, name: str, weights: Mapping[str, Tensor], leading: tuple[int, ...]) -> None:
        """`weights` must be those of this memory's network, each parameter with `leading` sizes in front."""
        expected = {key: (*leading, *shape) for key, shape in self.parameters.items()}
        _check_tensors(name, weights)
        came = {str(key): tuple(t.shape) for key, t in weights.items()}
        # by key, as the compiler cannot compare dictionaries of shapes
        if came.keys() != expected.keys() or any(came[key] != shape for key, shape in expected.items()):
            raise ValueError(f'{name} must hold the weights of this memory, {expected}, got {came}')

    def over_time(self, name: str, weights: Mapping[str, Tensor], batch: int) -> FastWeights:
        """Weights as a user gives them, (bh, n, …), (bh, …) or the initial ones, as weights over time."""
        _check_tensors(name, weights)
        if {*weights.keys()} != {*self.parameters}:
            raise ValueError(f'{name} must hold the parameters {[*self.parameters]}, got {[*weights.keys()]}')

        bh, tensors = batch * self.heads, {}
        if isinstance(weights, FastWeights):
            came = {key: tuple(w.shape) for key, w in weights.end.items()}
            if came != {key: (bh, *shape) for key, shape in self.parameters.items()}:
                raise ValueError(f'{name} must be the weights of a memory like this one, got {came}')
            return tree_map(outside_inference, weights)
        for key, shape in self.parameters.items():
            w = weights[key]
            # the number of axes first: of a dynamic length no size is compared with another axis
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
        """The step of `weights` in force before the first chunk of a call, which completes `num_chunks` from
        `first_chunk` on, counted over all calls.

        Weights of the call itself have a step before each of its chunks and, as `state.updates` does, one after the
        last. Those of the whole sequence begin before chunk 0 and have a step after each chunk, later ones included.
        """
        if weights.num_steps in (num_chunks, num_chunks + 1):
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
    """Any mapping will do, a `TensorDict` among them."""
    if not hasattr(weights, 'items'):
        raise TypeError(f'{name} must map the names of parameters to tensors, got {described(weights)}')
    if not isinstance(weights, FastWeights):  # which would materialise them
        for key, w in weights.items():
            check_floating(f'{name}[{key!r}]', w)


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {str(name): outside_inference(at_least_float32(w)) for name, w in weights.items()}


def check_memory_loss(loss_fn: Callable[[Tensor, Tensor], Any], shape: tuple[int, int]) -> None:
    """A memory's loss function maps predictions and targets, (rows, dim_head), to one loss a row."""
    rows = torch.zeros(shape)
    try:
        losses = loss_fn(rows, rows)
    except Exception as cause:
        raise ValueError(f'store_memory_loss_fn must accept two tensors {shape}, it raised: {cause}') from cause
    if not isinstance(losses, Tensor) or losses.shape != shape[:1]:
        raise ValueError(
            f'store_memory_loss_fn must return one loss a row, {shape[:1]} for two tensors {shape}, '
            f'got {described(losses)}'
        )


def check_memory_model(model: Module, dim_head: int, name: str = 'model') -> None:
    """A memory network keeps the shape of its input, has parameters and has no buffers."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f'{name} must be a module of Python code, got a scripted one: pass the module it was made from')
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if buffers:
        raise ValueError(f'{name} must have no buffers, got {buffers}')
    first = next((p for p in model.parameters() if p.requires_grad), None)
    if first is None:
        raise ValueError(f'{name} must have parameters that are not frozen: they are the memory')

    rows = torch.zeros(3, 2, dim_head, dtype=first.dtype, device=first.device)
    try:
        with torch.no_grad():
            came = model(rows).shape
    except Exception as cause:
        raise ValueError(f'{name} must accept a tensor of shape {tuple(rows.shape)}, it raised: {cause}') from cause
    if came != rows.shape:
        raise ValueError(
            f'{name} must keep the shape of its input, (…, dim_head={dim_head}): '
            f'it gave {tuple(came)} for {tuple(rows.shape)}'
        )
