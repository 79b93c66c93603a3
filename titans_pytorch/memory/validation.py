"""Checks of what a call of a memory receives: inputs, states and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor
from torch.utils._pytree import tree_map

from titans_pytorch.memory.fast_weights import FastWeights, MemoryWeights
from titans_pytorch.memory.packing import PackedDocuments
from titans_pytorch.memory.state import NeuralMemState, OpenState, PendingSegment
from titans_pytorch.utils.checks import (
    check_floating,
    check_multiple,
    check_not_negative,
    check_origin,
    check_shape,
    check_tensor,
    checked_carried,
    checked_mask,
    checked_state,
    described,
)
from titans_pytorch.utils.functional import is_traced, outside_inference, replaced
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Bool, Float


class Call(NamedTuple):
    """Inputs of one call, checked and brought into a single layout."""

    queries: Float[Tensor, 'b n d']
    to_store: Float[Tensor, 'b n d'] | Float[Tensor, 'v b n d']
    mask: Bool[Tensor, 'b n'] | None
    batch_size: int | None
    stores: bool = True
    """False if the memory is only read; `to_store` is then empty."""
    resets: Bool[Tensor, 'b c'] | None = None
    """`PackedDocuments.resets`"""

    def of_documents(self, documents: PackedDocuments) -> Call:
        """This call with zeros in the padding of `documents`, like those before a first token."""
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
    """Sizes of a memory. Methods check tensors against them and raise a ValueError or TypeError for a mismatch."""

    dim: int
    heads: int
    chunk_size: int
    momentum_orders: int
    """0 without momentum."""
    different_views: bool
    """True if queries, keys and values have separate inputs."""
    conv_context: int
    """Number of earlier tokens that a convolution sees; 0 without convolutions."""
    dtype: torch.dtype
    """Precision of the parameters, and so of the inputs."""
    parameters: Mapping[str, tuple[int, ...]]
    """Shape of each parameter of the memory network, without heads."""

    def call(
        self, seq: Any, store_seq: Any, store_mask: Any, ttt_batch_size: int | None, batch_size: int | None
    ) -> Call:
        """The arguments of a call as a `Call`; a single token is given its length axis."""
        seq = self._with_length('seq', seq)
        if self.different_views:
            # with `store_seq`, the view for queries is enough
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
        """`state` with missing parts filled in, from which `seq` continues; the two functions create initial weights
        and momentum for a batch size.

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
            newest, momentum = self._checked_states(states_name, state.states, batch, seq.device)
        momentum = init_momentum(batch) if momentum is None else momentum
        pending = self._checked_pending(state.cache_store_segment, seq)
        weights = MemoryWeights(_plain(base), _plain(newest), _plain(momentum))
        return OpenState(seq_index, weights, pending, at_rest=state.states is None)

    def _checked_states(
        self, name: str, states: Any, batch: int, device: torch.device
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]:
        """The newest weights and the momentum of a state; `None` if it has no momentum."""
        if not isinstance(states, (tuple, list)) or len(states) != 2:
            raise TypeError(f'{name} must be a pair of weights and momentum, got {described(states)}')
        newest, momentum = states
        self._check_weights(f'{name}[0]', newest, (batch * self.heads,), device)
        if momentum is None:
            return newest, None
        if not self.momentum_orders:
            _check_zero(f'{name}[1]', momentum)
            return newest, None
        self._check_weights(f'{name}[1]', momentum, (self.momentum_orders, batch * self.heads), device)
        return newest, momentum

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
        if queries is not None:
            self._check_kept_rows(f'{name}.queries', queries, (batch,), None)
        if before is not None:
            self._check_kept_rows(f'{name}.before', before, stored, self.conv_context)
        carried = partial(checked_carried, dtype=self.dtype, device=seq.device)
        return PendingSegment(
            tokens=carried(name, tokens),
            mask=None if mask is None else outside_inference(mask),
            queries=None if queries is None else carried(f'{name}.queries', queries),
            before=None if before is None else carried(f'{name}.before', before),
        )

    def _check_kept_rows(self, name: str, rows: Any, leading: tuple[int, ...], length: int | None) -> None:
        """Check rows (…, length, dim) of earlier tokens; with `None`, any length will do."""
        check_floating(name, rows)
        fits = rows.shape[:-2] == leading and rows.shape[-1] == self.dim
        if not fits or (length is not None and rows.shape[-2] != length):
            raise ValueError(f'{name} must come from a memory with the same settings, got {tuple(rows.shape)}')

    def no_pending(self, like: Float[Tensor, 'b n d']) -> PendingSegment:
        tokens = like[:, :0]
        return PendingSegment(torch.stack((tokens, tokens)) if self.different_views else tokens)

    def _check_weights(
        self, name: str, weights: Mapping[str, Tensor], leading: tuple[int, ...], device: torch.device
    ) -> None:
        """Check that `weights` fit this memory's network; the axes `leading` come before those of each parameter."""
        expected = {key: (*leading, *shape) for key, shape in self.parameters.items()}
        _check_tensors(name, weights)
        came = {str(key): tuple(t.shape) for key, t in weights.items()}
        # one key at a time, because the compiler cannot compare dictionaries of shapes
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
        """Weights passed by a user, (bh, n, …), (bh, …), (h, …) or (…), as weights over time."""
        _check_tensors(name, weights)
        if {*weights.keys()} != {*self.parameters}:
            raise ValueError(f'{name} must hold the parameters {[*self.parameters]}, got {[*weights.keys()]}')

        for key, w in (weights.final if isinstance(weights, FastWeights) else weights).items():
            check_origin(f'{name}[{key!r}]', w, self.dtype, device)
        if isinstance(weights, FastWeights):
            came = {key: tuple(w.shape) for key, w in weights.final.items()}
            if came != {key: (batch * self.heads, *shape) for key, shape in self.parameters.items()}:
                raise ValueError(f'{name} must be the weights of a memory like this one, got {came}')
            return tree_map(outside_inference, weights)
        tensors = {
            key: outside_inference(self._with_steps(f'{name}[{key!r}]', weights[key], shape, batch))
            for key, shape in self.parameters.items()
        }
        lengths = [w.shape[1] for w in tensors.values()]
        if any(length != lengths[0] for length in lengths):
            raise ValueError(f'{name} must hold equally many steps of each parameter, got {sorted({*lengths})}')
        return FastWeights.of(tensors)

    def _with_steps(self, name: str, w: Tensor, shape: tuple[int, ...], batch: int) -> Float[Tensor, 'bh n ...']:
        """A parameter of this shape, with the axes added that `over_time` allows a user to leave out."""
        bh = batch * self.heads
        # compare the number of axes first, so that a dynamic length is not compared with the size of another axis
        if w.ndim == len(shape) and tuple(w.shape) == shape:
            w = w.expand(bh, *shape)
        elif w.ndim == len(shape) + 1 and tuple(w.shape) == (self.heads, *shape):
            w = repeat(w, 'h ... -> (b h) ...', b=batch)
        if w.ndim == len(shape) + 1 and tuple(w.shape) == (bh, *shape):
            w = w.unsqueeze(1)
        if w.ndim != len(shape) + 2 or w.shape[0] != bh or tuple(w.shape[2:]) != shape:
            sizes = ', '.join([f'batch·heads={bh}', 'chunks', *map(str, shape)])
            raise ValueError(f'{name} must be ({sizes}), got {tuple(w.shape)}')
        return w

    @staticmethod
    def first_step(name: str, weights: FastWeights, first_chunk: int, num_chunks: int) -> int:
        """The step of `weights` before the first chunk of a call.

        The call completes `num_chunks` chunks; the first of them has index `first_chunk` over all calls. Weights over
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
    if not isinstance(weights, FastWeights):  # reading its items would form them
        for key, w in weights.items():
            check_floating(f'{name}[{key!r}]', w)


def _check_zero(name: str, momentum: Any) -> None:
    """Refuse momentum for a memory without momentum, which would drop it; the reference's states hold zeros there."""
    _check_tensors(name, momentum)
    # only the reference's states have any, so only they pay for reading values that may be on a GPU
    if any(t.any() for t in momentum.values() if not (t.is_meta or is_traced())):
        raise ValueError(f'{name} must hold no momentum, or zeros, as this memory has none')


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {str(name): outside_inference(at_least_float32(w)) for name, w in weights.items()}
