"""Memory as context (MAC): a transformer whose segments attend to long-term memory (Titans, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from axial_positional_embedding import ContinuousAxialPositionalEmbedding
from einops import rearrange, repeat
from hyper_connections import mc_get_init_and_expand_reduce_stream_functions
from torch import Tensor, nn
from torch.nn import Linear, Module, ModuleList

from titans_pytorch import generation
from titans_pytorch.attention import KeyValues, SegmentedAttention, Slot, flex_attention, segmented_flex_attention
from titans_pytorch.checks import check_not_negative, check_positive, check_token_ids
from titans_pytorch.connections import AddResidual, FoldedConnection, connect, folded
from titans_pytorch.decoding import DecodingCache, StepKind
from titans_pytorch.memory_state import NeuralMemState, StepState
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.rotary import frequencies, turns
from titans_pytorch.shapes import Float, Int
from titans_pytorch.sinkhorn import sinkhorn

__all__ = ['MemoryAsContextTransformer', 'SegmentedAttention', 'flex_attention']


class GEGLU(Module):
    """One half gates the other, through SiLU: a SwiGLU, under the name that the reference gave it."""

    def forward(self, x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


def FeedForward(dim: int, mult: float = 4) -> nn.Sequential:
    """A gated feedforward with as many weights as an ungated one of `mult` times the width."""
    dim_inner = int(dim * mult * 2 / 3)
    return nn.Sequential(nn.RMSNorm(dim), Linear(dim, dim_inner * 2), GEGLU(), Linear(dim_inner, dim))


@dataclass
class _Stream:
    """What earlier blocks leave for later ones, beside the residual stream."""

    inputs: list[Tensor] = field(default_factory=list)
    """Inputs and outputs of every attention and feedforward so far, which a memory may choose its views from."""
    values: Tensor | None = None
    """The first attention's values."""
    memory_weights: Mapping[str, Tensor] | None = None
    """The last memory's weights over time."""


class _Place(NamedTuple):
    """A position, for all layers."""

    position: Int[Tensor, ' 1']
    slot: Slot
    kind: StepKind


class _LayerState(NamedTuple):
    """What a layer keeps between steps, and its connections' weights."""

    key_values: KeyValues
    memory: StepState | None
    connections: list[FoldedConnection | None]


class DecodingState(NamedTuple):
    """A `DecodingCache` as buffers of constant size, which every step writes in place, with tables that it reads."""

    position: Int[Tensor, ' 1']
    token: Int[Tensor, 'b 1']
    """What the next step reads."""
    logits: Float[Tensor, 'b l']
    """What the last step of a token gave."""
    layers: list[_LayerState]
    frequencies: Float[Tensor, 'layers d/2']
    inner_positions: Float[Tensor, 'n d']
    """Embeddings of the positions in a memory chunk."""
    outer_position: Float[Tensor, '1 d']
    """Embedding of the open chunk."""


def _part(index: int) -> Any:
    return property(lambda block: block._modules[str(index)])  # `block[index]` takes far longer


