"""Training and evaluation of the models of a task over several seeds, and a table of all runs."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]
from harness import captured, machine, table, write_section  # noqa: E402

Loss = Callable[..., Tensor]
"""The training loss, as a function of the model and the tensors of a batch."""


@dataclass(frozen=True)
class Training:
    """How to train a model, the same in every task.

    Args:
        seconds: time limit.
        compile: whether forward and backward go through `torch.compile`.
    """

    device: str
    steps: int
    learning_rate: float
    seconds: float | None = None
    compile: bool = False


class Trainer:
    """AdamW with warm-up, cosine decay and gradient clipping; on a GPU in bf16, with one CUDA graph per batch shape.

    `progress` maps a step to the share of the training done before it, for training that ends after some time rather
    than after `steps`; the first twentieth is the warm-up. `norm` is the norm of the last gradients, before clipping.
    """

    norm: Tensor

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        training: Training,
        progress: Callable[[int], float] | None = None,
    ):
        decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
        others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{'params': decayed, 'weight_decay': 0.1}, {'params': others, 'weight_decay': 0.0}]
        on_gpu = next(model.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95), fused=on_gpu)
        self.training, steps = training, training.steps
        warmup = max(1, steps // 20)

        def schedule(step: int) -> float:
            done = min(1.0, step / steps if progress is None else progress(step))
            warm = min(1.0, (step + 1) / warmup if progress is None else max((step + 1) / 1000, done * 20))
            return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)
        self.parameters = decayed + others
        self.model, self.on_gpu = model, on_gpu
        if training.compile:
            torch.compiler.reset()  # Dynamo keeps graphs of eight models per function, and runs others eagerly
        self.loss = torch.compile(loss, fullgraph=True) if training.compile else loss
        self.graphs: dict[tuple[torch.Size, ...], tuple[list[Tensor], Callable[[], Any], Tensor]] = {}

    def step(self, *batch: Tensor) -> Tensor:
        """The loss, which the next step overwrites."""
        loss = self._replayed(batch) if self.on_gpu else self._gradients(batch)
        self.norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.on_gpu)
        self.schedule.step()
        return loss

    def _gradients(self, batch: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        # cached casts must not outlive a graph
        with torch.autocast('cuda', torch.bfloat16, enabled=self.on_gpu, cache_enabled=False):
            loss = self.loss(self.model, *batch)
        loss.backward()
        return loss.detach()

    def _replayed(self, batch: tuple[Tensor, ...]) -> Tensor:
        shapes = tuple(t.shape for t in batch)
        if shapes not in self.graphs:
            buffers, result = [t.clone() for t in batch], batch[0].new_zeros((), dtype=torch.float32)
            replay = captured(lambda: result.copy_(self._gradients(buffers)))
            self.optimizer.zero_grad(set_to_none=False)
            self.graphs[shapes] = buffers, replay, result
        buffers, replay, result = self.graphs[shapes]
        for buffer, t in zip(buffers, batch):
            buffer.copy_(t)
        replay()
        return result


def right(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the target has the largest logit, else 0; NaN where logits are NaN, as in a diverged model."""
    found = (logits.argmax(dim=-1) == targets).float()
    return found.masked_fill(logits.isnan().any(dim=-1), math.nan)


def train(trainer: Trainer, batches: Iterator[tuple[Tensor, ...]]) -> int:
    """Train until the steps or the seconds are up; return the number of steps done."""
    training, started = trainer.training, time.perf_counter()
    for step in range(training.steps):
        loss = trainer.step(*next(batches))
        if step % 200 == 0:
            print(f'  step {step}: loss {loss.item():.4f}, {time.perf_counter() - started:.0f} s', flush=True)
            if training.seconds is not None and time.perf_counter() - started > training.seconds:
                return step + 1
    return training.steps


def parser(
    description: str, models: list[str], steps: int, small_steps: int, pictures: bool = True
) -> argparse.ArgumentParser:
    """The options of a task; `pictures`: there is one to draw."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument('--models', nargs='*', default=models, help='models to run')
    made.add_argument('--seeds', type=int, default=3)
    made.add_argument('--first-seed', type=int, default=0)
    made.add_argument('--steps', type=int, help=f'default: {steps}, and {small_steps} if small')
    made.set_defaults(steps_of=(steps, small_steps))
    made.add_argument('--learning-rate', type=float, default=2e-3)
    made.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    made.add_argument(
        '--small', action='store_true', help='sizes for two CPU cores, with their own section of docs/benchmarks.md'
    )
    made.add_argument(
        '--memory-batch',
        type=int,
        help='tokens per memory batch, a multiple of the chunk size: gradients at the newest weights, in proximal '
        'steps; default: gradients at the initial weights, but for the order of the paper',
    )
    made.add_argument('--memory', type=json.loads, default={}, help='arguments of all memories, as JSON')
    made.add_argument('--seconds', type=float, help='time limit of the training of each run')
    made.add_argument('--compile', action='store_true', help='compile the training step (torch.compile)')
    made.add_argument('--json', type=Path, help='append each run to this file when it is done')
    made.add_argument('--report', type=Path, nargs='+', help='print the table of saved runs')
    made.add_argument('--write', action='store_true', help='put the table into docs/benchmarks.md')
    if pictures:
        made.add_argument('--plot', type=Path, help='draw the table to this file (needs matplotlib)')
    made.set_defaults(plot=None)
    return made


def settings(options: argparse.Namespace, small: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a run from the options; with `--small` they include the sizes `small`."""
    steps = options.steps_of[options.small] if options.steps is None else options.steps
    training = Training(options.device, steps, options.learning_rate, options.seconds, options.compile)
    batch = {} if options.memory_batch is None else {'memory_batch': options.memory_batch}
    memory = {'memory': options.memory} if options.memory else {}
    return {'training': training, **(small if options.small else {}), **batch, **memory}


