"""Classes that `torch.load(..., weights_only=True)` may construct."""

from __future__ import annotations

import sys
from typing import Any

import torch


def allow_loading(*constructors: Any, formerly: str) -> None:
    """Allow files written by `torch.save` to refer to classes or functions by their present module or a former one.

    Args:
        formerly: the module within this package where they were in version 1.0.
    """
    former = f'titans_pytorch.{formerly}'
    renamed = [(constructor, f'{former}.{constructor.__qualname__}') for constructor in constructors]
    torch.serialization.add_safe_globals([*constructors, *renamed])
    # for pickle itself, as in `weights_only=False`
    sys.modules.setdefault(former, sys.modules[constructors[0].__module__])
