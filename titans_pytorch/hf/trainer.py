"""Checkpoints of transformers' `Trainer` for models whose `save_pretrained` leaves out added memories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch.nn import Module
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from titans_pytorch.hf.adapter import WEIGHTS, memories_of, save_memory


class MemoryCheckpoints(TrainerCallback):
    """Callback of `Trainer` that writes the memories to every checkpoint and restores them from it.

        Trainer(adapted, ..., callbacks=[MemoryCheckpoints()]).train(resume_from_checkpoint=True)

    For peft models with memories: their checkpoints hold only what peft added, so training would resume with new
    memories. The callback restores memories on resuming and, with `load_best_model_at_end`, at the end. Checkpoints
    must be in `output_dir`.

    Raises:
        FileNotFoundError: on resuming from a checkpoint without memories.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if state.is_world_process_zero:
            save_memory(given['model'], _checkpoint(args, state))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if state.global_step > 0:
            _restore(given['model'], _checkpoint(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _restore(given['model'], Path(state.best_model_checkpoint))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or '.') / f'checkpoint-{state.global_step}'


def _restore(model: Module, folder: Path) -> None:
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f'{folder} must hold the memories of the model, {WEIGHTS}, and it does not')
    memories_of(model).load_state_dict(load_file(folder / WEIGHTS))
