"""Memory as context (MAC): a transformer whose segments attend to long-term memory (Titans, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.attention.flex_attention import flex_attention

from titans_pytorch.attention.context import ContextAttention
from titans_pytorch.attention.masks import create_mac_block_mask
from titans_pytorch.attention.segmented import AttnIntermediates, SegmentedAttention
from titans_pytorch.generation.decodable import StepKind
from titans_pytorch.generation.logits import gumbel_noise, gumbel_sample, min_p_filter
from titans_pytorch.models.axial_positions import AxialPositions, AxialTables
from titans_pytorch.models.base import Transformer
from titans_pytorch.models.block import Block, Parts
from titans_pytorch.models.decoding import ModelBuffers
from titans_pytorch.models.feedforward import GEGLU, FeedForward
from titans_pytorch.models.gating import Gated
from titans_pytorch.models.residual_streams import Streams
from titans_pytorch.models.state import ModelState
from titans_pytorch.models.validation import checked_memory_settings, layers_with_memory
from titans_pytorch.models.views import NUM_VIEWS, view_selector
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.utils.checks import (
    check_flags,
    check_multiple,
    check_positive,
    checked_arguments,
)
from titans_pytorch.utils.functional import constant, replaced
from titans_pytorch.utils.parameters import InReferenceFormat, fill
from titans_pytorch.utils.shapes import Float, Int, divided

__all__ = [
    'GEGLU',
    'AttnIntermediates',
    'FeedForward',
    'MemoryAsContextTransformer',
    'SegmentedAttention',
    'create_mac_block_mask',
    'flex_attention',
    'gumbel_noise',
    'gumbel_sample',
    'min_p_filter',
]


def _part(index: int) -> Any:
    return property(lambda block: block._modules[str(index)])  # `block[index]` takes far longer


class MACBlock(Block):
    """Memory (in some layers), attention and feedforward, each inside a hyper-connection.

    The parts are in the order of the reference's checkpoints: `layers.0.4` is the first layer's memory, and so is
    `model.layers[0][4]`. Unlike the reference's, the block is not a `ModuleList`, because FSDP2 refuses those (PyTorch
    2.11).

    Args:
        parts: memory connection, attention connection, feedforward connection, view selector, memory, attention and
            feedforward; `None` for a part that the layer lacks.
        gate_attn_output: gate the attention's output with the retrieved values instead of adding them to the stream.
        shares_views, shares_memory_weights: see `Block`.
    """

    memory_connection = _part(0)
    attention_connection = _part(1)
    feedforward_connection = _part(2)
    view_selector = _part(3)
    memory = _part(4)
    attention = _part(5)
    feedforward = _part(6)

    def __init__(
        self,
        *parts: Module | None,
        gate_attn_output: bool = False,
        shares_views: bool = False,
        shares_memory_weights: bool = False,
    ):
        super().__init__()
        for index, part in enumerate(parts):
            self.add_module(str(index), part)
        self.gate_attn_output = gate_attn_output
        self.shares_views = shares_views
        self.shares_memory_weights = shares_memory_weights

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> Module | None:
        return [*self._modules.values()][index]

    def _parts(self) -> list[Module]:
        later = [part for part in self.children() if part is not self.memory]
        return later if self.memory is None else [self.memory, *later]

    @property
    def connections(self) -> tuple[Module | None, ...]:
        """Connections of memory, attention and feedforward."""
        return self.memory_connection, self.attention_connection, self.feedforward_connection

    def update_stream(self, x: Streams, parts: Parts) -> Streams:
        to_memory, to_attention, to_feedforward = parts.connections
        gates = None
        if self.memory is not None:
            memory_in, add_residual = to_memory(x)
            if self.view_selector is None:
                views = memory_in.expand(NUM_VIEWS, *memory_in.shape)
            else:
                views = parts.select_views(self.view_selector, memory_in)
            retrieved = parts.store_and_retrieve(views)
            if self.gate_attn_output:
                gates = retrieved.sigmoid()
            else:
                x = add_residual(retrieved)

        attn_in, add_residual = to_attention(x)
        attn_out = parts.attend(attn_in, output_gating=gates)
        x = add_residual(attn_out)

        ff_in, add_residual = to_feedforward(x)
        ff_out = parts.feed_forward(ff_in)
        x = add_residual(ff_out)

        if self.shares_views:
            parts.add_views(attn_in, attn_out, ff_in, ff_out)
        return x


class PaperMACBlock(MACBlock):
    """A block in the paper's order: retrieve, attend, then store (Titans eq. 21–25). Segments are processed one after
    another, because each retrieves from the memory that the previous one has written."""

    combine = _part(7)

    def __init__(self, *parts: Module | None, detach_context: bool = False):
        super().__init__(*parts)
        self.detach_context = detach_context

    def update_stream(self, x: Streams, parts: Parts) -> Streams:
        _, to_attention, to_feedforward = parts.connections
        seq, add_residual = to_attention(x)
        segments = parts.segments(seq, self.attention.total_segment_len)
        x = add_residual(torch.cat([self._segment(segment, parts) for segment in segments], dim=1))

        seq, add_residual = to_feedforward(x)
        return add_residual(parts.feed_forward(seq))

    def _segment(self, seq: Float[Tensor, 'b n d'], parts: Parts) -> Float[Tensor, 'b n d']:
        # eq. 21: h_t = M*_{t−1}(q_t)
        context = parts.retrieve(seq)
        stored = parts.attend_without_gradient_of_context(seq, context) if self.detach_context else None
        # eq. 22, 23: y_t = Attn([p ‖ h_t ‖ S_t])
        attended = parts.attend(seq, context=context)
        # autocast has lowered the precision of these rows, and the memory's norms are faster in their own
        stored = (attended if stored is None else stored).to(seq.dtype)
        # eq. 24, 25: M_t = M_{t−1}(y_t), o_t = y_t ⊗ M*_t(y_t)
        return self.combine(attended, parts.store_and_retrieve(stored))


class MemoryAsContextTransformer(Transformer, InReferenceFormat):
    """A language model that reads text in segments, with neural memory in some of its layers.

    Each segment of `segment_len` tokens is followed by `num_longterm_mem_tokens` learned memory tokens, through which
    retrieved values reach attention. Every token also attends to `num_persist_mem_tokens` learned keys and values
    (persistent memory). In a layer with memory, the memory stores the layer's input, and the retrieved values are added
    to the residual stream before attention (the reference's order) or gate the attention's output.

    With `paper_order`, a layer with memory follows the paper instead. The memory retrieves values for the segment,
    attention sees them beside the segment, and the memory stores the attention's output, then retrieves for it the
    values that gate it. A memory batch is then one segment, and segments are processed one after another.

    Args:
        num_tokens: size of the vocabulary; `None` for a model of embeddings, without logits.
        dim: width of the model.
        depth: number of layers.
        segment_len: tokens per segment. An attention window spans a segment and its `num_longterm_mem_tokens`.
        neural_memory_segment_len: chunk size of the memories. Default: `segment_len + num_longterm_mem_tokens`.
        neural_mem_gate_attn_output: let the memory gate the attention's output instead of adding to its input.
        neural_memory_add_value_residual: without effect, as in the reference.
        num_longterm_mem_tokens: memory tokens after each segment.
        num_persist_mem_tokens: learned keys and values in each attention.
        neural_memory_batch_size: memory-batch size of the memories, in positions.
        neural_memory_qkv_receives_diff_views: let each memory compute its queries, keys and values from inputs and
            outputs of earlier layers, which it selects per token.
        dim_head, heads: width and number of attention heads.
        ff_mult: sets the hidden width: `ff_mult * dim` for an ungated feedforward. The gated one used here is two
            thirds as wide, so that it has as many weights.
        num_residual_streams: streams of the hyper-connections; 1 is a plain residual.
        neural_memory_model: memory network, copied for each memory layer. Default: that of `NeuralMemory`.
        neural_memory_kwargs: further arguments of `NeuralMemory`. Modules among them, such as an activation with
            parameters, are shared by all memories.
        neural_memory_layers: layers that have a memory, counted from 1. Default: all.
        use_flex_attn: use FlexAttention on a CUDA device.
        sliding_window_attn: use sliding attention windows instead of blocks.
        neural_mem_weight_residual: let each memory take its gradients at its weights mixed with those of the previous
            memory.
        token_emb: a module that maps token ids, or any features, to embeddings, in place of `nn.Embedding`.
        paper_order: retrieve, attend, then store.
        detach_context: with `paper_order`, stop gradients from what a segment stores to what it retrieved before.
            Otherwise they flow from segment to segment and explode in long windows (docs/guides/stability.md).
        checkpoint_layers: save only the input of each layer for the backward pass, which recomputes the layer. For
            sequences so long that even one layer does not fit, see `checkpoint_every` of `NeuralMemory`.
        position_length: tokens whose memory chunks have their own position embeddings; the chunks of later tokens share
            the last one. The embedding is an MLP of the chunk's number and grows with it, so a model that will read
            further than its training length should be given that length here. Default: no limit, as in the reference.
    """

    def __init__(
        self,
        *,
        num_tokens: int | None,
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
        paper_order: bool = False,
        detach_context: bool = False,
        checkpoint_layers: bool = False,
        position_length: int | None = None,
    ):
        dim, depth, segment_len, dim_head, heads, num_residual_streams, *memory_tokens = checked_arguments(
            MemoryAsContextTransformer,
            locals(),
            positive=['dim', 'depth', 'segment_len', 'dim_head', 'heads', 'num_residual_streams'],
            not_negative=['num_longterm_mem_tokens', 'num_persist_mem_tokens'],
        )
        num_longterm_mem_tokens, num_persist_mem_tokens = memory_tokens
        attn_window_size = segment_len + num_longterm_mem_tokens
        chunk_size, memory_batch_size = checked_memory_settings(
            dim,
            attn_window_size if neural_memory_segment_len is None else neural_memory_segment_len,
            neural_memory_batch_size,
            neural_memory_model,
            neural_memory_kwargs,
        )
        memory_layers = layers_with_memory(neural_memory_layers, depth)
        super().__init__(num_tokens=num_tokens, dim=dim, token_emb=token_emb)
        if paper_order:
            _check_paper_order(
                num_longterm_mem_tokens=num_longterm_mem_tokens,
                neural_mem_gate_attn_output=neural_mem_gate_attn_output,
                neural_memory_batch_size=None if memory_batch_size == segment_len else memory_batch_size,
                neural_memory_qkv_receives_diff_views=neural_memory_qkv_receives_diff_views,
                neural_mem_weight_residual=neural_mem_weight_residual,
                sliding_window_attn=sliding_window_attn,
                use_flex_attn=use_flex_attn,
            )
            check_multiple('segment_len', segment_len, 'neural_memory_segment_len', chunk_size)
            memory_batch_size = segment_len
        elif detach_context:
            raise ValueError('detach_context=True needs paper_order=True, got paper_order=False')

        self.segment_len = segment_len
        self.num_longterm_mem_tokens = num_longterm_mem_tokens
        self.num_persist_mem_tokens = num_persist_mem_tokens
        self.attn_window_size = attn_window_size
        self.sliding_window_attn = sliding_window_attn
        self.gate_attn_output = neural_mem_gate_attn_output
        self.neural_mem_weight_residual = neural_mem_weight_residual
        self.neural_memory_segment_len = chunk_size
        self.neural_memory_batch_size = memory_batch_size

        self.axial_pos_emb = AxialPositions(dim, self._num_position_chunks(position_length))
        self.longterm_mems = (
            nn.Parameter(torch.empty(num_longterm_mem_tokens, dim)) if num_longterm_mem_tokens else None
        )
        self._reset_own()

        def memory(layer: int) -> NeuralMemory:
            return NeuralMemory(
                dim=dim,
                chunk_size=chunk_size,
                batch_size=memory_batch_size,
                model=neural_memory_model,
                qkv_receives_diff_views=not paper_order,
                accept_weight_residual=neural_mem_weight_residual and layer != min(memory_layers),
                **neural_memory_kwargs,
            )

        def attention(kind: type[SegmentedAttention], layer: int) -> SegmentedAttention:
            return kind(
                dim=dim,
                dim_head=dim_head,
                heads=heads,
                segment_len=segment_len,
                use_flex_attn=use_flex_attn,
                accept_value_residual=layer > 1 and not paper_order,
                num_longterm_mem_tokens=num_longterm_mem_tokens,
                num_persist_mem_tokens=num_persist_mem_tokens,
                sliding=sliding_window_attn,
            )

        def block(connection: Callable[..., Module], layer: int) -> MACBlock:
            # the memory comes first, because the reference draws the weights of the parts in this order
            own_memory = memory(layer) if layer in memory_layers else None
            if own_memory is not None and paper_order:
                return PaperMACBlock(
                    None,
                    connection(),
                    connection(),
                    None,
                    own_memory,
                    attention(ContextAttention, layer),
                    FeedForward(dim, ff_mult),
                    Gated(dim),
                    detach_context=detach_context,
                )
            adds_retrieved = not neural_mem_gate_attn_output
            selects_views = own_memory is not None and neural_memory_qkv_receives_diff_views and layer > 1
            return MACBlock(
                None if own_memory is None else connection(add_branch_out_to_residual=adds_retrieved),
                connection(),
                connection(),
                view_selector(dim, layer) if selects_views else None,
                own_memory,
                attention(SegmentedAttention, layer),
                FeedForward(dim, ff_mult),
                gate_attn_output=neural_mem_gate_attn_output,
                shares_views=neural_memory_qkv_receives_diff_views,
                shares_memory_weights=neural_mem_weight_residual,
            )

        self._stack(
            num_residual_streams,
            lambda connection: [block(connection, layer) for layer in range(1, depth + 1)],
            use_flex_attn,
            checkpoint_layers,
        )
        if paper_order and any(memory.mixes_tokens for memory in self._memories):
            raise ValueError('paper_order retrieves for each token separately, and neural_memory_model mixes them')

    def _num_position_chunks(self, position_length: int | None) -> int | None:
        """Number of memory chunks of this many tokens and the memory tokens between them; `None` for no limit."""
        if position_length is None:
            return None
        (position_length,) = check_positive(position_length=position_length)
        return -(-self.num_positions(position_length) // self.neural_memory_segment_len)

    def _reset_own(self) -> None:
        if self.longterm_mems is not None:
            shape, device = self.longterm_mems.shape, self.longterm_mems.device
            fill(self.longterm_mems, torch.randn(shape, device=device) * 0.02)

    def empty_parameters(self) -> dict[str, tuple[int, ...]]:
        return {} if self.longterm_mems is not None else {'longterm_mems': (0, self.dim)}

    # positions count tokens and the long-term memory tokens between them

    def seq_index_is_longterm(self, seq_index: int) -> bool:
        """Whether the position holds a long-term memory token."""
        return seq_index % self.attn_window_size >= self.segment_len

    def seq_len_with_longterm_mem(self, seq_len: int) -> int:
        """Number of positions up to and including the `seq_len`-th token; memory tokens stand between segments."""
        (seq_len,) = check_positive(seq_len=seq_len)
        full_before, _ = divided(seq_len - 1, self.segment_len)
        return full_before * self.num_longterm_mem_tokens + seq_len

    def num_positions(self, num_tokens: int) -> int:
        return self.seq_len_with_longterm_mem(num_tokens)

    def num_tokens_until(self, position: int) -> int:
        full, in_open_segment = divided(position, self.attn_window_size)
        return full * self.segment_len + min(in_open_segment, self.segment_len)

    def _embedded(
        self, x: Tensor, start: int, factorized_pos_emb: list[Tensor] | None = None
    ) -> Float[Tensor, 'b n d']:
        segment = self.segment_len
        # from here on, positions and tokens are counted from the beginning of the open segment
        first = constant(start % self.attn_window_size)
        num_before = self.num_tokens_until(first)
        stop = self.num_positions(num_before + x.shape[1])

        # whole segments, each followed by its memory tokens; then cut to the requested positions
        x = F.pad(self._token_embedding(x), (0, 0, num_before, 0))
        num_segments, in_last = divided(x.shape[1], segment)
        x = F.pad(x, (0, 0, 0, -in_last % segment)).unflatten(1, (num_segments + int(in_last > 0), segment))
        if self.longterm_mems is not None:
            memory_tokens = self.longterm_mems.to(x.dtype).expand(*x.shape[:2], -1, -1)
            x = torch.cat((x, memory_tokens), dim=2)
        x = x.flatten(1, 2)[:, first:stop]
        chunk = self.neural_memory_segment_len
        return x + self.axial_pos_emb.span(start, stop - first, chunk, factorized_pos_emb, x.device)

    def _token_rows(self, hidden: Float[Tensor, 'b _n d'], start: int, num_tokens: int) -> Float[Tensor, 'b n d']:
        first = constant(start % self.attn_window_size)  # counted from the beginning of the open segment
        tokens = torch.arange(num_tokens, device=hidden.device) + self.num_tokens_until(first)
        positions = tokens // self.segment_len * self.attn_window_size + tokens % self.segment_len
        return hidden.index_select(1, positions - first)

    # calls

    embedding_keywords = ('factorized_pos_emb',)

    def forward(
        self,
        x: Int[Tensor, 'b n'] | Float[Tensor, 'b n d'],
        return_loss: bool = False,
        return_loss_breakdown: bool = False,
        disable_flex_attn: bool = False,
        cache: ModelState | None = None,
        return_cache: bool = False,
        factorized_pos_emb: list[Tensor] | None = None,
        *,
        state: ModelState | None = None,
        return_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`Transformer.forward` with its arguments in the reference's order, plus two more.

        Args:
            return_loss_breakdown: without effect, as in the reference: the loss has a single part.
            factorized_pos_emb: precomputed position embeddings, from `axial_pos_emb(…, return_factorized=True)`.
        """
        check_flags(return_loss_breakdown=return_loss_breakdown)
        return super().forward(
            x,
            return_loss,
            cache=cache,
            return_cache=return_cache,
            disable_flex_attn=disable_flex_attn,
            factorized_pos_emb=factorized_pos_emb,
            # passed by name, because `torch.export` identifies dynamic shapes by argument names
            state=state,
            return_state=return_state,
            **kwargs,
        )

    # decoding steps

    def step_kind(self, position: int) -> StepKind:
        return replaced(super().step_kind(position), is_longterm=self.seq_index_is_longterm(position))

    def _decoding_embedding(self, position: Int[Tensor, ' 1']) -> AxialTables:
        offsets = torch.arange(self.neural_memory_segment_len, device=position.device)
        inner = self.axial_pos_emb.axis(1, offsets)
        return AxialTables(inner, of_chunk=inner + self._chunk_embedding(position))

    def _chunk_embedding(self, position: Int[Tensor, ' 1']) -> Float[Tensor, '1 d']:
        return self.axial_pos_emb.axis(0, position // self.neural_memory_segment_len)

    def _embedded_one(
        self, state: ModelBuffers, kind: StepKind, chunk_offset: Int[Tensor, ' 1']
    ) -> Float[Tensor, 'b 1 d']:
        if kind.is_longterm:
            assert self.longterm_mems is not None
            index = state.position % self.attn_window_size - self.segment_len
            x = self.longterm_mems.index_select(0, index).expand(len(state.token), 1, -1)
        else:
            x = self._token_embedding(state.token)
        return x + state.embedding.of_chunk.index_select(0, chunk_offset)

    def _chunk_ended(self, state: ModelBuffers) -> None:
        inner, of_chunk = state.embedding
        of_chunk.copy_(inner + self._chunk_embedding(state.position))


def _check_paper_order(**given: Any) -> None:
    for name, value in given.items():
        if value:
            raise ValueError(f'{name} cannot be combined with paper_order=True, got {value}')
