"""Train a byte-level Titans transformer (memory as context) on enwik8, in one file.

    python train_mac.py                       # the preset for this machine: full on a GPU, quick on a CPU
    python train_mac.py --preset quick        # a complete run in a few minutes on two CPU cores
    python train_mac.py --resume latest       # continue the last run of this preset
    python train_mac.py --help                # every setting

From top to bottom: settings, machine, data, model, checkpoints, evaluation, training loop, main.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from titans_pytorch import MemoryAsContextTransformer, MemoryAttention, MemoryMLP

DATA_FOLDER = Path(__file__).resolve().parent / 'data'
ENWIK8_URL = 'https://mattmahoney.net/dc/enwik8.zip'
ENWIK8_ZIP_SHA256 = '547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc'
ENWIK8_BYTES = 100_000_000
ENWIK8_SHA256 = '2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8'

say = tqdm.write  # prints above a progress bar instead of through it


def one_line(error: BaseException) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


# settings -------------------------------------------------------------------------------------------------------------


class BadSetting(ValueError):
    pass


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, zero: bool = False) -> Any:
    return field(default=default, metadata={'help': help, 'choices': choices, 'zero': zero})


def check_setting(setting: dataclasses.Field[Any], value: Any) -> None:
    """Refuse values whose type is not the default's, and numbers that are not finite and positive (`zero`: or 0)."""
    name, default, zero, choices = setting.name, setting.default, setting.metadata['zero'], setting.metadata['choices']
    kind: type = bool if default is None else type(default)
    if value is None and default is None:
        return
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise BadSetting(f'{name} must be of type {kind.__name__}, not {value!r}')
    if choices and value not in choices:
        raise BadSetting(f'{name} must be one of {", ".join(choices)}, not {value!r}')
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(value, tuple) and type(number) is not int:
            raise BadSetting(f'{name} must hold integers, not {number!r}')
        if type(number) in (int, float):
            wanted, limit = ('an integer below 2**63', 2**63) if type(number) is int else ('a finite number', math.inf)
            if not (0 < number < limit or (zero and number == 0)):  # NaN is refused as well
                raise BadSetting(f'{name} must be {wanted}, {"at least" if zero else "above"} 0, not {number}')


