"""`TitansConfig`, the configuration of a model in the form of Hugging Face."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from titans_pytorch.configuration import ARCHITECTURES, NOT_STORED, model_config
from titans_pytorch.utils.checks import check_positive

POSITIVE = ('num_tokens', 'dim', 'depth', 'dim_head', 'heads', 'num_residual_streams')


class TitansConfig(PreTrainedConfig):
    """The architecture of a model and the arguments of its constructor, as JSON values.

        sizes = preset('170M', memory_batch=16)
        config = TitansConfig(
            architecture='mag', num_tokens=256, segment_len=512, neural_memory_segment_len=16, **sizes
        )

    Names shared with other models can be passed and read too: `vocab_size`, `hidden_size`, `num_hidden_layers`,
    `num_attention_heads` and `head_dim`.

    Args:
        architecture: a key of `titans_pytorch.configuration.ARCHITECTURES`; the fifth architecture is `'mac'` with
            `paper_order=True`.
        num_tokens, dim, …, checkpoint_layers: arguments of the constructor, described there. `None` takes the default
            of the architecture. `neural_memory_model` and `neural_memory_kwargs` are given as for `model_config`.
        use_cache: whether calls in evaluation mode return a `TitansCache` unless told otherwise.
        tie_word_embeddings: use the token embedding for the logits too.
        pad_token_id, bos_token_id, eos_token_id: special tokens, if the vocabulary has them.

    Raises:
        ValueError, TypeError: for an invalid value, naming the field, the expectation and the value.
    """

    model_type = 'titans'
    attribute_map: ClassVar[dict[str, str]] = {
        'vocab_size': 'num_tokens',
        'hidden_size': 'dim',
        'num_hidden_layers': 'depth',
        'num_attention_heads': 'heads',
        'head_dim': 'dim_head',
    }
    keys_to_ignore_at_inference = ['past_key_values', 'cache']

    architecture: str = 'mac'
    num_tokens: int = 256
    dim: int = 384
    depth: int = 8
    segment_len: int | None = 32
    neural_memory_segment_len: int | None = None
    neural_memory_batch_size: int | None = None
    neural_memory_layers: list[int] | None = None
    neural_memory_model: dict[str, Any] | None = None
    neural_memory_kwargs: dict[str, Any] | None = None
    num_persist_mem_tokens: int | None = None
    dim_head: int | None = None
    heads: int | None = None
    ff_mult: float | None = None
    num_residual_streams: int | None = None
    use_flex_attn: bool | None = None
    checkpoint_layers: bool | None = None

    # memory as context only
    num_longterm_mem_tokens: int | None = None
    neural_mem_gate_attn_output: bool | None = None
    neural_mem_weight_residual: bool | None = None
    neural_memory_add_value_residual: bool | None = None
    neural_memory_qkv_receives_diff_views: bool | None = None
    sliding_window_attn: bool | None = None
    paper_order: bool | None = None
    position_length: int | None = None
    detach_context: bool | None = None

    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # before the base class sets further attributes, the aliases among them
        for alias in kwargs.keys() & self.attribute_map.keys():
            setattr(self, alias, kwargs.pop(alias))
        # transformers keeps names that it does not know, so a misspelt argument would silently get its default
        for name in kwargs:
            for intended in get_close_matches(name, ('architecture', *ARGUMENTS, *self.attribute_map), 1, 0.8):
                raise TypeError(f'TitansConfig has no argument {name!r}; did you mean {intended!r}?')
        model_config(self.architecture)  # refuses an unknown one
        defaults = constructor_defaults(self.architecture)
        for name in ARGUMENTS:
            if getattr(self, name) is None and defaults.get(name) is not None:
                setattr(self, name, defaults[name])
        check_positive(**{name: getattr(self, name) for name in POSITIVE})
        for name, value in self.model.items():
            setattr(self, name, value)
        super().__post_init__(**kwargs)

    @property
    def model(self) -> dict[str, Any]:
        """The configuration for `build_model`."""
        arguments = {name: value for name in ARGUMENTS if (value := getattr(self, name)) is not None}
        return model_config(self.architecture, **arguments)


def constructor_defaults(architecture: str) -> dict[str, Any]:
    """Default of each argument of an architecture's constructor, `None` where there is none."""
    parameters = inspect.signature(ARCHITECTURES[architecture]).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters if p.name not in NOT_STORED}


ARGUMENTS = tuple({name: None for architecture in ARCHITECTURES for name in constructor_defaults(architecture)})
"""Arguments of the constructors, in their order."""
