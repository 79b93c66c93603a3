"""Evaluation mode for the duration of sampling, shared by threads that sample from the same model."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.nn import Module

from titans_pytorch.generation.decodable import Decodable


@dataclass
class _Samplers:
    """Samplers at work on one model."""

    number: int = 0
    modes: list[tuple[Module, bool]] | None = None
    """Each module's training mode before the first sampler started, parents before children."""


# Reentrant, because garbage collection may close an abandoned stream anywhere below, and closing it leaves the context.
# Samplers are therefore counted before anything else is done.
_LOCK = threading.RLock()
_SAMPLERS: weakref.WeakKeyDictionary[Any, _Samplers] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def evaluation_mode(model: Decodable) -> Iterator[None]:
    """Put the model in evaluation mode. The last of several samplers to leave restores each module's own mode."""
    with _LOCK:
        samplers = _SAMPLERS.setdefault(model, _Samplers())
        samplers.number += 1
    try:
        with _LOCK:
            if samplers.modes is None:
                samplers.modes = [(module, module.training) for module in model.modules()]
            model.train(False)
        yield
    finally:
        with _LOCK:
            samplers.number -= 1
            if samplers.number == 0:
                modes, samplers.modes = samplers.modes or [], None
                for module, was_training in modes:
                    if module.training != was_training:
                        module.train(was_training)
