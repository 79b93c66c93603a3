"""The state of a model between calls."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from titans_pytorch.attention.rotary import KeyValues
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.utils.checks import checked_entries
from titans_pytorch.utils.functional import replaced
from titans_pytorch.utils.saving import allow_loading
from titans_pytorch.utils.shapes import Int


class ModelState(NamedTuple):
    """The state of a model after some tokens; given this state, the next call continues as if both calls were one.

    Its size does not depend on the number of tokens read. It can be detached, moved, restricted to some of its batch
    entries, saved with `torch.save`, and loaded with `torch.load(..., weights_only=True)` once this package has been
    imported. Passing `None` in its place starts a new sequence.
    """

    seq_index: int
    """Positions read, long-term memory tokens included."""
    key_values: list[KeyValues | None]
    """For each layer, the keys (not rotated) and values that later tokens can still see; `None` without attention."""
    memories: list[NeuralMemState]
    """State of the memory of each layer that has one."""

    @property
    def batch_size(self) -> int | None:
        """Number of sequences; `None` for a state without tensors."""
        sizes = [key_values[0].shape[0] for key_values in self.key_values if key_values is not None]
        sizes += [memory.batch_size for memory in self.memories if memory.batch_size is not None]
        return sizes[0] if sizes else None

    def detach(self) -> ModelState:
        """The same state without its graph, for truncated backpropagation through time."""
        key_values, memories = tree_map(_of_tensors(Tensor.detach), self[1:])
        return replaced(self, key_values=key_values, memories=memories)

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """The state on another device, with floating-point tensors in another dtype, or both."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        move = _of_tensors(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))
        memories = [memory.to(device, dtype) for memory in self.memories]
        return replaced(self, key_values=tree_map(move, self.key_values), memories=memories)

    def __deepcopy__(self, memo: Any) -> ModelState:
        """A copy that does not alias this state, detached from its graph."""
        key_values = tree_map(_of_tensors(lambda t: t.detach().clone()), self.key_values)
        return replaced(self, key_values=key_values, memories=deepcopy(self.memories, memo))

    def select(self, entries: Int[Tensor, ' e'] | list[int]) -> ModelState:
        """The state of the given batch entries, in their order; an entry may occur several times."""
        pick = _of_tensors(lambda t: t.index_select(0, checked_entries(entries, len(t)).to(t.device)))
        memories = [memory.select(entries) for memory in self.memories]
        return replaced(self, key_values=tree_map(pick, self.key_values), memories=memories)


def _of_tensors(fn: Any) -> Any:
    return lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf


allow_loading(ModelState, formerly='model_state')