@dataclass(frozen=True)
class Config:
    """Every setting; the defaults are the full preset. NUM_BATCHES is --num-batches on the command line, and so on."""

    PRESET: str = option(
        'auto',
        'full: the defaults listed here; quick: a small model, for two CPU cores; auto: full with a GPU, else quick',
        ('auto', 'full', 'quick'),
    )
    RUN_DIR: str = option('', 'folder for checkpoints, metrics, samples and the plot; empty: runs/PRESET')
    DATA: str = option('', 'file to train on: raw bytes, .gz, or a .zip of one file; empty: enwik8, downloaded once')

    NUM_BATCHES: int = option(100_000, 'total number of optimizer steps')
    BATCH_SIZE: int = option(4, 'windows per micro batch')
    GRADIENT_ACCUMULATE_EVERY: int = option(4, 'micro batches per optimizer step')
    SEQ_LEN: int = option(512, 'bytes per window')
    LEARNING_RATE: float = option(2e-4, 'learning rate of AdamW', zero=True)
    MAX_GRAD_NORM: float = option(0.5, 'gradients are clipped to this norm')
    VALIDATE_EVERY: int = option(100, 'steps between validations')
    VALIDATE_BATCHES: int = option(32, 'batches of fixed validation windows')
    GENERATE_EVERY: int = option(500, 'steps between samples')
    PRIME_LENGTH: int = option(100, 'bytes of validation text that a sample continues')
    GENERATE_LENGTH: int = option(512, 'length of a sample in bytes, including the text that it continues')
    CHECKPOINT_EVERY: int = option(5000, 'steps between checkpoints')
    SEED: int = option(0, 'seed of the initial weights and of the samples', zero=True)
    DATA_SEED: int = option(0, 'seed of the order of training windows, independent of the model', zero=True)

    DIM: int = option(384, 'width of the model')
    DEPTH: int = option(8, 'number of layers')
    HEADS: int = option(8, 'attention heads')
    DIM_HEAD: int = option(64, 'width of an attention head')
    WINDOW_SIZE: int = option(32, 'attention segment (window) in bytes')
    SLIDING_WINDOWS: bool = option(True, 'let attention slide over segments instead of staying inside one')
    NUM_PERSIST_MEM: int = option(4, 'persistent memory tokens', zero=True)
    NUM_LONGTERM_MEM: int = option(4, 'long-term memory tokens per segment', zero=True)

    NEURAL_MEM_LAYERS: tuple[int, ...] = option((2, 4, 6), 'layers with a neural memory, counted from 1')
    NEURAL_MEM_HEADS: int = option(4, 'neural memory heads')
    NEURAL_MEM_DIM_HEAD: int = option(64, 'width of a neural memory head')
    NEURAL_MEMORY_DEPTH: int = option(2, 'depth of the memory MLP')
    NEURAL_MEM_SEGMENT_LEN: int = option(4, 'tokens per memory update (chunk); smaller is finer and slower')
    NEURAL_MEM_BATCH_SIZE: int = option(128, 'tokens per memory batch; gradients are taken at the weights of its start')
    NEURAL_MEM_GATE_ATTN_OUTPUT: bool = option(False, 'let memory gate the attention output instead of adding to it')
    NEURAL_MEM_MOMENTUM: bool = option(True, 'momentum of the surprise')
    NEURAL_MEM_MOMENTUM_ORDER: int = option(1, 'order of the momentum')
    NEURAL_MEM_QK_NORM: bool = option(True, 'normalise the queries and keys of the memory')
    NEURAL_MEM_MAX_LR: float = option(1e-1, 'upper limit of the learned step size of memory updates')
    NEURAL_MEM_WEIGHT_RESIDUAL: bool = option(True, 'let a memory build on the updates of the preceding memory layer')
    NEURAL_MEM_QKV_RECEIVES_DIFF_VIEW: bool = option(True, 'let queries, keys and values come from different layers')
    NEURAL_MEM_SPEC_NORM_SURPRISES: bool = option(True, 'spectral norm of the surprises (as in Muon)')
    STORE_ATTN_POOL_CHUNKS: bool = option(True, 'pool a chunk by attention for its momentum, decay and step size')
    MEMORY_MODEL_PER_LAYER_LEARNED_LR: bool = option(True, 'a learned step size for each weight matrix of the memory')
    USE_MEM_ATTENTION_MODEL: bool = option(False, 'a small attention network as memory model instead of the MLP')

    DEVICE: str = option('auto', 'auto, cpu, cuda, cuda:1, ...')
    PRECISION: str = option(
        'auto',
        'fp32 is true fp32; tf32: fp32 with TF32 matrix products; bf16: autocast; '
        'auto: bf16 on a GPU that has it, else fp32',
        ('auto', 'fp32', 'tf32', 'bf16'),
    )
    USE_ACCELERATED_SCAN: bool | None = option(
        None, 'accelerated scan of the dense form; no effect here: the memories of this script run in the dual form'
    )
    USE_FLEX_ATTN: bool | None = option(None, 'FlexAttention; unset: on a GPU with Triton')
    USE_CUDA_GRAPHS: bool | None = option(
        None, 'capture forward and backward once and replay them, which saves the kernel launches; unset: on a GPU'
    )
    COMPILE: bool | None = option(
        None, 'compile forward and backward together, during the first step; unset: on a GPU with Triton'
    )
    USE_FAST_INFERENCE: bool = option(True, 'sample with a cache instead of reading the whole text again for each byte')

    WANDB: bool = option(False, 'also report to Weights & Biases')
    PROJECT_NAME: str = option('titans-mac-transformer', 'Weights & Biases project')
    RUN_NAME: str = option('', 'Weights & Biases run name')

    def __post_init__(self) -> None:
        if isinstance(self.NEURAL_MEM_LAYERS, list):  # as the command line gives it
            object.__setattr__(self, 'NEURAL_MEM_LAYERS', tuple(self.NEURAL_MEM_LAYERS))
        for setting in dataclasses.fields(self):
            check_setting(setting, getattr(self, setting.name))
        if any(layer > self.DEPTH for layer in self.NEURAL_MEM_LAYERS):
            raise BadSetting(f'NEURAL_MEM_LAYERS must be from 1 to DEPTH={self.DEPTH}, not {self.NEURAL_MEM_LAYERS}')
        if self.NEURAL_MEM_BATCH_SIZE % self.NEURAL_MEM_SEGMENT_LEN:
            raise BadSetting(
                f'NEURAL_MEM_BATCH_SIZE must be a multiple of NEURAL_MEM_SEGMENT_LEN={self.NEURAL_MEM_SEGMENT_LEN}, '
                f'not {self.NEURAL_MEM_BATCH_SIZE}'
            )
        if self.GENERATE_LENGTH <= self.PRIME_LENGTH:
            raise BadSetting(
                f'GENERATE_LENGTH must be above PRIME_LENGTH={self.PRIME_LENGTH}, which it includes, '
                f'not {self.GENERATE_LENGTH}'
            )


PRESETS: dict[str, dict[str, Any]] = {
    'full': {},
    'quick': {
        'NUM_BATCHES': 200,
        'BATCH_SIZE': 4,
        'GRADIENT_ACCUMULATE_EVERY': 1,
        'SEQ_LEN': 128,
        'LEARNING_RATE': 3e-3,
        'VALIDATE_EVERY': 50,
        'VALIDATE_BATCHES': 8,
        'GENERATE_EVERY': 100,
        'PRIME_LENGTH': 64,
        'GENERATE_LENGTH': 192,
        'CHECKPOINT_EVERY': 100,
        'DIM': 96,
        'DEPTH': 2,
        'HEADS': 4,
        'DIM_HEAD': 32,
        'NEURAL_MEM_LAYERS': (2,),
        'NEURAL_MEM_HEADS': 2,
        'NEURAL_MEM_DIM_HEAD': 32,
        'NEURAL_MEM_BATCH_SIZE': 64,
    },
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Train a byte-level Titans transformer (memory as context).')
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        '--resume',
        metavar='PATH|latest',
        help='continue a run exactly, with the settings in its '
        'checkpoint; latest: the newest valid one in the folder of the run',
    )
    start.add_argument(
        '--init-from', metavar='PATH', help='start a new run from the weights in a checkpoint (or in a bare state dict)'
    )
    for setting in dataclasses.fields(Config):
        kind: dict[str, Any] = {'type': type(setting.default), 'choices': setting.metadata['choices']}
        if isinstance(setting.default, tuple):
            kind = {'type': int, 'nargs': '*', 'metavar': 'N'}
        elif str(setting.type).startswith('bool'):
            kind = {'action': argparse.BooleanOptionalAction}
        # suppressed defaults distinguish options that were given from those that were not
        parser.add_argument(
            '--' + setting.name.lower().replace('_', '-'),
            dest=setting.name,
            default=argparse.SUPPRESS,
            help=f'{setting.metadata["help"]} (default: {setting.default})',
            **kind,
        )
    return parser


