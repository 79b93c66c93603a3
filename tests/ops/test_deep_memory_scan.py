"""Scan over memory batches of an MLP of any depth: the reference and the kernels against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_no_worse, assert_same

from titans_pytorch import MemoryMLP, NeuralMemory, without_kernels
from titans_pytorch.ops.deep_memory_scan import deep_memory_scan
from titans_pytorch.ops.norms import standardise
from titans_pytorch.ops.proximal_steps import proximal_deltas, proximal_vector

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# products in float32 of three TF32 ones keep a little less, and each memory batch builds on the one before
EXACT = 2e-5 if DEVICE == 'cpu' else 5e-5
EPS = 1e-5
COEFFICIENTS = ('steps', 'initial_steps', 'final', 'initial_final')
# heads, blocks, memory batches of a block, chunks of one, rows of a chunk, width, hidden width, states, depth
SHAPES = [
    (2, 2, 2, 2, 3, 16, 32, 2, 3),
    (1, 2, 1, 4, 1, 20, 70, 1, 3),
    (1, 1, 3, 1, 4, 24, 130, 2, 2),
    (1, 2, 2, 1, 3, 20, 70, 2, 4),
    (1, 2, 2, 1, 18, 72, 40, 1, 3),
]
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


@pytest.fixture
def kernels(kernels_everywhere):
    """Kernels run on this device too; their module."""
    from titans_pytorch.ops.deep_memory_scan import triton

    return triton


def problem(heads, blocks, batches, chunks, rows, dim, width, states, depth, norm=True, step_size=0.3):
    """The arguments of the operation by name. Steps are small, as each memory batch builds on the one before."""
    in_block, widths = batches * chunks, (dim, *(width,) * (depth - 1), dim)

    def draw(*shape, scale=1.0):
        return (torch.randn(heads, *shape) * scale).to(DEVICE)

    tensors = {
        'keys': draw(blocks * in_block, rows, dim),
        'values': draw(blocks * in_block, rows, dim),
        'step_sizes': draw(blocks * in_block, rows).abs() * step_size,
        'steps': draw(blocks, in_block, in_block, scale=in_block**-0.5).tril(-1),
        'initial_steps': draw(blocks, in_block, states, scale=1 / states),
        'final': draw(blocks, states, in_block, scale=in_block**-0.5),
        'initial_final': draw(blocks, states, states, scale=1 / states),
    }
    # the weights before a block are the first of its states
    tensors['initial_steps'][:, :, 0] = torch.eye(states)[0]
    for layer, shape in enumerate(zip(widths[:-1], widths[1:])):
        for index in range(states):
            tensors[f'matrix {layer} {index}'] = draw(*shape, scale=shape[0] ** -0.5)
    if norm:
        tensors |= {f'gamma {index}': draw(dim, scale=0.3) for index in range(states)}
    return tensors


def states_of(tensors):
    """Of each matrix, and of γ."""
    count = tensors['final'].shape[2]
    matrices = [t for name, t in tensors.items() if name.startswith('matrix')]
    gamma = [t for name, t in tensors.items() if name.startswith('gamma')]
    return [matrices[start : start + count] for start in range(0, len(matrices), count)], gamma


def scanned(tensors, chunks, num_proximal_steps=None):
    matrices, gamma = states_of(tensors)
    rows = (tensors[name] for name in ('keys', 'values', 'step_sizes'))
    coefficients = (tensors[name] for name in COEFFICIENTS)
    settings = EPS, chunks, num_proximal_steps
    out = deep_memory_scan(*rows, matrices, gamma or None, *coefficients, *settings)._asdict()
    # of the first matrix, X are the keys
    lists = {
        f'{name} {index}': t
        for name in ('initial', 'final', 'inputs', 'deltas')
        for index, t in enumerate(out.pop(name))
        if (name, index) != ('inputs', 0)
    }
    return {name: t for name, t in out.items() if t is not None} | lists


def by_autograd(tensors, chunks, num_proximal_steps=None):
    """A memory batch after the other, with weights formed, and gradients by autograd."""
    matrices, gamma = states_of(tensors)
    states = [torch.stack(own, dim=1) for own in (*matrices, *([gamma] if gamma else []))]
    length, out = tensors['steps'].shape[2], {}

    def note(name, t):
        out.setdefault(name, []).append(t)

    batches = iter([*zip(*(tensors[name].split(chunks, dim=1) for name in ('keys', 'values', 'step_sizes')))])
    for steps, initial_steps, final, initial_final in zip(*(tensors[name].unbind(1) for name in COEFFICIENTS)):
        updates = [[] for _ in states]
        for index, state in enumerate(states):
            note(f'initial {index}' if index < len(matrices) else 'gamma_initial', state)
        for first in range(0, length, chunks):
            keys, values, theta = next(batches)
            base = []
            for state, own in zip(states, updates):
                w = torch.einsum('bk, bk... -> b...', initial_steps[:, first], state)
                for chunk, update in enumerate(own):
                    w = w + steps[:, first, chunk].reshape(-1, *(1,) * (w.ndim - 1)) * update
                base.append(w)
            inputs, products, x = [], [], keys
            for layer, w in enumerate(base[: len(matrices)]):
                inputs.append(F.gelu(x) if layer else x)
                x = inputs[-1] @ w.unsqueeze(1)
                products.append(x)
            if gamma:
                products.append(base[-1].unsqueeze(1).expand(-1, chunks, -1) * 1.0)
                x = standardise(x, EPS)[0] * (products[-1].unsqueeze(2) + 1) + keys
            losses = (x - values).square().mean(dim=-1)
            steps_taken = [*torch.autograd.grad(-(losses * theta).sum(), products, create_graph=True)]
            common = theta, losses, num_proximal_steps
            if num_proximal_steps is not None:
                of_rows = [proximal_deltas(x, delta, *common) for x, delta in zip(inputs, steps_taken)]
                steps_taken = of_rows + [proximal_vector(own, *common) for own in steps_taken[len(matrices) :]]
            for index, (x, delta) in enumerate(zip(inputs, steps_taken)):
                updates[index] += (x.mT @ delta).unbind(1)
                note(f'deltas {index}', delta)
                if index:
                    note(f'inputs {index}', x)
            if gamma:
                updates[-1] += steps_taken[-1].unbind(1)
                note('negative_gamma_gradient', steps_taken[-1])
            note('losses', losses)
        states = [
            torch.einsum('bkn, bn... -> bk...', final, torch.stack(own, dim=1))
            + torch.einsum('bki, bi... -> bk...', initial_final, state)
            for state, own in zip(states, updates)
        ]
    results = {}
    for name, parts in out.items():
        if 'initial' in name:
            results[name] = torch.stack(parts, dim=1)
        else:
            results[name] = torch.cat(parts, dim=1).unflatten(1, (-1, length))
            if 'inputs' in name or 'deltas' in name:
                results[name] = results[name].flatten(2, 3)
    finals = {f'final {index}': state for index, state in enumerate(states[: len(matrices)])}
    return results | finals | ({'gamma_final': states[-1]} if gamma else {})


def leaves(tensors, dtype=None):
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}


def learned(function, tensors, used=None):
    """Results of `function`, and gradients of a linear function of them, or of those in `used`, for every tensor."""
    generator, total, out = torch.Generator().manual_seed(1), 0.0, function(tensors)
    for name, t in sorted(out.items()):
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        if used is None or name in used:
            total = total + (t.double() * weights).sum()
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    came = torch.autograd.grad(total, [*wanted.values()], materialize_grads=True)
    return {name: t.detach() for name, t in out.items()}, dict(zip(wanted, came))


def exactly(tensors, *args, used=None):
    return learned(lambda own: by_autograd(own, *args), leaves(tensors, torch.float64), used)


def with_large_steps(tensors):
    """Steps beyond the limit among them, and rows that are not stored."""
    tensors['step_sizes'] = tensors['step_sizes'] * 30.0
    tensors['step_sizes'][:, ::2, 0] *= 1e5
    tensors['step_sizes'][:, -1, -1] = 0
    return tensors


@pytest.mark.parametrize('num_proximal_steps', [None, 4])
@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('shape', SHAPES[:4])
def test_the_reference_equals_autograd(shape, norm, num_proximal_steps):
    tensors = leaves(problem(*shape, norm), torch.float64)
    settings = shape[3], num_proximal_steps
    came, expected = (learned(lambda own, f=f: f(own, *settings), tensors) for f in (scanned, by_autograd))
    assert_same(came, expected, 1e-11)


@pytest.mark.parametrize(('shape', 'norm'), [*((shape, True) for shape in SHAPES), (SHAPES[0], False)])
def test_kernels(kernels, poisoned, shape, norm):
    tensors = problem(*shape, norm)
    came = learned(lambda own: scanned(own, shape[3]), leaves(tensors))
    assert_same(came, exactly(tensors, shape[3]), EXACT)
    assert all(t.dtype == torch.float32 for own in came for t in own.values())


@pytest.mark.parametrize(('shape', 'norm'), [(SHAPES[0], True), (SHAPES[2], True), (SHAPES[3], False)])
def test_proximal_steps(kernels, poisoned, shape, norm):
    tensors = with_large_steps(problem(*shape, norm))
    came = learned(lambda own: scanned(own, shape[3], 3), leaves(tensors))
    assert_same(came, exactly(tensors, shape[3], 3), 3 * EXACT)


def test_proximal_steps_of_repeated_rows(kernels, poisoned):
    """Each key occurs four times in a chunk, whose systems are eliminated 16 rows at a time."""
    tensors = with_large_steps(problem(1, 2, 1, 1, 40, 16, 32, 2, 2, norm=False))
    tensors['keys'] = tensors['keys'][:, :, :10].repeat(1, 1, 4, 1)
    assert_no_worse(lambda: learned(lambda own: scanned(own, 1, 3), leaves(tensors)), exactly(tensors, 1, 3), 1e-5)


def test_proximal_steps_of_almost_nothing(kernels, poisoned):
    # quotients of losses that underflow
    tensors = problem(1, 1, 2, 2, 2, 16, 40, 2, 2)
    for theta in (1e-40, 8e-39, 1e-30, 1e-20):
        tensors['step_sizes'] = torch.full_like(tensors['step_sizes'], theta)
        came = learned(lambda own: scanned(own, 2, 64), leaves(tensors))
        assert_same(came, exactly(tensors, 2, 64), EXACT)


@pytest.mark.parametrize('name', ['initial 1', 'final 0', 'inputs 2', 'deltas 2', 'gamma_final', 'losses'])
def test_only_one_output_is_used(kernels, poisoned, name):
    tensors = problem(1, 2, 2, 1, 2, 16, 20, 2, 3)
    came = learned(lambda own: scanned(own, 1), leaves(tensors), [name])
    assert_same(came, exactly(tensors, 1, used=[name]), EXACT)


def test_without_gradients(kernels, poisoned):
    tensors = problem(*SHAPES[0])
    with torch.no_grad():
        came = scanned(tensors, 2, 3)
    assert_same(came, {name: t.detach() for name, t in scanned(leaves(tensors), 2, 3).items()}, 0.0)


def test_views(kernels, poisoned):
    # keys without the last feature, states of all heads
    tensors = problem(*SHAPES[0])
    longer = problem(2, 2, 2, 2, 4, 17, 32, 2, 3)
    cut = {'keys': longer['keys'][:, :, :-1, :-1], 'values': longer['values'][:, :, 1:, 1:]}
    tensors |= cut | {name: t[:1].expand(t.shape) for name, t in tensors.items() if 'matrix' in name}
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    came = learned(lambda own: scanned(own, 2), tensors)
    assert_same(came, exactly(tensors, 2), EXACT)


@pytest.mark.parametrize('num_proximal_steps', [None, 2])
@pytest.mark.parametrize('dtype', [torch.float32, LOW])
def test_autocast(kernels, poisoned, dtype, num_proximal_steps):
    tensors = problem(*SHAPES[0])
    tensors = {name: t.to(dtype) if name in ('keys', 'values') else t for name, t in tensors.items()}

    def compute():
        with torch.autocast(DEVICE, LOW):
            return learned(lambda own: scanned(own, 2, num_proximal_steps), leaves(tensors))

    # states are kept in low precision
    assert_no_worse(compute, exactly(tensors, 2, num_proximal_steps), floor=3 * torch.finfo(LOW).eps)


def test_shapes_that_the_kernels_do_not_support(kernels, monkeypatch):
    monkeypatch.setattr(kernels, 'deep_memory_scan', None)
    for shape, num_proximal_steps in (
        ((1, 1, 1, 1, 2, 130, 8, 1, 2), None),
        ((1, 1, 1, 1, 65, 8, 8, 1, 2), None),
        ((1, 1, 1, 1, 2, 8, 8, 3, 3), 2),
        ((1, 1, 1, 1, 2, 8, 8, 1, 5), None),
    ):
        tensors = problem(*shape)
        came = learned(lambda own, steps=num_proximal_steps: scanned(own, 1, steps), leaves(tensors))
        assert_same(came, exactly(tensors, 1, num_proximal_steps), EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ('sizes', 'num_proximal_steps'),
    [
        ((16, 64, 256, 2, 3), None),
        ((16, 64, 256, 2, 3), 1),
        ((16, 64, 256, 1, 4), 1),
        ((64, 64, 256, 2, 2), 1),
        ((16, 128, 512, 2, 2), None),
        ((16, 128, 512, 2, 2), 1),
        ((64, 128, 256, 2, 3), 1),
    ],
)
@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('low', [False, True])
def test_sizes_of_training(sizes, num_proximal_steps, norm, low):
    # under a norm, or with four matrices, rounding errors of larger steps grow from one memory batch to the next
    if num_proximal_steps is None:
        step_size = 0.02
    elif norm:
        step_size = 0.03
    else:
        step_size = 0.2 if sizes[-1] == 4 else 2.0
    tensors = problem(8, 3, 64 // sizes[0], 1, *sizes, norm=norm, step_size=step_size)

    def compute():
        with torch.autocast(DEVICE, LOW, enabled=low):
            return learned(lambda own: scanned(own, 1, num_proximal_steps), leaves(tensors))

    floor = 3 * torch.finfo(LOW).eps if low else 1e-5
    assert_no_worse(compute, exactly(tensors, 1, num_proximal_steps), floor)


@pytest.mark.parametrize('num_proximal_steps', [None, 3])
def test_the_operation_is_registered_correctly(kernels, num_proximal_steps):
    # of equal widths, as the rest of shorter rows is arbitrary
    tensors = leaves(problem(1, 2, 2, 1, 2, 16, 16, 2, 3))
    matrices, gamma = states_of(tensors)
    flat = torch.cat([torch.stack(own, dim=1).flatten(1) for own in matrices], dim=1).detach().requires_grad_()
    rows = (tensors[name] for name in ('keys', 'values', 'step_sizes'))
    coefficients = (tensors[name] for name in COEFFICIENTS)
    of_gamma = torch.stack(gamma, dim=1).detach().requires_grad_()
    args = (*rows, flat, of_gamma, *coefficients, 16, 3, 1, True, EPS, num_proximal_steps, torch.float32)
    torch.library.opcheck(kernels.deep_memory_scan, args, test_utils=CHECKS)


def test_training_is_compiled_without_momentum(kernels, fresh_compiler):
    model = MemoryMLP(16, depth=3)
    settings = {'chunk_size': 2, 'batch_size': 4, 'momentum': False, 'default_step_transform_max_lr': 0.1}
    memory = NeuralMemory(16, model=model, **settings).to(DEVICE)
    seq = torch.randn(2, 32, 16, device=DEVICE)

    def gradients(loss):
        found = torch.autograd.grad(loss(seq), [*memory.parameters()], allow_unused=True)
        return [d for d in found if d is not None]

    def loss(seq):
        return memory(seq)[0].square().sum()

    with without_kernels():
        expected = gradients(loss)
    assert_same(gradients(torch.compile(loss)), expected, 1e-4 if DEVICE == 'cpu' else 1e-3)
