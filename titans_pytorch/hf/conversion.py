"""Conversion between the folder of a training run and a folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from titans_pytorch.hf.configuration import TitansConfig
from titans_pytorch.hf.modeling import TitansForCausalLM
from titans_pytorch.hf.tokenization import tokenizer_of, vocabulary_of
from titans_pytorch.training.checkpoints import write_checkpoint
from titans_pytorch.training.run_folder import DESCRIPTION, describe_run
from titans_pytorch.training.runs import open_run

CHECKPOINT = 'pretrained.pt'
"""Checkpoint of a run that was converted from a Hugging Face folder."""


def run_to_pretrained(run: str | Path, folder: str | Path, checkpoint: str | Path | None = None) -> None:
    """Write the model and the tokenizer of a run of `train_mac.py` to `folder`, in the form of Hugging Face.

        run_to_pretrained('runs/full', 'titans-full')
        generator = pipeline('text-generation', 'titans-full')

    This changes settings of the whole process, as `open_run` does.

    Args:
        run, checkpoint: as in `open_run`.

    Raises:
        RunError: if there is no such run or checkpoint, or if a file is damaged.
        OSError: if `folder` is a file, or cannot be written to.
    """
    opened = open_run(run, checkpoint, device='cpu', precision='fp32')
    Path(folder).mkdir(parents=True, exist_ok=True)  # transformers only logs an error if it is a file
    tokenizer = tokenizer_of(opened.vocabulary)
    special = {'pad_token_id': tokenizer.pad_token_id, 'eos_token_id': tokenizer.eos_token_id}
    model = TitansForCausalLM(TitansConfig(**opened.config, **special))
    model.transformer.load_state_dict(opened.model.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrained_to_run(folder: str | Path, run: str | Path) -> None:
    """Inverse of `run_to_pretrained`: write the model in `folder` as a new run.

    `train_mac.py --init-from` continues training from its checkpoint.

    Raises:
        FileExistsError: if `run` already holds a run.
        OSError, ValueError: if there is no complete Titans model with a byte-level tokenizer in `folder`.
    """
    run = Path(run)
    if (run / DESCRIPTION).exists():
        raise FileExistsError(f'there is a run in {run} already: name a new folder')
    if not isinstance(config := AutoConfig.from_pretrained(folder), TitansConfig):
        raise ValueError(f'folder must hold a Titans model, and in {folder} is one of type {config.model_type!r}')
    loaded: Any = TitansForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, found = loaded
    if missing := sorted(found['missing_keys']):
        raise ValueError(f'folder must hold all parameters of its model, and {folder} lacks {missing}')
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    vocabulary = vocabulary_of(tokenizer)
    run.mkdir(parents=True, exist_ok=True)
    describe_run(run, model.config.model, vocabulary)
    write_checkpoint(run / CHECKPOINT, {'model_state_dict': model.transformer.state_dict()})
