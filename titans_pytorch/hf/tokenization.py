"""Tokenizers in the form of Hugging Face for the vocabularies of `train_mac.py`."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the bytes of the text in UTF-8, and their ids the values of the bytes.

    Byte 0, which texts do not contain, pads batches and ends a text.
    """
    symbols = bytes_to_unicode()
    tokenizer = Tokenizer(BPE({symbols[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=symbols[0],
        eos_token=symbols[0],
        padding_side='left',
        model_input_names=['input_ids', 'attention_mask'],
        split_special_tokens=True,  # the symbol of byte 0 is a letter, which texts may contain
        clean_up_tokenization_spaces=False,
    )
