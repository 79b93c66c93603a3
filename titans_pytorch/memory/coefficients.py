"""The gates of chunks as coefficient matrices, with which the dual form stores and retrieves.

Momentum and decay are recurrences over chunks. This module solves them over a block of chunks, resets included.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.memory.chunks import Chunks
from titans_pytorch.ops.gate_products import gate_products
from titans_pytorch.utils.functional import replaced
from titans_pytorch.utils.precision import at_least_float32, no_autocast
from titans_pytorch.utils.shapes import Bool, Float


class Coefficients(NamedTuple):
    """The recurrences of momentum and decay over a block of n chunks, solved.

    Both recurrences are linear (Titans eq. 10, 13), so every state is a combination of the updates u_j of the chunks
    and of the k initial states: the weights and the momentum of each order. The coefficients depend only on the gates.

    If there are `Chunks.resets`, the weights with which the memory begins anew are one more state, the last, which
    never changes. After a reset the weights consist of that state alone, and no coefficient reaches across the reset.
    """

    steps: Float[Tensor, 'bh n n']
    """Coefficient of update j in the weights before chunk c."""
    initial_steps: Float[Tensor, 'bh n k']
    """Coefficient of each initial state in the weights before chunk c."""
    final: Float[Tensor, 'bh k n']
    """Coefficient of update j in each state after the last chunk."""
    initial_final: Float[Tensor, 'bh k k']
    """Coefficient of each initial state in each state after the last chunk."""

    @classmethod
    def of_blocks(cls, chunks: Chunks, num_blocks: int) -> Coefficients:
        """Coefficients of blocks of equal length; the blocks become the second axis of every tensor."""
        with no_autocast(chunks.decay_logits):
            return cls.of(*_gates_of_blocks(chunks, num_blocks))._with_blocks(num_blocks)

    @classmethod
    def with_base(cls, chunks: Chunks, num_blocks: int, lookahead: bool) -> tuple[Coefficients, Coefficients]:
        """Coefficients of the weights W, and of state 0, for blocks in which state 0 is where gradients are taken. With
        `lookahead`, state 0 is V = W + Σ P, the weights that momentum P of all orders leads to; otherwise it is W."""
        if not lookahead:
            coefficients = cls.of_blocks(chunks, num_blocks)
            return coefficients, coefficients
        assert chunks.resets is None
        with no_autocast(chunks.decay_logits):
            weights, initial, orders, initial_orders = cls._solved(*_gates_of_blocks(chunks, num_blocks))
            of_weights = cls._shifted(weights, initial, orders, initial_orders)
            initial_lookahead = initial + F.pad(sum(initial_orders[1:], initial_orders[0]), (1, 0))
            of_lookahead = cls._shifted(sum(orders, weights), _of_lookahead(initial_lookahead), orders, initial_orders)
            initial_steps = _of_lookahead(of_weights.initial_steps)
            of_weights = replaced(of_lookahead, steps=of_weights.steps, initial_steps=initial_steps)
        return of_weights._with_blocks(num_blocks), of_lookahead._with_blocks(num_blocks)

    def _with_blocks(self, num_blocks: int) -> Coefficients:
        return Coefficients(*(t.unflatten(0, (-1, num_blocks)) for t in self))

    def unbind(self) -> list[Coefficients]:
        """Coefficients of each block."""
        return [Coefficients(*block) for block in zip(*(t.unbind(1) for t in self))]

    def to(self, dtype: torch.dtype) -> Coefficients:
        """The same coefficients in another precision."""
        return Coefficients(*(t.to(dtype) for t in self))

    @classmethod
    def of(
        cls,
        decay_logits: Float[Tensor, 'bh n'],
        momentum_logits: Float[Tensor, 'bh n o'] | None,
        momentum_mix: Float[Tensor, 'bh n o'] | Float[Tensor, 'bh n o+1'] | None,
        momentum_shares: Float[Tensor, 'bh n o'] | None = None,
        resets: Bool[Tensor, 'bh n'] | None = None,
    ) -> Coefficients:
        """Compute the coefficients from the gates of `Chunks`."""
        if resets is None:
            return cls._shifted(*cls._solved(decay_logits, momentum_logits, momentum_mix, momentum_shares))
        retention = gate_products(_log_gate(-decay_logits))
        reset = Resets.of(resets, retention)
        coefficients = cls._shifted(*cls._solved(decay_logits, momentum_logits, momentum_mix, momentum_shares, reset))
        return coefficients._with_constant_state(reset.restored(retention))

    def _with_constant_state(self, in_weights: Float[Tensor, 'bh n 1']) -> Coefficients:
        """The same with one more, constant state. `in_weights`: its coefficient in the weights after each chunk."""
        between, final_weights = in_weights.split((in_weights.shape[1] - 1, 1), dim=1)
        states = self.initial_final.shape[2]
        of_constant = torch.cat((final_weights, F.pad(torch.ones_like(final_weights), (0, 0, states - 1, 0))), dim=1)
        return Coefficients(
            steps=self.steps,
            initial_steps=torch.cat((self.initial_steps, F.pad(between, (0, 0, 1, 0))), dim=2),
            final=F.pad(self.final, (0, 0, 0, 1)),
            initial_final=torch.cat((F.pad(self.initial_final, (0, 0, 0, 1)), of_constant), dim=2),
        )

    @staticmethod
    def _solved(
        decay_logits: Float[Tensor, 'bh n'],
        momentum_logits: Float[Tensor, 'bh n o'] | None,
        momentum_mix: Float[Tensor, 'bh n o'] | Float[Tensor, 'bh n o+1'] | None,
        momentum_shares: Float[Tensor, 'bh n o'] | None,
        reset: Resets | None = None,
    ) -> tuple[Float[Tensor, 'bh n n'], Float[Tensor, 'bh n k'], list[Tensor], list[Tensor]]:
        """Coefficients of each update and of each initial state in the weights after every chunk; and, for each order,
        the same for its momentum, (bh, n, n) and (bh, n, o), which does not depend on the initial weights."""
        log_retention = _log_gate(-decay_logits)
        retention = gate_products(log_retention)
        initial_weights = _remaining_share(retention, log_retention)
        if reset is not None:
            retention, initial_weights = reset.cut(retention, initial_weights)
        if momentum_logits is None:
            return retention, initial_weights, [], []

        held, given = _solved_momentum(momentum_logits, momentum_shares, reset)
        combined, combined_initial = given[-1] if momentum_mix is None else _mixed(given, momentum_mix)
        # One product, not two: Inductor turns a product with a single column into a sum. On a CPU, its code for a sum
        # that goes straight into a concatenation writes past the end if batch × heads is below the vector width (2.13)
        updates, momenta = (retention @ torch.cat((combined, combined_initial), dim=-1)).split(
            (combined.shape[-1], len(held)), dim=-1
        )
        orders, initial_orders = ([*own] for own in zip(*held))
        return updates, torch.cat((initial_weights, momenta), dim=-1), orders, initial_orders

    @classmethod
    def _shifted(
        cls, weights: Tensor, initial: Tensor, orders: list[Tensor], initial_orders: list[Tensor]
    ) -> Coefficients:
        """Derive the coefficients from those of the weights and of each momentum after every chunk."""
        # the weights before chunk c + 1 are those after chunk c; before chunk 0 they are the initial ones
        at_first = F.pad(torch.ones_like(initial[:, :1, :1]), (0, initial.shape[2] - 1))
        # momentum does not depend on the initial weights
        final_orders = [F.pad(own[:, -1], (1, 0)) for own in initial_orders]
        # not by slices: each slice's gradient would be as long as the whole tensor
        between, final_weights = weights.split((weights.shape[1] - 1, 1), dim=1)
        return cls(
            steps=F.pad(between, (0, 0, 1, 0)),
            initial_steps=torch.cat((at_first, initial[:, :-1]), dim=1),
            final=torch.cat([final_weights, *(order[:, -1:] for order in orders)], dim=1),
            initial_final=torch.stack([initial[:, -1], *final_orders], dim=1),
        )


Solution = tuple[Float[Tensor, 'bh n n'], Float[Tensor, 'bh n o']]
"""Coefficients of each update, and of each order's initial momentum, in a state after every chunk."""


