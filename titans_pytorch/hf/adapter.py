"""Memories for an existing language model of transformers: added, trained, saved, loaded and removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList, Parameter
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedConfig

from titans_pytorch.configuration import memory_arguments, memory_config
from titans_pytorch.hf.layer_memory import PADDING, LayerMemory, MemoryStates, cache_of
from titans_pytorch.hf.row_groups import check_past
from titans_pytorch.models.validation import SET_BY_MODELS, check_left_out
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.presets import memory_settings
from titans_pytorch.training.files import atomic_file, one_line
from titans_pytorch.utils.checks import check_flags, check_integer, check_integers, check_keywords, check_multiple
from titans_pytorch.utils.functional import is_traced
from titans_pytorch.utils.shapes import Bool

M = TypeVar('M', bound=Module)

WEIGHTS, CONFIG = 'memory.safetensors', 'memory_config.json'
"""Files of a saved adapter."""

EXCLUDED_ARGUMENTS = ('dim', *SET_BY_MODELS)
"""Arguments of `NeuralMemory` that an adapter sets itself, or that need inputs which no decoder layer has."""

OWN_ARGUMENTS = {
    'heads': 'heads',
    'dim_head': 'dim_head',
    'chunk_size': 'chunk_size',
    'batch_size': 'memory_batch',
    'memory_batch': 'memory_batch',
}
"""Arguments of `NeuralMemory` and `memory_settings` that `add_memory` has its own arguments for."""

NOT_OF_THE_BACKBONE = {*PreTrainedConfig().to_dict(), 'use_cache', 'quantization_config', 'vocab_size'} - {'model_type'}
"""Fields of a configuration that do not identify a backbone: they change with how a model is used or stored, or when a
token is added. Token ids are left out as well."""


def add_memory(
    model: M,
    layers: Iterable[int] | None = None,
    *,
    heads: int = 4,
    dim_head: int = 64,
    chunk_size: int = 1,
    memory_batch: int = 1,
    freeze_backbone: bool = False,
    neural_memory_kwargs: Mapping[str, Any] = {},
) -> M:
    """Put a `NeuralMemory` in front of some decoder layers of `model`, in place, and return `model`.

        model = AutoModelForCausalLM.from_pretrained(...)
        add_memory(model, layers=[8, 16, 24])
        memories = [*memory_parameters(model)]
        own = {id(parameter) for parameter in memories}
        backbone = [parameter for parameter in model.parameters() if id(parameter) not in own]
        optimizer = torch.optim.AdamW([{'params': backbone, 'lr': 1e-5}, {'params': memories, 'lr': 1e-3}])

    A memory reads the input x of its layer and adds the retrieved values to it: x + gate · memory(x). As in memory as
    context, attention sees these values, in that layer and in all later ones; and because nothing inside a layer
    changes, any kind of layer will do. There is one gate per channel, zero at first, so the model starts unchanged, to
    the last bit. The gates receive gradients from the first step on, the memories behind them from the second.

    The forward pass, `labels`, gradient checkpointing, `generate` (sampling, beams, padded batches) and `Trainer` work
    as before. The state of the memories is part of the call's cache, beside its keys and values; without a cache, every
    call starts from an empty memory. Padding in `attention_mask`, which must be (batch, length), is neither stored nor
    counted. With a cache, rows of different lengths are read one after another, so train on padded batches with
    `use_cache=False`, as `Trainer` does. Assisted decoding is refused, because a memory cannot take tokens back.

    Half precision is too coarse for an optimizer's updates, so the memories are in float32 even if the backbone is in
    half precision; their output is rounded to the precision of the hidden states. A later `model.to` converts the
    memories with the rest.

    Args:
        model: a decoder-only model of transformers, or a peft model around one.
        layers: the layers that get a memory in front, counted from 0. Default: those at a quarter, half and three
            quarters of the depth; a guess, as a few memories are usually enough.
        heads: number of independent memories side by side. This default and the next are guesses. Together with
            `dim_head`, this sets the size of the adapter: about 5 · width · heads · dim_head parameters per layer.
        dim_head: width of a head.
        chunk_size: tokens per update of a memory.
        memory_batch: tokens whose gradients are taken at the same weights, a multiple of `chunk_size`. With a deep
            network, larger is faster; with a linear one, 1 is fast too.
        freeze_backbone: train only the memories. `remove_memory` undoes this.
        neural_memory_kwargs: further arguments of `NeuralMemory`, as JSON values: `activation` is a name in
            `configuration.ACTIVATIONS`, and `model` is a dict such as `{'type': 'MemoryMLP', 'dim': 64, 'depth': 2}`.
            Default: the settings of `presets.memory_settings`, but with a linear memory without momentum, that is, the
            delta rule with forgetting. Its keys have length 1, so no step overshoots, whatever is learned. Any other
            `model` takes proximal steps, which do not overshoot either.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
    """
    decoder = _decoder(model)
    depth = len(_layers(decoder))
    if layers is None:
        layers = sorted({depth * quarter // 4 for quarter in (1, 2, 3)})
    check_multiple('memory_batch', memory_batch, 'chunk_size', check_integer('chunk_size', chunk_size, 1))
    check_keywords(neural_memory_kwargs=neural_memory_kwargs)
    for name in EXCLUDED_ARGUMENTS:
        if neural_memory_kwargs.get(name):
            raise ValueError(f'neural_memory_kwargs must leave out {name}, got {neural_memory_kwargs[name]!r}')
    check_left_out(neural_memory_kwargs, OWN_ARGUMENTS, 'add_memory has')
    sizes = {'heads': heads, 'dim_head': dim_head, 'memory_batch': memory_batch}
    settings: dict[str, Any] = {'chunk_size': chunk_size, 'batch_size': memory_batch}
    if 'model' not in neural_memory_kwargs:
        settings |= _linear_settings(dim_head, memory_batch, neural_memory_kwargs)
    settings = memory_settings(**sizes, **{**settings, **neural_memory_kwargs})
    _attach(model, check_integers('layers', layers), memory_config(**settings), freeze_backbone)
    return model


def _linear_settings(dim_head: int, memory_batch: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The default network and its update rule, to go with the arguments of `NeuralMemory` that are given."""
    keys_per_token = check_integer('num_kv_per_token', given.get('num_kv_per_token', 1), 1)
    return {
        'model': {'type': 'MemoryMLP', 'dim': dim_head, 'depth': 1},
        'momentum': False,
        # all plain steps that a memory batch takes for one key move its value no further than the target
        'proximal_steps': False,
        'default_step_transform_max_lr': dim_head / (2 * memory_batch * keys_per_token),
    }


