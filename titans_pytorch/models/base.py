"""What all models here are made of: an embedding, blocks around a residual stream, logits, and a state over calls.

A model differs from another in how its blocks put their parts together: see `block.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear, Module, ModuleList
from torch.utils.checkpoint import checkpoint

from titans_pytorch.attention.rotary import KeyValues, frequencies
from titans_pytorch.attention.segmented import SegmentedAttention, segmented_flex_attention
from titans_pytorch.generation import sampling
from titans_pytorch.generation.decodable import StepKind
from titans_pytorch.memory.state import NeuralMemState, outside_inference, take_over
from titans_pytorch.models.block import Block, Carried, LayerBuffers, LayerState, Place
from titans_pytorch.models.documents import IGNORED, Documents, checked_documents, continues
from titans_pytorch.models.state import ModelState
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.ops.hyper_connection import ExpandStreams, Streams, residual_streams, written
from titans_pytorch.ops.token_attention import Position
from titans_pytorch.utils.checks import (
    check_flags,
    check_floating,
    check_integer,
    check_integers,
    check_keywords,
    check_module,
    check_multiple,
    check_not_traced,
    check_positive,
    check_shape,
    check_tensor,
    checked_state,
    checked_token_ids,
    described,
    is_integral,
    values_are_at_hand,
)
from titans_pytorch.utils.functional import is_intercepted
from titans_pytorch.utils.parameters import Resettable, reset_parameters
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Bool, Float, Int


class DecodingState(NamedTuple):
    """A `ModelState` as buffers of constant size, which every step writes in place, with tables that it reads."""

    position: Int[Tensor, ' 1']
    token: Int[Tensor, 'b 1']
    """What the next step reads."""
    logits: Float[Tensor, 'b l']
    """What the last step of a token gave."""
    layers: list[LayerBuffers]
    frequencies: Float[Tensor, 'layers half']
    """Of the rotary embeddings of the layers that have attention."""
    embedding: Any
    """What the model's position embedding needs, if it has one."""


