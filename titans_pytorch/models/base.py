"""`Transformer`, the base class of every model: embedding, blocks around a residual stream, logits, and states.

Models differ in how their blocks compose memory and attention: see `block.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear, Module, ModuleList

from titans_pytorch.attention.flex import segmented_flex_attention
from titans_pytorch.memory.packing import PackedDocuments
from titans_pytorch.memory.state import LayerSurprises
from titans_pytorch.models.block import Block, Carried, LayerState
from titans_pytorch.models.decoding import StepwiseDecoding
from titans_pytorch.models.documents import (
    IGNORED,
    DocumentGroup,
    Documents,
    PackedRows,
    checked_documents,
    continues,
)
from titans_pytorch.models.residual_streams import complete, residual_streams
from titans_pytorch.models.state import ModelState
from titans_pytorch.models.validation import check_beside_documents, check_labels, checked_model_state
from titans_pytorch.utils.checks import (
    check_flags,
    check_floating,
    check_integer,
    check_module,
    check_not_traced,
    check_positive,
    check_shape,
    check_tensor,
    checked_token_ids,
    described,
    is_integral,
)
from titans_pytorch.utils.functional import can_checkpoint, checkpointed, compile_each_length
from titans_pytorch.utils.parameters import Resettable, first_weight, reset_parameters
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Bool, Float, Int


class Transformer(StepwiseDecoding, Resettable):
    """Base class of the models: logits or a loss, a state between calls, and sampling. Subclasses build `layers`.

    A subclass in which positions are not just tokens overrides `num_positions`, `num_tokens_until`, `_embedded`,
    `_token_rows` and the methods that `StepwiseDecoding` names. It lists further arguments of its `_embedded` in
    `embedding_keywords`.

    Args:
        num_tokens: size of the vocabulary. `None` for a model without embedding and logits: its input is (batch,
            length, dim), and its calls return hidden states.
        dim: width of the model.
        token_emb: a module that maps the input, token ids or any features, to (batch, length, dim), in place of
            `nn.Embedding`. It must embed each position independently, because pieces and steps see only their own.
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
        """Build the layers and the logits.

        Args:
            num_residual_streams: streams of the hyper-connections; 1 is a plain residual.
            blocks: builds the blocks, given a constructor of connections.
        """
        connection, self.expand_streams, self.reduce_streams = residual_streams(num_residual_streams, self.dim)
        self.layers = ModuleList(blocks(connection))
        self.norm = nn.RMSNorm(self.dim)
        self.to_logits = None if self.num_tokens is None else Linear(self.dim, self.num_tokens, bias=False)
        self.use_flex_attn = use_flex_attn
        self.checkpoint_layers = checkpoint_layers

    def reset_parameters(self) -> None:
        """Initialise every parameter anew, as the constructor does.

        Each memory then draws its own network, whereas the constructor copies `neural_memory_model`.

        Raises:
            TypeError: if `token_emb` or `neural_memory_model` has parameters but no method `reset_parameters()`.
        """
        for part in self.children():
            if part is self.layers:
                self._reset_own()
            reset_parameters(part)

    # positions

    def num_positions(self, num_tokens: int) -> int:
        """Number of positions up to and including the `num_tokens`-th token."""
        return num_tokens

    def num_tokens_until(self, position: int) -> int:
        """Number of tokens before `position`."""
        return position

    def _embedded(self, x: Tensor, start: int) -> Float[Tensor, 'b n d']:
        """Embeddings of the positions that the tokens `x` occupy, beginning at `start`."""
        return self._token_embedding(x)

    def _token_rows(self, hidden: Float[Tensor, 'b _n d'], start: int, num_tokens: int) -> Float[Tensor, 'b n d']:
        """Hidden states of `num_tokens` tokens, picked from those of all positions, which begin at `start`."""
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

    if TYPE_CHECKING:  # `Module.__call__` is untyped, so callers would not see the signatures of `forward`

        @overload
        def __call__(
            self, x: Tensor, return_loss: bool = False, *, return_surprises: Literal[True], **kwargs: Any
        ) -> Any: ...

        @overload
        def __call__(
            self, x: Tensor, return_loss: bool = False, *, return_state: Literal[True], **kwargs: Any
        ) -> tuple[Tensor, ModelState]: ...

        @overload
        def __call__(
            self, x: Tensor, return_loss: bool = False, *, return_cache: Literal[True], **kwargs: Any
        ) -> tuple[Tensor, ModelState]: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            return_loss: bool = False,
            *,
            return_state: Literal[False] = False,
            return_cache: Literal[False] = False,
            return_surprises: Literal[False] = False,
            **kwargs: Any,
        ) -> Tensor: ...

        @overload
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(
        self,
        x: Int[Tensor, 'b n'] | Float[Tensor, 'b n d'],
        return_loss: bool = False,
        *,
        state: ModelState | None = None,
        return_state: bool = False,
        return_hidden: bool = False,
        labels: Int[Tensor, 'b n'] | None = None,
        reduction: Literal['mean', 'sum', 'none'] = 'mean',
        mask: Bool[Tensor, 'b n'] | None = None,
        document_ids: Int[Tensor, 'b n'] | None = None,
        cache: ModelState | None = None,
        return_cache: bool = False,
        disable_flex_attn: bool = False,
        store: bool = True,
        return_surprises: bool = False,
        **embedding_kwargs: Any,
    ) -> Any:
        """Compute logits of the next token, the loss, or hidden states.

        Args:
            x: token ids (batch, length) of any integer dtype; embeddings (batch, length, dim); or the input of
                `token_emb`.
            return_loss: return the mean cross-entropy, in nats, of predicting x[:, 1:] from x[:, :-1].
            state: the state returned by the previous call, which `x` continues. With `return_loss` or `labels`, the
                last token of `x` is not read; pass it again as the first token of the next call.
            return_state: also return the state, for the next call.
            return_hidden: return the hidden states after the last norm, (batch, length, dim), instead of logits.
            labels: return the loss of predicting these, (batch, length), instead of `x` itself. They are aligned with
                `x`, as in Hugging Face's models: labels[:, t] is the token at position t, predicted from x[:, :t], so
                labels[:, 0] is not used; −100 ignores a position. The loss is the mean over the remaining labels, and 0
                if there are none. With labels, `x` may be embeddings. `state`, `mask` and `document_ids` act as with
                `return_loss`: padding and the first token of a document are not predicted, whatever their label.
            reduction: of the loss, as in `torch.nn.functional.cross_entropy`: 'mean'; 'sum', for batches read in parts,
                where parts with few labels would otherwise weigh as much as the others; or 'none', the loss of each
                prediction, (batch, length − 1), with 0 where there is none.
            mask: true (or 1) for tokens, false (or 0) for padding, on either side. Results for padding are meaningless.
            document_ids: integers; a new document begins where they change within a row, and after padding. Documents
                do not see each other, by attention or by memory, and each counts its positions from 0. `mask` and
                `document_ids` synchronise with the device, and cannot be compiled with `fullgraph=True`.
            cache: like `state`, except that `x` starts at the very beginning of the sequence; only what is not yet read
                is processed.
            return_cache: another name for `return_state`.
            disable_flex_attn: do not use FlexAttention in this call.
            store: false to read the memories without writing to them: every token reads the weights in `state`, and the
                returned state has the same weights, momentum and open chunk. Attention is not affected.
            return_surprises: also return the surprises of every memory layer, for the chunks that this call completes:
                a dict from the layer's number, counted from 1 as in `neural_memory_layers`, to `Surprises`, that is,
                losses and step sizes, (batch, heads, rows) each. A row is a pair of key and value. A layer stores one
                row for each position, or `num_kv_per_token`; long-term memory tokens are positions too. Surprises of
                consecutive pieces, joined, are those of a single call. Like the loss, they have a graph.
        Returns:
            logits (batch, length, num_tokens), hidden states, or the loss; with `return_state` or `return_surprises` a
            tuple with the state, the surprises, or both in this order.

        Raises:
            ValueError, TypeError: for invalid arguments, naming the argument, the expectation and the value.
        """
        check_not_traced(type(self).__name__)
        check_flags(
            return_loss=return_loss,
            return_state=return_state,
            return_hidden=return_hidden,
            return_cache=return_cache,
            disable_flex_attn=disable_flex_attn,
            store=store,
            return_surprises=return_surprises,
        )
        if not embedding_kwargs.keys() <= {*self.embedding_keywords}:
            raise TypeError(self._unknown_keywords(embedding_kwargs))
        x = self._checked_input(x)
        compile_each_length(x.shape[1])
        return_state = return_state or return_cache
        return_loss = return_loss or labels is not None
        if not isinstance(reduction, str) or reduction not in ('mean', 'sum', 'none'):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {described(reduction)}")
        if return_loss and return_hidden:
            raise ValueError('return_hidden returns hidden states, return_loss and labels the loss: choose one of them')
        if mask is not None or document_ids is not None:
            mask, document_ids = checked_documents(mask, document_ids, x.shape[0], x.shape[1])
            has_state = state is not None or cache is not None or return_state
            check_beside_documents(has_state, return_surprises)
        if cache is not None and (state is not None or return_loss):
            other = 'state' if state is not None else 'return_loss' if labels is None else 'labels'
            raise ValueError(f'with {other}, pass the tokens after the cache as x, and the cache as state')
        x, state = self._continuation(x, state, cache)

        if return_loss:
            x, labels, mask, document_ids = self._with_labels(x, labels, mask, document_ids)
        options: dict[str, Any] = {
            'disable_flex_attn': disable_flex_attn,
            'store': store,
            'embedding_kwargs': embedding_kwargs,
        }
        if mask is None and document_ids is None:
            hidden, after, surprises = self._read(
                x, state, return_state=return_state, return_surprises=return_surprises, **options
            )
        else:
            hidden = self._read_documents(x, mask, document_ids, **options)
            after = surprises = None

        out = self.norm(hidden)
        if not return_hidden and self.to_logits is not None:
            out = self.to_logits(out)
        if labels is not None:
            out = _loss(out, labels, reduction)
        if return_surprises:
            return (out, after, surprises) if return_state else (out, surprises)
        return (out, after) if return_state else out

    def _unknown_keywords(self, given: Mapping[str, Any]) -> str:
        own = {**inspect.signature(type(self).forward).parameters, **inspect.signature(Transformer.forward).parameters}
        known = [name for name, p in own.items() if name != 'self' and p.kind is not inspect.Parameter.VAR_KEYWORD]
        unknown = ', '.join(repr(name) for name in given if name not in self.embedding_keywords)
        return f'{type(self).__name__} got an unexpected keyword argument {unknown}; a call takes {", ".join(known)}'

    @property
    def num_input_tokens(self) -> int | None:
        """Size of the embedding, which may be larger than `num_tokens`; `None` if it is not an `nn.Embedding`."""
        return self.token_emb.num_embeddings if isinstance(self.token_emb, nn.Embedding) else None

    def _checked_input(self, x: Any) -> Tensor:
        check_tensor('x', x)
        if self.num_input_tokens is not None and not (x.is_floating_point() and x.ndim == 3):
            return checked_token_ids('x', x, self.num_input_tokens)
        if self._takes_embeddings(x):
            self._check_embeddings('x', x)
        elif x.ndim < 2 or 0 in x.shape:
            raise ValueError(f'x must be (batch, length, …), none of them empty, got {tuple(x.shape)}')
        return x.long() if is_integral(x) and x.ndim == 2 else x

    def _check_embeddings(self, name: str, x: Any) -> None:
        weight = first_weight(self.norm, self)
        check_floating(name, x, None if weight is None else weight.dtype)
        check_shape(name, x, batch=None, length=None, dim=self.dim)

    def _continuation(
        self, x: Tensor, state: ModelState | None, cache: ModelState | None
    ) -> tuple[Tensor, ModelState | None]:
        """The input not yet read, and the checked state that it continues."""
        if state is None and cache is None:
            return x, None
        before = checked_model_state(cache if state is None else state, self._blocks, len(x))
        if cache is None:
            return x, before
        num_read = self.num_tokens_until(before.seq_index)
        if num_read >= x.shape[1]:
            raise ValueError(f'x must go beyond the {num_read} tokens in the cache, got {x.shape[1]}')
        return x[:, num_read:], before

    def _with_labels(
        self,
        x: Int[Tensor, 'b n'] | Float[Tensor, 'b n d'],
        labels: Int[Tensor, 'b n'] | None,
        mask: Bool[Tensor, 'b n'] | None,
        document_ids: Int[Tensor, 'b n'] | None,
    ) -> tuple[
        Int[Tensor, 'b n-1'] | Float[Tensor, 'b n-1 d'],
        Int[Tensor, 'b n-1'],
        Bool[Tensor, 'b n-1'] | None,
        Int[Tensor, 'b n-1'] | None,
    ]:
        """The input without its last position, and the label that each remaining position is to predict."""
        if self.to_logits is None:
            raise ValueError('return_loss and labels need logits, and this model has no num_tokens')
        if labels is None:
            if not is_integral(x) or x.ndim != 2:
                raise ValueError(f'return_loss predicts tokens from tokens: x must be token ids, got {described(x)}')
            labels = x
        else:
            labels = checked_token_ids('labels', labels, None, x.shape[0], x.shape[1])
        if x.shape[1] < 2:
            raise ValueError(f'x must hold at least 2 tokens to predict one from another, got {x.shape[1]}')
        labels = labels[:, 1:]
        if mask is not None or document_ids is not None:
            labels = labels.masked_fill(~continues(mask, document_ids), IGNORED)
        check_labels(labels, getattr(self.to_logits, 'out_features', self.num_tokens))
        mask, document_ids = (None if t is None else t[:, :-1] for t in (mask, document_ids))
        return x[:, :-1], labels, mask, document_ids

    def _read_documents(
        self,
        x: Tensor,
        mask: Bool[Tensor, 'b n'] | None,
        document_ids: Int[Tensor, 'b n'] | None,
        *,
        disable_flex_attn: bool,
        store: bool,
        embedding_kwargs: Mapping[str, Any],
    ) -> Float[Tensor, 'b n d']:
        """`_read` with each document read separately."""

        def read(rows: Tensor, packed: PackedDocuments | None = None) -> Float[Tensor, 'r m d']:
            hidden, *_ = self._read(
                rows,
                None,
                disable_flex_attn=disable_flex_attn,
                store=store,
                embedding_kwargs=embedding_kwargs,
                documents=packed,
            )
            return hidden

        documents = Documents.of(mask, document_ids, (x.shape[0], x.shape[1]), x.device)
        if not documents.lengths:  # the only token is the last one, which is predicted but not read
            return read(x)
        in_flex = self.use_flex_attn and x.is_cuda and not disable_flex_attn and self._attentions
        packed = self._packed(documents) if store and not in_flex else None
        if packed is not None:
            return packed.batch(read(packed.rows(x), packed.documents))
        groups = documents.groups()
        return DocumentGroup.batch(groups, [read(group.rows(x)) for group in groups])

    def _packed(self, documents: Documents) -> PackedRows | None:
        """The documents in the rows they came in, if every part of the model can read them so, and quickly."""
        memories = self._memories
        # segments, and embeddings of positions, would have to begin anew for each document too
        if self.embedding_keywords or not all(attention.sliding for attention in self._attentions):
            return None
        # by measurement, deep memories, whose steps wait for each other, are faster with one row per document; and
        # their kernels take at most two states
        if not all(memory.is_linear and memory.reads_documents for memory in memories):
            return None
        first = memories[0] if memories else None  # chunks and memory batches are the same in all layers
        chunk_size = 1 if first is None else first.store_chunk_size
        alignment = chunk_size if first is None or first.batch_size is None else first.batch_size
        # one token of padding keeps the last query from reading the memory that begins anew
        return documents.packed(chunk_size, alignment, max([1, *(memory.conv_context for memory in memories)]))

    def _read(
        self,
        x: Tensor,
        state: ModelState | None,
        *,
        disable_flex_attn: bool,
        store: bool,
        embedding_kwargs: Mapping[str, Any],
        return_state: bool = False,
        return_surprises: bool = False,
        documents: PackedDocuments | None = None,
    ) -> tuple[Float[Tensor, 'b n d'], ModelState | None, LayerSurprises]:
        """Hidden states of the tokens `x`, before the last norm; the state after them; and surprises, if requested."""
        start = 0 if state is None else state.seq_index
        layer_states = self._layer_states(state)

        hidden = self._embedded(x, start, **embedding_kwargs)
        kwargs: dict[str, Any] = {'store': store, 'return_state': return_state, 'return_surprises': return_surprises}
        kwargs['documents'] = documents
        kwargs |= self._attention_kwargs(hidden, layer_states, disable_flex_attn)
        end = start + hidden.shape[1]
        carried, hidden = Carried(), self.expand_streams(hidden)
        after: list[LayerState] = []
        for block, layer_state in zip(self._blocks, layer_states):
            call: Callable[..., Any] = block
            if self.checkpoint_layers and can_checkpoint():
                call = checkpointed(block, block.memory is None or not block.memory.uses_func_transforms)
            hidden, carried, layer_state = call(hidden, carried, layer_state, start, **kwargs)
            after.append(layer_state)
        hidden = self._token_rows(self.reduce_streams(complete(hidden)), start, x.shape[1])
        after_all = self._model_state(end, after) if return_state else None
        with_memory = [number for number, block in enumerate(self._blocks, start=1) if block.memory is not None]
        return hidden, after_all, dict(zip(with_memory, carried.surprises))

    def _attention_kwargs(self, x: Tensor, states: list[LayerState], disable_flex_attn: bool) -> dict[str, Any]:
        """Keyword arguments of every attention, which share one block mask."""
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


def _loss(
    logits: Float[Tensor, 'b n l'], labels: Int[Tensor, 'b n'], reduction: str
) -> Float[Tensor, ''] | Float[Tensor, 'b n']:
    """Cross-entropy, in float32 at least; the mean over no labels is 0."""
    loss = F.cross_entropy(
        at_least_float32(logits).flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction='none' if reduction == 'none' else 'sum',
    )
    if reduction == 'none':
        return loss.view_as(labels)
    return loss / (labels != IGNORED).sum().clamp(min=1) if reduction == 'mean' else loss
