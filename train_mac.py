"""Train a Titans transformer (memory as context) on enwik8 or on text of your own.

    python train_mac.py                       # the preset for this machine: full on a GPU, quick on a CPU
    python train_mac.py --preset quick        # a complete run in a few minutes on two CPU cores
    python train_mac.py --resume latest       # continue the last run of this preset
    torchrun --nproc-per-node 2 train_mac.py  # the same run on two GPUs
    python train_mac.py --help                # every setting

From top to bottom: settings, machine, data, model, evaluation, training loop, main. The parts that other scripts use
too are in `titans_pytorch.training`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from titans_pytorch import MemoryAsContextTransformer, configuration, training
from titans_pytorch.training import (
    PRECISIONS,
    BadCheckpoint,
    BadData,
    ByteVocabulary,
    Data,
    Interrupted,
    LossCurve,
    Machine,
    MicroStep,
    RunError,
    Signals,
    TooLittleText,
    Vocabulary,
    any_rank,
    append,
    check_outside_text,
    clear_run_folder,
    describe_run,
    enwik8,
    finish_saves,
    first_rank_first,
    is_distributed,
    is_run_folder,
    latest_checkpoint,
    leave_best_checkpoint,
    leave_later_checkpoints,
    load_bpe,
    load_optimizer,
    load_shards,
    local_part,
    num_ranks,
    one_line,
    process_group,
    random_starts,
    rank,
    read_checkpoint,
    read_resumable,
    remove_leftovers,
    remove_other_form,
    rewind,
    run_lock,
    save_shards,
    say,
    shard,
    share,
    unsharded,
    validation_loss,
    vocabulary_from_dict,
    wandb_id,
    whole_tensor,
    windows,
    write_checkpoint,
)
from titans_pytorch.training.checkpoints import checkpoints

BYTES = ByteVocabulary()
EXPLODES = 1000
"""Gradient norm, as a multiple of MAX_GRAD_NORM, above which a warning is given."""
BEST = 'titans_enwik8_best.pt'
DATA_FOLDER = Path(__file__).resolve().parent / 'data'


# settings -------------------------------------------------------------------------------------------------------------


class BadSetting(ValueError):
    pass


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    zero: bool = False,
    negative: bool = False,
    of: type = int,
) -> Any:
    """A setting. `zero`, `negative`: it may be 0, or any number; `of`: the type of a tuple's items, or of a setting
    that may be unset."""
    limits = {'choices': choices, 'zero': zero or negative, 'negative': negative}
    return field(default=default, metadata={'help': help, 'of': of, **limits})


def check_setting(setting: dataclasses.Field[Any], value: Any) -> None:
    """Refuse values of another type than the default's, and numbers that are not finite and positive (`zero`: or 0)."""
    name, default = setting.name, setting.default
    choices, zero, negative, of = (setting.metadata[key] for key in ('choices', 'zero', 'negative', 'of'))
    kind: type = of if default is None else type(default)
    if value is None and default is None:
        return
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise BadSetting(f'{name} must be of type {kind.__name__}, not {value!r}')
    if choices and value not in choices:
        raise BadSetting(f'{name} must be one of {", ".join(choices)}, not {value!r}')
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(value, tuple) and type(number) is not of:
            raise BadSetting(f'{name} must hold items of type {of.__name__}, not {number!r}')
        if type(number) in (int, float):
            wanted, limit = ('an integer below 2**63', 2**63) if type(number) is int else ('a finite number', math.inf)
            if not (0 < number < limit or (zero and number == 0) or (negative and -limit < number < 0)):  # nor NaN
                least = '' if negative else ', at least 0' if zero else ', above 0'
                raise BadSetting(f'{name} must be {wanted}{least}, not {number}')


