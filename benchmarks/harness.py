"""Shared parts of the benchmarks: interleaved processes, medians, and the sections of docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'docs' / 'benchmarks.md'
GIB = 2**30
# CPU tensors' freed memory is kept, as by `titans_pytorch.training.keep_freed_memory`, for every package alike
ALLOCATOR = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2**40)}


def own_path() -> str:
    """PYTHONPATH that imports the package of this repository."""
    return f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'


def in_own_process(script: str, path: str, timeout: float | None = None, **job: Any) -> dict[str, Any]:
    """Run `script --worker <job>` and return the JSON of its last line; `{'failed': reason}` if it fails."""
    command = [sys.executable, script, '--worker', json.dumps(job)]
    settings = {'env': {**os.environ, **ALLOCATOR, 'PYTHONPATH': path}, 'cwd': Path(script).parent, 'timeout': timeout}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    except subprocess.TimeoutExpired:
        return {'failed': f'not finished after {timeout:.0f} s'}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f'status {done.returncode}']
        # the last line of a longer message says nothing
        reason = next((line for line in reversed(lines) if 'Error' in line or 'Exit' in line), lines[-1])
        return {'failed': reason[:200]}
    return json.loads(done.stdout.splitlines()[-1])


def together(script: str, jobs: list[tuple[str, dict[str, Any]]], timeout: float) -> Iterator[dict[str, Any]]:
    """Run `in_own_process` for all jobs, (PYTHONPATH, arguments), which are prepared at the same time and then take
    turns. Yield each result as soon as it and those before it are there.

    Args:
        timeout: seconds after which a job that is not yet prepared is given up.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(jobs)) as pool:
        results = [
            pool.submit(in_own_process, script, path, **job, gate={'folder': folder, 'timeout': timeout, 'job': number})
            for number, (path, job) in enumerate(jobs)
        ]
        while not all(result.done() or _prepared(folder, number).exists() for number, result in enumerate(results)):
            time.sleep(0.1)
        (Path(folder) / 'open').touch()
        for result in results:
            yield result.result()


@contextmanager
def turn(gate: dict[str, Any] | None) -> Iterator[None]:
    """In a worker: its turn to measure, which comes once all jobs that `together` has started are prepared."""
    if gate is None:
        yield
        return
    import fcntl  # not available on Windows

    signal.alarm(0)
    folder = Path(gate['folder'])
    _prepared(folder, gate['job']).touch()
    while not (folder / 'open').exists():
        time.sleep(0.1)
    with open(folder / 'open') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepared(folder: str | Path, job: int) -> Path:
    """The file that says that a job is prepared."""
    return Path(folder) / f'{job} is prepared'


def _limit_preparation(gate: dict[str, Any]) -> None:
    """In a worker: raise an error if it does not reach `turn` in time."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f'not prepared after {gate["timeout"]:.0f} s')

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, gate['timeout'])


def by_turns(
    script: str, paths: dict[str, str], rounds: int = 2, timeout: float | None = None, **job: Any
) -> dict[str, dict[str, Any]]:
    """Summaries of runs of each mode, with its PYTHONPATH, interleaved so that drift affects all equally."""
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in paths}
    for _ in range(rounds):
        for mode, path in paths.items():
            if not any('failed' in earlier for earlier in runs[mode]):
                runs[mode].append(in_own_process(script, path, timeout, mode=mode, **job))
    return {mode: summary(own) for mode, own in runs.items()}


def parsed(parser: argparse.ArgumentParser, work: Callable[..., dict[str, Any]]) -> argparse.Namespace:
    """The options, including those common to all benchmarks. In a worker process, run the job and exit."""
    parser.add_argument('--reference-path', help='PYTHONPATH of the reference package')
    parser.add_argument('--rounds', type=int, default=2, help='processes per package, interleaved')
    parser.add_argument('--write', action='store_true', help='put the tables into docs/benchmarks.md')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        job = json.loads(options.worker)
        if job.get('gate') is not None:
            _limit_preparation(job['gate'])
        print(json.dumps(work(**job)))
        sys.exit()
    return options


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, 10th and 90th percentile of the seconds over all runs, and the highest peak memory in bytes."""
    for run in runs:
        if 'failed' in run:
            return run
    seconds = [s for run in runs for s in run['seconds']]
    low, *_, high = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else seconds * 2
    peaks = [run['peak'] for run in runs if run['peak'] is not None]
    others = {key: value for key, value in runs[0].items() if key not in ('seconds', 'peak')}
    return {'median': statistics.median(seconds), 'low': low, 'high': high, 'peak': max(peaks, default=None), **others}


def timed(step: Callable[[], Any], repeats: int, warmup: int = 3) -> list[float]:
    """Seconds of each of `repeats` steps, with the device synchronised."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(warmup):
        step()
    seconds = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - started)
    return seconds


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """`step` as a CUDA graph. It may write gradients, in place, and nothing else."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.reset_peak_memory_stats()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def machine() -> str:
    """The device, the versions and the date."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        names = [line.split(':')[1] for line in _cpu_info() if line.startswith('model name')]
        device = f'{os.cpu_count()} cores of {names[0].strip() if names else platform.machine()}'
    return f'{device}, PyTorch {torch.__version__}, Python {platform.python_version()}, {time.strftime("%Y-%m-%d")}'


def _cpu_info() -> list[str]:
    path = Path('/proc/cpuinfo')
    return path.read_text().splitlines() if path.exists() else []


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ['---'] * len(heads), *rows]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)


def milliseconds(figures: dict[str, Any]) -> list[str]:
    """Median and spread, for a table."""
    return [f'{figures["median"] * 1e3:.1f} ms', f'{figures["low"] * 1e3:.1f}–{figures["high"] * 1e3:.1f} ms']


def gibibytes(peak: int | None) -> str:
    return '–' if peak is None else f'{peak / GIB:.2f} GiB'


def write_section(name: str, text: str) -> None:
    """Put `text` between the marks of section `name` in docs/benchmarks.md."""
    before, rest = RESULTS.read_text().split(f'<!-- {name} -->\n')
    after = rest.split(f'<!-- end of {name} -->')[1]
    RESULTS.write_text(f'{before}<!-- {name} -->\n{text}\n<!-- end of {name} -->{after}')
