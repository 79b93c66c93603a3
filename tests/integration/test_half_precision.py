"""float16 and bfloat16, as the module's own precision and by autocast: close to float32, finite, and learning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import CLASSES, build, ids
from memories import SWITCHES, inputs, memory
from torch import Tensor, nn

from titans_pytorch import (
    GatedResidualMemoryMLP,
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    NeuralMemory,
)
from titans_pytorch.attention.rotary import Rotary
from titans_pytorch.generation.logits import gumbel_sample

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}
# of machine epsilons: 1e-3 and 8e-3
EPSILONS = 60
dtypes = pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
by_autocast = pytest.mark.parametrize('autocast', [False, True], ids=['module', 'autocast'])


def in_half(module: nn.Module, dtype: torch.dtype, autocast: bool) -> torch.autocast:
    if not autocast:
        module.to(dtype)
    return torch.autocast('cpu', dtype, enabled=autocast)


@by_autocast
@dtypes
@pytest.mark.parametrize('switch', SWITCHES)
def test_values_and_gradients_of_a_memory(switch: str, dtype: torch.dtype, autocast: bool):
    mem = memory(switch, default_step_transform_max_lr=0.02, init_decay_bias=-2.0).float()
    seq = inputs(mem, 18).float()
    expected = mem(seq)[0].detach()

    with in_half(mem, dtype, autocast):
        came, state = mem(seq if autocast else seq.to(dtype))
    came.float().square().mean().backward()

    assert came.dtype == (torch.float32 if came.dtype == torch.float32 else dtype)
    assert autocast or came.dtype == dtype
    error = (came.float() - expected).abs().max() / expected.abs().max()
    assert error < EPSILONS * torch.finfo(dtype).eps
    for name, parameter in mem.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    for weights in (state.weights, *state.states):
        assert all(w.dtype == torch.float32 for w in weights.values()), 'the recurrence is not in float32'


@dtypes
def test_rotary_frequencies_are_not_cast_to_half_precision(dtype: torch.dtype):
    rotary, expected = Rotary(32), Rotary(32).freqs
    assert torch.equal(rotary.to(dtype).freqs, expected)
    assert torch.equal(rotary.double().to(dtype).freqs, expected)
    assert rotary.double().freqs.dtype == torch.float64
    assert rotary.to('meta', dtype).freqs.dtype == torch.float32


@dtypes
@pytest.mark.parametrize('switch', ['plain', 'soft clamp', 'attention memory', 'convolution'])
def test_pieces_in_half_precision(switch: str, dtype: torch.dtype):
    mem = memory(switch, default_step_transform_max_lr=0.02).to(dtype)
    seq = inputs(mem, 18).to(dtype)
    whole, _ = mem(seq)
    state, pieces = None, []
    for piece in seq.split([5, 1, 7, 5], dim=1):
        out, state = mem(piece, state=state)
        pieces.append(out)
    error = (torch.cat(pieces, dim=1) - whole).abs().max() / whole.abs().max()
    assert error < 4 * torch.finfo(dtype).eps


def test_a_state_in_half_precision_is_continued_in_float32():
    mem = memory('plain').float()
    seq = inputs(mem, 18).float()
    _, state = mem(seq)
    expected = mem(seq, state=state)[1].states[0]['norm.gamma']
    came = mem(seq, state=state.to(torch.bfloat16))[1].states[0]['norm.gamma']
    assert came.dtype == torch.float32
    assert (came - expected).abs().max() < 0.05 * expected.abs().max()


@dtypes
def test_a_state_in_float32_is_continued_in_half_precision(dtype: torch.dtype):
    mem = memory('convolution', default_step_transform_max_lr=0.02).to(dtype)
    seq = inputs(mem, 18).to(dtype)
    _, state = mem(seq[:, :9])
    assert torch.equal(mem(seq[:, 9:], state=state.to(torch.float32))[0], mem(seq[:, 9:], state=state)[0])

    model = build('MAG').to(dtype)
    x = ids(18)
    _, of_model = model(x[:, :9], return_state=True)
    assert torch.equal(model(x[:, 9:], state=of_model.to(torch.float32)), model(x[:, 9:], state=of_model))


def test_updates_are_formed_in_float32():
    mem = NeuralMemory(64, heads=2, dim_head=32, chunk_size=4, batch_size=4, qk_rmsnorm=True)
    seq = torch.randn(1, 4, 64)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        buffers = mem.to_buffers(mem(seq[:, :3])[1])
        _, after = mem.step(seq[:, 3:], buffers, torch.tensor([3]), True, True)
    momentum = after.weights.momentum['model.weights.0'][0]
    assert (torch.linalg.matrix_rank(momentum, rtol=1e-4) <= 4).all()  # a direction for each row


@by_autocast
@dtypes
@pytest.mark.parametrize('switch', ['plain', 'no residual norm', 'deep memory', 'swiglu memory'])
def test_reading_a_memory_and_single_steps(switch: str, dtype: torch.dtype, autocast: bool):
    mem = memory(switch, chunk_size=2, batch_size=4, default_step_transform_max_lr=0.02).float()
    seq = inputs(mem, 8).float()

    def read(seq: Tensor) -> list[Tensor]:
        with torch.no_grad():
            _, state = mem(seq[:, :5])
            buffers = mem.to_buffers(state)
            step, _ = mem.step(seq[:, 5:6], buffers, torch.tensor([1]), True, False)
            return [mem.recall(seq, state), step, mem.retrieve_memories(seq, state.weights)]

    expected = read(seq)
    with in_half(mem, dtype, autocast):
        came = read(seq if autocast else seq.to(dtype))
    for have, want in zip(came, expected):
        assert (have.float() - want).abs().max() / want.abs().max() < EPSILONS * torch.finfo(dtype).eps


def test_gated_residual_memories_under_autocast_with_float32_rows():
    model = GatedResidualMemoryMLP(8, depth=2)
    mem = NeuralMemory(8, chunk_size=4, model=model, qk_rmsnorm=True, default_step_transform_max_lr=0.01)
    seq = torch.randn(2, 12, 8)
    expected = mem(seq)[0]
    with torch.autocast('cpu', torch.bfloat16):
        came = mem(seq)[0]
    assert (came - expected).abs().max() < 0.1 * expected.abs().max()


def learns(
    module: nn.Module, loss_of: Callable[[], Tensor], dtype: torch.dtype, autocast: bool, steps: int = 40
) -> list[float]:
    """Losses of some steps; none may be skipped but those by which a `GradScaler` finds its scale."""
    lowered = in_half(module, dtype, autocast)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, eps=1e-8 if autocast else 1e-4)
    scaler = torch.amp.GradScaler('cpu', enabled=autocast and dtype == torch.float16)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with lowered:
            loss = loss_of()
        scaler.scale(loss.float()).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() >= 16 or not scaler.is_enabled()
    return losses


@by_autocast
@dtypes
@pytest.mark.parametrize(
    'settings', [{}, {'init_decay_bias': -3.0, 'qk_rmsnorm': True}], ids=['default', 'long memory']
)
def test_a_layer_learns(settings: dict, dtype: torch.dtype, autocast: bool):
    mem = NeuralMemory(16, chunk_size=4, batch_size=16, **settings)
    seq = torch.randn(2, 32, 16)

    def loss() -> Tensor:
        return (mem(seq.to(mem.to_keys.weight.dtype))[0].float() - seq.roll(1, 1)).square().mean()

    losses = learns(mem, loss, dtype, autocast)
    assert losses[-1] < losses[0] / 2


@by_autocast
@dtypes
@pytest.mark.parametrize('cls', [MemoryAsContextTransformer, MemoryAsGateTransformer, LongTermMemoryModel])
def test_a_model_learns(cls: type, dtype: torch.dtype, autocast: bool):
    assert cls in CLASSES.values()
    memories = {'heads': 2, 'dim_head': 8, 'default_step_transform_max_lr': 0.1}
    model = cls(
        num_tokens=16,
        dim=16,
        depth=1,
        segment_len=8,
        heads=2,
        dim_head=8,
        neural_memory_segment_len=4,
        neural_memory_kwargs=memories,
    )
    tokens = torch.randint(0, 16, (4, 17))
    losses = learns(model, lambda: model(tokens, return_loss=True), dtype, autocast)
    assert losses[-1] < 0.75 * losses[0]


@by_autocast
@dtypes
@pytest.mark.parametrize('name', CLASSES)
def test_sampling_with_a_cache_in_half_precision(name: str, dtype: torch.dtype, autocast: bool):
    model = build(name).float()
    prompt = torch.randint(0, 16, (2, 7))
    with in_half(model, dtype, autocast):
        logits, state = model(prompt, return_state=True)
        assert logits.dtype == dtype and logits.isfinite().all()
        assert all(w.dtype == torch.float32 for w in state.memories[0].states[0].values())
        assert model.sample(prompt, 20, use_cache=True, show_progress=False).shape == (2, 13)


@pytest.mark.gpu
@by_autocast
@dtypes
@pytest.mark.parametrize(
    'switch', ['plain', 'spectral norm', 'soft clamp', 'attention memory', 'gated residual memory']
)
def test_values_and_gradients_on_a_gpu(switch: str, dtype: torch.dtype, autocast: bool):
    mem = memory(switch, default_step_transform_max_lr=0.02, init_decay_bias=-2.0).float().cuda()
    seq = inputs(mem, 66).float().cuda()
    expected = mem(seq)[0].detach()
    if not autocast:
        mem.to(dtype)
    with torch.autocast('cuda', dtype, enabled=autocast):
        came, state = mem(seq if autocast else seq.to(dtype))
    came.float().square().mean().backward()
    error = (came.float() - expected).norm() / expected.norm()
    assert error < 30 * torch.finfo(dtype).eps
    assert all(p.grad is None or p.grad.isfinite().all() for p in mem.parameters())
    assert all(w.dtype == torch.float32 for weights in (state.weights, *state.states) for w in weights.values())


@dtypes
def test_the_loss_of_many_tokens_is_a_mean_in_float32(dtype: torch.dtype):
    model = LongTermMemoryModel(num_tokens=64, dim=8, depth=1, neural_memory_segment_len=64, neural_memory_layers=())
    tokens = torch.randint(0, 64, (40, 512))
    expected = model(tokens, return_loss=True).item()
    assert model.to(dtype)(tokens, return_loss=True).item() == pytest.approx(expected, rel=1e-2)


@dtypes
def test_sampling_draws_from_the_distribution(dtype: torch.dtype):
    rare = gumbel_sample(torch.tensor([0.0, -7.0, -7.0, -7.0], dtype=dtype).expand(100_000, 4)) > 0
    # e⁻⁷ · 3 / (1 + 3 e⁻⁷); a standard deviation is 1.7e-4
    assert rare.double().mean().item() == pytest.approx(2.728e-3, abs=8e-4)