@dataclass(frozen=True)
class Config:
    """Every setting; the defaults are the full preset. NUM_BATCHES is --num-batches on the command line, and so on."""

    PRESET: str = option(
        'auto',
        'full: the defaults listed here; quick: a small model, for two CPU cores; stable, quick-stable: the same with '
        'memories whose steps do not overshoot; auto: full with a GPU, else quick',
        ('auto', 'full', 'quick', 'stable', 'quick-stable'),
    )
    RUN_DIR: str = option('', 'folder for checkpoints, metrics, samples and the plot; empty: runs/PRESET')
    DATA: tuple[str, ...] = option(
        (), 'files (raw text, .gz, or .zip of one file) and folders to train on; none: enwik8, downloaded once', of=str
    )
    VOCABULARY: str = option('bytes', 'bytes; bpe, trained on the data; or the path of a tokenizer.json')
    VOCABULARY_SIZE: int = option(8192, 'tokens of a vocabulary that is trained on the data')
    CACHE_DIR: str = option(
        '', 'folder for unpacked and tokenised data; empty: titans_pytorch in the cache of the user'
    )

    NUM_BATCHES: int = option(100_000, 'total number of optimizer steps')
    BATCH_SIZE: int = option(4, 'windows per micro batch')
    GRADIENT_ACCUMULATE_EVERY: int = option(4, 'micro batches per optimizer step, of all processes together')
    SEQ_LEN: int = option(512, 'tokens (bytes, but for BPE) per window')
    LEARNING_RATE: float = option(2e-4, 'learning rate of AdamW', zero=True)
    MAX_GRAD_NORM: float = option(0.5, 'gradients are clipped to this norm')
    VALIDATE_EVERY: int = option(100, 'steps between validations')
    VALIDATE_BATCHES: int = option(32, 'batches of fixed validation windows')
    GENERATE_EVERY: int = option(500, 'steps between samples')
    PRIME_LENGTH: int = option(100, 'tokens of validation text that a sample continues')
    GENERATE_LENGTH: int = option(512, 'length of a sample in tokens, including the text that it continues')
    CHECKPOINT_EVERY: int = option(5000, 'steps between checkpoints')
    SEED: int = option(0, 'seed of the initial weights and of the samples', zero=True)
    DATA_SEED: int = option(0, 'seed of the order of training windows, independent of the model', zero=True)

    DIM: int = option(384, 'width of the model')
    DEPTH: int = option(8, 'number of layers')
    HEADS: int = option(8, 'attention heads')
    DIM_HEAD: int = option(64, 'width of an attention head')
    WINDOW_SIZE: int = option(32, 'attention segment (window) in tokens')
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
    NEURAL_MEM_INIT_STEP_BIAS: float | None = option(
        None, 'initial logit of the step sizes; unset: random for each token', of=float, negative=True
    )
    NEURAL_MEM_INIT_MOMENTUM_BIAS: float | None = option(
        None,
        'initial logit of the momentum; unset: near 0, half of the surprise is carried over',
        of=float,
        negative=True,
    )
    NEURAL_MEM_INIT_DECAY_BIAS: float | None = option(
        None,
        'initial logit of the forgetting of a chunk; unset: near 0, half of the memory is forgotten',
        of=float,
        negative=True,
    )
    NEURAL_MEM_PROXIMAL_STEPS: bool = option(
        False,
        'proximal steps and normalised momentum, so that memory updates do not overshoot; the network of a memory then '
        'has no norm around it; needs --no-neural-mem-spec-norm-surprises',
    )
    USE_MEM_ATTENTION_MODEL: bool = option(False, 'a small attention network as memory model instead of the MLP')

    DEVICE: str = option('auto', 'auto, cpu, cuda, cuda:1, ...')
    PRECISION: str = option(
        'auto',
        'fp32 is true fp32; tf32: fp32 with TF32 matrix products; bf16: autocast; '
        'auto: bf16 on a GPU that has it, else fp32',
        PRECISIONS,
    )
    USE_ACCELERATED_SCAN: bool | None = option(
        None,
        'accelerated scan of the dense form; no effect here: the memories of this script run in the dual form',
        of=bool,
    )
    USE_FLEX_ATTN: bool | None = option(None, 'FlexAttention; unset: on a GPU with Triton', of=bool)
    USE_CUDA_GRAPHS: bool | None = option(
        None,
        'capture forward and backward once and replay them, which saves the kernel launches; unset: on a GPU',
        of=bool,
    )
    COMPILE: bool | None = option(
        None,
        'compile forward and backward together, during the first step; unset: on a GPU with Triton',
        of=bool,
    )
    FSDP: bool = option(
        False,
        'with torchrun: shard the model (FSDP2); steps are then compiled layer by layer and not captured, and '
        'checkpoints are folders',
    )
    USE_FAST_INFERENCE: bool = option(
        True, 'sample with a cache instead of reading the whole text again for each token'
    )

    WANDB: bool = option(False, 'also report to Weights & Biases')
    PROJECT_NAME: str = option('titans-mac-transformer', 'Weights & Biases project')
    RUN_NAME: str = option('', 'Weights & Biases run name')

    def __post_init__(self) -> None:
        if isinstance(self.DATA, str):  # from older checkpoints
            object.__setattr__(self, 'DATA', (self.DATA,) if self.DATA else ())
        for setting in dataclasses.fields(self):
            if isinstance(getattr(self, setting.name), list):  # from the command line
                object.__setattr__(self, setting.name, tuple(getattr(self, setting.name)))
            check_setting(setting, getattr(self, setting.name))
        if any(layer > self.DEPTH for layer in self.NEURAL_MEM_LAYERS):
            raise BadSetting(f'NEURAL_MEM_LAYERS must be from 1 to DEPTH={self.DEPTH}, not {self.NEURAL_MEM_LAYERS}')
        if self.NEURAL_MEM_BATCH_SIZE % self.NEURAL_MEM_SEGMENT_LEN:
            raise BadSetting(
                f'NEURAL_MEM_BATCH_SIZE must be a multiple of NEURAL_MEM_SEGMENT_LEN={self.NEURAL_MEM_SEGMENT_LEN}, '
                f'not {self.NEURAL_MEM_BATCH_SIZE}'
            )
        if self.NEURAL_MEM_SEGMENT_LEN == 1 and self.STORE_ATTN_POOL_CHUNKS:
            raise BadSetting('NEURAL_MEM_SEGMENT_LEN=1 needs --no-store-attn-pool-chunks: a token has nothing to pool')
        if self.NEURAL_MEM_PROXIMAL_STEPS and self.NEURAL_MEM_SPEC_NORM_SURPRISES:
            raise BadSetting('NEURAL_MEM_PROXIMAL_STEPS needs --no-neural-mem-spec-norm-surprises')
        if self.NEURAL_MEM_PROXIMAL_STEPS and self.USE_MEM_ATTENTION_MODEL:
            raise BadSetting('NEURAL_MEM_PROXIMAL_STEPS cannot go with USE_MEM_ATTENTION_MODEL, which mixes tokens')
        if self.NEURAL_MEM_INIT_MOMENTUM_BIAS is not None and not self.NEURAL_MEM_MOMENTUM:
            raise BadSetting('NEURAL_MEM_INIT_MOMENTUM_BIAS needs NEURAL_MEM_MOMENTUM')
        if self.GENERATE_LENGTH <= self.PRIME_LENGTH:
            raise BadSetting(
                f'GENERATE_LENGTH must be above PRIME_LENGTH={self.PRIME_LENGTH}, which it includes, '
                f'not {self.GENERATE_LENGTH}'
            )


