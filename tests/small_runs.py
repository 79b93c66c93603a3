"""Folders of runs as `train_mac.py` leaves them, of a small model that was never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from titans_pytorch.configuration import build_model, model_config
from titans_pytorch.training import ByteVocabulary, Vocabulary, describe_run, write_checkpoint

TEXT = ''.join(f'{n} times {n} is {n * n}, äöü 中文 😀\n' for n in range(90)).encode()


def small_config(num_tokens: int = 256) -> dict[str, Any]:
    return model_config(
        'mac',
        num_tokens=num_tokens,
        dim=16,
        depth=1,
        heads=2,
        dim_head=8,
        segment_len=8,
        num_longterm_mem_tokens=2,
        neural_memory_segment_len=4,
        neural_memory_batch_size=8,
        sliding_window_attn=True,
        num_residual_streams=1,
        neural_memory_kwargs={'dim_head': 8, 'heads': 2, 'qk_rmsnorm': True, 'default_step_transform_max_lr': 0.1},
    )


def checkpoint(path: Path, steps: int, seed: int = 0, num_tokens: int = 256, **content: Any) -> None:
    torch.manual_seed(seed)
    weights = build_model(small_config(num_tokens)).state_dict()
    write_checkpoint(path, {'batch': steps, 'model_state_dict': weights, 'data_sha256': '', **content})


def small_run(folder: Path, vocabulary: Vocabulary | None = None, **content: Any) -> Path:
    """A folder with a description, and one checkpoint after 7 steps."""
    vocabulary = ByteVocabulary() if vocabulary is None else vocabulary
    folder.mkdir(parents=True)
    (folder / 'text.txt').write_bytes(TEXT)
    settings = {'DATA': [str(folder / 'text.txt')], 'CACHE_DIR': str(folder / 'cache')}
    describe_run(folder, small_config(vocabulary.size), vocabulary, settings)
    checkpoint(folder / 'titans_enwik8_best.pt', 7, num_tokens=vocabulary.size, **content)
    return folder
