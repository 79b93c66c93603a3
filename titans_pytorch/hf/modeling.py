"""`TitansModel` and `TitansForCausalLM`: every architecture of this package in the form of Hugging Face's models."""

from __future__ import annotations

import inspect
from inspect import Parameter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from titans_pytorch.attention.rotary import Rotary
from titans_pytorch.configuration import build_model
from titans_pytorch.hf.cache import TitansCache
from titans_pytorch.hf.configuration import TitansConfig
from titans_pytorch.hf.packing import packed_documents
from titans_pytorch.hf.row_groups import check_past, padding_last, rank_of_last_token, rearranged
from titans_pytorch.models.documents import IGNORED, continues
from titans_pytorch.models.residual_streams import complete
from titans_pytorch.models.state import ModelState
from titans_pytorch.models.validation import check_labels
from titans_pytorch.utils.checks import (
    check_leaves_tokens,
    check_tensor,
    checked_mask,
    checked_token_ids,
    values_are_at_hand,
)
from titans_pytorch.utils.parameters import Resettable
from titans_pytorch.utils.shapes import Bool, Float, Int

CACHE = ALL_CACHE_NAMES[0]
"""Name of the cache among arguments and outputs: `cache`, or `past_key_values` in older versions of transformers."""
WITHOUT_EFFECT = {'output_attentions', 'max_length_q', 'max_length_k', 'cache_position'}
"""Further arguments that transformers passes to models; they follow from the others or change no result."""
OF_FORWARD = {'logits', 'labels', 'vocab_size', 'ignore_index'}
"""Arguments of loss functions that `forward` sets itself."""