def _solved_momentum(
    momentum_logits: Float[Tensor, 'bh n o'], momentum_shares: Float[Tensor, 'bh n o'] | None, reset: Resets | None
) -> tuple[list[Solution], list[Solution]]:
    """The momentum of each order, and what each order hands on to the next one."""
    log_gates = _log_gate(momentum_logits)
    num_orders = log_gates.shape[-1]
    orders: list[Solution] = []
    given: list[Solution] = []
    for order in range(num_orders):
        of_order = log_gates[..., order]
        if momentum_shares is not None:
            # an order hands on a share of all that it holds, its input included, and carries over only the rest
            of_order = F.pad(of_order[:, :-1], (1, 0))
        held = gate_products(of_order)
        initial = F.pad(_remaining_share(held, of_order), (order, num_orders - order - 1))
        if reset is not None:
            held, initial = reset.cut(held, initial)
        if given:
            held, initial = held @ given[-1][0], held @ given[-1][1] + initial
        carried = passed = (held, initial)
        if momentum_shares is not None:
            kept, share = log_gates[..., order, None].exp(), momentum_shares[..., order, None].to(held.dtype)
            carried, passed = (kept * held, kept * initial), (share * held, share * initial)
        orders.append(carried)
        given.append(passed)
    return orders, given


def _mixed(given: list[Solution], momentum_mix: Float[Tensor, 'bh n o'] | Float[Tensor, 'bh n o+1']) -> Solution:
    """Combine what the orders hand on; with one weight more than there are orders, the surprise itself takes part."""
    last, last_initial = given[-1]
    mix = momentum_mix.to(last.dtype)
    surprise = torch.eye(mix.shape[1], dtype=mix.dtype, device=mix.device).expand_as(last)
    nothing = torch.zeros_like(last_initial)
    with_surprise = mix.shape[-1] > len(given)
    terms = zip(mix.split(1, dim=-1), [(surprise, nothing)] * with_surprise + given)
    weighted = [(share * matrix, share * start) for share, (matrix, start) in terms]
    combined, combined_initial = (sum(own[1:], own[0]) for own in zip(*weighted))
    return combined, combined_initial


