"""`spectral_memory_scan`, by kernels: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same
from memories import randomised

from titans_pytorch import NeuralMemory
from titans_pytorch.memory.backends import SpectralBackend, fused_mlp
from titans_pytorch.ops import spectral_memory_scan as operation

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16


@pytest.fixture
def scans(monkeypatch):
    """The numbers of chunks of each memory batch in each call of the operation."""
    calls = []

    def noted(*args):
        calls.append(args[8])
        return operation.spectral_memory_scan(*args)

    monkeypatch.setattr(fused_mlp, 'spectral_memory_scan', noted)
    return calls


def memory(accept_weight_residual=False, **options):
    settings = {'dim': 8, 'heads': 2, 'dim_head': 4, 'chunk_size': 4, 'batch_size': 8, 'spectral_norm_surprises': True}
    own = {'accept_weight_residual': accept_weight_residual, **options}
    return randomised(NeuralMemory(**settings | own)).to(DEVICE)


def part_by_part(monkeypatch):
    monkeypatch.setattr(SpectralBackend, '_has_kernel', lambda self, inputs: False)


OPTIONS = {
    'two matrices and a norm': {},
    'no momentum': {'momentum': False},
    'a step size for each parameter': {'per_parameter_lr_modulation': True},
    'one matrix': {'default_model_kwargs': {'depth': 1}},
    'no norm': {'mem_model_norm_add_residual': False},
    'two keys per token': {'num_kv_per_token': 2},
    'memory batches of a chunk': {'batch_size': 4},
    'without memory batches': {'batch_size': None},
}


@pytest.mark.parametrize(
    ('option', 'precision'),
    [*((option, 'full') for option in OPTIONS), ('two matrices and a norm', 'autocast')],
)
def test_all_memory_batches_at_once_are_as_one_by_one(option, precision, kernels_everywhere, scans, monkeypatch):
    """Outputs, states and gradients of two memories, of which the second builds on the first and goes on from a state
    within a memory batch. Both run the same kernels, so that Newton–Schulz magnifies no difference."""

    def stored():
        torch.manual_seed(0)
        one, two = (memory(residual, **OPTIONS[option]) for residual in (False, True))
        seq = torch.randn(1, 22, 8, device=DEVICE, requires_grad=True)
        with torch.autocast(DEVICE, LOW, enabled=precision == 'autocast'):
            first, before = one(seq)
            second, after = two(first.float(), prev_weights=before.updates)
            longer, state = one(seq[:, :11], state=before)
            third, after = two(seq[:, :11], state=after, prev_weights=state.updates)
        states = [w for pair in after.states for w in pair.values()]
        total = sum(t.float().square().mean() for t in (first, second, third, longer, *states))
        inputs = [seq, *one.parameters(), *two.parameters()]
        scale = 1.0 if precision == 'full' else 1e-4  # so that half precision does not overflow
        gradients = torch.autograd.grad(scale * total, inputs, allow_unused=True)
        gradients = [None if g is None else g / scale for g in gradients]
        return first, second, third, dict(after.updates.items()), dict(after.weights.items()), gradients

    found = stored()
    assert len(scans) == 4
    part_by_part(monkeypatch)
    expected = stored()
    assert len(scans) == 4
    assert_same(found, expected, 1e-4 if precision == 'full' else 1e-2)


def test_a_call_may_end_within_a_memory_batch_or_not_reach_its_end(kernels_everywhere, scans):
    one = memory()
    _, state = one(torch.randn(1, 28, 8, device=DEVICE))
    one(torch.randn(1, 8, 8, device=DEVICE), state=state)
    assert scans == [[2, 2, 2, 1], [1, 1]]


def test_without_a_gradient_only_one_memory_batch_is_kept(kernels_everywhere, monkeypatch):
    from titans_pytorch.ops.spectral_memory_scan import triton

    kept = []
    outputs = triton._outputs

    def noted(*args):
        found = outputs(*args)
        kept.append(found[triton.MOMENTA].numel())
        return found

    monkeypatch.setattr(triton, '_outputs', noted)
    one, seq = memory(), torch.randn(1, 16, 8, device=DEVICE)
    learned, _ = one(seq)
    with torch.no_grad():
        out, _ = one(seq)
    assert_same(out, learned, 1e-6)
    assert kept[0] == 2 * kept[1] > 0


def test_outputs_are_written_whole(kernels_everywhere, poisoned, scans):
    out, state = memory()(torch.randn(1, 14, 8, device=DEVICE))
    (out.sum() + sum(w.sum() for w in state.updates.values())).backward()
    assert scans and out.isfinite().all()


@pytest.mark.parametrize(
    'options',
    [
        {'max_grad_norm': 1.0},
        {'momentum_order': 2},
        {'gated_transition': True},
        {'default_model_kwargs': {'depth': 3}},
        {'store_memory_loss_fn': lambda pred, target: (pred - target).abs().mean(dim=-1)},
    ],
)
def test_other_memories_are_stored_part_by_part(options, kernels_everywhere, scans):
    memory(**options)(torch.randn(1, 16, 8, device=DEVICE))
    assert not scans
