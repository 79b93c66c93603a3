"""Evaluation mode for the duration of sampling, shared by threads that sample from one model."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.nn import Module

from titans_pytorch.generation.decodable import Decodable


class _Samplers(NamedTuple):
    """Samplers at work on one model."""

    number: int
    modes: list[tuple[Module, bool]]
    """Each module's training mode before the first of them, parents before children."""


_LOCK = threading.Lock()
_SAMPLERS: weakref.WeakKeyDictionary[Any, _Samplers] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def evaluation_mode(model: Decodable) -> Iterator[None]:
    """The model in evaluation mode. The last of several samplers to leave restores each module's own mode."""
    with _LOCK:
        count, modes = _SAMPLERS.get(model) or (0, [(module, module.training) for module in model.modules()])
        _SAMPLERS[model] = _Samplers(count + 1, modes)
        model.train(False)
    try:
        yield
    finally:
        with _LOCK:
            count, modes = _SAMPLERS.pop(model)
            if count > 1:
                _SAMPLERS[model] = _Samplers(count - 1, modes)
            else:
                for module, was_training in modes:
                    if module.training != was_training:
                        module.train(was_training)