class MACBlock(ModuleList):
    """One layer: memory (in some layers), attention, feedforward, each inside a hyper-connection.

    The parts stand in the order of the reference's checkpoints: `layers.0.4` is the first layer's memory.
    """

    memory_connection = _part(0)
    attention_connection = _part(1)
    feedforward_connection = _part(2)
    view_selector = _part(3)
    memory = _part(4)
    attention = _part(5)
    feedforward = _part(6)

    def __init__(self, *parts: Module | None, gate_attn_output: bool):
        super().__init__(parts)  # type: ignore[arg-type]  # a slot may be empty
        self.gate_attn_output = gate_attn_output

    @property
    def connections(self) -> tuple[Module, Module, Module]:
        """To memory, attention and feedforward."""
        return self.memory_connection, self.attention_connection, self.feedforward_connection

    def forward(
        self,
        x: Float[Tensor, 'b n d'],
        stream: _Stream,
        memory_state: NeuralMemState | None,
        **attention_kwargs: Any,
    ) -> tuple[Float[Tensor, 'b n d'], tuple[Tensor, Tensor], NeuralMemState | None]:
        """Returns the residual stream, the attention's keys and values, and the memory's state."""
        key_values: Any = None

        def remember(views: Tensor, weights: Any) -> tuple[Tensor, Any]:
            nonlocal memory_state
            retrieved, memory_state = self.memory(views, state=memory_state, prev_weights=weights)
            return retrieved, memory_state.updates

        def attend(seq: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor]:
            nonlocal key_values
            out, (values, key_values) = self.attention(
                seq, value_residual=stream.values, output_gating=gates, **attention_kwargs
            )
            return out, values

        x = self._through_parts(x, stream, self.connections, remember, attend)
        return x, key_values, memory_state

    def step(
        self,
        x: Float[Tensor, 'b s d'],
        stream: _Stream,
        state: _LayerState,
        place: _Place,
        turn: Tensor,
    ) -> tuple[Float[Tensor, 'b s d'], StepState | None]:
        """`forward` for one position; its streams stand in a dimension of their own.

        Writes the position into the buffers of `state`. Returns the streams and the memory's state.
        """
        memory_state = state.memory
        connections = [partial(connect, own, weights) for own, weights in zip(self.connections, state.connections)]

        def remember(views: Tensor, weights: Any) -> tuple[Tensor, Any]:
            nonlocal memory_state
            assert memory_state is not None
            before = memory_state.last
            retrieved, memory_state = self.memory.step(
                views, memory_state, place.position, place.kind.ends_chunk, place.kind.ends_batch, weights
            )
            return retrieved, before

        def attend(seq: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.attention.step(seq, state.key_values, place.slot, turn, stream.values, gates)

        return self._through_parts(x, stream, connections, remember, attend), memory_state

    def _through_parts(
        self,
        x: Tensor,
        stream: _Stream,
        connections: Iterable[Callable[[Tensor], tuple[Tensor, AddResidual]]],
        remember: Callable[[Tensor, Any], tuple[Tensor, Any]],
        attend: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """How the parts are put together, whether a sequence passes through them or a single position.

        `remember` takes the views and the weights of the memory before; it gives what was retrieved, and this memory's
        weights. `attend` takes a sequence and gates on its output; it gives that, and the values.
        """
        to_memory, to_attention, to_feedforward = connections
        gates = None
        if self.memory is not None:
            memory_in, add_residual = to_memory(x)
            accepts_weights = self.memory.to_learned_weight_residual_mix is not None
            retrieved, stream.memory_weights = remember(
                self._views(memory_in, stream.inputs), stream.memory_weights if accepts_weights else None
            )
            if self.gate_attn_output:
                gates = retrieved.sigmoid()
            else:
                x = add_residual(retrieved)

        attn_in, add_residual = to_attention(x)
        attn_out, values = attend(attn_in, gates)
        x = add_residual(attn_out)
        stream.values = values if stream.values is None else stream.values

        ff_in, add_residual = to_feedforward(x)
        ff_out = self.feedforward(ff_in)
        x = add_residual(ff_out)

        stream.inputs += [attn_in, attn_out, ff_in, ff_out]
        return x

    def _views(self, memory_in: Float[Tensor, 'b n d'], earlier: list[Tensor]) -> Float[Tensor, 'v b n d']:
        """What the memory's queries, keys and values are made of."""
        if self.view_selector is None:
            return torch.stack((memory_in,) * 3)
        choices = torch.stack((memory_in, *earlier), dim=2)
        weights = self.view_selector(memory_in).unflatten(-1, (3, -1)).softmax(dim=-1)
        return (weights @ choices).movedim(2, 0)


class MemoryAsContextTransformer(Module):
    """A language model of segments, with neural memory in some of its layers.

    After each segment of `segment_len` tokens stand `num_longterm_mem_tokens` learned memory tokens, through which
    what the memory retrieves reaches the attention; `num_persist_mem_tokens` learned keys and values are seen by all.
    In a layer with memory, the memory is written with the layer's input and what it retrieves is added to the
    residual stream before attention (the reference's arrangement), or gates the attention's output.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of the model.
        depth: number of layers.
        segment_len: tokens in a segment, and in an attention window.
        neural_memory_segment_len: chunk size of the memories. Default: `segment_len + num_longterm_mem_tokens`.
        neural_mem_gate_attn_output: let the memory gate the attention's output, instead of adding to its input.
        neural_memory_add_value_residual: without effect, as in the reference.
        num_longterm_mem_tokens: memory tokens after each segment.
        num_persist_mem_tokens: learned keys and values in each attention.
        neural_memory_batch_size: memory-batch size of the memories, in positions.
        neural_memory_qkv_receives_diff_views: let a memory choose, per token, from which earlier layers' inputs and
            outputs its queries, keys and values are made.
        dim_head, heads: width and number of attention heads.
        ff_mult: width of the feedforward, relative to `dim`.
        num_residual_streams: streams of the hyper-connections; 1 is a plain residual.
        neural_memory_model: memory network, copied for each memory layer. Default: that of `NeuralMemory`.
        neural_memory_kwargs: further arguments of `NeuralMemory`.
        neural_memory_layers: layers that have a memory, counted from 1. Default: all.
        use_flex_attn: use FlexAttention on a CUDA device.
        sliding_window_attn: attention windows that slide, instead of blocks.
        neural_mem_weight_residual: let each memory take its gradients at weights mixed with the memory's before it.
        token_emb: a module from token ids to embeddings, in place of `nn.Embedding`.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        segment_len: int,
        neural_memory_segment_len: int | None = None,
        neural_mem_gate_attn_output: bool = False,
        neural_memory_add_value_residual: bool = False,
        num_longterm_mem_tokens: int = 0,
        num_persist_mem_tokens: int = 0,
        neural_memory_batch_size: int | None = None,
        neural_memory_qkv_receives_diff_views: bool = False,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        num_residual_streams: int = 4,
        neural_memory_model: Module | None = None,
        neural_memory_kwargs: Mapping[str, Any] = {},
        neural_memory_layers: Sequence[int] | None = None,
        use_flex_attn: bool = False,
        sliding_window_attn: bool = False,
        neural_mem_weight_residual: bool = False,
        token_emb: Module | None = None,
    ):
        super().__init__()
        check_positive(num_tokens=num_tokens, dim=dim, depth=depth, segment_len=segment_len)
        check_positive(dim_head=dim_head, heads=heads, num_residual_streams=num_residual_streams)
        check_not_negative(
            num_longterm_mem_tokens=num_longterm_mem_tokens, num_persist_mem_tokens=num_persist_mem_tokens
        )
        memory_layers = range(1, depth + 1) if neural_memory_layers is None else neural_memory_layers
        missing = [layer for layer in memory_layers if layer not in range(1, depth + 1)]
        if missing:
            raise ValueError(f'neural_memory_layers must be layers from 1 to depth={depth}, got {missing}')

        self.num_tokens = num_tokens
        self.segment_len = segment_len
        self.num_longterm_mem_tokens = num_longterm_mem_tokens
        self.num_persist_mem_tokens = num_persist_mem_tokens
        self.attn_window_size = segment_len + num_longterm_mem_tokens
        self.sliding_window_attn = sliding_window_attn
        self.use_flex_attn = use_flex_attn
        self.gate_attn_output = neural_mem_gate_attn_output
        self.neural_mem_weight_residual = neural_mem_weight_residual
        self.neural_memory_segment_len = (
            self.attn_window_size if neural_memory_segment_len is None else neural_memory_segment_len
        )
        self.neural_memory_batch_size = neural_memory_batch_size

        self.token_emb = nn.Embedding(num_tokens, dim) if token_emb is None else token_emb
        self.axial_pos_emb = ContinuousAxialPositionalEmbedding(dim=dim, num_axial_dims=2)
        self.longterm_mems = nn.Parameter(torch.randn(num_longterm_mem_tokens, dim) * 0.02)

        connection, self.expand_streams, self.reduce_streams = mc_get_init_and_expand_reduce_stream_functions(
            num_residual_streams,
            dim=dim,
            add_stream_embed=True,
            disable=num_residual_streams == 1,
            residual_mix_constraint_fn=sinkhorn,
        )

        def memory_parts(layer: int) -> tuple[Module | None, Module | None, Module | None]:
            """Connection, view selector and memory of a layer."""
            if layer not in memory_layers:
                return None, None, None
            selects_views = neural_memory_qkv_receives_diff_views and layer > 1
            memory = NeuralMemory(
                dim=dim,
                chunk_size=self.neural_memory_segment_len,
                batch_size=neural_memory_batch_size,
                model=deepcopy(neural_memory_model),
                qkv_receives_diff_views=True,
                accept_weight_residual=neural_mem_weight_residual and layer != min(memory_layers),
                **neural_memory_kwargs,
            )
            return (
                connection(add_branch_out_to_residual=not neural_mem_gate_attn_output),
                _view_selector(dim, layer) if selects_views else None,
                memory,
            )

        def block(layer: int) -> MACBlock:
            memory_connection, view_selector, memory = memory_parts(layer)
            attention = SegmentedAttention(
                dim=dim,
                dim_head=dim_head,
                heads=heads,
                segment_len=segment_len,
                use_flex_attn=use_flex_attn,
                accept_value_residual=layer > 1,
                num_longterm_mem_tokens=num_longterm_mem_tokens,
                num_persist_mem_tokens=num_persist_mem_tokens,
                sliding=sliding_window_attn,
            )
            return MACBlock(
                memory_connection,
                connection(),
                connection(),
                view_selector,
                memory,
                attention,
                FeedForward(dim, ff_mult),
                gate_attn_output=neural_mem_gate_attn_output,
            )

        self.layers = ModuleList(block(layer) for layer in range(1, depth + 1))
        self.norm = nn.RMSNorm(dim)
        self.to_logits = Linear(dim, num_tokens, bias=False)

    @property
    def _mac_blocks(self) -> list[MACBlock]:
        return [*self.layers]  # type: ignore[arg-type]

    # positions: tokens, and long-term memory tokens between them

    def seq_index_is_longterm(self, seq_index: int) -> bool:
        """Whether the position holds a long-term memory token."""
        return seq_index % self.attn_window_size >= self.segment_len

    def seq_len_with_longterm_mem(self, seq_len: int) -> int:
        """Positions up to and with token number `seq_len`: memory tokens stand between segments."""
        check_positive(seq_len=seq_len)
        return (seq_len - 1) // self.segment_len * self.num_longterm_mem_tokens + seq_len

    def _embedded(
        self, ids: Int[Tensor, 'b n'], start: int, factorized_pos_emb: list[Tensor] | None
    ) -> Float[Tensor, 'b n d']:
        """The positions from `start` on, embedded."""
        segment, window = self.segment_len, self.attn_window_size
        stop = self.seq_len_with_longterm_mem(ids.shape[1])

        # whole segments, each followed by its memory tokens, then cut to the positions asked for
        first_segment = start // window
        x = self.token_emb(ids[:, first_segment * segment :])
        x = F.pad(x, (0, 0, 0, -x.shape[1] % segment))
        x = rearrange(x, 'b (s n) d -> b s n d', n=segment)
        memory_tokens = repeat(self.longterm_mems.to(x.dtype), 'n d -> b s n d', b=x.shape[0], s=x.shape[1])
        x = torch.cat((x, memory_tokens), dim=2).flatten(1, 2)
        x = x[:, start - first_segment * window : stop - first_segment * window]
        return x + self._position_embedding(start, stop, factorized_pos_emb)

    def _position_embedding(self, start: int, stop: int, factorized: list[Tensor] | None) -> Float[Tensor, 'n d']:
        """Axial: which memory chunk, and where in it. Positions are exact integers, so never in half precision."""
        inner = self.neural_memory_segment_len
        with torch.autocast(self.longterm_mems.device.type, enabled=False):
            if start == 0 or factorized is not None:
                return self.axial_pos_emb.forward_with_seq_len(stop, (inner,), factorized=factorized)[start:]
            positions = torch.arange(start, stop, device=self.longterm_mems.device)
            return self.axial_pos_emb.forward_with_pos(positions, (stop // inner + 1, inner))

    def _token_rows(self, x: Float[Tensor, 'b n d'], start: int, num_tokens: int) -> Float[Tensor, 'b n d']:
        """Of the positions from `start` on, those that hold tokens."""
        full, open_segment = divmod(start, self.attn_window_size)
        first_token = full * self.segment_len + min(open_segment, self.segment_len)
        tokens = torch.arange(first_token, num_tokens, device=x.device)
        positions = tokens // self.segment_len * self.attn_window_size + tokens % self.segment_len
        return x.index_select(1, positions - start)

    # calls

    def forward(
        self,
        x: Int[Tensor, 'b n'],
        return_loss: bool = False,
        return_loss_breakdown: bool = False,
        disable_flex_attn: bool = False,
        cache: DecodingCache | None = None,
        return_cache: bool = False,
        factorized_pos_emb: list[Tensor] | None = None,
    ) -> Any:
        """Logits of the next token, or the loss.

        Args:
            x: token ids (batch, length), from the first token on.
            return_loss: return the mean cross-entropy, in nats, of predicting x[:, 1:] from x[:, :-1].
            return_loss_breakdown: without effect, as in the reference: the loss has one part.
            disable_flex_attn: take the plain attention path for this call.
            cache: process only the positions that it does not cover; `x` still begins with the first token.
            return_cache: also return the cache for the next call.
            factorized_pos_emb: position embeddings computed before, by `axial_pos_emb(…, return_factorized=True)`.

        Returns:
            logits (batch, tokens processed, num_tokens), or the loss; with `return_cache` a pair with the cache.
        """
        check_token_ids('x', x, self.num_tokens if isinstance(self.token_emb, nn.Embedding) else None)
        if return_loss:
            if x.shape[1] < 2:
                raise ValueError(f'x must hold at least 2 tokens to predict one from another, got {x.shape[1]}')
            x, labels = x[:, :-1], x[:, 1:]

        start = 0 if cache is None else cache[0]
        stop = self.seq_len_with_longterm_mem(x.shape[1])
        if start >= stop:
            raise ValueError(f'x must go beyond the {start} positions in the cache, got {stop} positions')
        key_values, memories = ([], []) if cache is None else (cache[1], cache[2])

        hidden = self._embedded(x, start, factorized_pos_emb)
        hidden, key_values, memories = self._blocks(hidden, start, key_values, memories, disable_flex_attn)
        logits = self.to_logits(self.norm(self._token_rows(hidden, start, x.shape[1])))

        if return_loss:
            return F.cross_entropy(rearrange(logits, 'b n l -> b l n'), labels)
        if not return_cache:
            return logits
        pairs = zip(self._mac_blocks, key_values)
        key_values = [block.attention.trimmed(pair, stop) for block, pair in pairs]
        return logits, DecodingCache(stop, key_values, memories)

    def _blocks(
        self,
        x: Float[Tensor, 'b n d'],
        start: int,
        key_values: Sequence[tuple[Tensor, Tensor]],
        memories: Sequence[NeuralMemState],
        disable_flex_attn: bool,
    ) -> tuple[Float[Tensor, 'b n d'], list[tuple[Tensor, Tensor]], list[NeuralMemState]]:
        """Positions from `start` on through all layers, after a cache's keys, values and memory states.

        Returns the hidden states, and what the keys, values and memory states then are.
        """
        flex_attn_fn = None
        if self.use_flex_attn and x.is_cuda and not disable_flex_attn and not key_values:
            flex_attn_fn = segmented_flex_attention(
                x.shape[1], self.attn_window_size, self.num_persist_mem_tokens, self.sliding_window_attn, x.device
            )

        stream, next_key_values, next_memories = _Stream(), [], []
        states = iter(memories)
        x = self.expand_streams(x)

        for index, block in enumerate(self._mac_blocks):
            x, pair, memory = block(
                x,
                stream,
                next(states, None) if block.memory is not None else None,
                cache=key_values[index] if key_values else None,
                position=start,
                flex_attn_fn=flex_attn_fn,
                disable_flex_attn=disable_flex_attn,
            )
            next_key_values.append(pair)
            if memory is not None:
                next_memories.append(memory._replace(updates=None))  # the next call does not need them

        return self.reduce_streams(x), next_key_values, next_memories

    # one position at a time: see `decoding.Decodable`

    sample = generation.sample
    stream = generation.stream

    def decoding_state(self, cache: DecodingCache) -> DecodingState:
        """`cache` as buffers for `step`. Weights are read here: it serves until they change."""
        states = iter(cache.memories)
        layers = []
        for block, key_values in zip(self._mac_blocks, cache.key_values):
            buffers = block.attention.to_ring(key_values, cache.seq_index)
            memory = None if block.memory is None else block.memory.step_state(next(states))
            layers.append(_LayerState(buffers, memory, [folded(connection) for connection in block.connections]))

        batch, device = cache.key_values[0][0].shape[0], self.longterm_mems.device
        position = torch.full((1,), cache.seq_index, device=device)
        weight = self.to_logits.weight
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        return DecodingState(
            position=position,
            token=torch.zeros(batch, 1, dtype=torch.long, device=device),
            logits=torch.zeros(batch, self.num_tokens, dtype=dtype, device=device),
            layers=layers,
            frequencies=torch.stack([frequencies(block.attention.rotary_emb) for block in self._mac_blocks]),
            inner_positions=self._axial_embedding(1, torch.arange(self.neural_memory_segment_len, device=device)),
            outer_position=self._axial_embedding(0, position // self.neural_memory_segment_len),
        )

    def decoding_cache(self, state: DecodingState, position: int) -> DecodingCache:
        """The cache after `position` positions, from the buffers, with which it shares nothing."""
        layers = [*zip(self._mac_blocks, state.layers)]
        return DecodingCache(
            position,
            [block.attention.from_ring(layer.key_values, position) for block, layer in layers],
            [
                layer.memory.closed(position, block.memory.step_sizes)
                for block, layer in layers
                if layer.memory is not None
            ],
        )

    def step_kind(self, position: int) -> StepKind:
        """What the step at `position` has to do."""
        batch_size, following = self.neural_memory_batch_size, position + 1
        return StepKind(
            self.seq_index_is_longterm(position),
            following % self.neural_memory_segment_len == 0,
            batch_size is not None and following % batch_size == 0,
        )

    def step(self, state: DecodingState, kind: StepKind) -> None:
        """One position through all layers, from buffers into buffers.

        Shapes do not change from step to step, and a kind of step always does the same: it can be captured as a CUDA
        graph. So whatever depends on the position is computed from the tensor that holds it.
        """
        position = state.position
        x = self._embedded_one(state, kind)
        place = _Place(position, self._mac_blocks[0].attention.slot(position, state.layers[0].key_values[0]), kind)
        layer_turns = turns(state.frequencies, position).unbind(0)

        stream, memories = _Stream(), []
        if hasattr(self.expand_streams, 'stream_embed'):
            x = x + self.expand_streams.stream_embed
        for block, layer, turn in zip(self._mac_blocks, state.layers, layer_turns):
            x, memory = block.step(x, stream, layer, place, turn)
            memories.append(memory)
        if not kind.is_longterm:
            state.logits.copy_(self.to_logits(self.norm(x.sum(dim=1))))

        position.add_(1)
        if kind.ends_chunk:
            state.outer_position.copy_(self._axial_embedding(0, position // self.neural_memory_segment_len))
            # only now: memories read the weights that earlier ones had before this step
            for layer, memory in zip(state.layers, memories):
                if layer.memory is not None and memory is not None:
                    layer.memory.take_over(memory)

    def _embedded_one(self, state: DecodingState, kind: StepKind) -> Float[Tensor, 'b 1 d']:
        if kind.is_longterm:
            index = state.position % self.attn_window_size - self.segment_len
            x = self.longterm_mems.index_select(0, index).expand(len(state.token), 1, -1)
        else:
            x = self.token_emb(state.token)
        inner_position = state.inner_positions.index_select(0, state.position % len(state.inner_positions))
        return x + (state.outer_position + inner_position)

    def _axial_embedding(self, axis: int, indices: Int[Tensor, ' n']) -> Float[Tensor, 'n d']:
        with torch.autocast(indices.device.type, enabled=False):
            return self.axial_pos_emb.mlps[axis](indices.to(self.axial_pos_emb.dtype).unsqueeze(1))


def _view_selector(dim: int, layer: int) -> nn.Sequential:
    """Logits, for each of three views, over the memory's own input and four tensors of each earlier layer."""
    choices = (layer - 1) * 4 + 1
    return nn.Sequential(nn.RMSNorm(dim), Linear(dim, 3 * choices))