def config_from_options(given: dict[str, Any]) -> Config:
    """The preset, overridden by the options that were given."""
    preset = given.get('PRESET', 'auto')
    if preset == 'auto':
        device = given.get('DEVICE', 'auto')
        preset = 'full' if device.startswith('cuda') or (device == 'auto' and torch.cuda.is_available()) else 'quick'
    return dataclasses.replace(Config(), **{**PRESETS[preset], **given, 'PRESET': preset})


def run_folder(config: Config) -> Path:
    return Path(config.RUN_DIR or f'runs/{config.PRESET}')


# machine --------------------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    device: torch.device
    precision: str
    flex_attn: bool
    accelerated_scan: bool
    cuda_graphs: bool
    compile: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == 'bf16')


def choose_machine(config: Config) -> Machine:
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(config.DEVICE if config.DEVICE != 'auto' else 'cuda' if cuda else 'cpu')
        torch.zeros((), device=device).item()  # a device can have a valid name and be absent
    except Exception as error:  # its type depends on the kind of device
        sys.exit(f'--device {config.DEVICE} cannot be used here: {one_line(error)}')
    on_gpu = device.type == 'cuda'
    if device.index is not None and on_gpu:
        torch.cuda.set_device(device)  # kernels are launched on the current device
    precision = config.PRECISION
    if precision == 'auto':
        precision = 'bf16' if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else 'fp32'
    torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')  # fp32 never means TF32
    if config.USE_CUDA_GRAPHS and not on_gpu:
        sys.exit(f'--use-cuda-graphs needs a CUDA device, and this run is on {device}')
    triton = on_gpu and importlib.util.find_spec('triton') is not None
    return Machine(
        device,
        precision,
        triton if config.USE_FLEX_ATTN is None else config.USE_FLEX_ATTN,
        bool(config.USE_ACCELERATED_SCAN),
        on_gpu if config.USE_CUDA_GRAPHS is None else config.USE_CUDA_GRAPHS,
        triton if config.COMPILE is None else config.COMPILE,
    )


# files ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of the file to an OSError that lacks it, as errors of writes do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write to a temporary file and rename it once all of it is on disk: a kill leaves the old file."""
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with naming(path):
            with open(temporary, 'wb') as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, text: str) -> None:
    with naming(path), open(path, 'a', encoding='utf-8') as file:
        file.write(text)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Create `folder` if necessary, and refuse a second run in it. The lock ends with its process."""
    new, lock = not folder.exists(), folder / 'lock'
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(lock, 'a') as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f'another run is using {folder}: wait until it has ended, or choose another --run-dir')
            except (ImportError, OSError) as error:  # some platforms and file systems have no such lock
                say(f'NOTICE: {folder} cannot be locked ({one_line(error)}); a second run in it would not be refused')
            yield
    finally:
        with contextlib.suppress(OSError):
            if new and [*folder.iterdir()] == [lock]:  # the run was refused before it left anything
                lock.unlink()
                folder.rmdir()


def remove_leftovers(folder: Path, older_than: float = 0.0) -> None:
    for leftover in folder.glob('*.tmp'):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime >= older_than:
                leftover.unlink()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a kill can cut the last line short
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get('step')) is int:
                rows.append(row)
    if len(rows) < len(lines):
        say(f'NOTICE: {path}: {len(lines) - len(rows)} damaged lines of {len(lines)} are left out')
    return rows


def rewind(folder: Path, batch: int, evaluated: int) -> None:
    """Remove metrics and samples later than the checkpoint to resume, since they will be written again."""
    metrics, samples = folder / 'metrics.jsonl', folder / 'samples.txt'
    rows = [row for row in read_metrics(metrics) if row['step'] <= (evaluated if 'val_loss' in row else batch)]
    with atomic_file(metrics) as file:
        file.writelines(json.dumps(row).encode() + b'\n' for row in rows)
    text = samples.read_bytes() if samples.exists() else b''
    for sample in re.finditer(rb'^--- sample after (\d+) steps$', text, re.MULTILINE):
        if int(sample[1]) > evaluated:
            with atomic_file(samples) as file:
                file.write(text[: sample.start()])
            break


def prepare_run_folder(folder: Path, resume: dict[str, Any] | None) -> None:
    remove_leftovers(folder)
    if resume is not None:
        rewind(folder, resume['batch'], resume['evaluated'])
        return
    names = ('metrics.jsonl', 'samples.txt', 'loss.png')
    earlier = [path for path in folder.iterdir() if path.suffix == '.pt' or path.name in names]
    if earlier:  # never overwrite days of work because --resume was forgotten
        aside = next(path for n in itertools.count(1) if not (path := folder / f'earlier-{n}').exists())
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        say(f'a new run (no --resume): the run that was in {folder} is now in {aside}')


# data -----------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    train: Tensor
    valid: Tensor
    test: Tensor
    source: str
    sha256: str


def read_bytes(path: Path) -> bytes:
    try:
        if path.suffix == '.gz':
            with gzip.open(path) as file:
                return file.read()
        if path.suffix == '.zip':
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                if len(members) != 1:
                    sys.exit(f'{path} holds {len(members)} files; a .zip to train on must hold exactly one')
                return archive.read(members[0])
        return path.read_bytes()
    except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        hint = '; delete it, and it is downloaded again' if path.parent == DATA_FOLDER else ''
        sys.exit(f'cannot read the data file {path}: {error}{hint}')


def copy_verified(source: IO[bytes], target: IO[bytes] | gzip.GzipFile, size: int, sha256: str, name: str) -> None:
    digest, length = hashlib.sha256(), 0
    with tqdm(total=size or None, unit='B', unit_scale=True, desc=name) as bar:
        while block := source.read(1 << 18):
            length += len(block)
            if length > ENWIK8_BYTES:  # a limit for the archive too, which is smaller than the text
                sys.exit(
                    f'{name} from {ENWIK8_URL} is corrupt: it exceeds {ENWIK8_BYTES:,} bytes. '
                    'Nothing of it was kept; try again, or give a file with --data'
                )
            target.write(block)
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != sha256:
        sys.exit(
            f'{name} from {ENWIK8_URL} is corrupt: its sha256 is {digest.hexdigest()}, not {sha256}. '
            'Nothing of it was kept; try again, or give a file with --data'
        )


def download_enwik8(path: Path) -> bool:
    """Download enwik8 to `path`. False if the network is out of reach; any other failure ends the program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, older_than=3600.0)
    archive = path.with_name(f'enwik8.zip.{os.getpid()}.tmp')
    try:
        response = urllib.request.urlopen(ENWIK8_URL, timeout=30)
    except urllib.error.HTTPError as error:  # a server answered, so there is a network
        error.close()
        sys.exit(f'the download of {ENWIK8_URL} was refused ({error}); give a file with --data')
    except OSError as error:
        say(f'no network: {ENWIK8_URL} is out of reach ({getattr(error, "reason", error)})')
        return False
    try:
        with response, open(archive, 'wb') as zipped:
            copy_verified(response, zipped, response.length or 0, ENWIK8_ZIP_SHA256, 'enwik8.zip')
        with (
            zipfile.ZipFile(archive) as unpacked,
            unpacked.open('enwik8') as text,
            atomic_file(path) as file,
            gzip.GzipFile('', 'wb', compresslevel=1, fileobj=file, mtime=0) as packed,
        ):
            copy_verified(text, packed, unpacked.getinfo('enwik8').file_size, ENWIK8_SHA256, 'enwik8')
        return True
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f'the download of {ENWIK8_URL} failed ({error}); nothing was kept. Try again, or use --data')
    finally:
        archive.unlink(missing_ok=True)


