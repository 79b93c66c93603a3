"""What a whole model carries from one call to the next."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from titans_pytorch.attention.rotary import KeyValues
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.utils.checks import checked_entries
from titans_pytorch.utils.saving import allow_loading
from titans_pytorch.utils.shapes import Int


class ModelState(NamedTuple):
    """A model's state after some tokens; hand it to the next call to continue as if the two were one.

    It does not grow with the length read. It can be detached, moved, cut to some of its batch entries, saved with
    `torch.save`, and loaded with `torch.load(..., weights_only=True)` once this package has been imported. To start
    anew is to hand over `None`.
    """

    seq_index: int
    """Positions read, long-term memory tokens included."""
    key_values: list[KeyValues | None]
    """For each layer the keys, not rotated, and values that later tokens can still see; `None` without attention."""
    memories: list[NeuralMemState]
    """For each memory layer its state."""

    @property
    def batch_size(self) -> int | None:
        """Sequences that it is of; `None` if nothing in it says so."""
        sizes = [key_values[0].shape[0] for key_values in self.key_values if key_values is not None]
        sizes += [memory.batch_size for memory in self.memories if memory.batch_size is not None]
        return sizes[0] if sizes else None

    def detach(self) -> ModelState:
        """The same state, cut from the graph that made it: where truncated backpropagation through time truncates."""
        key_values, memories = tree_map(_of_tensors(Tensor.detach), self[1:])
        return ModelState(self.seq_index, key_values, memories)

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """The state on another device, in another dtype (of its floating-point tensors), or both."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        move = _of_tensors(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))
        return ModelState(
            self.seq_index, tree_map(move, self.key_values), [memory.to(device, dtype) for memory in self.memories]
        )

    def __deepcopy__(self, memo: Any) -> ModelState:
        """A copy that shares nothing with this state, cut from its graph as by `detach`."""
        key_values = tree_map(_of_tensors(lambda t: t.detach().clone()), self.key_values)
        return ModelState(self.seq_index, key_values, deepcopy(self.memories, memo))

    def select(self, entries: Int[Tensor, ' e'] | list[int]) -> ModelState:
        """The state of these batch entries, in this order; an entry may come several times."""
        pick = _of_tensors(lambda t: t.index_select(0, checked_entries(entries, len(t)).to(t.device)))
        return ModelState(
            self.seq_index, tree_map(pick, self.key_values), [memory.select(entries) for memory in self.memories]
        )


def _of_tensors(fn: Any) -> Any:
    return lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf


allow_loading(ModelState, formerly='model_state')