class TitansPreTrainedModel(PreTrainedModel):
    """A model of this package, `transformer`, described by a `TitansConfig`."""

    config_class = TitansConfig
    config: TitansConfig
    supports_gradient_checkpointing = True
    _is_stateful = True  # rules out assisted generation, which takes tokens back
    _no_split_modules = ['MACBlock', 'PaperMACBlock', 'MAGBlock', 'MALBlock', 'LMMBlock']

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.transformer = build_model(config.model)
        for module in self.transformer.modules():  # keeps transformers from redrawing what the constructor drew
            is_drawn = not any(p.is_meta for p in module.parameters(recurse=False))
            module._is_hf_initialized = is_drawn  # type: ignore[assignment]

    def initialize_weights(self) -> None:
        """Draw the parameters that were not loaded; `from_pretrained` calls this last."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, Rotary):  # loading has made every parameter trainable
                module.freqs.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: Module) -> None:
        """Draw the parameters that a module holds itself, as its constructor does, except those that were loaded."""
        own = [*module.parameters(recurse=False)]
        loaded = [(p, p.clone()) for p in own if getattr(p, '_is_hf_initialized', False)]
        if len(loaded) < len(own):
            reset: Any = module._reset_own if isinstance(module, Resettable) else module.reset_parameters
            reset()
            for parameter, value in loaded:
                parameter.copy_(value)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does; for a model from the meta device, after `to_empty`."""
        self.transformer.reset_parameters()

    def get_input_embeddings(self) -> Module:
        return self.transformer.token_emb  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        self.transformer.token_emb = value
        self.transformer.num_tokens = value.num_embeddings

    @property
    def gradient_checkpointing(self) -> bool:  # type: ignore[override]  # a plain attribute there
        """Whether layers are recomputed in the backward pass, as with `checkpoint_layers`."""
        return self.transformer.checkpoint_layers

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:  # type: ignore[override]
        if (every_n_layers := options.get('every_n_layers', 1)) != 1:
            raise ValueError(f'every_n_layers must be 1, as all layers are checkpointed or none, got {every_n_layers}')
        self.transformer.checkpoint_layers = enable

    def _inputs(
        self,
        input_ids: Int[Tensor, 'b n'] | None,
        inputs_embeds: Float[Tensor, 'b n d'] | None,
        attention_mask: Int[Tensor, 'b m'] | None,
    ) -> tuple[Tensor, Bool[Tensor, 'b n'] | None]:
        """The tokens or embeddings to read, and the part of the mask that covers them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError('pass one of input_ids and inputs_embeds')
        if inputs_embeds is None:
            x = checked_token_ids('input_ids', input_ids, self.transformer.num_input_tokens)
        else:
            self.transformer._check_embeddings('inputs_embeds', inputs_embeds)
            x = inputs_embeds
        if attention_mask is None:
            return x, None
        check_tensor('attention_mask', attention_mask)
        if attention_mask.is_floating_point():
            attention_mask = attention_mask.long()
        if attention_mask.ndim == 2:
            attention_mask = attention_mask[:, -x.shape[1] :]
        mask = checked_mask('attention_mask', attention_mask, x.shape[0], x.shape[1])
        if values_are_at_hand(mask):
            check_leaves_tokens('attention_mask', mask)
        return x, mask

    def _documents(
        self,
        x: Tensor,
        mask: Bool[Tensor, 'b n'] | None,
        is_continued: bool,
        /,
        position_ids: Int[Tensor, 'b n'] | None = None,
        document_ids: Int[Tensor, 'b n'] | None = None,
        seq_idx: Int[Tensor, 'b n'] | None = None,
        cu_seq_lens_q: Int[Tensor, ' k'] | None = None,
        cu_seq_lens_k: Int[Tensor, ' k'] | None = None,
        **further: Any,
    ) -> Int[Tensor, 'b n'] | None:
        """The number of each token's document in its row, if a row holds several."""
        if further and (unknown := further.keys() - WITHOUT_EFFECT - self._loss_keywords):
            names = ', '.join(map(repr, sorted(unknown)))
            raise TypeError(f'{type(self).__name__} got an unexpected keyword argument {names}')
        if is_continued and position_ids is not None:
            raise ValueError(f'position_ids cannot go with {CACHE}, which counts the tokens of each row')
        shape = x.shape[0], x.shape[1]
        bounds = {'cu_seq_lens_q': cu_seq_lens_q, 'cu_seq_lens_k': cu_seq_lens_k}
        return packed_documents(mask, shape, position_ids, bounds, {'document_ids': document_ids, 'seq_idx': seq_idx})

    @property
    def _loss_keywords(self) -> set[str]:
        """Names of further arguments of the loss function."""
        return set()

    def _cache(
        self,
        given: TitansCache | None,
        use_cache: bool | None,
        x: Tensor,
        attention_mask: Int[Tensor, 'b m'] | None,
        documents: Int[Tensor, 'b n'] | None,
    ) -> TitansCache | None:
        """The cache that a call updates, if any."""
        batch, length = x.shape[:2]
        if documents is not None:
            if given is not None or use_cache:
                raise ValueError(f'several documents in a row leave no state to continue: leave out {CACHE}, use_cache')
            return None
        if given is None:
            wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
            return TitansCache() if wanted else None
        if not isinstance(given, TitansCache):
            raise TypeError(f'{CACHE} must be a TitansCache, got {type(given).__name__}')
        if given.batch_size not in (-1, batch):
            raise ValueError(f'{CACHE} must be of a batch of {batch}, as the input is, got one of {given.batch_size}')
        if attention_mask is not None and attention_mask.shape[1] > length:
            check_past(given.groups, attention_mask[:, :-length])
        return given

    def _wants_layers(self, output_hidden_states: bool | None) -> bool:
        return bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)

    def _read(
        self,
        x: Tensor,
        mask: Bool[Tensor, 'b n'] | None,
        documents: Int[Tensor, 'b n'] | None,
        cache: TitansCache | None,
        all_layers: bool,
    ) -> list[Float[Tensor, 'b n d']]:
        """Hidden states: if requested, those of the embedding and of every layer but the last; then the final ones.

        Padding at the end of a row has the hidden states of the row's last token, from which `generate` takes the next
        one.
        """
        if cache is not None:
            return cache.read(x, mask, lambda x, state: self._hidden_states(x, all_layers, state, return_state=True))
        order = None if mask is None else padding_last(mask)

        def ordered(x: Tensor | None) -> Any:
            return x if x is None or order is None else rearranged(x, order)

        if documents is not None:
            if all_layers:
                raise ValueError('output_hidden_states needs rows of one document each, and here a row holds several')
            own = {'mask': ordered(mask), 'document_ids': ordered(documents)}
            hidden = [self.transformer(ordered(x), **own, return_hidden=True)]
        else:  # models are causal: with padding on the right, each row is read as if it were alone
            hidden, _ = self._hidden_states(ordered(x), all_layers)
        return hidden if mask is None else [rearranged(layer, rank_of_last_token(mask)) for layer in hidden]

    def _hidden_states(
        self, x: Tensor, all_layers: bool, state: ModelState | None = None, return_state: bool = False
    ) -> tuple[list[Float[Tensor, 'b n d']], ModelState | None]:
        """`_read` of rows that share a state, and the next state."""
        model = self.transformer
        start = 0 if state is None else state.seq_index
        hidden = []

        def keep_input(_: Module, inputs: tuple[Any, ...]) -> None:
            hidden.append(model._token_rows(inputs[0], start, x.shape[1]))

        def keep_output(_: Module, __: Any, output: tuple[Any, ...]) -> None:
            hidden.append(model._token_rows(model.reduce_streams(complete(output[0])), start, x.shape[1]))

        hooks = []
        if all_layers:
            hooks = [model.expand_streams.register_forward_pre_hook(keep_input)]
            hooks += [layer.register_forward_hook(keep_output) for layer in model.layers[:-1]]
        try:
            last = model(x, state=state, return_state=return_state, return_hidden=True, disable_flex_attn=return_state)
        finally:
            for hook in hooks:
                hook.remove()
        return ([*hidden, last[0]], last[1]) if return_state else ([*hidden, last], None)