def standard_library_text() -> bytes:
    """The source of Python's standard library, files ordered by a hash of their names to mix the splits."""
    root = Path(sysconfig.get_paths()['stdlib'])
    skip = {'site-packages', 'dist-packages', 'test', 'tests', '__pycache__'}
    names = [path.relative_to(root) for path in root.rglob('*.py')]
    names = [name for name in names if not skip.intersection(name.parts)]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return b''.join((root / name).read_bytes() for name in names)


def load_data(config: Config) -> Data:
    path = Path(config.DATA) if config.DATA else DATA_FOLDER / 'enwik8.gz'
    if config.DATA or path.exists() or download_enwik8(path):
        content, source = read_bytes(path), str(path)
    else:
        content, source = standard_library_text(), "the source text of Python's standard library"
    sha256 = hashlib.sha256(content).hexdigest()
    if not config.DATA and sha256 != ENWIK8_SHA256:
        say(f'NOTICE: this run uses {source}, which is not enwik8: results are not comparable with enwik8 results')
    least = 20 * (max(config.SEQ_LEN, config.PRIME_LENGTH) + 2)  # a twentieth is for validation
    if len(content) < least:
        sys.exit(f'{source} has {len(content)} bytes, too few: this configuration needs at least {least}')
    everything = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    ends = len(content) * 90 // 100, len(content) * 95 // 100
    return Data(everything[: ends[0]], everything[ends[0] : ends[1]], everything[ends[1] :], source, sha256)


def windows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    return data[starts[:, None] + torch.arange(length)].long()


def random_windows(data: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - config.SEQ_LEN, (config.BATCH_SIZE,), generator=generator)
    return windows(data, starts, config.SEQ_LEN + 1)


# model ----------------------------------------------------------------------------------------------------------------


def build_model(config: Config) -> MemoryAsContextTransformer:
    machine = choose_machine(config)
    torch.manual_seed(config.SEED)
    random.seed(config.SEED)  # the residual streams draw from Python's own generator
    if config.USE_MEM_ATTENTION_MODEL:
        memory_model: nn.Module = MemoryAttention(dim=config.NEURAL_MEM_DIM_HEAD)
    else:
        memory_model = MemoryMLP(dim=config.NEURAL_MEM_DIM_HEAD, depth=config.NEURAL_MEMORY_DEPTH)
    model = MemoryAsContextTransformer(
        num_tokens=256,
        dim=config.DIM,
        depth=config.DEPTH,
        heads=config.HEADS,
        dim_head=config.DIM_HEAD,
        segment_len=config.WINDOW_SIZE,
        sliding_window_attn=config.SLIDING_WINDOWS,
        use_flex_attn=machine.flex_attn,
        num_persist_mem_tokens=config.NUM_PERSIST_MEM,
        num_longterm_mem_tokens=config.NUM_LONGTERM_MEM,
        neural_memory_layers=config.NEURAL_MEM_LAYERS,
        neural_memory_segment_len=config.NEURAL_MEM_SEGMENT_LEN,
        neural_memory_batch_size=config.NEURAL_MEM_BATCH_SIZE,
        neural_mem_gate_attn_output=config.NEURAL_MEM_GATE_ATTN_OUTPUT,
        neural_mem_weight_residual=config.NEURAL_MEM_WEIGHT_RESIDUAL,
        neural_memory_qkv_receives_diff_views=config.NEURAL_MEM_QKV_RECEIVES_DIFF_VIEW,
        neural_memory_model=memory_model,
        neural_memory_kwargs={
            'dim_head': config.NEURAL_MEM_DIM_HEAD,
            'heads': config.NEURAL_MEM_HEADS,
            'attn_pool_chunks': config.STORE_ATTN_POOL_CHUNKS,
            'qk_rmsnorm': config.NEURAL_MEM_QK_NORM,
            'momentum': config.NEURAL_MEM_MOMENTUM,
            'momentum_order': config.NEURAL_MEM_MOMENTUM_ORDER,
            'default_step_transform_max_lr': config.NEURAL_MEM_MAX_LR,
            'use_accelerated_scan': machine.accelerated_scan,
            'per_parameter_lr_modulation': config.MEMORY_MODEL_PER_LAYER_LEARNED_LR,
            'spectral_norm_surprises': config.NEURAL_MEM_SPEC_NORM_SURPRISES,
        },
    )
    return model.to(machine.device)