def memory_parameters(model: Module) -> Iterator[Parameter]:
    """The parameters of all memories and gates of `model`, and no others."""
    return memories_of(model).parameters()


def remove_memory(model: M) -> M:
    """Remove the memories from `model`, in place, and return `model`; what `add_memory` froze is trained again."""
    memories = memories_of(model)
    for hook in memories.hooks:
        hook.remove()
    for parameter in memories.frozen:
        parameter.requires_grad_()
    del _decoder(model).neural_memories
    return model


def save_memory(model: Module, folder: str | Path) -> None:
    """Write the memories of `model`, without its backbone, to `memory.safetensors` and `memory_config.json`.

    The configuration records the layers, the arguments, and the backbone, by its configuration and a hash of that.
    `save_pretrained` of the model, and checkpoints of `Trainer`, hold memories and backbone in one file, from which
    `from_pretrained` reads only the backbone. Those of a peft model hold neither: see `MemoryCheckpoints`.
    """
    memories, folder = memories_of(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backbone = _backbone(model)
    config = {
        'layers': memories.numbers,
        'neural_memory_kwargs': memories.settings,
        'backbone_hash': _hash(backbone),
        'backbone': backbone,
    }
    with atomic_file(folder / WEIGHTS) as file:
        file.write(save(memories.state_dict()))
    with atomic_file(folder / CONFIG) as file:
        file.write((json.dumps(config, indent=2) + '\n').encode())


def load_memory(model: M, folder: str | Path, *, freeze_backbone: bool = False) -> M:
    """Add the memories that `save_memory` wrote to `folder` to `model`, in place, and return `model`.

    Raises:
        ValueError: if they were trained with another backbone (only its configuration is compared, not its weights),
            and for damaged files.
        FileNotFoundError: if the folder holds no memories.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        saved, saved_hash = dict(config['backbone']), config['backbone_hash']
        layers, settings = config['layers'], config['neural_memory_kwargs']
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f'{folder / CONFIG} describes no memories: {one_line(error)}') from None
    _check_same_backbone(folder, saved, saved_hash, _backbone(model))
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f'{folder / WEIGHTS} is damaged: {one_line(error)}') from None
    try:
        _attach(model, layers, settings, freeze_backbone)
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(f'{folder / CONFIG} describes no memories of this model: {one_line(error)}') from None
    try:
        memories_of(model).load_state_dict(weights)
    except RuntimeError as error:
        remove_memory(model)  # rather than leave untrained ones in it
        raise RuntimeError(f'{folder / WEIGHTS} does not fit {folder / CONFIG}: {one_line(error)}') from None
    return model


def _check_same_backbone(folder: Path, saved: Mapping[str, Any], saved_hash: str, own: Mapping[str, Any]) -> None:
    # a field known to only one of two versions of transformers does not make it another backbone
    differing = [name for name in saved.keys() & own.keys() if saved[name] != own[name]]
    if differing:
        name = 'model_type' if 'model_type' in differing else min(differing)
        raise ValueError(
            f'model must have the backbone of the memories in {folder}, {saved_hash}, '
            f'with {name}={saved[name]!r}, got {_hash(own)}, with {name}={own[name]!r}'
        )


class Memories(ModuleDict):
    """The memories of a decoder by layer number, with everything needed to save and to remove them."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self.settings = settings
        self.hooks: list[RemovableHandle] = []
        self.frozen: list[Parameter] = []

    @property
    def numbers(self) -> list[int]:
        return [int(number) for number in self]

    def register_hooks(self, decoder: Module, layers: ModuleList) -> None:
        hooks: dict[Module, Any] = {decoder: self.before_decoder}
        hooks |= {layers[number]: self[str(number)].before_layer for number in self.numbers}
        self.hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks.items()]

    def before_decoder(self, decoder: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the decoder that passes the padding mask on to its layers.

        The mask is passed as an argument, so that a layer still has it when checkpointing runs the layer again.
        """
        inputs = args[0] if args else kwargs.get('input_ids')
        inputs = kwargs.get('inputs_embeds') if inputs is None else inputs
        mask = args[1] if len(args) > 1 else kwargs.get('attention_mask')
        real = None if mask is None or inputs is None else self._real(mask, inputs.shape[1], cache_of(args, kwargs))
        if not is_traced():
            documents = {name: kwargs.get(name) for name in ('position_ids', 'seq_idx', 'cu_seq_lens_q')}
            _check_one_document(real, **documents)
        return args, {**kwargs, PADDING: real}

    def _real(self, mask: Any, length: int, cache: Cache | None) -> Bool[Tensor, 'b n'] | None:
        """Which tokens of a call are not padding; `None` if all of them are."""
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            got = f'{tuple(mask.shape)}' if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f'attention_mask must be (batch, length), so that memories can leave out padding, got {got}; '
                f'it has four dimensions in padded batches with static caches, which memories cannot read'
            )
        if mask.all():
            return None
        # the first columns of a longer mask belong to earlier calls
        past, real = mask[:, :-length], mask[:, -length:].bool()
        for entry in () if cache is None else cache.layers:
            if isinstance(entry, MemoryStates):
                check_past(entry.groups, past)
        return None if real.all() else real


def _check_one_document(
    real: Bool[Tensor, 'b n'] | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
) -> None:
    """Raise an error if a row holds several documents, whichever argument says so: memories would mix them."""
    several = {'cu_seq_lens_q': cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2}
    if seq_idx is not None:
        several['seq_idx'] = bool((seq_idx != seq_idx[..., :1]).any())
    if position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] > 1:
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]
        several['position_ids'] = bool((restarts if real is None else restarts & real[:, 1:] & real[:, :-1]).any())
    for name, found in several.items():
        if found:
            raise ValueError(
                f'{name} must describe one document in each row, as memories read a row as one text, got several: pad '
                f'each document to a row of its own'
            )


def _attach(model: Module, numbers: list[int], settings: Mapping[str, Any], freeze_backbone: bool) -> None:
    decoder = _decoder(model)
    layers = _layers(decoder)
    check_flags(freeze_backbone=freeze_backbone)
    if hasattr(decoder, 'neural_memories'):
        raise ValueError('model has memories already: remove_memory(model) takes them out')
    if not numbers or len({*numbers}) < len(numbers) or not all(0 <= number < len(layers) for number in numbers):
        raise ValueError(f'layers must be different integers from 0 to {len(layers) - 1}, at least one, got {numbers}')
    memories = Memories(settings)
    for number in numbers:
        memory = NeuralMemory(decoder.config.hidden_size, **memory_arguments(settings))
        like = next(layers[number].parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)
        memories[str(number)] = LayerMemory(memory, number, len(layers)).to(like.device, dtype)
    if freeze_backbone:
        memories.frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in memories.frozen:
            parameter.requires_grad_(False)
    decoder.neural_memories = memories
    memories.register_hooks(decoder, layers)


def _decoder(model: Any) -> Any:
    """The module that runs the decoder layers."""
    if not hasattr(model, 'get_decoder') or model.config.is_encoder_decoder:
        raise TypeError(f'model must be a decoder-only language model of transformers, got {type(model).__name__}')
    return model.get_decoder()


def _layers(decoder: Any) -> ModuleList:
    depth = decoder.config.num_hidden_layers
    for part in decoder.children():
        if isinstance(part, ModuleList) and len(part) == depth:
            return part
    raise TypeError(f'model must hold its {depth} decoder layers in a ModuleList, got {type(decoder).__name__}')


def memories_of(model: Module) -> Memories:
    """The memories of `model`, which must have some."""
    memories = getattr(_decoder(model), 'neural_memories', None)
    if memories is None:
        raise ValueError('model must have memories, added by add_memory or load_memory, and it has none')
    return memories


def _backbone(model: Module) -> dict[str, Any]:
    """The fields of the decoder's configuration that identify a backbone."""
    fields = json.loads(_decoder(model).config.to_json_string(use_diff=False))
    ignored = NOT_OF_THE_BACKBONE
    return {name: fields[name] for name in sorted(fields) if name not in ignored and not name.endswith('_token_id')}


def _hash(backbone: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(backbone, sort_keys=True).encode()).hexdigest()[:16]