def measured(
    options: argparse.Namespace, run: Callable[[str, int], dict[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """The machine, and the result of every model and seed, run now or saved before."""
    if options.report:
        notes = [json.loads(line) for path in options.report for line in path.read_text().splitlines()]
        machines = {note['machine'].rpartition(',')[0] for note in notes}
        if len(machines) > 1:
            raise SystemExit(f'a table takes runs of one machine, got {sorted(machines)}')
        last = {(note['result']['model'], note['result']['seed']): note['result'] for note in notes}
        return notes[0]['machine'], [*last.values()]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    return machine(), [noted(name, seed, run, options.json) for seed in seeds for name in options.models]


def noted(name: str, seed: int, run: Callable[[str, int], dict[str, Any]], notes: Path | None) -> dict[str, Any]:
    """The result of one run, printed and appended to the file `notes`."""
    print(f'{name}, seed {seed}', flush=True)
    torch.set_float32_matmul_precision('high')
    started = time.perf_counter()
    result = {'model': name, 'seed': seed, **run(name, seed)}
    result['seconds'] = round(time.perf_counter() - started, 1)
    print(f'  {json.dumps(result)}', flush=True)
    if notes:
        with open(notes, 'a') as file:
            file.write(json.dumps({'machine': machine(), 'result': result}) + '\n')
    return result


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over the seeds; seeds that diverged are counted and excluded."""
    finite = [value for value in values if math.isfinite(value)]
    diverged = f' ({len(values) - len(finite)} diverged)' if len(finite) < len(values) else ''
    if not finite:
        return f'diverged ({len(values)})'
    if len(finite) == 1:
        return f'{finite[0]:.{digits}f}{diverged}'
    return f'{statistics.mean(finite):.{digits}f} ± {statistics.stdev(finite):.{digits}f}{diverged}'


def by_model(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        grouped.setdefault(result['model'], []).append(result)
    return grouped


def report(
    options: argparse.Namespace,
    task: str,
    where: str,
    results: list[dict[str, Any]],
    columns: dict[str, Callable[[dict[str, Any]], float]],
    digits: int,
    order: list[str],
) -> None:
    """One row per model: parameters, steps, and each column over the seeds."""
    grouped = by_model(results)
    rows = []
    for name in sorted(grouped, key=order.index):
        own = grouped[name]
        fewest, most = (bound(result['steps'] for result in own) for bound in (min, max))
        steps = f'{most:,}' if fewest == most else f'{fewest:,}–{most:,}'
        cells = [spread([column(result) for result in own], digits) for column in columns.values()]
        rows.append([name, f'{own[0]["parameters"] / 1e6:.2f} M', steps, f'{len(own)}', *cells])
    if options.plot:
        plot(options.plot, {name: grouped[name] for name in sorted(grouped, key=order.index)}, columns)
    text = f'{where}\n\n{table(["model", "parameters", "steps", "seeds", *columns], rows)}'
    print(f'\n{text}')
    if options.write:
        batch = f', memory batch {options.memory_batch}' if options.memory_batch else ''
        write_section(f'task, {task}{batch}{", small" * options.small}', text)
    print(json.dumps({'machine': where, 'results': results}))


def plot(
    picture: Path, grouped: dict[str, list[dict[str, Any]]], columns: dict[str, Callable[[dict[str, Any]], float]]
) -> None:
    """One line per model over the columns: the mean of its seeds, with a point for each seed."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 4.5), layout='constrained')).subplots()
    for index, (name, own) in enumerate(grouped.items()):
        values = [[column(result) for result in own] for column in columns.values()]
        means = [statistics.mean(of) for of in values]
        # the colour cycle has ten entries
        (line,) = axes.plot([*columns], means, '-' if index < 10 else '--', label=name)
        for place, of in enumerate(values):
            axes.plot([place] * len(of), of, '.', color=line.get_color(), alpha=0.4)
    axes.set(ylabel='% right', ylim=(-3, 103))
    axes.legend(fontsize='small', loc='center left', bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=80)