# checkpoints ----------------------------------------------------------------------------------------------------------


class BadCheckpoint(Exception):
    pass


# entries that a resumed run needs, and their types
RESUMABLE: dict[str, Any] = {
    'batch': int,
    'evaluated': int,
    'val_loss': (float, type(None)),
    'best_val_loss': float,
    'config': dict,
    'model_state_dict': dict,
    'optimizer_state_dict': dict,
    'data_sha256': str,
    'random': Tensor,
    'python_random': tuple,
    'windows_random': Tensor,
    'cuda_random': (Tensor, type(None)),
}
DIGEST_MARK, DIGEST_LENGTH = b'sha256 ', 64


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save in the format of `torch.save`, with a sha256 of all preceding bytes as the comment of the zip archive."""
    with atomic_file(path) as file:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        buffer.seek(-2, os.SEEK_END)  # an archive without a comment ends with its length, 0
        assert buffer.read() == b'\0\0'
        buffer.seek(-2, os.SEEK_END)
        buffer.write((len(DIGEST_MARK) + DIGEST_LENGTH).to_bytes(2, 'little') + DIGEST_MARK)
        digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
        buffer.write(digest.encode())
        file.write(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict saved at `path` by this script, an older version of it, or `torch.save` alone.

    Raises:
        BadCheckpoint: if the file is missing, damaged or of another kind.
    """
    try:
        stored = path.read_bytes()
        digested, digest = memoryview(stored)[:-DIGEST_LENGTH], stored[-DIGEST_LENGTH:]
        if digested[-len(DIGEST_MARK) :] == DIGEST_MARK:
            if hashlib.sha256(digested).hexdigest().encode() != digest:
                raise ValueError('its sha256 is not the stored one')
        elif zipfile.is_zipfile(io.BytesIO(stored)):  # torch.save alone: its checksums omit the headers
            with zipfile.ZipFile(io.BytesIO(stored)) as archive:
                if archive.testzip() is not None or archive.comment:
                    raise ValueError('checksum mismatch')
        content = torch.load(io.BytesIO(stored), map_location='cpu', weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f'it holds a {type(content).__name__}')
        return content
    except FileNotFoundError:
        raise BadCheckpoint(f'there is no checkpoint {path}') from None
    except Exception as error:
        raise BadCheckpoint(f'{path} is corrupt, or no checkpoint: {one_line(error)}') from error


def read_resumable(path: Path) -> dict[str, Any]:
    """A checkpoint with everything in `RESUMABLE`.

    Raises:
        BadCheckpoint: if it cannot be read or is incomplete.
    """
    content = read_checkpoint(path)
    missing = [key for key, kind in RESUMABLE.items() if key not in content or not isinstance(content[key], kind)]
    if missing:
        raise BadCheckpoint(
            f'{path} cannot be resumed, since it lacks {", ".join(missing)}; --init-from can use the weights in it'
        )
    return content