QUICK: dict[str, Any] = {
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
}
# take the gradients of every chunk at the newest weights
STABLE: dict[str, Any] = {
    'NEURAL_MEM_PROXIMAL_STEPS': True,
    'NEURAL_MEM_SPEC_NORM_SURPRISES': False,
    'NEURAL_MEM_SEGMENT_LEN': 16,
    'NEURAL_MEM_BATCH_SIZE': 16,
    'NEURAL_MEM_MAX_LR': 10.0,
    'NEURAL_MEM_INIT_DECAY_BIAS': -5.0,
    # with either of these, memory batches would be stored one after another, and a step would take eight times as long
    'NEURAL_MEM_WEIGHT_RESIDUAL': False,
    'MEMORY_MODEL_PER_LAYER_LEARNED_LR': False,
}
PRESETS = {'full': {}, 'quick': QUICK, 'stable': STABLE, 'quick-stable': {**QUICK, **STABLE}}


def flag(name: str) -> str:
    """The command-line option of a setting."""
    return '--' + name.lower().replace('_', '-')


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Train a Titans transformer (memory as context).')
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        '--resume',
        metavar='PATH|latest',
        help='continue a run exactly, with the settings in a checkpoint, or in the newest valid one of a folder; '
        'latest: of the folder of the run',
    )
    start.add_argument(
        '--init-from', metavar='PATH', help='start a new run from the weights in a checkpoint (or in a bare state dict)'
    )
    for setting in dataclasses.fields(Config):
        kind: dict[str, Any] = {'type': type(setting.default), 'choices': setting.metadata['choices']}
        if isinstance(setting.default, tuple):
            of = setting.metadata['of']
            # an empty list of layers is valid, an empty list of files is not
            kind = {'type': of, 'nargs': '*' if of is int else '+', 'metavar': 'N' if of is int else 'PATH'}
        elif str(setting.type).startswith('bool'):
            kind = {'action': argparse.BooleanOptionalAction}
        elif setting.default is None:
            kind = {'type': setting.metadata['of']}
        # suppressed defaults distinguish options that were given from those that were not
        parser.add_argument(
            flag(setting.name),
            dest=setting.name,
            default=argparse.SUPPRESS,
            help=f'{setting.metadata["help"]} (default: {setting.default})',
            **kind,
        )
    return parser


