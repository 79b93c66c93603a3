"""A memory layer in a custom model: prediction of the next value of a series, read piece by piece.

    python examples/time_series.py

Each series has its own periods, which trained weights cannot contain: the model has to learn them from the series while
it reads. The model consists of a linear map, a `NeuralMemory` with a residual connection, and an MLP. It reads a series
in pieces, and the memory's state carries over what it has learned (truncated backpropagation through time).
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from titans_pytorch import NeuralMemory, NeuralMemState
from titans_pytorch.commands.options import integer


class Forecaster(nn.Module):
    def __init__(self, dim: int = 32):
        super().__init__()
        self.embed = nn.Linear(4, dim)  # the last four values
        # gradients at the newest weights; steps that do not overshoot, however far the series goes on
        self.memory = NeuralMemory(
            dim,
            chunk_size=4,
            batch_size=4,
            qk_rmsnorm=True,
            init_decay_bias=-4.0,
            default_step_transform_max_lr=4.0,
            proximal_steps=True,
            normalized_momentum=True,
            mem_model_norm_add_residual=False,
        )
        self.predict = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1))

    def forward(self, values: Tensor, state: NeuralMemState | None = None) -> tuple[Tensor, NeuralMemState]:
        """Predictions (batch, length) of the value after each of `values` (batch, length + 3) but the first three."""
        x = self.embed(values.unfold(1, 4, 1))
        retrieved, state = self.memory(x, state=state)
        return self.predict(x + retrieved).squeeze(-1), state


def series(batch: int, length: int) -> Tensor:
    """Two sines of random periods and phases, and a little noise."""
    time = torch.arange(length)
    waves = []
    for _ in range(2):
        period, phase = torch.rand(batch, 1) * 20 + 5, torch.rand(batch, 1)
        waves.append(torch.sin(2 * math.pi * (time / period + phase)))
    return sum(waves) + 0.05 * torch.randn(batch, length)


def pieces(values: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of each piece; inputs include the three values before it."""
    starts = range(3, values.shape[1] - length, length)
    return [(values[:, start - 3 : start + length], values[:, start + 1 : start + length + 1]) for start in starts]


def main() -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=integer(1), default=300)
    parser.add_argument('--piece', type=integer(1), default=64, help='values read at a time')
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Forecaster()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trained = 0
    while trained < options.steps:
        state = None
        for inputs, targets in pieces(series(16, 4 * options.piece + 4), options.piece):
            predictions, state = model(inputs, state)
            loss = (predictions - targets).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            state = state.detach()
            trained += 1
        print(f'step {trained}: mean squared error {loss.item():.4f}')

    # a series sixteen times as long as a piece, in constant memory
    state, errors = None, []
    with torch.no_grad():
        for inputs, targets in pieces(series(64, 16 * options.piece + 4), options.piece):
            predictions, state = model(inputs, state)
            errors.append((predictions - targets).square().mean().item())
    print(f'new series: error {errors[0]:.4f} in the first piece, {errors[-1]:.4f} in the last')
    return errors[0], errors[-1]


if __name__ == '__main__':
    main()