def latest_checkpoint(folder: Path) -> dict[str, Any]:
    """The resumable checkpoint in `folder` with the most steps, regardless of file times."""

    def progress(path: Path) -> tuple[float, int]:
        try:
            peek = torch.load(path, map_location='cpu', weights_only=True, mmap=True)  # reads no tensor
            return int(peek['batch']), int(peek['evaluated'])
        except Exception:
            return math.inf, 0  # tried first, so that the output says why it is skipped

    for path in sorted(folder.glob('*.pt'), key=progress, reverse=True):
        try:
            return read_resumable(path)
        except BadCheckpoint as error:
            say(f'skipped: {error}')
    raise BadCheckpoint(f'there is no checkpoint to resume in {folder}')


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restore the optimizer. Earlier versions also saved empty parameters, and scalars as zero-dimensional tensors."""
    (group,), state = saved['param_groups'], saved['state']
    kept = [index for index in group['params'] if index not in state or state[index]['exp_avg'].numel()]
    moments = {
        index: {key: value if key == 'step' else value.reshape(parameter.shape) for key, value in state[old].items()}
        for index, (old, parameter) in enumerate(zip(kept, optimizer.param_groups[0]['params']))
        if old in state
    }
    optimizer.load_state_dict({'state': moments, 'param_groups': [{**group, 'params': [*range(len(kept))]}]})


# evaluation -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(model: nn.Module, data: Tensor, config: Config, machine: Machine) -> float:
    """Mean loss (nats per byte) over windows that are the same in every run: evenly spaced over the split."""
    model.eval()
    count = config.VALIDATE_BATCHES * config.BATCH_SIZE
    starts = torch.linspace(0, len(data) - config.SEQ_LEN - 1, count, dtype=torch.float64).long()
    losses = []
    for some in starts.split(config.BATCH_SIZE):
        with machine.autocast():
            losses.append(model(windows(data, some, config.SEQ_LEN + 1).to(machine.device), return_loss=True))
    model.train()
    return torch.stack(losses).double().mean().item()


def printable(content: Tensor) -> str:
    text = bytes(content.tolist()).decode('utf-8', errors='replace')
    return ''.join(c if c.isprintable() or c in '\n\t' else '\N{REPLACEMENT CHARACTER}' for c in text)


def generate(model: MemoryAsContextTransformer, data: Tensor, config: Config, machine: Machine, batch: int) -> str:
    """A passage of validation text and its continuation. The random state of training does not change."""
    with torch.random.fork_rng(devices=[machine.device] if machine.device.type == 'cuda' else []), machine.autocast():
        torch.manual_seed(config.SEED + batch)
        prompt = windows(data, torch.randint(len(data) - config.PRIME_LENGTH, (1,)), config.PRIME_LENGTH)
        made = model.sample(
            prompt.to(machine.device), config.GENERATE_LENGTH, use_cache=config.USE_FAST_INFERENCE, show_progress=False
        )
    model.train()
    return f'--- sample after {batch} steps\n{printable(prompt[0])}\n--- goes on as\n{printable(made[0])}\n---\n'


def rehearse(model: MemoryAsContextTransformer, data: Tensor, config: Config, machine: Machine) -> None:
    """Sample two bytes before training, because some sizes can be trained but not sampled."""
    try:
        generate(model, data, dataclasses.replace(config, GENERATE_LENGTH=config.PRIME_LENGTH + 2), machine, 0)
    except (ValueError, TypeError, RuntimeError) as error:
        sys.exit(
            f'no sample can be made with these settings: {one_line(error)}. Try an even DIM_HEAD (now '
            f'{config.DIM_HEAD}), or --no-use-fast-inference'
        )


def draw_losses(folder: Path) -> None:
    from matplotlib.figure import Figure

    rows = read_metrics(folder / 'metrics.jsonl')
    if not rows:
        return
    axes = (figure := Figure(figsize=(8, 5), layout='constrained')).subplots()
    for key, label, marker in (('train_loss', 'training', ''), ('val_loss', 'validation', 'o')):
        points = [(row['step'], row['bpb']) for row in rows if key in row]
        axes.plot(*zip(*points), label=label, marker=marker, markersize=4) if points else None
    axes.set(xlabel='steps', ylabel='bits per byte')
    axes.set_title(str(folder), parse_math=False)  # a path may hold a $
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(folder / 'loss.png') as file:
        figure.savefig(file, format='png', dpi=120)


def plot_losses(folder: Path) -> None:
    """Draw the loss curve. A failure is reported and never raised: it must not end a run."""
    try:
        draw_losses(folder)
    except ModuleNotFoundError:
        say('no loss curve was drawn: matplotlib is not installed')
    except Exception as error:
        say(f'no loss curve was drawn: {one_line(error)}')


# training -------------------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    pass


class Signals:
    """Ctrl-C and SIGTERM: deferred to the end of a step or a save, immediate elsewhere; a second one never waits."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.wait = False

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, signal.Signals(number)
        if not (first and self.wait):
            raise Interrupted

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(config: Config, resume: dict[str, Any] | None = None, weights: dict[str, Any] | None = None) -> int:
    """Train from scratch, from the checkpoint `resume`, or from `weights` alone (a checkpoint or a state dict).

    Returns the exit status: 0, or 128 + the number of the signal that ended the run.
    """
    with Signals() as signals:
        try:
            training_loop(config, resume, weights, signals)
        except Interrupted:
            say(f'ended at once by {signals.received.name if signals.received else "a signal"}; nothing more was saved')
    return 128 + signals.received if signals.received else 0


class MicroStep:
    """Forward and backward over one micro batch, adding to the gradients. It is compiled and captured as a CUDA graph
    where `machine` says so."""

    def __init__(self, model: nn.Module, config: Config, machine: Machine):
        self.model = model
        # not the model itself, so that validation and sampling, whose lengths differ, are not compiled
        self.loss_of = torch.compile(self._loss, fullgraph=True, dynamic=False) if machine.compile else self._loss
        self.shares = config.GRADIENT_ACCUMULATE_EVERY
        self.machine = machine
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The loss divided by the number of micro batches; overwritten by the next call."""
        if not self.machine.cuda_graphs:
            return self._compute(inputs.to(self.machine.device))
        if self.graph is None:
            self._capture(inputs)
        assert self.graph is not None
        self.inputs.copy_(inputs, non_blocking=True)
        self.graph.replay()
        return self.loss

    def _loss(self, inputs: Tensor) -> Tensor:
        return self.model(inputs, return_loss=True) / self.shares

    def _compute(self, inputs: Tensor) -> Tensor:
        with self.machine.autocast():
            loss = self.loss_of(inputs)
        loss.backward()
        return loss.detach()

    def _capture(self, inputs: Tensor) -> None:
        self.inputs = inputs.to(self.machine.device)
        # warm-up passes compile the step and allocate the gradients that the graph adds to
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.model.zero_grad(set_to_none=False)
                expected = self._outcome(self._compute(self.inputs))
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self._compute(self.inputs)

        self.model.zero_grad(set_to_none=False)
        self.graph.replay()
        captured = self._outcome(self.loss)
        if not torch.allclose(captured, expected, rtol=0.02):
            raise RuntimeError(
                f'loss and gradient norm are {captured.tolist()} in the captured step and {expected.tolist()} in the '
                f'step itself: train with --no-use-cuda-graphs, or with --no-compile'
            )
        self.model.zero_grad(set_to_none=False)

    def _outcome(self, loss: Tensor) -> Tensor:
        """The loss and the gradient norm."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.stack((loss.float(), nn.utils.get_total_norm(gradients)))