def _log_gate(logits: Tensor) -> Tensor:
    # in log space and in at least float32, so that saturated gates stay finite
    return F.logsigmoid(at_least_float32(logits))


class Resets(NamedTuple):
    """Where a memory begins anew within a block, expressed as factors of coefficients."""

    indicator: Float[Tensor, 'bh n 1']
    """1 for chunks after which the memory begins anew."""
    none_since: Float[Tensor, 'bh n n']
    """1 if there is no reset from chunk j to chunk c, both included."""
    none_after: Float[Tensor, 'bh n n']
    """1 if there is no reset from the chunk after j to chunk c."""
    none_before: Float[Tensor, 'bh n 1']
    """1 if there is no reset up to chunk c."""

    @classmethod
    def of(cls, resets: Bool[Tensor, 'bh n'], like: Tensor) -> Resets:
        ends = resets.cumsum(dim=1)
        starts = ends - resets.long()
        none_since, none_after = (ends.unsqueeze(2) == t.unsqueeze(1) for t in (starts, ends))
        return cls(*(t.to(like.dtype) for t in (resets.unsqueeze(2), none_since, none_after, (ends == 0).unsqueeze(2))))

    def cut(
        self, products: Float[Tensor, 'bh n n'], initial: Float[Tensor, 'bh n k']
    ) -> tuple[Float[Tensor, 'bh n n'], Float[Tensor, 'bh n k']]:
        """Drop the coefficients of inputs and of initial states that would reach across a reset."""
        return products * self.none_since, initial * self.none_before

    def restored(self, retention: Float[Tensor, 'bh n n']) -> Float[Tensor, 'bh n 1']:
        """Coefficient, after each chunk, of the weights with which the memory last began anew."""
        return (retention * self.none_after) @ self.indicator


def _gates_of_blocks(chunks: Chunks, num_blocks: int) -> list[Any]:
    """The gates of the recurrences; blocks of equal length become part of the batch."""
    logits = (chunks.decay_logits, chunks.momentum_logits)
    gates = (*logits, chunks.momentum_mix, chunks.momentum_shares, chunks.resets)
    return [None if t is None else t.unflatten(1, (num_blocks, -1)).flatten(0, 1) for t in gates]


def _of_lookahead(initial: Float[Tensor, 'bh _c k']) -> Float[Tensor, 'bh _c k']:
    """Coefficients of V and P, computed from those of W = V − Σ P and P."""
    of_weights, of_momentum = initial.split((1, initial.shape[2] - 1), dim=2)
    return torch.cat((of_weights, of_momentum - of_weights), dim=2)


def _remaining_share(products: Float[Tensor, 'bh n n'], log_gates: Float[Tensor, 'bh n']) -> Float[Tensor, 'bh n 1']:
    """g_0 · … · g_c, what is left of an initial state at step c, given the products of the gates after each step."""
    return products[..., :1] * log_gates[:, :1].exp().unsqueeze(-1)
