"""What models of sliding-window attention and neural memory share: everything but how a block composes its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import Module, ModuleDict

from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.models.base import Transformer
from titans_pytorch.models.block import Block
from titans_pytorch.models.feedforward import FeedForward
from titans_pytorch.models.validation import checked_memory_settings, layers_with_memory
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.utils.checks import check_positive, checked_arguments


class HybridBlock(Block):
    """A block with named parts. Subclasses say which of them are branches of the residual stream, and compose them.

    Args:
        memory, attention: `None` if the layer has none.
        connection: constructs the connection of a branch to the residual stream.
    """

    branch_names: tuple[str, ...]

    def __init__(
        self,
        dim: int,
        memory: NeuralMemory | None,
        attention: SegmentedAttention | None,
        feedforward: nn.Sequential,
        connection: Callable[[], Module],
    ):
        super().__init__()
        self.memory = memory
        self.attention = attention
        self.feedforward = feedforward
        present = [name for name in self.branch_names if getattr(self, name) is not None]
        self.branches = ModuleDict({name: connection() for name in present})

    @property
    def connections(self) -> Sequence[Module | None]:
        return [self.branches[name] if name in self.branches else None for name in self.branch_names]


class HybridTransformer(Transformer):
    """Base class of models whose blocks are all of one class, which a subclass names.

    Args:
        num_tokens: size of the vocabulary; `None` for a model of embeddings, without logits.
        dim: width of the model.
        depth: number of layers.
        segment_len: number of positions that attention looks back; also the default chunk size of the memories.
        neural_memory_segment_len: chunk size of the memories, in tokens; a chunk is stored as one step.
        neural_memory_batch_size: memory-batch size of the memories, in tokens. Default: all gradients are taken at the
            initial weights.
        neural_memory_layers: layers that have a memory, counted from 1. Default: all.
        neural_memory_model: memory network, copied for each layer. Default: that of `NeuralMemory`.
        neural_memory_kwargs: further arguments of `NeuralMemory`. Modules among them, such as an activation with
            parameters, are shared by all memories.
        num_persist_mem_tokens: learned keys and values that every token sees (persistent memory, Titans eq. 19).
        dim_head, heads: width and number of attention heads.
        ff_mult: sets the hidden width: `ff_mult * dim` for an ungated feedforward. The gated one used here is two
            thirds as wide, so that it has as many weights.
        num_residual_streams: streams of the hyper-connections; 1 is a plain residual.
        use_flex_attn: use FlexAttention on a CUDA device.
        token_emb: a module that maps token ids, or any features, to embeddings, in place of `nn.Embedding`.
        checkpoint_layers: save only the input of each layer for the backward pass, which recomputes the layer. For
            sequences so long that even one layer does not fit, see `checkpoint_every` of `NeuralMemory`.
    """

    block: type[HybridBlock]
    has_attention = True

    def __init__(
        self,
        *,
        num_tokens: int | None,
        dim: int,
        depth: int,
        segment_len: int | None = None,
        neural_memory_segment_len: int | None = None,
        neural_memory_batch_size: int | None = None,
        neural_memory_layers: Sequence[int] | None = None,
        neural_memory_model: Module | None = None,
        neural_memory_kwargs: Mapping[str, Any] = {},
        num_persist_mem_tokens: int = 0,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        num_residual_streams: int = 1,
        use_flex_attn: bool = False,
        token_emb: Module | None = None,
        checkpoint_layers: bool = False,
    ):
        dim, depth, num_residual_streams, num_persist_mem_tokens = checked_arguments(
            HybridTransformer,
            locals(),
            positive=['dim', 'depth', 'num_residual_streams'],
            not_negative=['num_persist_mem_tokens'],
        )
        if self.has_attention:
            segment_len, dim_head, heads = check_positive(segment_len=segment_len, dim_head=dim_head, heads=heads)
        elif segment_len is not None:
            (segment_len,) = check_positive(segment_len=segment_len)
        chunk_size = segment_len if neural_memory_segment_len is None else neural_memory_segment_len
        if chunk_size is None:
            raise TypeError('neural_memory_segment_len, the tokens of a memory chunk, or segment_len must be given')
        chunk_size, neural_memory_batch_size = checked_memory_settings(
            dim, chunk_size, neural_memory_batch_size, neural_memory_model, neural_memory_kwargs
        )
        memory_layers = layers_with_memory(neural_memory_layers, depth)
        super().__init__(num_tokens=num_tokens, dim=dim, token_emb=token_emb)
        self.segment_len = segment_len
        self.neural_memory_segment_len = chunk_size
        self.neural_memory_batch_size = neural_memory_batch_size

        def memory() -> NeuralMemory:
            return NeuralMemory(
                dim=dim,
                chunk_size=self.neural_memory_segment_len,
                batch_size=neural_memory_batch_size,
                model=neural_memory_model,
                **neural_memory_kwargs,
            )

        def attention() -> SegmentedAttention:
            assert segment_len is not None
            return SegmentedAttention(
                dim=dim,
                segment_len=segment_len,
                dim_head=dim_head,
                heads=heads,
                num_persist_mem_tokens=num_persist_mem_tokens,
                sliding=True,
                use_flex_attn=use_flex_attn,
            )

        def block(layer: int, connection: Callable[[], Module]) -> HybridBlock:
            own_memory = memory() if layer in memory_layers else None
            own_attention = attention() if self.has_attention else None
            return self.block(dim, own_memory, own_attention, FeedForward(dim, ff_mult), connection)

        self._stack(
            num_residual_streams,
            lambda connection: [block(layer, connection) for layer in range(1, depth + 1)],
            use_flex_attn,
            checkpoint_layers,
        )
