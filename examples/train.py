"""A custom training script, built from the parts of `titans_pytorch.training`: text files, BPE vocabulary, any model.

    python examples/train.py books/ --run-dir runs/books
    torchrun --nproc-per-node 2 examples/train.py books/ --run-dir runs/books

Copy it and change the model, the optimizer or the loop. Ctrl-C saves a checkpoint; the same command continues the run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from titans_pytorch import training as t
from titans_pytorch.commands.options import integer
from titans_pytorch.configuration import build_model, model_config
from titans_pytorch.presets import memory_settings


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs='+', help='files and folders of text')
    parser.add_argument('--run-dir', type=Path, default=Path('runs/own'), help='folder of the run')
    parser.add_argument('--vocabulary', type=integer(256), default=4096, help='tokens of the BPE vocabulary')
    parser.add_argument('--steps', type=integer(1), default=2000, help='optimizer steps')
    parser.add_argument('--batch', type=integer(1), default=8, help='windows per micro batch')
    parser.add_argument('--micro-batches', type=integer(1), default=4, help='micro batches per step, in all processes')
    parser.add_argument('--length', type=integer(1), default=256, help='tokens per window')
    options = parser.parse_args()
    t.check_outside_text(options.run_dir, options.data)

    with t.process_group(), t.Signals() as signals, t.run_lock(options.run_dir):
        first = t.rank() == 0
        machine = t.choose_machine()
        path = options.run_dir / 'checkpoint.pt'
        saved = t.read_checkpoint(path) if path.exists() else None
        vocabulary = options.vocabulary if saved is None else t.vocabulary_from_dict(saved['vocabulary'])
        with t.first_rank_first():
            data = t.load_data(options.data, vocabulary, window=options.length + 1)
        description = model_config(
            'mal',
            num_tokens=data.vocabulary.size,
            dim=256,
            depth=4,
            heads=4,
            segment_len=64,
            neural_memory_segment_len=16,
            neural_memory_batch_size=16,
            neural_memory_kwargs=memory_settings(4, 64, memory_batch=16, default_model_kwargs={'depth': 1}),
        )
        torch.manual_seed(0)
        model = build_model(description).to(machine.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        generator, start, loss = torch.Generator().manual_seed(0), 0, math.nan
        if saved is not None:
            model.load_state_dict(saved['model_state_dict'])
            optimizer.load_state_dict(saved['optimizer_state_dict'])
            if saved['data_sha256'] != data.sha256:
                raise SystemExit(f'{path} was trained on other text: name another --run-dir')
            generator.set_state(saved['windows_random'])
            start = saved['batch']
        elif first:
            t.describe_run(options.run_dir, description, data.vocabulary)

        step = t.MicroStep(model, machine, options.micro_batches)
        for batch in range(start + 1, options.steps + 1):
            signals.wait = True
            starts = (
                t.random_starts(data.train, options.batch, options.length, generator)
                for _ in range(options.micro_batches)
            )
            train_loss = step.accumulate(t.windows(data.train, own, options.length + 1) for own in t.share(starts))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            stop = t.any_rank(signals.received is not None)
            if stop or batch % 100 == 0 or batch == options.steps:
                sizes = {'batches': 8, 'batch_size': options.batch, 'length': options.length}
                loss = t.validation_loss(model, data.valid, machine, **sizes)
                row = {'step': batch, 'train_loss': train_loss.item(), 'val_loss': loss}
                row['bpb'] = loss / math.log(2) * data.tokens_per_byte
                t.say(str(row))
                if not math.isfinite(loss):
                    raise SystemExit('training has diverged; the last checkpoint is from before')
                if first:
                    t.append(options.run_dir / 'metrics.jsonl', json.dumps(row) + '\n')
                    states = {'model_state_dict': model.state_dict(), 'optimizer_state_dict': optimizer.state_dict()}
                    text = {'vocabulary': data.vocabulary.to_dict(), 'data_sha256': data.sha256}
                    rest = {'batch': batch, 'val_loss': loss, 'config': {}, 'windows_random': generator.get_state()}
                    t.write_checkpoint(path, {**states, **text, **rest})
            if stop:
                break
    return loss


if __name__ == '__main__':
    try:
        main()
    except t.TooLittleText as error:
        sys.exit(f'{error}: give a smaller --length, or more text')
    except (t.RunError, OSError) as error:
        sys.exit(str(error))
