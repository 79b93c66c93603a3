"""Memories added to a trained transformer: bits per byte at contexts of 1K to 32K, with and without them.

    python benchmarks/add_memory.py --data text.gz                        (about 9 minutes on a GPU)
    python benchmarks/add_memory.py --data text.gz --test other.gz --minutes 30
    python benchmarks/add_memory.py --data text.gz --quick                (a minute on a CPU: does it run?)

A byte-level Mistral (a Llama with a sliding window, so that attention works at any length) is trained for a third of
the time. Three copies are then trained on, for a sixth each and on the same batches: as they are, with memories, and
with memories on a frozen backbone. The rest is for the evaluation: the same last bytes of windows of the test text are
predicted after contexts of growing length, read in pieces through the cache.

The output is a section in Markdown. Without `--test`, the last twentieth of the data is kept for it.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import inspect
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from harness import machine, table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from titans_pytorch.hf import add_memory, memory_parameters

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# the name of the cache among the arguments changed in transformers 5.24
CACHE = 'cache' if 'cache' in inspect.signature(MistralForCausalLM.forward).parameters else 'past_key_values'


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='text to train on, plain or .gz')
    parser.add_argument('--test', type=Path, help='text to evaluate on; default: the end of --data')
    parser.add_argument('--minutes', type=float, default=9.0, help='time for everything')
    parser.add_argument('--width', type=int, default=384)
    parser.add_argument('--depth', type=int, default=8)
    parser.add_argument('--window', type=int, default=512, help='attention window in bytes')
    parser.add_argument('--length', type=int, default=1024, help='training context before memories are added')
    parser.add_argument('--second-length', type=int, default=2048, help='training context afterwards')
    parser.add_argument('--batch', type=int, default=32_768, help='bytes per optimizer step')
    parser.add_argument('--contexts', type=int, nargs='+', default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument('--windows', type=int, default=32, help='test windows')
    parser.add_argument('--scored', type=int, default=512, help='bytes at the end of each test window to predict')
    parser.add_argument('--lr', type=float, default=1e-3, help='learning rate of the first training')
    parser.add_argument('--second-lr', type=float, default=3e-4, help='learning rate of the backbone afterwards')
    parser.add_argument('--memory-lr', type=float, default=3e-3, help='learning rate of memories and gates')
    parser.add_argument('--quick', action='store_true', help='tiny sizes')
    given = parser.parse_args()
    if given.quick:
        tiny = dict(width=64, depth=4, window=64, length=128, second_length=256, batch=1024, minutes=0.5)
        parser.set_defaults(**tiny, contexts=[256, 1024, 4096], windows=8, scored=128)
        given = parser.parse_args()
    return given


def read(path: Path) -> np.ndarray:
    with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
        return np.frombuffer(file.read(), dtype=np.uint8)


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == 'cuda')


def build(width: int, depth: int, window: int) -> MistralForCausalLM:
    heads = width // 64 or 1
    config = MistralConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        sliding_window=window,
        max_position_embeddings=2**16,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return MistralForCausalLM(config).to(DEVICE)


def train(
    model: MistralForCausalLM, data: np.ndarray, groups: list[dict], seconds: float, length: int, batch: int
) -> int:
    """Train for so many seconds, with a learning rate that rises at once and falls to zero; return the steps taken."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=DEVICE == 'cuda')
    highest = [group['lr'] for group in optimizer.param_groups]
    random = np.random.default_rng(0)  # the same batches for every copy, as far as each one gets
    started, step, used = time.perf_counter(), 0, 0.0
    while used < 1.0:
        for group, lr in zip(optimizer.param_groups, highest):
            group['lr'] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * used))
        starts = random.integers(len(data) - length, size=batch // length)
        ids = torch.from_numpy(np.stack([data[start : start + length] for start in starts])).to(DEVICE).long()
        with autocast():
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group['params']], 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f'  step {step}: {loss.item() / math.log(2):.3f} bits per byte', file=sys.stderr, flush=True)
        used = (time.perf_counter() - started) / seconds
    return step


@torch.no_grad()
def bits_per_byte(
    model: MistralForCausalLM, windows: Tensor, context: int, scored: int, piece: int
) -> tuple[float, float]:
    """Mean and standard error over windows of the bits per byte of their `scored` last bytes, of `context` in all."""
    cache, kept = DynamicCache(config=model.config), []
    for ids in windows[:, -context:].split(piece, dim=1):
        with autocast():
            kept.append(model(ids, use_cache=True, logits_to_keep=scored + 1, **{CACHE: cache}).logits.float())
        kept = [torch.cat(kept, dim=1)[:, -scored - 1 :]]
    targets = windows[:, -scored:]
    losses = cross_entropy(kept[0][:, :-1].transpose(1, 2), targets, reduction='none').mean(dim=1) / math.log(2)
    return losses.mean().item(), losses.std().item() / len(losses) ** 0.5


def main() -> None:
    given = options()
    torch.manual_seed(0)
    data = read(given.data)
    if given.test is None:
        data, test = np.split(data, [len(data) * 19 // 20])
    else:
        test = read(given.test)
    longest = max(given.contexts)
    starts = np.linspace(0, len(test) - longest, given.windows).astype(int)
    windows = torch.from_numpy(np.stack([test[start : start + longest] for start in starts])).to(DEVICE).long()

    minutes, batch = given.minutes, given.batch
    backbone = build(given.width, given.depth, given.window)
    everything = [{'params': [*backbone.parameters()], 'lr': given.lr}]
    steps = train(backbone, data, everything, 60 * minutes / 3, given.length, batch)
    size = sum(p.numel() for p in backbone.parameters())
    print(f'backbone: {size / 1e6:.1f} M parameters, {steps} steps', file=sys.stderr, flush=True)

    rows = []
    for name in ('as before', 'with memories', 'with memories, backbone frozen'):
        model = copy.deepcopy(backbone)
        groups = [{'params': [*model.parameters()], 'lr': given.second_lr}]
        added = 0
        if name != 'as before':
            add_memory(model, freeze_backbone='frozen' in name)
            memories = [*memory_parameters(model)]
            groups = [*groups[: 'frozen' not in name], {'params': memories, 'lr': given.memory_lr}]
            added = sum(p.numel() for p in memories)
        steps = train(model, data, groups, 60 * minutes / 6, given.second_length, batch)
        figures = [
            bits_per_byte(model, windows, context, given.scored, given.second_length) for context in given.contexts
        ]
        print(f'{name}: {figures}', file=sys.stderr, flush=True)
        bits = [f'{mean:.3f} ± {error:.3f}' for mean, error in figures]
        rows.append([name, f'{added / 1e6:.1f} M', str(steps), *bits])
    before = [
        bits_per_byte(backbone, windows, context, given.scored, given.second_length)[0] for context in given.contexts
    ]
    rows.insert(0, ['not trained on', '0.0 M', '0', *(f'{mean:.3f}' for mean in before)])

    print(f'{machine()}, transformers {transformers.__version__}. `{" ".join(["python", *sys.argv])}`\n')
    print(
        f'Byte-level Mistral of {size / 1e6:.1f} M parameters, attention window {given.window}, trained for '
        f'{minutes / 3:.1f} minutes on contexts of {given.length}, then {minutes / 6:.1f} minutes each on contexts of '
        f'{given.second_length}. Bits per byte of the last {given.scored} bytes of {len(windows)} windows of the test text, '
        f'with the standard error over windows, by context length.\n'
    )
    print(table(['trained on', 'added', 'steps', *(f'{context:,}' for context in given.contexts)], rows))


if __name__ == '__main__':
    main()