def _further_outputs(layers: list[Tensor], cache: TitansCache | None) -> dict[str, Any]:
    """Outputs that both models have, by name."""
    return {'hidden_states': tuple(layers) if len(layers) > 1 else None, CACHE: cache}


class TitansModel(TitansPreTrainedModel):
    """The model without its logits: it returns hidden states after the last norm, as `last_hidden_state`.

    It is called like `TitansForCausalLM`, but without `labels` and `logits_to_keep`.
    """

    _keys_to_ignore_on_load_unexpected = [r'transformer\.to_logits\.weight']

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.transformer.to_logits = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, 'b n'] | None = None,
        attention_mask: Int[Tensor, 'b m'] | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Float[Tensor, 'b n d'] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: TitansCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        cache = past_key_values if cache is None else cache
        x, mask = self._inputs(input_ids, inputs_embeds, attention_mask)
        documents = self._documents(x, mask, cache is not None, **kwargs)
        cache = self._cache(cache, use_cache, x, attention_mask, documents)
        layers = self._read(x, mask, documents, cache, self._wants_layers(output_hidden_states))
        return BaseModelOutputWithPast(last_hidden_state=layers[-1], **_further_outputs(layers, cache))


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """A language model: logits of the next token, a loss, and `generate`."""

    _tied_weights_keys = {'transformer.to_logits.weight': 'transformer.token_emb.weight'}

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.post_init()

    @property
    def base_model(self) -> TitansModel:  # type: ignore[override]
        """The model without its logits, sharing the same modules. TRL's trainers compute their losses from it."""
        model = TitansModel.__new__(TitansModel)
        nn.Module.__init__(model)
        model.config, model.transformer, model.training = self.config, self.transformer, self.training
        return model

    def get_output_embeddings(self) -> Module | None:
        return self.transformer.to_logits

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.transformer.to_logits = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, 'b n'] | None = None,
        attention_mask: Int[Tensor, 'b m'] | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Float[Tensor, 'b n d'] | None = None,
        labels: Int[Tensor, 'b n'] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Int[Tensor, ' k'] = 0,
        cache: TitansCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if there are labels.

        Args:
            input_ids: token ids; pass `inputs_embeds` instead for embeddings.
            attention_mask: 1 for tokens and 0 for padding, which is skipped wherever it is. It covers the tokens of
                this call, or all tokens since the cache began. Each row is read as if it were alone.
            past_key_values, cache: the cache that an earlier call returned, which this call continues and updates.
            labels: the tokens at the same positions, or −100 to ignore one. Padding, the first token after padding, and
                the first token of a document are ignored.
            use_cache: return a cache. Default: as configured, but not in training mode or with labels.
            output_hidden_states: also return the hidden states of the embedding and of every layer, for the last layer
                after the final norm. Hooks read them, so no other thread may call the model meanwhile.
            logits_to_keep: number of last positions to return logits for, or their indices; 0 for all.
            kwargs: where the documents of packed rows begin, given by `position_ids`, which count each document from 0,
                or by `seq_idx`, `cu_seq_lens_q` or `document_ids`. Documents do not see each other, and there is no
                cache. Also further arguments of the loss function, such as `num_items_in_batch` of `Trainer`.

        Raises:
            ValueError, TypeError: for invalid arguments, naming the argument, the expectation and the value.
        """
        cache = past_key_values if cache is None else cache
        x, mask = self._inputs(input_ids, inputs_embeds, attention_mask)
        documents = self._documents(x, mask, cache is not None, **kwargs)
        if labels is not None:
            if 'shift_labels' in kwargs and (mask is not None or documents is not None):
                raise ValueError('shift_labels cannot go with a mask or several documents, which labels are adapted to')
            use_cache = bool(use_cache)
            labels = self._labels(labels, x, mask, documents)
            if not isinstance(logits_to_keep, int) or logits_to_keep:
                raise ValueError('logits_to_keep cannot go with labels, whose loss needs the logits of every position')
        cache = self._cache(cache, use_cache, x, attention_mask, documents)
        all_layers = self._wants_layers(output_hidden_states)
        is_step = x.shape[1] == 1 and inputs_embeds is None and mask is None and not all_layers
        layers: list[Tensor] = []
        if cache is not None and cache.can_step and is_step and not torch.is_grad_enabled():
            logits = cache.step(self.transformer, x.squeeze(1)).unsqueeze(1)
        else:
            layers = self._read(x, mask, documents, cache, all_layers)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.transformer.to_logits(layers[-1][:, kept])  # type: ignore[misc]
            if cache is not None and mask is not None:
                columns = torch.arange(x.shape[1], device=x.device)[kept]
                logits = cache.with_logits_of_steps(logits, columns, x.shape[1])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.num_tokens, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **_further_outputs(layers, cache))

    def _labels(
        self, labels: Any, x: Tensor, mask: Bool[Tensor, 'b n'] | None, documents: Int[Tensor, 'b n'] | None
    ) -> Int[Tensor, 'b n']:
        """Checked labels, in which tokens that cannot be predicted are ignored."""
        labels = checked_token_ids('labels', labels, None, x.shape[0], x.shape[1])
        if mask is not None or documents is not None:
            labels = F.pad(labels[:, 1:].masked_fill(~continues(mask, documents), IGNORED), (1, 0), value=IGNORED)
        check_labels(labels[:, 1:], self.config.num_tokens)
        return labels

    @property
    def _loss_keywords(self) -> set[str]:
        named = {Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY}
        parameters = inspect.signature(self.loss_function).parameters.values()
        return {p.name for p in parameters if p.kind in named} - OF_FORWARD

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes the cache

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if next_sequence_length is not None and next_sequence_length < 1:  # transformers would slice by it
            name, given = ('input_ids', input_ids) if inputs_embeds is None else ('inputs_embeds', inputs_embeds)
            read = given.shape[1] - next_sequence_length
            raise ValueError(
                f'{name} must go beyond the {read} tokens that {CACHE} has read, got {given.shape[1]}: pass the whole '
                'text, or new tokens alone with an attention_mask of the whole text'
            )
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        # a generated token is never padding
        if next_sequence_length == 1 and not kwargs.get('is_first_iteration'):
            inputs.pop('attention_mask', None)
        return inputs