def training_loop(
    config: Config, resume: dict[str, Any] | None, weights: dict[str, Any] | None, signals: Signals
) -> None:
    machine, folder = choose_machine(config), run_folder(config)
    gpu = machine.device.type == 'cuda'
    if config.WANDB and importlib.util.find_spec('wandb') is None:
        sys.exit('--wandb needs the wandb package, which is not installed')
    say(
        f'{config.PRESET} preset on {torch.cuda.get_device_name(machine.device) if gpu else machine.device}, '
        f'{machine.precision}, FlexAttention {"on" if machine.flex_attn else "off"}, accelerated scan '
        f'{"without effect (dual form)" if machine.accelerated_scan else "off"}, '
        f'CUDA graphs {"on" if machine.cuda_graphs else "off"}, '
        f'compiled {"yes" if machine.compile else "no"}, '
        f'PyTorch {torch.__version__}'
    )
    data = load_data(config)
    say(f'data: {data.source}: {len(data.train):,} bytes to train on, {len(data.valid):,} to validate')

    # `batch` counts the steps done, `evaluated` is its value at the last evaluation, and `windows_random` the state of
    # `generator` after the last complete step

    try:
        model = build_model(config)
    except (ValueError, TypeError, RuntimeError) as error:
        sys.exit(f'no model can be built with these settings: {one_line(error)}')
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.LEARNING_RATE, weight_decay=0.0, fused=gpu)
    micro_step = MicroStep(model, config, machine)
    generator = torch.Generator().manual_seed(config.DATA_SEED)
    batch, evaluated, val_loss, best = 0, -1, None, math.inf
    try:
        if resume is not None:
            model.load_state_dict(resume['model_state_dict'])
            load_optimizer(optimizer, resume['optimizer_state_dict'])
            torch.set_rng_state(resume['random'])
            random.setstate(resume['python_random'])
            generator.set_state(resume['windows_random'])
            if gpu and resume['cuda_random'] is not None:
                torch.cuda.set_rng_state(resume['cuda_random'], machine.device)
        elif weights is not None:
            model.load_state_dict(weights.get('model_state_dict', weights))
    except (LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        sys.exit(f'the saved weights or optimizer state do not fit this configuration: {one_line(error)}')
    if resume is not None:
        for group in optimizer.param_groups:
            group['lr'] = config.LEARNING_RATE  # which may have been changed on the command line
        batch, evaluated, val_loss, best = (resume[key] for key in ('batch', 'evaluated', 'val_loss', 'best_val_loss'))
        say(f'resumed after {batch} steps')
        if resume['data_sha256'] != data.sha256:
            say('NOTICE: the data is not what this run began with')
    windows_random = generator.get_state()
    rehearse(model, data.valid, config, machine)
    prepare_run_folder(folder, resume)
    say(f'{sum(p.numel() for p in model.parameters()):,} parameters; the run is kept in {folder}')

    wandb_run = None
    if config.WANDB:
        import wandb

        settings = dataclasses.asdict(config)
        wandb_run = wandb.init(project=config.PROJECT_NAME, name=config.RUN_NAME or None, config=settings)

    def log(row: dict[str, Any]) -> None:
        append(folder / 'metrics.jsonl', json.dumps(row) + '\n')
        if wandb_run is not None:
            wandb_run.log(row, step=row['step'])

    def fail(reason: str) -> NoReturn:
        sys.exit(
            f'\nstopped after {batch} steps: {reason}. Nothing was saved from this state; earlier checkpoints are '
            f'good. A lower NEURAL_MEM_MAX_LR (now {config.NEURAL_MEM_MAX_LR:g}) or LEARNING_RATE '
            f'(now {config.LEARNING_RATE:g}) usually helps'
        )

    def save(name: str) -> None:
        weights = model.state_dict()
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            fail('the weights are not finite')
        content = {
            'batch': batch,
            'model_state_dict': weights,
            'optimizer_state_dict': optimizer.state_dict(),
            'val_loss': val_loss,
            'config': dataclasses.asdict(config),
            # the rest makes a resumed run the same as an uninterrupted one
            'best_val_loss': best,
            'evaluated': evaluated,
            'data_sha256': data.sha256,
            'random': torch.get_rng_state(),
            'python_random': random.getstate(),
            'windows_random': windows_random,
            'cuda_random': torch.cuda.get_rng_state(machine.device) if gpu else None,
        }
        write_checkpoint(folder / name, content)
        say(f'saved {folder / name}')

    start = batch
    model.train()
    bar = tqdm(
        total=config.NUM_BATCHES,
        initial=batch,
        unit='step',
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
    try:
        while True:
            # evaluate: this changes nothing that training depends on, so a signal may interrupt it, and a resumed run
            # repeats it. A checkpoint counts as evaluated only once the results are in metrics and samples

            last = batch >= config.NUM_BATCHES
            new_loss = sample = None
            now_evaluated, started = evaluated, time.perf_counter()
            if batch != evaluated:
                try:
                    signals.wait = False
                    if last or batch % config.VALIDATE_EVERY == 0:
                        new_loss = validate(model, data.valid, config, machine)
                    validation_seconds = time.perf_counter() - started
                    if last or (batch > 0 and batch % config.GENERATE_EVERY == 0):
                        sample = generate(model, data.valid, config, machine, batch)
                    signals.wait, now_evaluated = True, batch
                except Interrupted:
                    new_loss = sample = None
            signals.wait = True
            if new_loss is not None:
                if not math.isfinite(new_loss):
                    fail(f'the validation loss is {new_loss}')
                bpb = new_loss / math.log(2)
                log({'step': batch, 'val_loss': new_loss, 'bpb': bpb, 'seconds': validation_seconds})
                say(f'step {batch}: validation {bpb:.4f} bits per byte')
            if sample is not None:
                say(sample)
                append(folder / 'samples.txt', sample + '\n')
                plot_losses(folder)

            evaluated = now_evaluated
            if new_loss is not None:
                val_loss = new_loss
                if val_loss < best:
                    best = val_loss
                    if batch > 0:
                        save('titans_enwik8_best.pt')

            # save, end

            stop = signals.received is not None
            if stop or (batch > start and batch % config.CHECKPOINT_EVERY == 0):
                save(f'checkpoint_batch_{batch}.pt')
            if stop or last:
                break

            # one step; loss and gradient norm are read back once, after the optimizer step is queued

            started, total = time.perf_counter(), torch.zeros((), device=machine.device)
            if gpu:
                torch.cuda.reset_peak_memory_stats(machine.device)
            for _ in range(config.GRADIENT_ACCUMULATE_EVERY):
                total += micro_step(random_windows(data.train, config, generator))
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not machine.cuda_graphs)
            train_loss, grad_norm = torch.stack((total, norm)).tolist()
            if not (math.isfinite(train_loss) and math.isfinite(grad_norm)):
                fail(f'the training loss is {train_loss}, the norm of its gradient {grad_norm}')
            batch, windows_random = batch + 1, generator.get_state()

            seconds = time.perf_counter() - started
            if batch == start + 1 and machine.compile:
                say(f'the first step, including compilation, took {seconds:.0f} s')
            speed = config.BATCH_SIZE * config.GRADIENT_ACCUMULATE_EVERY * config.SEQ_LEN / seconds
            bpb = train_loss / math.log(2)
            row = {
                'step': batch,
                'train_loss': train_loss,
                'bpb': bpb,
                'grad_norm': grad_norm,
                'tokens_per_second': speed,
                'seconds': seconds,
            }
            if gpu:
                row['peak_memory_bytes'] = torch.cuda.max_memory_allocated(machine.device)
            log(row)
            bar.set_postfix_str(f'loss {train_loss:.3f}, {bpb:.3f} bits per byte, {speed:,.0f} tokens/s', refresh=False)
            bar.update()

        bar.close()
        if last and not stop:
            save('titans_enwik8.pt')
    except Exception as error:  # for example, a full disk
        signals.wait = True
        bar.close()
        say(f'stopped after {batch} steps: {one_line(error)}')
        if batch > start:
            try:
                save(f'checkpoint_batch_{batch}.pt')
            except OSError as full:
                sys.exit(f'the {batch} steps done could not be saved: {full}; earlier checkpoints are good')
        raise
    plot_losses(folder)
    if wandb_run is not None:
        wandb_run.finish()
    if signals.received is not None:
        say(f'ended by {signals.received.name} after {batch} steps; go on with --resume latest --run-dir {folder}')
    else:
        say(f'done: {batch} steps, best validation {best / math.log(2):.4f} bits per byte; everything is in {folder}')


# main -----------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    with contextlib.suppress(AttributeError):
        # a terminal may lack characters of a sample, and a log file should be up to date
        sys.stdout.reconfigure(errors='replace', line_buffering=True)  # type: ignore[union-attr]
    options = vars(build_parser().parse_args(arguments))
    resume, init_from = options.pop('resume'), options.pop('init_from')
    try:
        config = config_from_options(options)
        folder = run_folder(config)
        if resume:
            source = folder if resume == 'latest' else Path(resume).parent
            if not source.is_dir():
                raise BadCheckpoint(f'there is no checkpoint to resume: {source} is not a folder')
            if not config.RUN_DIR:
                folder = source
        with run_lock(folder):
            weights = read_checkpoint(Path(init_from)) if init_from else None
            checkpoint = None
            if resume == 'latest':
                checkpoint = latest_checkpoint(folder)
            elif resume:
                checkpoint = read_resumable(Path(resume))
            if checkpoint is not None:
                known = {setting.name for setting in dataclasses.fields(Config)}
                saved = {name: value for name, value in checkpoint['config'].items() if name in known}
                options.pop('PRESET', None)  # it has named the folder; the settings come from the checkpoint
                config = dataclasses.replace(Config(), **{**saved, **options, 'RUN_DIR': str(folder)})
            return train(config, checkpoint, weights)
    except (BadSetting, BadCheckpoint) as error:
        sys.exit(str(error))
    except OSError as error:  # a folder that cannot be written to, a full disk
        sys.exit(f'the run cannot continue: {error}')


if __name__ == '__main__':
    sys.exit(main())