def with_absolute_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Options that a run keeps, with absolute paths, because it may be resumed and evaluated from another folder."""
    absolute = {
        name: os.path.abspath(given[name])
        for name in ('CACHE_DIR', 'VOCABULARY')
        if given.get(name) not in (None, '', 'bytes', 'bpe')
    }
    if 'DATA' in given:
        absolute['DATA'] = [os.path.abspath(path) for path in given['DATA']]
    return given | absolute


def config_from_options(given: dict[str, Any]) -> Config:
    """The settings of the preset, overridden by the options that were given."""
    preset = given.get('PRESET', 'auto')
    if preset == 'auto':
        device = given.get('DEVICE', 'auto')
        preset = 'full' if device.startswith('cuda') or (device == 'auto' and torch.cuda.is_available()) else 'quick'
    return dataclasses.replace(Config(), **{**PRESETS[preset], **given, 'PRESET': preset})


def run_folder(config: Config) -> Path:
    return Path(config.RUN_DIR or f'runs/{config.PRESET}')


# machine --------------------------------------------------------------------------------------------------------------


def choose_machine(config: Config) -> Machine:
    graphs, compiles = config.USE_CUDA_GRAPHS, config.COMPILE
    if config.FSDP:
        if graphs:
            raise BadSetting('FSDP cannot go with --use-cuda-graphs: its hooks are Python')
        if not is_distributed():
            raise BadSetting('FSDP must be started by torchrun, as in torchrun --nproc-per-node 2 train_mac.py --fsdp')
        graphs = False
    try:
        return training.choose_machine(config.DEVICE, config.PRECISION, graphs, compiles)
    except RunError as error:
        raise BadSetting(f'--{error}') from None


def uses_flex_attn(config: Config, machine: Machine) -> bool:
    return machine.triton if config.USE_FLEX_ATTN is None else config.USE_FLEX_ATTN


# data -----------------------------------------------------------------------------------------------------------------


def load_data(config: Config, stored_vocabulary: dict[str, Any] | None = None) -> Data:
    """The data of a run; a resumed run already has a vocabulary."""
    vocabulary = choose_vocabulary(config, stored_vocabulary)
    path = DATA_FOLDER / 'enwik8.gz'
    paths, source = [*map(Path, config.DATA)] or [path], None
    try:
        if not config.DATA and not path.exists() and not enwik8.download_enwik8(path):
            paths, source = enwik8.standard_library(), "the source text of Python's standard library"
        window = max(config.SEQ_LEN, config.PRIME_LENGTH) + 2
        check_outside_text(run_folder(config), paths)
        data = training.load_data(paths, vocabulary, cache=config.CACHE_DIR or None, window=window)
    except TooLittleText as error:
        option = '--seq-len' if config.SEQ_LEN >= config.PRIME_LENGTH else '--prime-length'
        sys.exit(f'{error}: give a smaller {option}, or more text with --data')
    except BadData as error:
        sys.exit(f'{error}; delete it, and it is downloaded again' if paths == [path] and path.exists() else str(error))
    except ModuleNotFoundError as error:  # the package `tokenizers` is missing
        sys.exit(str(error))
    data = data._replace(source=source or data.source)
    if not config.DATA and data.sha256 != enwik8.SHA256:
        say(f'NOTICE: this run uses {data.source}, which is not enwik8: results are not comparable with enwik8 results')
    return data


def stored_vocabulary(
    config: Config, resume: dict[str, Any] | None, weights: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The vocabulary of a run to resume, or of the weights that a run with a BPE vocabulary starts from."""
    if resume is not None:
        return resume.get('vocabulary')
    stored = None if weights is None or config.VOCABULARY != 'bpe' else weights.get('vocabulary')
    return None if stored == BYTES.to_dict() else stored


def choose_vocabulary(config: Config, stored: dict[str, Any] | None) -> Vocabulary | int:
    """A vocabulary, or the size of one that is to be trained on the data."""
    if config.VOCABULARY == 'bpe' and config.VOCABULARY_SIZE < BYTES.size:
        raise BadSetting(f'VOCABULARY_SIZE must be at least {BYTES.size}, got {config.VOCABULARY_SIZE}')
    try:
        if stored is not None:
            return vocabulary_from_dict(stored)
        if config.VOCABULARY in ('bytes', 'bpe'):
            return BYTES if config.VOCABULARY == 'bytes' else config.VOCABULARY_SIZE
        return load_bpe(config.VOCABULARY)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise BadSetting(f'VOCABULARY {config.VOCABULARY} cannot be used here: {one_line(error)}') from None


# model ----------------------------------------------------------------------------------------------------------------


def describe_model(config: Config) -> dict[str, Any]:
    """The model as JSON values, from which `configuration.build_model` builds it."""
    machine = choose_machine(config)
    memory_model = {'type': 'MemoryMLP', 'dim': config.NEURAL_MEM_DIM_HEAD, 'depth': config.NEURAL_MEMORY_DEPTH}
    if config.USE_MEM_ATTENTION_MODEL:
        memory_model = {'type': 'MemoryAttention', 'dim': config.NEURAL_MEM_DIM_HEAD}
    return configuration.model_config(
        'mac',
        num_tokens=BYTES.size if config.VOCABULARY == 'bytes' else config.VOCABULARY_SIZE,
        dim=config.DIM,
        depth=config.DEPTH,
        heads=config.HEADS,
        dim_head=config.DIM_HEAD,
        segment_len=config.WINDOW_SIZE,
        sliding_window_attn=config.SLIDING_WINDOWS,
        use_flex_attn=uses_flex_attn(config, machine),
        num_persist_mem_tokens=config.NUM_PERSIST_MEM,
        num_longterm_mem_tokens=config.NUM_LONGTERM_MEM,
        neural_memory_layers=config.NEURAL_MEM_LAYERS,
        neural_memory_segment_len=config.NEURAL_MEM_SEGMENT_LEN,
        neural_memory_batch_size=config.NEURAL_MEM_BATCH_SIZE,
        neural_mem_gate_attn_output=config.NEURAL_MEM_GATE_ATTN_OUTPUT,
        neural_mem_weight_residual=config.NEURAL_MEM_WEIGHT_RESIDUAL,
        neural_memory_qkv_receives_diff_views=config.NEURAL_MEM_QKV_RECEIVES_DIFF_VIEW,
        neural_memory_model=memory_model,
        # no effect on training, and lets the model read beyond the training length afterwards
        position_length=config.SEQ_LEN,
        neural_memory_kwargs={
            'dim_head': config.NEURAL_MEM_DIM_HEAD,
            'heads': config.NEURAL_MEM_HEADS,
            'attn_pool_chunks': config.STORE_ATTN_POOL_CHUNKS,
            'qk_rmsnorm': config.NEURAL_MEM_QK_NORM,
            'momentum': config.NEURAL_MEM_MOMENTUM,
            'momentum_order': config.NEURAL_MEM_MOMENTUM_ORDER,
            'default_step_transform_max_lr': config.NEURAL_MEM_MAX_LR,
            'use_accelerated_scan': bool(config.USE_ACCELERATED_SCAN),
            'per_parameter_lr_modulation': config.MEMORY_MODEL_PER_LAYER_LEARNED_LR,
            'spectral_norm_surprises': config.NEURAL_MEM_SPEC_NORM_SURPRISES,
            'init_adaptive_step_bias': config.NEURAL_MEM_INIT_STEP_BIAS,
            'init_momentum_bias': config.NEURAL_MEM_INIT_MOMENTUM_BIAS,
            'init_decay_bias': config.NEURAL_MEM_INIT_DECAY_BIAS,
            'proximal_steps': config.NEURAL_MEM_PROXIMAL_STEPS,
            'normalized_momentum': config.NEURAL_MEM_PROXIMAL_STEPS and config.NEURAL_MEM_MOMENTUM,
            'mem_model_norm_add_residual': not config.NEURAL_MEM_PROXIMAL_STEPS,
        },
    )