class Transformer(Resettable):
    """The face of every model: logits or a loss, a state over calls, sampling. Subclasses build `layers`.

    A subclass whose positions are not its tokens overrides `num_positions`, `num_tokens_until`, `_embedded`,
    `_token_rows` and `_embedded_one`; further arguments of its `_embedded` are named in `embedding_keywords`.

    Args:
        num_tokens: size of the vocabulary. `None`: no embedding and no logits; the input is (batch, length, dim), and a
            call returns hidden states.
        dim: width of the model.
        token_emb: a module from the input to (batch, length, dim), in place of `nn.Embedding`: of token ids, or of any
            features; of each position by itself, as pieces and steps hand over what they have.
        num_residual_streams: streams of the hyper-connections; 1 is a plain residual.
    """

    layers: ModuleList
    embedding_keywords: tuple[str, ...] = ()

    def __init__(self, *, num_tokens: int | None, dim: int, token_emb: Module | None):
        super().__init__()
        (dim,) = check_positive(dim=dim)
        num_tokens = None if num_tokens is None else check_integer('num_tokens', num_tokens, 1)
        check_module(token_emb=token_emb)
        self.num_tokens = num_tokens
        self.dim = dim
        self.token_emb = nn.Embedding(num_tokens, dim) if token_emb is None and num_tokens is not None else token_emb

    def _stack(
        self,
        num_residual_streams: int,
        blocks: Callable[[Callable[..., Module]], Iterable[Block]],
        use_flex_attn: bool,
        checkpoint_layers: bool,
    ) -> None:
        """Build the layers and the logits; `blocks` makes them, from a function that makes connections."""
        connection, self.expand_streams, self.reduce_streams = residual_streams(num_residual_streams, self.dim)
        self.layers = ModuleList(blocks(connection))
        self.norm = nn.RMSNorm(self.dim)
        self.to_logits = None if self.num_tokens is None else Linear(self.dim, self.num_tokens, bias=False)
        self.use_flex_attn = use_flex_attn
        self.checkpoint_layers = checkpoint_layers

    def reset_parameters(self) -> None:
        """Initialise every parameter anew, as the constructor does.

        Each memory draws a network of its own then, where the constructor copies `neural_memory_model`.

        Raises:
            TypeError: if `token_emb` or `neural_memory_model` has parameters but no method `reset_parameters()`.
        """
        for part in self.children():
            if part is self.layers:
                self._reset_own()
            reset_parameters(part)

    @property
    def _blocks(self) -> list[Block]:
        return [*self.layers]  # type: ignore[arg-type]

    @property
    def _attentions(self) -> list[SegmentedAttention]:
        return [block.attention for block in self._blocks if block.attention is not None]

    @property
    def _memories(self) -> list[NeuralMemory]:
        return [block.memory for block in self._blocks if block.memory is not None]

    # positions

    def num_positions(self, num_tokens: int) -> int:
        """Positions up to and with token number `num_tokens`."""
        return num_tokens

    def num_tokens_until(self, position: int) -> int:
        """Tokens before `position`."""
        return position

    def _embedded(self, x: Tensor, start: int) -> Float[Tensor, 'b n d']:
        """The positions from `start` on that the tokens `x` make, embedded."""
        return self._token_embedding(x)

    def _token_rows(self, hidden: Float[Tensor, 'b _n d'], start: int, num_tokens: int) -> Float[Tensor, 'b n d']:
        """Of the positions from `start` on, those that hold tokens, of which there then are `num_tokens`."""
        return hidden

    def _token_embedding(self, x: Tensor) -> Float[Tensor, 'b n d']:
        if self._takes_embeddings(x):
            return x
        embedded = self.token_emb(x)  # type: ignore[misc]
        if embedded.shape != (*x.shape[:2], self.dim):
            expected = f'(batch, length, dim={self.dim}) for x of {tuple(x.shape)}'
            raise ValueError(f'token_emb must return {expected}, got {tuple(embedded.shape)}')
        return embedded

    def _takes_embeddings(self, x: Tensor) -> bool:
        return self.token_emb is None or (isinstance(self.token_emb, nn.Embedding) and x.is_floating_point())

    # calls

    def forward(
        self,
        x: Int[Tensor, 'b n'] | Float[Tensor, 'b n d'],
        return_loss: bool = False,
        *,
        state: ModelState | None = None,
        return_state: bool = False,
        return_hidden: bool = False,
        labels: Int[Tensor, 'b n'] | None = None,
        mask: Bool[Tensor, 'b n'] | None = None,
        document_ids: Int[Tensor, 'b n'] | None = None,
        cache: ModelState | None = None,
        return_cache: bool = False,
        disable_flex_attn: bool = False,
        store: bool = True,
        **embedding_kwargs: Any,
    ) -> Any:
        """Logits of the next token, the loss, or hidden states.

        Args:
            x: token ids (batch, length) of any integer dtype; embeddings (batch, length, dim); or what `token_emb`
                takes.
            return_loss: return the mean cross-entropy, in nats, of predicting x[:, 1:] from x[:, :-1].
            state: that of the call before: `x` is what follows. With `return_loss` or `labels` the last token of `x` is
                not read, and is the first of the next call.
            return_state: also return the state, for the next call.
            return_hidden: return the hidden states after the last norm, (batch, length, dim), in place of logits.
            labels: return the loss of predicting these, (batch, length), instead of `x` itself. They are aligned with
                `x`, as in Hugging Face's models: labels[:, t] is the token at position t, predicted from x[:, :t], so
                that labels[:, 0] is not used; −100 leaves a position out. The mean is over the labels that are left,
                and 0 if there are none. `x` may then be embeddings. With `state`, `mask` and `document_ids` it is as
                with `return_loss`: padding and the first token of a document are not predicted, whatever their label.
            mask: true for tokens, false for padding, on either side, or 1 and 0. What is returned for padding means
                nothing.
            document_ids: integers; where they change within a row, or padding stands between, a new document begins,
                which sees nothing of the one before, neither by attention nor by memory, and whose positions count from
                0. Both wait for the device, and neither is compiled whole.
            cache: as `state`, but `x` begins with the first token of all, and only what follows is processed.
            return_cache: another name for `return_state`.
            disable_flex_attn: take the plain attention path for this call.
            store: false to read the memories without writing them: every token reads the weights that `state` brought,
                and these, momentum and the open chunk are the same in the state after. Attention goes on as ever.

        Returns:
            logits (batch, length, num_tokens), hidden states, or the loss; with `return_state` a pair with the state.
        """
        check_not_traced(type(self).__name__)
        check_flags(
            return_loss=return_loss,
            return_state=return_state,
            return_hidden=return_hidden,
            return_cache=return_cache,
            disable_flex_attn=disable_flex_attn,
            store=store,
        )
        if not embedding_kwargs.keys() <= {*self.embedding_keywords}:
            raise TypeError(self._unknown_keywords(embedding_kwargs))
        x = self._checked_input(x)
        return_state = return_state or return_cache
        return_loss = return_loss or labels is not None
        if return_loss and return_hidden:
            raise ValueError('return_hidden returns hidden states, return_loss and labels the loss: choose one of them')
        if mask is not None or document_ids is not None:
            mask, document_ids = checked_documents(mask, document_ids, x.shape[0], x.shape[1])
            if state is not None or cache is not None or return_state:
                raise ValueError(
                    'mask and document_ids make rows that begin or end at positions of their own, of which there is '
                    'no one state: leave out state, cache and return_state'
                )
        if cache is not None:
            if state is not None or return_loss:
                other = 'state' if state is not None else 'return_loss' if labels is None else 'labels'
                raise ValueError(f'with {other}, give what follows on the cache as x, and the cache as state')
            state = cache
        state = None if state is None else self._checked_state(state, len(x))
        if cache is not None and state is not None:
            read = self.num_tokens_until(state.seq_index)
            if read >= x.shape[1]:
                raise ValueError(f'x must go beyond the {read} tokens in the cache, got {x.shape[1]}')
            x = x[:, read:]

        if return_loss:
            x, labels, mask, document_ids = self._with_labels(x, labels, mask, document_ids)
        if mask is None and document_ids is None:
            hidden, after = self._read(x, state, disable_flex_attn, return_state, store, embedding_kwargs)
        else:
            hidden = self._read_documents(x, mask, document_ids, disable_flex_attn, store, embedding_kwargs)
            after = None

        out = self.norm(hidden)
        if not return_hidden and self.to_logits is not None:
            out = self.to_logits(out)
        if labels is not None:
            losses = F.cross_entropy(
                at_least_float32(out).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction='sum'
            )
            out = losses / (labels != IGNORED).sum().clamp(min=1)
        return (out, after) if return_state else out

    def _unknown_keywords(self, given: Mapping[str, Any]) -> str:
        own = {**inspect.signature(type(self).forward).parameters, **inspect.signature(Transformer.forward).parameters}
        known = [name for name, p in own.items() if name != 'self' and p.kind is not inspect.Parameter.VAR_KEYWORD]
        unknown = ', '.join(repr(name) for name in given if name not in self.embedding_keywords)
        return f'{type(self).__name__} got an unexpected keyword argument {unknown}; a call takes {", ".join(known)}'

    def _checked_input(self, x: Any) -> Tensor:
        check_tensor('x', x)
        if isinstance(self.token_emb, nn.Embedding) and not (x.is_floating_point() and x.ndim == 3):
            return checked_token_ids('x', x, self.token_emb.num_embeddings)
        if self._takes_embeddings(x):
            check_floating('x', x, self.norm.weight.dtype)
            check_shape('x', x, batch=None, length=None, dim=self.dim)
        elif x.ndim < 2 or 0 in x.shape:
            raise ValueError(f'x must be (batch, length, …), none of them empty, got {tuple(x.shape)}')
        return x.long() if is_integral(x) and x.ndim == 2 else x

    def _with_labels(
        self,
        x: Tensor,
        labels: Int[Tensor, 'b n'] | None,
        mask: Bool[Tensor, 'b n'] | None,
        document_ids: Int[Tensor, 'b n'] | None,
    ) -> tuple[Tensor, Int[Tensor, 'b n'], Bool[Tensor, 'b n'] | None, Int[Tensor, 'b n'] | None]:
        """What is read, and which token each position is to predict: those of `x`, or `labels`."""
        if self.to_logits is None:
            raise ValueError('return_loss and labels need logits, and this model has no num_tokens')
        if labels is None:
            if not is_integral(x) or x.ndim != 2:
                raise ValueError(f'return_loss predicts tokens from tokens: x must be token ids, got {described(x)}')
            labels = x
        else:
            labels = checked_labels(labels, self.to_logits.out_features, x.shape[0], x.shape[1])
        if x.shape[1] < 2:
            raise ValueError(f'x must hold at least 2 tokens to predict one from another, got {x.shape[1]}')
        labels = labels[:, 1:]
        if mask is None and document_ids is None:
            return x[:, :-1], labels, None, None
        labels = labels.masked_fill(~continues(mask, document_ids), IGNORED)
        mask, document_ids = (None if t is None else t[:, :-1] for t in (mask, document_ids))
        return x[:, :-1], labels, mask, document_ids

    def _read_documents(
        self,
        x: Tensor,
        mask: Bool[Tensor, 'b n'] | None,
        document_ids: Int[Tensor, 'b n'] | None,
        disable_flex_attn: bool,
        store: bool,
        embedding_kwargs: Mapping[str, Any],
    ) -> Float[Tensor, 'b n d']:
        """`_read`, each document by itself."""
        hidden = None
        for documents in Documents.groups(mask, document_ids, (x.shape[0], x.shape[1]), x.device):
            rows, _ = self._read(documents.rows(x), None, disable_flex_attn, False, store, embedding_kwargs)
            hidden = documents.batch(rows) if hidden is None else hidden + documents.batch(rows)
        if hidden is None:  # a single token, of which nothing is read where it is only to be predicted
            hidden, _ = self._read(x, None, disable_flex_attn, False, store, embedding_kwargs)
        return hidden

    def _read(
        self,
        x: Tensor,
        state: ModelState | None,
        disable_flex_attn: bool,
        return_state: bool,
        store: bool,
        embedding_kwargs: Mapping[str, Any],
    ) -> tuple[Float[Tensor, 'b n d'], ModelState | None]:
        """The hidden states of the tokens `x`, before the last norm, and the state after them."""
        start = 0 if state is None else state[0]
        num_tokens = self.num_tokens_until(start) + x.shape[1]
        stop = self.num_positions(num_tokens)
        layer_states = self._layer_states(state)

        hidden = self._embedded(x, start, **embedding_kwargs)
        attention_kwargs = self._attention_kwargs(hidden, layer_states, disable_flex_attn)
        carried, hidden = Carried(), self.expand_streams(hidden)
        after: list[LayerState] = []
        for block, layer_state in zip(self._blocks, layer_states):
            kept = self.checkpoint_layers and torch.is_grad_enabled()
            call = partial(checkpoint, block, use_reentrant=False) if kept else block
            hidden, carried, layer_state = call(hidden, carried, layer_state, start, store, **attention_kwargs)
            after.append(layer_state)
        hidden = self._token_rows(self.reduce_streams(written(hidden)), start, num_tokens)
        return hidden, self._model_state(stop, after) if return_state else None

    def _attention_kwargs(self, x: Tensor, states: list[LayerState], disable_flex_attn: bool) -> dict[str, Any]:
        """What all attentions share: one block mask."""
        shared: dict[str, Any] = {'disable_flex_attn': disable_flex_attn}
        if self.use_flex_attn and x.is_cuda and not disable_flex_attn and self._attentions:
            caches = [state.key_values for state in states if state.key_values is not None]
            num_cached = caches[0][0].shape[-2] if caches else 0
            attention = self._attentions[0]
            shared['flex_attn_fn'] = segmented_flex_attention(
                num_cached + x.shape[1],
                attention.total_segment_len,
                attention.num_persist_mem_tokens,
                attention.sliding,
                x.device,
            )
        return shared

    def _checked_state(self, state: Any, batch: int) -> ModelState:
        """`state`, if it is of a model like this one and of so many sequences."""
        position, key_values, memories = checked_state('state', state, ModelState)
        position = check_integer('state.seq_index', position, 0)
        if not isinstance(key_values, (tuple, list)) or not isinstance(memories, (tuple, list)):
            given = f'{described(key_values)} and {described(memories)}'
            raise TypeError(f'state must hold lists of key_values and of memories, got {given}')
        num_memories = len(self._memories)
        if (len(key_values), len(memories)) != (len(self._blocks), num_memories):
            raise ValueError(
                f'state must be of a model like this one, with {len(self._blocks)} layers and {num_memories} memories, '
                f'got {len(key_values)} and {len(memories)}'
            )
        checked: list[KeyValues | None] = []
        for layer, (block, pair) in enumerate(zip(self._blocks, key_values)):
            name = f'state.key_values[{layer}]'
            if block.attention is not None:
                pair, _ = block.attention.checked_cache(name, pair, position, None)
            elif pair is not None:
                raise ValueError(f'{name} must be None, as the layer has no attention, got {described(pair)}')
            checked.append(None if pair is None else (outside_inference(pair[0]), outside_inference(pair[1])))
        memories = [checked_state(f'state.memories[{n}]', memory, NeuralMemState) for n, memory in enumerate(memories)]
        state = ModelState(position, checked, memories)
        came = state.batch_size
        if came is not None and came != batch:
            raise ValueError(f'state must be of a batch of {batch}, as x is, got one of {came}: see ModelState.select')
        return state

    def _layer_states(self, state: ModelState | None) -> list[LayerState]:
        if state is None:
            return [LayerState(None, None)] * len(self._blocks)
        own = iter(state.memories)
        pairs = zip(self._blocks, state.key_values)
        return [LayerState(pair, None if block.memory is None else next(own)) for block, pair in pairs]

    def _model_state(self, position: int, states: list[LayerState]) -> ModelState:
        key_values = [
            None if block.attention is None else block.attention.trimmed(state.key_values, position)  # type: ignore[arg-type]
            for block, state in zip(self._blocks, states)
        ]
        # the next call does not need the weights over time
        memories = [state.memory._replace(updates=None) for state in states if state.memory is not None]
        return ModelState(position, key_values, memories)

    # one position at a time: see `decoding.Decodable`

    neural_memory_segment_len: int
    neural_memory_batch_size: int | None

    sample = sampling.sample
    stream = sampling.stream

    def obstacle_to_steps(self, state: ModelState) -> str | None:
        """Why steps, which call few modules as a whole and count chunks as they count positions, do not serve."""
        called = [self.token_emb, self.norm, self.to_logits, *(block.feedforward for block in self._blocks)]
        as_a_whole = {module for part in called if part is not None for module in part.modules()}
        networks = [memory._network for memory in self._memories]
        if is_intercepted(m for tree in (self, *networks) for m in tree.modules() if m not in as_a_whole):
            return 'a module of it has hooks, or a forward of its own'
        if not isinstance(self.to_logits, Linear):
            return f'its to_logits is a {type(self.to_logits).__name__}'
        if any(memory.num_tokens != state.seq_index for memory in state.memories):
            return 'its memories were read without being written (store=False)'
        return None

    def decoding_state(self, state: ModelState) -> DecodingState:
        """`state` as buffers for `step`. Weights are read here: it serves until they change."""
        assert self.to_logits is not None
        start, layer_states = state[0], self._layer_states(state)
        layers = [block.to_buffers(own, start) for block, own in zip(self._blocks, layer_states)]

        weight = self.to_logits.weight
        device = weight.device
        batch = state.batch_size
        if batch is None:
            raise ValueError('a model with neither attention nor memory has no state to decode from')
        position = torch.full((1,), start, device=device)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        rotations = [frequencies(attention.rotary_emb) for attention in self._attentions]
        return DecodingState(
            position=position,
            token=torch.zeros(batch, 1, dtype=torch.long, device=device),
            logits=torch.zeros(batch, len(weight), dtype=dtype, device=device),
            layers=layers,
            frequencies=torch.stack(rotations) if rotations else torch.zeros(0, 0, device=device),
            embedding=self._decoding_embedding(position),
        )

    def decoding_cache(self, state: DecodingState, position: int) -> ModelState:
        """The state after `position` positions, from the buffers, with which it shares nothing."""
        layers = [block.from_buffers(own, position) for block, own in zip(self._blocks, state.layers)]
        return ModelState(
            position,
            [layer.key_values for layer in layers],
            [layer.memory for layer in layers if layer.memory is not None],
        )

    def step_kind(self, position: int) -> StepKind:
        """What the step at `position` has to do."""
        batch_size, following = self.neural_memory_batch_size, position + 1
        return StepKind(
            False,
            following % self.neural_memory_segment_len == 0,
            batch_size is not None and following % batch_size == 0,
        )

    def step(self, state: DecodingState, kind: StepKind) -> None:
        """One position through all layers, from buffers into buffers.

        Shapes do not change from step to step, and a kind of step always does the same: it can be captured as a CUDA
        graph. So whatever depends on the position is computed from the tensor that holds it.
        """
        position = state.position
        x: Streams = self._embedded_one(state, kind)
        in_chunk = position % self.neural_memory_segment_len
        place, num_attentions = Place(Position(position, state.frequencies), in_chunk, kind), 0

        carried, memories = Carried(), []
        if isinstance(self.expand_streams, ExpandStreams):
            x = written(x) + self.expand_streams.stream_embed
        for block, layer in zip(self._blocks, state.layers):
            x, carried, memory = block.step(x, carried, layer, place, num_attentions)
            num_attentions += block.attention is not None
            if layer.memory is not None and memory is not None:
                memories.append((layer.memory, memory))
        if not kind.is_longterm:
            state.logits.copy_(self.to_logits(self.norm(written(x).sum(dim=1))))  # type: ignore[misc]

        position.add_(1)
        if kind.ends_chunk:
            self._chunk_ended(state)
            # only now: memories read the weights that earlier ones had before this step
            take_over(memories)

    def _decoding_embedding(self, position: Int[Tensor, ' 1']) -> Any:
        """What `_embedded_one` needs of positions, if anything."""

    def _embedded_one(self, state: DecodingState, kind: StepKind) -> Float[Tensor, 'b 1 d']:
        return self._token_embedding(state.token)

    def _chunk_ended(self, state: DecodingState) -> None:
        """`state.position` is the first of a chunk."""


