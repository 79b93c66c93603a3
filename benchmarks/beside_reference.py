"""Train with `train_mac.py` on whichever `titans_pytorch` is imported, this one or the reference, and compare runs.

    python benchmarks/beside_reference.py weights init.pt
    python benchmarks/beside_reference.py train --init-from init.pt --run-dir runs/ours …     (train_mac.py's options)
    PYTHONPATH=/path/to/the/reference python -P benchmarks/beside_reference.py train … --run-dir runs/reference
        --no-compile --no-use-cuda-graphs --no-use-accelerated-scan                 (it fails on a GPU with any of them)
    python benchmarks/beside_reference.py report runs/reference-1 runs/reference-2 runs/ours
    python benchmarks/beside_reference.py plot docs/assets/learning.png runs/reference runs/ours

`report` expects two runs of the reference first: their difference is the run-to-run noise. `plot` draws bits per byte
against training time, which excludes validation and sampling.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


def load_train_mac() -> ModuleType:
    """`train_mac.py` from this repository, on whichever `titans_pytorch` is imported. The reference lacks two modules
    that the script imports: `training`, which is supplied from here, and `configuration`."""
    path = Path(__file__).resolve().parent.parent / 'train_mac.py'
    if importlib.util.find_spec('titans_pytorch.training') is None:
        import titans_pytorch

        titans_pytorch.__path__.append(str(path.parent / 'titans_pytorch'))
        titans_pytorch.configuration = SimpleNamespace(
            model_config=lambda architecture, **arguments: arguments, build_model=_reference_model
        )
    spec = importlib.util.spec_from_file_location('train_mac', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['train_mac'] = module
    spec.loader.exec_module(module)
    return module


def _reference_model(arguments: dict[str, Any]) -> torch.nn.Module:
    import titans_pytorch

    def known(cls: type, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments that a class of the reference accepts. All others must be off, or not affect training."""
        names = inspect.signature(cls).parameters
        missing = [name for name, value in given.items() if name not in names and value and name != 'position_length']
        if missing:
            raise ValueError(f'{cls.__name__} of the reference has no {", ".join(missing)}')
        return {name: value for name, value in given.items() if name in names}

    network = {**arguments['neural_memory_model']}
    network = getattr(titans_pytorch, network.pop('type'))(**network)
    memory = known(titans_pytorch.NeuralMemory, arguments['neural_memory_kwargs'])
    given = {**arguments, 'neural_memory_model': network, 'neural_memory_kwargs': memory}
    return titans_pytorch.MemoryAsContextTransformer(**known(titans_pytorch.MemoryAsContextTransformer, given))


def train(arguments: list[str]) -> int:
    train_mac = load_train_mac()
    build_model = train_mac.build_model

    def with_real_storage(config):
        # the reference's per-head parameters are views of one storage, which an optimizer cannot step
        model = build_model(config)
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
        return model

    train_mac.build_model = with_real_storage
    return train_mac.main(arguments)


def initial_weights(path: str) -> None:
    """Save initial weights, drawn by this package, that both packages load."""
    from titans_pytorch import reference_state_dict

    train_mac = load_train_mac()
    model = train_mac.build_model(train_mac.Config(PRESET='full', DEVICE='cpu'))
    torch.save(reference_state_dict(model), path)


def read(folders: list[str]) -> dict[str, list[dict[str, Any]]]:
    paths = {Path(folder).name: Path(folder) / 'metrics.jsonl' for folder in folders}
    return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}


def plot(picture: str, *folders: str) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 5), layout='constrained')).subplots()
    for name, rows in read([*folders]).items():
        seconds, points = 0.0, []
        for row in rows:
            if 'train_loss' in row:
                seconds += row['seconds']
            else:
                points.append((seconds, row['bpb']))
        axes.plot(*zip(*points), label=f'{name}, {rows[-1]["step"]:,} steps', marker='.')
    axes.set(xlabel='seconds of training', ylabel='validation, bits per byte')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=100)


def report(folders: list[str]) -> None:
    runs = read(folders)
    curves = {name: {r['step']: r['bpb'] for r in rows if 'val_loss' in r} for name, rows in runs.items()}
    first, second = [*curves][:2]
    print('| step | ' + ' | '.join(curves) + f' | {first} and {second} differ by |')
    print('| --- ' * (len(curves) + 2) + '|')
    for step in curves[first]:
        values = ' | '.join(f'{curve[step]:.4f}' for curve in curves.values())
        print(f'| {step} | {values} | {abs(curves[first][step] - curves[second][step]):.4f} |')

    print('\n| run | step, median | step, 10 % to 90 % | tokens/s | peak memory |\n| --- | --- | --- | --- | --- |')
    for name, rows in runs.items():
        steps = [r for r in rows if 'train_loss' in r][5:]
        seconds = [r['seconds'] for r in steps]
        low, *_, high = statistics.quantiles(seconds, n=10)
        median = statistics.median(seconds)
        speed = statistics.median(r['tokens_per_second'] for r in steps)
        peak = max(r.get('peak_memory_bytes', 0) for r in steps) / 2**30
        spread = f'{low * 1e3:.0f}–{high * 1e3:.0f} ms'
        print(f'| {name} | {median * 1e3:.0f} ms | {spread} | {speed:,.0f} | {peak:.1f} GiB |')


if __name__ == '__main__':
    command, *rest = sys.argv[1:]
    commands = {
        'train': train,
        'report': report,
        'plot': lambda paths: plot(*paths),
        'weights': lambda paths: initial_weights(*paths),
    }
    sys.exit(commands[command](rest))
