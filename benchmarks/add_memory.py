"""Memories added to a trained transformer: bits per byte at contexts of 1K to 32K, with and without them.

    python benchmarks/add_memory.py --data text.gz                        (about 9 minutes on a GPU)
    python benchmarks/add_memory.py --data text.gz --test other.gz --minutes 30
    python benchmarks/add_memory.py --data text.gz --quick                (a minute on a CPU: does it run?)

A byte-level Mistral (a Llama with a sliding window, so that attention works at any length) is trained for a third of
the time. Three copies are then trained further, for a sixth of the time each and on the same batches: unchanged, with
memories, and with memories on a frozen backbone. The rest of the time is for evaluation: the same last bytes of windows
of the test text are predicted after contexts of growing length, read in pieces through the cache.

The output is a section in Markdown. Without `--test`, the last twentieth of the data is kept for testing.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import inspect
import json
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
# transformers 5.24 renamed the argument for the cache
CACHE = 'cache' if 'cache' in inspect.signature(MistralForCausalLM.forward).parameters else 'past_key_values'

SMALL = {'layers': [2], 'heads': 2, 'dim_head': 16}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='text to train on, plain or .gz')
    parser.add_argument('--test', type=Path, help='text to evaluate on; default: the end of --data')
    parser.add_argument('--minutes', type=float, default=8.0, help='time in all, without compiling kernels')
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
    parser.add_argument('--memory-lr', type=float, default=1e-3, help='learning rate of memories and gates')
    parser.add_argument('--memory', type=json.loads, default={}, help='arguments of add_memory, as JSON')
    parser.add_argument('--quick', action='store_true', help='tiny sizes')
    given = parser.parse_args()
    if given.quick:
        tiny = dict(width=64, depth=4, window=64, length=128, second_length=256, batch=1024, minutes=0.5)
        parser.set_defaults(**tiny, contexts=[256, 1024, 4096], windows=8, scored=128, memory=SMALL)
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
    """Train for some seconds, with a learning rate that rises immediately and falls to zero; return the steps taken."""
    parameters = [parameter for group in groups for parameter in group['params']]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=DEVICE == 'cuda')
    highest = [group['lr'] for group in groups]
    random = np.random.default_rng(0)  # the same batches for every copy, as far as each one gets

    def gradients() -> Tensor:
        starts = random.integers(len(data) - length, size=batch // length)
        ids = torch.from_numpy(np.stack([data[start : start + length] for start in starts])).to(DEVICE).long()
        with autocast():
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return loss

    gradients().item()  # compiles kernels, so it runs before the clock starts
    started, step, used = time.perf_counter(), 0, 0.0
    while used < 1.0:
        for group, lr in zip(optimizer.param_groups, highest):
            group['lr'] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * used))
        loss = gradients()
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f'  step {step}: {loss.item() / math.log(2):.3f} bits per byte', file=sys.stderr, flush=True)
        used = (time.perf_counter() - started) / seconds
    return step


@torch.no_grad()
def bits_per_byte(model: MistralForCausalLM, windows: Tensor, context: int, scored: int, piece: int) -> Tensor:
    """Bits per byte of the last `scored` bytes of each window, of which the model sees the last `context`."""
    cache = DynamicCache(config=model.config)
    logits = windows.new_empty(len(windows), 0, 256, dtype=torch.float32)
    for ids in windows[:, -context:].split(piece, dim=1):
        with autocast():
            new = model(ids, use_cache=True, logits_to_keep=scored + 1, **{CACHE: cache}).logits
        logits = torch.cat((logits, new.float()), dim=1)[:, -scored - 1 :]
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), windows[:, -scored:], reduction='none')
    return losses.mean(dim=1) / math.log(2)


def cell(bits: Tensor, form: str = '.3f') -> str:
    """Mean and standard error over windows."""
    return f'{bits.mean():{form}} ± {bits.std() / len(bits) ** 0.5:.3f}'


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

    def evaluate(model: MistralForCausalLM) -> list[Tensor]:
        return [bits_per_byte(model, windows, context, given.scored, given.second_length) for context in given.contexts]

    backbone = build(given.width, given.depth, given.window)
    size = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    first, second = given.minutes / 3, given.minutes / 6
    everything = [{'params': [*backbone.parameters()], 'lr': given.lr}]
    steps = train(backbone, data, everything, 60 * first, given.length, given.batch)
    before = evaluate(backbone)
    rows = [['before', '–', str(steps), *map(cell, before)]]

    results = {}
    for name in ('without memories', 'with memories', 'with memories, backbone frozen'):
        print(name, file=sys.stderr, flush=True)
        model = copy.deepcopy(backbone)
        groups, added = [{'params': [*model.parameters()], 'lr': given.second_lr}], 0.0
        if name != 'without memories':
            add_memory(model, **given.memory, freeze_backbone='frozen' in name)
            memories = {'params': [*memory_parameters(model)], 'lr': given.memory_lr}
            groups = [memories] if 'frozen' in name else [*groups, memories]
            added = sum(parameter.numel() for parameter in memories['params']) / 1e6
        steps = train(model, data, groups, 60 * second, given.second_length, given.batch)
        results[name] = evaluate(model)
        rows.append([name, f'{added:.1f} M', str(steps), *map(cell, results[name])])
    pairs = zip(results['with memories'], results['without memories'])
    rows.append(['with − without', '', '', *(cell(with_ - without, '+.3f') for with_, without in pairs)])

    print(
        f'{machine()}, transformers {transformers.__version__}: `{" ".join(["python", *sys.argv])}`\n\n'
        f'Byte-level Mistral of {size:.1f} M parameters, attention window {given.window}, trained for {first:.2f} '
        f'minutes on contexts of {given.length}, then three times for {second:.2f} minutes on contexts of '
        f'{given.second_length}. Bits per byte of the last {given.scored} bytes of {len(windows)} windows of the test '
        f'text by context length, with the standard error over windows; the last line compares window by window.\n'
    )
    print(table(['trained on', 'added', 'steps', *(f'{context:,}' for context in given.contexts)], rows))


if __name__ == '__main__':
    main()