def changes_model(config: Config, name: str, value: Any) -> bool:
    """Whether a setting with this value would describe a different model."""
    try:
        return describe_model(dataclasses.replace(config, **{name: value})) != describe_model(config)
    except (BadSetting, RunError):  # it does not fit the other settings, or this machine
        return False


def build_model(config: Config) -> MemoryAsContextTransformer:
    description = describe_model(config)
    torch.manual_seed(config.SEED)
    random.seed(config.SEED)  # the residual streams draw from Python's own generator
    model = configuration.build_model(description)
    # a model that will be sharded is moved layer by layer
    return model if config.FSDP else model.to(choose_machine(config).device)  # type: ignore[return-value]


# evaluation -----------------------------------------------------------------------------------------------------------


def validate(model: nn.Module, data: Tensor, config: Config, machine: Machine) -> float:
    """Mean loss (nats per token) over windows that are the same in every run."""
    sizes = {'batches': config.VALIDATE_BATCHES, 'batch_size': config.BATCH_SIZE, 'length': config.SEQ_LEN}
    return validation_loss(model, data, machine, **sizes)


def printable(tokens: Tensor, vocabulary: Vocabulary = BYTES) -> str:
    text = vocabulary.decode(tokens).decode('utf-8', errors='replace')
    return ''.join(c if c.isprintable() or c in '\n\t' else '\N{REPLACEMENT CHARACTER}' for c in text)


def generate(model: MemoryAsContextTransformer, data: Data, config: Config, machine: Machine, batch: int) -> str:
    """A passage of validation text and its continuation. The random state of training is unchanged."""
    devices = [machine.device] if machine.device.type == 'cuda' else []
    with torch.random.fork_rng(devices), machine.autocast(), unsharded(model):
        torch.manual_seed(config.SEED + batch)
        starts = torch.randint(len(data.valid) - config.PRIME_LENGTH, (1,))
        prompt = windows(data.valid, starts, config.PRIME_LENGTH)
        made = model.sample(
            prompt.to(machine.device), config.GENERATE_LENGTH, use_cache=config.USE_FAST_INFERENCE, show_progress=False
        )
    model.train()
    text, continuation = (printable(tokens[0], data.vocabulary) for tokens in (prompt, made))
    return f'--- sample after {batch} steps\n{text}\n--- goes on as\n{continuation}\n---\n'


def rehearse(model: MemoryAsContextTransformer, data: Data, config: Config, machine: Machine) -> None:
    """Sample two tokens before training, because some sizes can be trained but not sampled."""
    try:
        generate(model, data, dataclasses.replace(config, GENERATE_LENGTH=config.PRIME_LENGTH + 2), machine, 0)
    except (ValueError, TypeError, RuntimeError) as error:
        sys.exit(
            f'no sample can be made with these settings: {one_line(error)}. Try an even DIM_HEAD (now '
            f'{config.DIM_HEAD}), or --no-use-fast-inference'
        )


# training -------------------------------------------------------------------------------------------------------------


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


