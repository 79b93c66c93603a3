"""A memory layer with gradients at the newest weights, beside other sequence mixers of the same width.

    python benchmarks/peers.py                                   (about 4 minutes on a GPU)
    python benchmarks/peers.py --compile                         (a minute more for each row)
    python benchmarks/peers.py --compile --together              (2 to 3 minutes on 16 cores; --timeout 90: 114 s)
    python benchmarks/peers.py --reference-path /folder/with/the/reference --lengths 2048 32768
    python benchmarks/peers.py --quick                           (a minute on a CPU: does it run?)

Every layer has a norm, projections of width 384 to four heads of 64, and a projection back. Tokens are constant: at
twice the length, half the sequences. A row is the time of forward and backward under autocast in bf16, as a CUDA graph
where one can be captured; with `--compile` also that of the layer compiled by `torch.compile`. Before it is timed, a
memory is compared with the dense backend in float64, and another mixer with a loop over tokens; the error of its output
in the precision of the row is in the table.

Linear attention with gates and the gated delta rule are those of flash-linear-attention (package `fla-core`), if it is
installed; the first step of these rows searches for settings, which takes up to a minute each.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from harness import (
    captured,
    gibibytes,
    in_own_process,
    machine,
    own_path,
    parsed,
    summary,
    table,
    timed,
    together,
    turn,
    write_section,
)
from torch import Tensor, nn

DIM, HEADS, DIM_HEAD = 384, 4, 64
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@dataclass(frozen=True)
class Row:
    mixer: str
    chunk: int = 0
    memory_batch: int = 0
    depth: int = 0
    proximal: bool = False
    spectral: bool = False

    @property
    def name(self) -> str:
        if self.depth == 0:
            return self.mixer
        options = ', proximal steps' * self.proximal + ', spectral norm' * self.spectral
        return f'{self.mixer}, depth {self.depth}, ({self.chunk}, {self.memory_batch}){options}'

    def kwargs(self) -> dict[str, Any]:
        """Arguments of `NeuralMemory`. A linear memory has no norm around it, as in the delta rule."""
        return {
            'dim': DIM,
            'dim_head': DIM_HEAD,
            'heads': HEADS,
            'chunk_size': self.chunk,
            'batch_size': self.memory_batch,
            'qk_rmsnorm': True,
            'default_step_transform_max_lr': 1e-2,
            'init_decay_bias': -3.0,
            'default_model_kwargs': {'depth': self.depth, 'expansion_factor': 4.0},
            'mem_model_norm_add_residual': self.depth > 1,
            'spectral_norm_surprises': self.spectral,
            # options that the reference lacks
            **({'proximal_steps': True, 'normalized_momentum': True} if self.proximal else {}),
        }


MEMORIES = [(1, 1, 1), (16, 16, 1), (64, 64, 1), (16, 16, 2), (32, 32, 2), (64, 64, 2), (4, 128, 2), (16, 16, 3)]
PROXIMAL = [(1, 1, 1), (16, 16, 1), (16, 16, 2), (32, 32, 2), (64, 64, 2)]
SPECTRAL = [(16, 128, 2), (64, 64, 2)]
PEERS = ['causal attention', 'gated linear attention (fla)', 'gated delta rule (fla)']


class Mixer(nn.Module):
    """Projections around a function of queries, keys and values (b, n, h, d) and of gates."""

    def __init__(self, mix: Callable[..., Tensor], gates: int):
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.to_qkv = nn.Linear(DIM, 3 * HEADS * DIM_HEAD, bias=False)
        self.to_gates = nn.Linear(DIM, gates) if gates else None
        self.to_out = nn.Linear(HEADS * DIM_HEAD, DIM, bias=False)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        qkv = (t.unflatten(-1, (HEADS, DIM_HEAD)) for t in self.to_qkv(normed).chunk(3, dim=-1))
        gates = () if self.to_gates is None else (self.to_gates(normed).float(),)
        return self.to_out(self.mix(*qkv, *gates).flatten(-2).to(x.dtype))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, F.logsigmoid(gates.unflatten(-1, (HEADS, DIM_HEAD))).to(q.dtype))[0]


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    decay, beta = gates.chunk(2, dim=-1)
    q, k = (F.normalize(t.float(), dim=-1).to(v.dtype) for t in (q, k))
    return chunk_gated_delta_rule(q, k, v, F.logsigmoid(decay), beta.sigmoid().to(v.dtype))[0]


def attention_by_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = []
    for t in range(q.shape[1]):
        scores = torch.einsum('b h d, b n h d -> b h n', q[:, t], k[:, : t + 1]) / DIM_HEAD**0.5
        out.append(torch.einsum('b h n, b n h d -> b h d', scores.softmax(dim=-1), v[:, : t + 1]))
    return torch.stack(out, dim=1)


def recurrence(q: Tensor, k: Tensor, v: Tensor, retention: Tensor, beta: Tensor | None) -> Tensor:
    """S ← D + β kᵀ (v − k D) with D = retention ∘ S, or D + kᵀ v without β; read by q / √d."""
    state, out = q.new_zeros(len(q), HEADS, DIM_HEAD, DIM_HEAD), []
    for t in range(q.shape[1]):
        state = state * retention[:, t, :, :, None]
        target = v[:, t]
        if beta is not None:
            target = beta[:, t, :, None] * (target - torch.einsum('b h d, b h d e -> b h e', k[:, t], state))
        state = state + torch.einsum('b h d, b h e -> b h d e', k[:, t], target)
        out.append(torch.einsum('b h d, b h d e -> b h e', q[:, t], state) / DIM_HEAD**0.5)
    return torch.stack(out, dim=1)


def linear_attention_by_loop(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    return recurrence(q, k, v, gates.unflatten(-1, (HEADS, DIM_HEAD)).double().sigmoid(), None)


def delta_rule_by_loop(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    decay, beta = gates.double().sigmoid().chunk(2, dim=-1)
    return recurrence(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, decay.unsqueeze(-1), beta)


MIXERS = {
    PEERS[0]: (attention, attention_by_loop, 0),
    PEERS[1]: (gated_linear_attention, linear_attention_by_loop, HEADS * DIM_HEAD),
    PEERS[2]: (gated_delta_rule, delta_rule_by_loop, 2 * HEADS),
}


def build(row: Row) -> tuple[nn.Module, nn.Module]:
    """A layer, and one of the same weights that computes the same exactly, in float64."""

    def build_one(exactly: bool) -> nn.Module:
        torch.manual_seed(0)
        if row.depth == 0:
            mix, by_loop, gates = MIXERS[row.mixer]
            return Mixer(by_loop if exactly else mix, gates)
        from titans_pytorch import NeuralMemory

        # the reference has no engines
        has_engines = 'engine' in inspect.signature(NeuralMemory).parameters
        return NeuralMemory(**row.kwargs(), **({'engine': 'dense'} if exactly and has_engines else {}))

    return build_one(False).to(DEVICE), build_one(True).double()


def output(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x)
    return out if isinstance(out, Tensor) else out[0]


def work(
    row: dict[str, Any],
    length: int,
    tokens: int,
    repeats: int,
    compiles: bool,
    gate: dict[str, Any] | None = None,
) -> dict[str, Any]:
    # TorchScript, through which the reference's scan goes, fails on some GPUs to fuse casts to bfloat16
    torch._C._jit_set_texpr_fuser_enabled(False)
    layer, exact = build(Row(**row))

    def loss(x: Tensor) -> Tensor:
        # cached casts of weights would go stale between replays
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
            return output(layer, x)

    short = torch.randn(1, 256, DIM, dtype=torch.float64)
    with torch.no_grad():
        expected = output(exact, short)
        error = (loss(short.float().to(DEVICE)).cpu() - expected).norm() / expected.norm()
    if not error < 0.05:
        raise SystemExit(f'wrong by {error:.1e}, so nothing is timed')

    x = torch.randn(tokens // length, length, DIM, device=DEVICE)
    gradient = torch.randn_like(x)

    def prepared(forward: Callable[[Tensor], Tensor]) -> tuple[Callable[[], Any], bool]:
        """A step, and whether it is a CUDA graph."""

        def step() -> None:
            layer.zero_grad(set_to_none=True)
            forward(x).backward(gradient.to(torch.bfloat16))

        step()
        run, captures = step, DEVICE == 'cuda'
        if captures:
            try:
                run = captured(step)
            except RuntimeError:  # a kernel that cannot be captured
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                captures = False
        run()
        return run, captures

    run, captures = prepared(loss)
    peak = torch.cuda.max_memory_allocated() if DEVICE == 'cuda' else None
    run_compiled = prepared(torch.compile(loss, dynamic=False))[0] if compiles else None
    with turn(gate):
        seconds = timed(run, repeats)
        compiled = None if run_compiled is None else timed(run_compiled, repeats)
    return {'seconds': seconds, 'compiled': compiled, 'peak': peak, 'error': error.item(), 'captures': captures}


def milliseconds(seconds: float) -> str:
    return f'{seconds * 1e3:.2f} ms'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--lengths', type=int, nargs='+', default=[2048], help='tokens of a sequence')
    parser.add_argument('--tokens', type=int, default=32_768, help='tokens of a step')
    parser.add_argument('--repeats', type=int, default=20, help='timed steps')
    parser.add_argument('--compile', action='store_true', help='time each layer compiled too')
    parser.add_argument('--timeout', type=float, default=180.0, help='seconds after which a row is given up')
    parser.add_argument('--together', action='store_true', help='prepare all rows of a length at the same time')
    parser.add_argument('--quick', action='store_true', help='few tokens')
    options = parsed(parser, work)
    if options.quick:
        options.lengths, options.tokens, options.repeats = [256], 512, 3

    rows = [Row('memory', *sizes) for sizes in MEMORIES]
    rows += [Row('memory', *sizes, proximal=True) for sizes in PROXIMAL]
    rows += [Row('memory', *sizes, spectral=True) for sizes in SPECTRAL] + [Row(name) for name in PEERS]
    jobs = [(row, row.name, own_path()) for row in rows]
    if options.reference_path:
        jobs.append((Row('memory', 16, 16, 2), 'reference, depth 2, (16, 16)', options.reference_path))
    cells = []
    for length in options.lengths:
        sizes = dict(length=length, tokens=options.tokens, repeats=options.repeats)
        arguments = [
            (path, dict(row=asdict(row), **sizes, compiles=options.compile and path != options.reference_path))
            for row, _, path in jobs
        ]
        # the reference, which may need the memory of the whole GPU, comes last and by itself
        side_by_side = [job for job in arguments if options.together and job[0] != options.reference_path]
        by_themselves = arguments[len(side_by_side) :]
        results = chain(
            together(__file__, side_by_side, options.timeout) if side_by_side else (),
            (in_own_process(__file__, path, options.timeout, **job) for path, job in by_themselves),
        )
        for (_, name, _), figures in zip(jobs, results):
            print(json.dumps({'row': name, 'length': length, **figures}), flush=True)
            if 'failed' in figures:
                cells.append([name, f'{length:,}', f'failed: {figures["failed"][:80]}', *[''] * (3 + options.compile)])
                continue
            own = summary([figures])
            eager = '' if own['captures'] or DEVICE == 'cpu' else ', eager'
            times = [own['median'], *([statistics.median(own['compiled'])] if own['compiled'] else [])]
            compiled = milliseconds(times[1]) if own['compiled'] else '–'
            speed = f'{options.tokens / min(times) / 1e6:.2f} M'
            cells.append(
                [
                    name,
                    f'{length:,}',
                    f'{milliseconds(times[0])}{eager}',
                    *([compiled] if options.compile else []),
                    speed,
                    gibibytes(own['peak']),
                    f'{own["error"]:.1e}',
                ]
            )
    heads = ['layer', 'length', 'forward and backward', 'tokens/s', 'peak memory', 'error']
    if options.compile:
        heads.insert(3, 'compiled')
    text = f'{machine()}, {options.tokens:,} tokens\n\n{table(heads, cells)}'
    print(f'\n{text}')
    if options.write:
        write_section(f'peers, {DEVICE}', text)


if __name__ == '__main__':
    main()