def checked_memory_settings(chunk_size: Any, batch_size: Any, model: Any, kwargs: Any) -> tuple[int, int | None]:
    """Chunk and memory-batch size of a model's memories; their network and further arguments are checked too."""
    chunk_size = check_integer('neural_memory_segment_len', chunk_size, 1)
    if batch_size is not None:
        batch_size = check_multiple('neural_memory_batch_size', batch_size, 'chunk_size', chunk_size)
    check_module(neural_memory_model=model)
    check_keywords(neural_memory_kwargs=kwargs)
    return chunk_size, batch_size


def layers_with_memory(layers: Sequence[int] | None, depth: int) -> list[int]:
    """Layers counted from 1, checked; `None`: all."""
    chosen = [*range(1, depth + 1)] if layers is None else check_integers('neural_memory_layers', layers)
    missing = [layer for layer in chosen if layer not in range(1, depth + 1)]
    if missing:
        raise ValueError(f'neural_memory_layers must be layers from 1 to depth={depth}, got {missing}')
    return chosen


def checked_labels(labels: Any, num_tokens: int, batch: int, length: int) -> Int[Tensor, 'b n']:
    """Labels (batch, length) of any integer dtype as int64, each a token id or `IGNORED`."""
    labels = checked_token_ids('labels', labels, None, batch, length)
    if values_are_at_hand(labels):
        counted = labels[:, 1:][labels[:, 1:] != IGNORED]
        if counted.numel() and not 0 <= counted.min() <= counted.max() < num_tokens:
            raise ValueError(
                f'labels must be token ids in [0, num_tokens={num_tokens}), or {IGNORED} where there is none, '
                f'got labels in [{counted.min()}, {counted.max()}]'
            )
    return labels