def training_loop(
    config: Config, resume: dict[str, Any] | None, weights: dict[str, Any] | None, signals: Signals
) -> None:
    for name in ('GRADIENT_ACCUMULATE_EVERY', 'VALIDATE_BATCHES'):
        if (count := getattr(config, name)) % num_ranks():
            raise BadSetting(f'{name} must be a multiple of the {num_ranks()} processes that share it, not {count}')
    machine, folder = choose_machine(config), run_folder(config)
    gpu = machine.device.type == 'cuda'
    if config.WANDB and importlib.util.find_spec('wandb') is None:
        sys.exit('--wandb needs the wandb package, which is not installed')
    say(
        f'{config.PRESET} preset on {torch.cuda.get_device_name(machine.device) if gpu else machine.device}, '
        f'{machine.precision}, FlexAttention {"on" if uses_flex_attn(config, machine) else "off"}, accelerated scan '
        f'{"without effect (dual form)" if config.USE_ACCELERATED_SCAN else "off"}, '
        f'CUDA graphs {"on" if machine.cuda_graphs else "off"}, '
        f'compiled {"yes" if machine.compile else "no"}, '
        + (f'{num_ranks()} processes, {"sharded" if config.FSDP else "replicated"}, ' if num_ranks() > 1 else '')
        + f'PyTorch {torch.__version__}'
    )
    with first_rank_first():  # the first rank fills the cache
        data = load_data(config, stored_vocabulary(config, resume, weights))
    if weights is not None and weights.get('vocabulary') not in (None, data.vocabulary.to_dict()):
        raise BadSetting('VOCABULARY must be that of the weights in --init-from, whose embeddings belong to its tokens')
    if config.VOCABULARY != 'bytes':
        config = dataclasses.replace(config, VOCABULARY_SIZE=data.vocabulary.size)
    unit = 'bytes' if config.VOCABULARY == 'bytes' else 'tokens'
    say(f'data: {data.source}: {len(data.train):,} {unit} to train on, {len(data.valid):,} to validate')

    # `batch` is the number of steps done, `evaluated` its value at the last evaluation, and `windows_random` the state
    # of `generator` after the last complete step

    try:
        model = build_model(config)
    except (ValueError, TypeError, RuntimeError) as error:
        sys.exit(f'no model can be built with these settings: {one_line(error)}')
    generator = torch.Generator().manual_seed(config.DATA_SEED)
    batch, evaluated, val_loss, best = 0, -1, None, math.inf
    try:
        if resume is not None and 'shards' not in resume:
            model.load_state_dict(resume['model_state_dict'])
        elif weights is not None:
            model.load_state_dict(weights.get('model_state_dict', weights))
        if config.FSDP:
            shard(model, machine.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.LEARNING_RATE, weight_decay=0.0, fused=gpu)
        if resume is not None:
            if 'shards' in resume:
                load_shards(resume['shards'], model, optimizer)
            else:
                load_optimizer(optimizer, resume['optimizer_state_dict'])
            torch.set_rng_state(resume['random'])
            random.setstate(resume['python_random'])
            generator.set_state(resume['windows_random'])
            if gpu and resume['cuda_random'] is not None:
                torch.cuda.set_rng_state(resume['cuda_random'], machine.device)
    except (LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        saved, own = ({} if resume is None else resume['config']), dataclasses.asdict(config)
        changed = [name for name in sorted(own.keys() & saved.keys()) if changes_model(config, name, saved[name])]
        options = [f'{flag(name)} (now {own[name]}, saved with {saved[name]})' for name in changed]
        wrong = ', '.join(options) or 'this configuration'
        sys.exit(f'the saved weights or optimizer state do not fit {wrong}: {one_line(error)}')
    micro_step = MicroStep(model, machine, config.GRADIENT_ACCUMULATE_EVERY)
    if resume is not None:
        for group in optimizer.param_groups:
            group['lr'] = config.LEARNING_RATE  # the command line may have changed it
        batch, evaluated, val_loss, best = (resume[key] for key in ('batch', 'evaluated', 'val_loss', 'best_val_loss'))
        say(f'resumed after {batch} steps')
        if other_data := resume['data_sha256'] != data.sha256:
            say('NOTICE: the data is not what this run began with')
        sizes = {name: getattr(config, name) for name in ('SEQ_LEN', 'BATCH_SIZE', 'VALIDATE_BATCHES')}
        if other_data or any(resume['config'].get(name, size) != size for name, size in sizes.items()):
            best = math.inf  # the best loss so far comes from other validation windows
    windows_random = generator.get_state()
    rehearse(model, data, config, machine)
    any_rank(False)  # wait until all have read what they resume
    first = rank() == 0  # only this process writes
    best_is_gone = False
    if first:
        remove_leftovers(folder)
        if resume is None or not folder.samefile(resume['folder']):
            clear_run_folder(folder)
        else:
            best_is_gone = Path(BEST).stem in {path.stem for path in leave_later_checkpoints(folder, batch)}
            rewind(folder, batch, evaluated)
        describe_run(folder, describe_model(config), data.vocabulary, dataclasses.asdict(config))
    if any_rank(best_is_gone):
        best = math.inf  # the best loss belongs to the course that the run has left
    curve = LossCurve(folder)
    say(f'{sum(p.numel() for p in model.parameters()):,} parameters; the run is kept in {folder}')

    wandb_run = None
    if config.WANDB and first:
        import wandb

        wandb_run = wandb.init(
            project=config.PROJECT_NAME,
            name=config.RUN_NAME or None,
            config=dataclasses.asdict(config),
            id=wandb_id(folder),
            resume='allow',
        )

    def bits_per_byte(loss: float) -> float:
        return loss / math.log(2) * data.tokens_per_byte

    def log(row: dict[str, Any]) -> None:
        if not first:
            return
        append(folder / 'metrics.jsonl', json.dumps(row) + '\n')
        if wandb_run is not None:
            wandb_run.log(row, step=row['step'])

    def earlier() -> str:
        return '; earlier checkpoints are good' if checkpoints(folder) else ''

    def fail(reason: str) -> NoReturn:
        sys.exit(f'\nstopped after {batch} steps: {reason}. Nothing was saved from this state{earlier()}. {advice}')

    advice = (
        f'A lower NEURAL_MEM_MAX_LR (now {config.NEURAL_MEM_MAX_LR:g}) or LEARNING_RATE (now {config.LEARNING_RATE:g}) '
        'may help'
    )
    if not config.NEURAL_MEM_PROXIMAL_STEPS:
        advice += '; --preset stable and quick-stable start anew with memories whose steps do not overshoot'
    exploded = False

    def save(name: str) -> None:
        weights = model.state_dict()
        if not all(bool(local_part(tensor).isfinite().all()) for tensor in weights.values()):
            fail('the weights are not finite')
        content = {
            'batch': batch,
            'val_loss': val_loss,
            'config': dataclasses.asdict(config),
            'model': describe_model(config),
            'vocabulary': data.vocabulary.to_dict(),
            # the remaining entries make a resumed run the same as an uninterrupted one
            'best_val_loss': best,
            'evaluated': evaluated,
            'data_sha256': data.sha256,
            'random': torch.get_rng_state(),
            'python_random': random.getstate(),
            'windows_random': windows_random,
            'cuda_random': torch.cuda.get_rng_state(machine.device) if gpu else None,
        }
        path = folder / name
        if config.FSDP:
            save_shards(path := path.with_suffix(''), model, optimizer, content)
        elif first:
            states = {'model_state_dict': weights, 'optimizer_state_dict': optimizer.state_dict()}
            write_checkpoint(path, {**content, **states})
        if first:
            remove_other_form(path)
        say(f'saved {path}')

    start, in_step = batch, False
    model.train()
    bar = tqdm(
        total=config.NUM_BATCHES,
        initial=batch,
        unit='step',
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        disable=not first,
    )
    try:
        while True:
            # evaluate: nothing here affects training, so a signal may interrupt it (unless other processes take part),
            # and a resumed run repeats it. A checkpoint counts as evaluated only once the results are in metrics and
            # samples

            last = batch >= config.NUM_BATCHES
            new_loss = sample = None
            now_evaluated, started = evaluated, time.perf_counter()
            if batch != evaluated:
                try:
                    signals.wait = num_ranks() > 1
                    if last or batch % config.VALIDATE_EVERY == 0:
                        new_loss = validate(model, data.valid, config, machine)
                    validation_seconds = time.perf_counter() - started
                    if last or (batch > 0 and batch % config.GENERATE_EVERY == 0):
                        sample = generate(model, data, config, machine, batch)
                    signals.wait, now_evaluated = True, batch
                except Interrupted:
                    new_loss = sample = None
            signals.wait = True
            if new_loss is not None:
                if not math.isfinite(new_loss):
                    fail(f'the validation loss is {new_loss}')
                bpb = bits_per_byte(new_loss)
                log({'step': batch, 'val_loss': new_loss, 'bpb': bpb, 'seconds': validation_seconds})
                say(f'step {batch}: validation {bpb:.4f} bits per byte')
                if first:
                    curve.redraw()
            if sample is not None:
                say(sample)
                if first:
                    append(folder / 'samples.txt', sample + '\n')

            evaluated = now_evaluated
            if new_loss is not None:
                val_loss = new_loss
                if val_loss < best:
                    if first and best == math.inf:  # any best checkpoint was chosen by other windows
                        leave_best_checkpoint(folder / BEST)
                    best = val_loss
                    if batch > 0:
                        save(BEST)

            # save, end

            stop = any_rank(signals.received is not None)
            if stop or (batch > start and batch % config.CHECKPOINT_EVERY == 0):
                save(f'checkpoint_batch_{batch}.pt')
            if stop or last:
                break

            # one step; loss and gradient norm are read back once, after the optimizer step is queued

            started = time.perf_counter()
            starts = (
                random_starts(data.train, config.BATCH_SIZE, config.SEQ_LEN, generator)
                for _ in range(config.GRADIENT_ACCUMULATE_EVERY)
            )
            total = micro_step.accumulate(windows(data.train, own, config.SEQ_LEN + 1) for own in share(starts))
            norm = whole_tensor(nn.utils.clip_grad_norm_(model.parameters(), config.MAX_GRAD_NORM))
            in_step = True
            optimizer.step()
            optimizer.zero_grad()
            train_loss, grad_norm = torch.stack((total, norm)).tolist()
            if not (math.isfinite(train_loss) and math.isfinite(grad_norm)):
                fail(f'the training loss is {train_loss}, the norm of its gradient {grad_norm}')
            batch, windows_random, in_step = batch + 1, generator.get_state(), False
            if grad_norm > EXPLODES * config.MAX_GRAD_NORM and not exploded:
                exploded = True
                say(
                    f'WARNING: the gradient of step {batch} has norm {grad_norm:.3g}, which may mean that a memory '
                    f'diverges. {advice}'
                )

            seconds = time.perf_counter() - started
            if batch == start + 1 and machine.compile:
                say(f'the first step, including compilation, took {seconds:.0f} s')
            speed = config.BATCH_SIZE * config.GRADIENT_ACCUMULATE_EVERY * config.SEQ_LEN / seconds
            bpb = bits_per_byte(train_loss)
            row = {
                'step': batch,
                'train_loss': train_loss,
                'bpb': bpb,
                'grad_norm': grad_norm,
                'tokens_per_second': speed,
                'seconds': seconds,
            }
            if gpu:
                # peak of reserved memory since the start, because CUDA graphs reuse memory that counts as allocated
                # only once
                row['peak_memory_bytes'] = torch.cuda.max_memory_reserved(machine.device)
            log(row)
            bar.set_postfix_str(f'loss {train_loss:.3f}, {bpb:.3f} bits per byte, {speed:,.0f} tokens/s', refresh=False)
            bar.update()

        bar.close()
        if last and not stop:
            save('titans_enwik8.pt')
    except Exception as error:  # for example, the disk is full
        signals.wait = True
        bar.close()
        say(f'stopped after {batch} steps: {one_line(error)}')
        # parameters may be halfway through a step; and shards are saved by all processes, but this one may be alone
        if batch > start and not in_step and not config.FSDP:
            try:
                save(f'checkpoint_batch_{batch}.pt')
            except OSError as full:
                sys.exit(f'the {batch} steps done could not be saved: {full}{earlier()}')
        raise
    if first:
        curve.draw()
    if wandb_run is not None:
        wandb_run.finish()
    if stop or signals.received is not None:
        reason = signals.received.name if signals.received else 'a signal'
        say(f'ended by {reason} after {batch} steps; go on with --resume latest --run-dir {folder}')
    else:
        validated = f', best validation {bits_per_byte(best):.4f} bits per byte' if math.isfinite(best) else ''
        trained = f'{batch} steps'
        if batch == start:
            trained = f'nothing was trained, as there were {batch} steps and NUM_BATCHES is {config.NUM_BATCHES}'
        say(f'done: {trained}{validated}; everything is in {folder}')


# main -----------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    with contextlib.suppress(AttributeError):
        # a terminal may lack characters of a sample, and a log file should be up to date
        sys.stdout.reconfigure(errors='replace', line_buffering=True)  # type: ignore[union-attr]
    options = with_absolute_paths(vars(build_parser().parse_args(arguments)))
    resume, init_from = options.pop('resume'), options.pop('init_from')
    try:
        config = config_from_options(options)
        folder = run_folder(config)
        if resume:
            path = folder if resume == 'latest' else Path(resume)
            if resume != 'latest':
                if not path.exists():
                    raise BadCheckpoint(f'there is no checkpoint to resume: {path} does not exist')
                if 'PRESET' in options:
                    raise BadSetting('--preset cannot go with --resume PATH, whose checkpoint holds the settings')
            source = path if resume == 'latest' or is_run_folder(path) else path.parent
            if not source.is_dir():
                raise BadCheckpoint(f'there is no checkpoint to resume: {source} is not a folder')
            if not config.RUN_DIR:
                folder = source
        if init_from and Path(init_from).is_dir():
            raise BadCheckpoint(f'--init-from must name a file, and {init_from} is a folder')
        with process_group(), run_lock(folder):
            if rank() == 0:
                finish_saves(folder)
            any_rank(False)  # until they are
            weights = read_checkpoint(Path(init_from)) if init_from else None
            checkpoint = None
            if resume:
                checkpoint = latest_checkpoint(source) if path == source else read_resumable(path)
                checkpoint['folder'] = source
                known = {setting.name for setting in dataclasses.fields(Config)}
                saved = {name: value for name, value in checkpoint['config'].items() if name in known}
                options.pop('PRESET', None)  # it only named the folder; settings come from the checkpoint
                for name in ('VOCABULARY', 'DATA_SEED'):
                    kept = saved.get(name, getattr(Config(), name))
                    if (asked := options.get(name, kept)) != kept:
                        raise BadSetting(f'{name} must stay {kept} in the run that is resumed, not {asked}')
                config = dataclasses.replace(Config(), **{**saved, **options, 'RUN_DIR': str(folder)})
            return train(config, checkpoint, weights)
    except (BadSetting, RunError) as error:
        sys.exit(str(error))
    except OSError as error:  # a folder that cannot be written to, a full disk
        sys.exit(f'the run cannot continue: {error}')


if __name__ == '__main__':
    sys.exit(main())
