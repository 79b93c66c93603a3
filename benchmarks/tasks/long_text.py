"""Bits per byte by position in long windows of text, for all models at equal numbers of parameters and equal time.

    python benchmarks/tasks/long_text.py --data train.gz --test test.gz --memory-batch 16 --json runs.jsonl
    python benchmarks/tasks/long_text.py --report runs.jsonl --plot long_text.png --write

Models train for `--seconds` on random windows of 4,096 bytes. They are tested on windows of 65,536 bytes of other text,
sixteen times as long, which they read as a stream: in pieces, where each call gets the state that the last one
returned, so that memory use is constant. Attention sees 512 bytes back, in windows that slide or, in MAC, in blocks of
512. Through four layers of sliding windows, a byte can depend on the 2,048 bytes before it; beyond that, only a memory
can make bits per byte fall.

With `--save runs`, each model is saved to a folder that `python -m titans_pytorch` can open:

    python -m titans_pytorch generate --run 'runs/LMM, seed 0' --file beginning.c

Models train one after another, so that each has the device to itself. Time counts from the second step on, after
building, compiling and capturing. With `--compile`, the training step is compiled, which takes a minute for each model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models
import runs
import text as texts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pytorch.training.checkpoints import write_checkpoint
from titans_pytorch.training.run_folder import describe_run
from titans_pytorch.training.vocabulary import ByteVocabulary
from titans_pytorch.utils.precision import at_least_float32

SIZES = {
    **{'dim': 320, 'depth': 4, 'dim_head': 64, 'segment_len': 512, 'neural_memory_segment_len': 16},
    'use_flex_attn': True,
}
EDGES = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
"""Edges of the bins of positions, as far as the windows reach."""

SMALL = {
    **{'trained': 256, 'tested': 1024, 'stride': 1024, 'piece': 256, 'batch': 8, 'edges': (0, 32, 64, 128, 256, 512)},
    **{'dim': 64, 'depth': 2, 'dim_head': 32, 'segment_len': 32, 'neural_memory_segment_len': 8},
}
BASELINE = 'attention alone'


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch, return_loss=True)


@torch.no_grad()
def bits_of_stream(model: nn.Module, windows: Tensor, piece: int) -> Tensor:
    """Bits of each byte but the first in windows (batch, length + 1), which the model reads in pieces."""
    state, bits = None, []
    for start in range(0, windows.shape[1] - 1, piece):
        given = windows[:, start : start + piece + 1]
        # FlexAttention would be compiled for every number of keys that a state can hold
        logits, state = model(given[:, :-1], state=state, return_state=True, disable_flex_attn=True)
        losses = F.cross_entropy(at_least_float32(logits).flatten(0, 1), given[:, 1:].flatten(), reduction='none')
        bits.append(losses.view(len(windows), -1) / math.log(2))
    return torch.cat(bits, dim=1)


def bits_by_position(
    model: nn.Module, text: Tensor, length: int, stride: int, piece: int, batch: int, edges: tuple[int, ...]
) -> Tensor:
    """Mean bits per byte in each bin of positions, for each window of the text: (windows, bins).

    Windows begin every `stride` bytes. Bins at least that long cover nearly the same bytes; shorter bins cover
    different samples of them, so small differences between those may come from the text. All models read the same
    bytes.
    """
    windows = text.unfold(0, length + 1, stride)
    on_gpu = text.is_cuda
    sizes = [stop - start for start, stop in zip(edges, edges[1:])]
    found = []
    for rows in windows.split(batch):
        # in the precision of training
        with torch.autocast('cuda', torch.bfloat16, enabled=on_gpu):
            bits = bits_of_stream(model, rows.long(), piece)
        found.append(torch.stack([part.mean(dim=1) for part in bits.split(sizes, dim=1)], dim=1))
    return torch.cat(found).cpu()


class Clock:
    """Training time: wall time since `start`, which waits for the device."""

    def __init__(self, seconds: float | None, on_gpu: bool):
        self.seconds, self.on_gpu = seconds, on_gpu
        self.started: float | None = None

    def start(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.started = time.perf_counter()

    def elapsed(self, wait: bool = False) -> float:
        if wait and self.on_gpu:
            torch.cuda.synchronize()
        return 0.0 if self.started is None else time.perf_counter() - self.started

    def progress(self) -> float:
        """The share of the time that has passed; 0 without a limit."""
        return 0.0 if self.seconds is None else self.elapsed() / self.seconds


def train(
    trainer: runs.Trainer,
    batches: Callable[[], Tensor],
    clock: Clock,
    name: str,
) -> dict[str, Any]:
    """Train until the time is up, or for all steps; return what was done, and norms of the gradients."""
    norms, losses, running = [], [], []
    for step in range(trainer.training.steps):
        losses.append(trainer.step(batches()).clone())
        norms.append(trainer.norm.clone())
        if step == 0:
            clock.start()
        elif step % 100 == 0:
            print(f'  {name}, step {step}: loss {losses[-1].item():.4f}, {clock.elapsed():.0f} s', flush=True)
        if clock.on_gpu:
            # at most one step ahead of the device, so that steps are counted within the time in which they run
            running.append(torch.cuda.current_stream().record_event())
            running[-2:][0].synchronize()
        if clock.progress() >= 1:
            break
    seconds = clock.elapsed(wait=True)
    all_norms, last = torch.stack(norms).tolist(), torch.stack(losses[-100:]).mean().item()
    return {
        'steps': len(losses),
        'trained_seconds': round(seconds, 2),
        'milliseconds': 1000 * seconds / max(1, len(losses) - 1),
        'training_loss': last / math.log(2),
        'median_norm': statistics.median(all_norms),
        'worst_norm': max(all_norms, key=lambda norm: norm if math.isfinite(norm) else math.inf),
    }


def run(
    name: str,
    seed: int,
    training: runs.Training,
    data: Path | None,
    test: Path | None = None,
    batch: int = 12,
    trained: int = 4096,
    tested: int = EDGES[-1],
    stride: int = 16384,
    piece: int = 4096,
    edges: tuple[int, ...] = EDGES,
    save: Path | None = None,
    **sizes: Any,
) -> dict[str, Any]:
    """Train one model and test it. Without a `test` file, the last twentieth of `data` is for testing.

    Args:
        save: a folder in which to put the folders of the trained models.
    """
    text = texts.read(data).to(training.device)
    held_out = text[len(text) * 19 // 20 :] if test is None else texts.read(test).to(training.device)
    text = text[: len(text) * 19 // 20] if test is None else text
    options = {'num_tokens': 256, 'position_length': trained, **SIZES, **sizes}
    model = models.build(name, seed, **options).to(training.device)
    clock = Clock(training.seconds, text.is_cuda)

    def progress(step: int) -> float:
        return max(step / training.steps, clock.progress())

    trainer = runs.Trainer(model, loss, training, progress)
    generator = torch.Generator(training.device).manual_seed(seed)
    windows = texts.windows(text, batch, trained + 1, generator)
    done = train(trainer, lambda: next(windows).long(), clock, name)
    if save is not None:
        save_run(save / f'{name}, seed {seed}', models.config(name, **options), model, done['steps'])
    peak = torch.cuda.max_memory_allocated() if text.is_cuda else None
    del trainer
    if text.is_cuda:
        torch.cuda.empty_cache()

    edges = (*(edge for edge in edges if edge < tested), tested)
    started = time.perf_counter()
    bits = bits_by_position(model, held_out, tested, stride, piece, batch, edges)
    return {
        'parameters': models.num_parameters(model),
        'compiled': training.compile,
        'batch': batch,
        'trained': trained,
        'bytes': done['steps'] * batch * trained,
        'bytes_per_second': 1000 * batch * trained / done['milliseconds'] if done['milliseconds'] else None,
        **done,
        'peak': peak,
        'testing_seconds': round(time.perf_counter() - started, 1),
        'tested': tested,
        'stride': stride,
        'edges': edges,
        'bits': dict(zip(labels(edges), bits.mean(dim=0).tolist())),
        'windows': [[round(value, 4) for value in window] for window in bits.tolist()],
    }


def save_run(folder: Path, config: dict[str, Any], model: nn.Module, steps: int) -> None:
    folder.mkdir(parents=True)
    describe_run(folder, config, ByteVocabulary())
    write_checkpoint(folder / 'trained.pt', {'model_state_dict': model.state_dict(), 'batch': steps})


def labels(edges: tuple[int, ...]) -> list[str]:
    """A name for each bin, such as '4–8K'."""
    return [
        f'{start // 1024}–{stop // 1024}K' if start % 1024 == stop % 1024 == 0 and start else f'{start}–{stop}'
        for start, stop in zip(edges, edges[1:])
    ]


def report(options: argparse.Namespace, where: str, results: list[dict[str, Any]]) -> None:
    """Tables of the training, of bits per byte by position, and of differences from attention alone."""
    grouped = runs.by_model(results)
    names = sorted(grouped, key=[*models.MODELS].index)
    bins = [*results[0]['bits']]

    training, by_position = [], []
    for name in names:
        own = grouped[name]

        def mean(key: str, own: list[dict[str, Any]] = own) -> float:
            return statistics.mean(result[key] or math.nan for result in own)

        training.append(
            [
                *(name, f'{mean("parameters") / 1e6:.2f} M', f'{mean("steps"):,.0f}', f'{mean("bytes") / 1e6:.1f} M'),
                *(f'{mean("bytes_per_second") / 1e3:,.0f} kB/s', f'{mean("median_norm"):.2f}'),
                f'{max(result["worst_norm"] for result in own):.3g}',
            ]
        )
        by_position.append([name, *(runs.spread([result['bits'][at] for result in own], 3) for at in bins)])

    heads = ['model', 'parameters', 'steps', 'bytes seen', 'throughput', 'gradient norm, median', 'worst']
    parts = [where, conditions(results), runs.table(heads, training), runs.table(['position', *bins], by_position)]
    if BASELINE in grouped:
        rows = [
            [name, *(f'{mean:+.3f} ± {error:.3f}' for mean, error in differences(grouped[name], grouped[BASELINE]))]
            for name in names
            if name != BASELINE
        ]
        if rows:
            parts.append(runs.table([f'minus {BASELINE}', *bins], rows))
    text = '\n\n'.join(parts)
    print(f'\n{text}')
    if options.plot:
        plot(options.plot, {name: grouped[name] for name in names})
    if options.write:
        runs.write_section(f'task, {options.section}{", small" * options.small}', text)


def conditions(results: list[dict[str, Any]]) -> str:
    """A sentence on how these runs were trained and tested."""
    seconds = {round(result['trained_seconds']) for result in results}
    time_of_each = f'{min(seconds)} s' if len(seconds) == 1 else f'{min(seconds)}–{max(seconds)} s'
    first = results[0]
    compiled = ' in compiled steps' * all(result.get('compiled') for result in results)
    return (
        f'{time_of_each} of training{compiled} for each model; {first["batch"]} windows of {first["trained"]:,}\n'
        f'bytes per step; tested on {len(first["windows"])} windows of {first["tested"]:,} bytes, '
        f'{first["stride"]:,} apart.'
    )


def differences(own: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Difference in bits per byte from the baseline in each bin, and its standard error over sections of text.

    Windows that begin in the same section, which is as long as a window, count as one, because most of their bytes are
    the same. Seeds that diverged are left out, as in the other tables.
    """

    def by_window(results: list[dict[str, Any]]) -> Tensor:
        of_seeds = torch.tensor([result['windows'] for result in results], dtype=torch.float64)
        finite = of_seeds.isfinite().flatten(1).all(dim=1)
        return of_seeds[finite].mean(dim=0)

    difference = by_window(own) - by_window(baseline)
    each = max(1, own[0]['tested'] // own[0]['stride'])
    sections = torch.stack([part.mean(dim=0) for part in difference.split(each)])
    errors = sections.std(dim=0) / len(sections) ** 0.5 if len(sections) > 1 else sections[0] * math.nan
    return [*zip(difference.mean(dim=0).tolist(), errors.tolist())]


def plot(picture: Path, grouped: dict[str, list[dict[str, Any]]]) -> None:
    """Plot bits per byte by position, one line per model: the mean over its seeds, at the middle of each bin."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 4.5), layout='constrained')).subplots()
    for name, own in grouped.items():
        edges, bins = own[0]['edges'], [*own[0]['bits']]
        middles = [(start + stop) / 2 for start, stop in zip(edges, edges[1:])]
        axes.plot(middles, [statistics.mean(result['bits'][at] for result in own) for at in bins], 'o-', label=name)
    axes.set_xscale('log', base=2)
    axes.set_yscale('log')
    axes.set(xlabel='position in the window, in bytes', ylabel='bits per byte')
    axes.xaxis.set_major_formatter('{x:,.0f}')
    axes.yaxis.set_major_formatter('{x:.2f}')
    axes.yaxis.set_minor_formatter('{x:.2f}')
    axes.legend(fontsize='small', loc='center left', bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=80)


def main() -> None:
    parser = runs.parser(__doc__ or '', [*models.ARCHITECTURES], steps=1_000_000, small_steps=300)
    parser.set_defaults(seconds=480.0, seeds=1)
    parser.add_argument('--data', type=Path, help='a file of text, gzipped or not; default: enwik8 in data/')
    parser.add_argument('--test', type=Path, help='text for testing; default: the last twentieth of the data')
    parser.add_argument('--batch', type=int, help='windows per step; default: 12')
    parser.add_argument('--trained', type=int, help='bytes of a window in training; default: 4,096')
    parser.add_argument('--segment-len', type=int, help='bytes that attention sees; default: 512')
    parser.add_argument('--stride', type=int, help='bytes between the beginnings of windows in the test')
    parser.add_argument('--save', type=Path, help='folder for the trained models, in a folder each')
    parser.add_argument('--section', default='long text', help='of docs/benchmarks.md, for --write')
    parser.add_argument('--sizes', type=json.loads, default={}, help='arguments of all models, as JSON')
    options = parser.parse_args()
    settings = runs.settings(options, SMALL) | options.sizes
    for name in ('batch', 'stride', 'trained', 'segment_len'):
        if (own := getattr(options, name)) is not None:
            settings[name] = own
    files = {'data': options.data, 'test': options.test, 'save': options.save}
    one = partial(run, **files, **settings)
    report(options, *runs.measured(options, one))


if __name__ == '__main__':
    main()
