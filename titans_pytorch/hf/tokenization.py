"""Vocabularies of training runs as tokenizers in the form of Hugging Face, and back."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from titans_pytorch.training.vocabulary import BPEVocabulary, ByteVocabulary, Vocabulary, byte_of_symbol

SYMBOLS = {byte: symbol for symbol, byte in byte_of_symbol().items()}
"""The symbol of each byte in byte-level BPE."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the UTF-8 bytes of a text; the ids are the values of the bytes."""
    tokenizer = Tokenizer(BPE({SYMBOLS[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _pretrained(tokenizer)


def tokenizer_of(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """A tokenizer with the token ids of `vocabulary`.

    Its first special token pads batches and ends texts; without special tokens, byte 0 does, which texts do not
    contain.
    """
    if isinstance(vocabulary, ByteVocabulary):
        return byte_tokenizer()
    return _pretrained(Tokenizer.from_str(json.dumps(vocabulary.to_dict()['tokenizer'])))


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Inverse of `tokenizer_of`, for any byte-level tokenizer.

    Raises:
        ValueError: for a tokenizer that is not byte-level, or changes texts.
    """
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    stored['added_tokens'] = [token for token in stored['added_tokens'] if token['content'] != SYMBOLS[0]]
    if stored['model'].get('vocab') == {SYMBOLS[byte]: byte for byte in range(256)}:
        return ByteVocabulary()
    return BPEVocabulary(Tokenizer.from_str(json.dumps(stored)))


def _pretrained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    end = special[0] if special else SYMBOLS[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=end,
        eos_token=end,
        padding_side='left',
        model_input_names=['input_ids', 'attention_mask'],
        split_special_tokens=not special,  # the symbol of byte 0 is a letter, which texts may contain
        clean_up_tokenization_spaces=False,
    )
