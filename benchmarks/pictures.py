"""The pictures of `docs/pictures.md`: the memory at work, and the benchmarks' results.

    python benchmarks/pictures.py                        all pictures, two to three minutes on one CPU core
    python benchmarks/pictures.py surprise retention     some of them

Four pictures are computed here, by memories that were never trained: surprise along a text, retention of a fact, which
chunk answers, and the step sizes at which a memory stores. The others draw published figures: `mqar`, `needle` and
`long_text` from the tables of `docs/benchmarks.md`, `learning` from the rows of `learning.csv`.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import RESULTS
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from titans_pytorch import NeuralMemory

BENCHMARKS = Path(__file__).resolve().parent
ASSETS = BENCHMARKS.parent / 'docs' / 'assets'

# Okabe and Ito's palette, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, PURPLE, GREY = '#0072B2', '#D55E00', '#009E73', '#AA4499', '#8A8A8A'
WIDTH = 7.0  # inches; shown at 700 pixels, a point of type is 1.4 pixels
TITLE: dict[str, Any] = {'x': 0.01, 'ha': 'left', 'fontsize': 11, 'weight': 'bold'}
STYLE = {
    'font.size': 9,
    'axes.titlesize': 11,
    'axes.titleweight': 'bold',
    'axes.titlelocation': 'left',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.alpha': 0.25,
    'figure.dpi': 160,
}


def untrained_memory(dim: int, chunk_size: int, step: float, **settings: Any) -> NeuralMemory:
    """A memory with random projections and constant gates, which is queried with the keys under which it stored.

    Queries, keys and values come from separate views, so that no value can be computed from its key. The last matrix of
    the memory network starts at zero, so an empty memory answers zero.

    Args:
        step: share of the error on a single key that one step removes in a linear memory.
    """
    memory = NeuralMemory(
        dim,
        chunk_size=chunk_size,
        qkv_receives_diff_views=True,
        qk_rmsnorm=True,
        mem_model_norm_add_residual=False,
        # the loss is a mean over `dim` features, and keys have squared length `dim`, so a step of 1/2 removes the error
        default_step_transform_max_lr=step,
        init_adaptive_step_bias=0.0,
        **settings,
    )
    memory.to_queries.load_state_dict(memory.to_keys.state_dict())
    with torch.no_grad():
        memory.memory_model_parameters[-1].zero_()
    return memory.requires_grad_(False)


def stored_values(memory: NeuralMemory, values: Tensor) -> Tensor:
    """Values as the memory stores them, (batch, length, dim)."""
    return memory.to_values(memory.store_norm(values))


def logit(share: float) -> float:
    return math.log(share / (1 - share)) if share else -30.0


# surprise along a text


class Reading(NamedTuple):
    """A text with a repeated passage, and the surprise at each word: 1 is the loss of an empty memory."""

    words: list[str]
    surprise: Tensor
    first: slice
    second: slice


def read_with_repetition(dim: int, length: int, start: int, passage: int, after: int) -> Reading:
    """Surprise of an untrained memory along a text.

    The text is the first `length` words of the docstring of `NeuralMemory`, then `passage` of them again, beginning at
    word `start`, then the next `after` words. At each word the value is the word's random vector, and the key is the
    elementwise product of the vectors of the two words before it.
    """
    torch.manual_seed(0)
    source = re.findall(r'[^\W\d_]{2,}|a\b', (NeuralMemory.__doc__ or '').lower())
    first, second = slice(start, start + passage), slice(length, length + passage)
    words = source[:length] + source[first] + source[length : length + after]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    vectors = torch.randn(len(vocabulary), dim)[[vocabulary[word] for word in words]]

    def words_before(distance: int) -> Tensor:
        return torch.cat((torch.ones(distance, dim), vectors[:-distance]))

    # rolled, so that the order of the two words matters
    keys = words_before(1) * words_before(2).roll(1, dims=-1)
    memory = untrained_memory(
        dim,
        chunk_size=4,
        batch_size=4,
        step=0.5,
        momentum=False,
        init_decay_bias=logit(0.0005),
        default_model_kwargs={'depth': 1},
    )
    views = torch.stack((keys, keys, vectors)).unsqueeze(1)
    _, _, (losses, _) = memory(views, return_surprises=True)
    surprise = losses.flatten() / stored_values(memory, vectors).square().mean(dim=-1)[: losses.shape[-1]]
    return Reading(words[: len(surprise)], surprise, first, second)


def draw_surprise(small: bool) -> Figure:
    full, tiny = (1024, 240, 7, 30, 80), (256, 60, 7, 16, 16)
    reading = read_with_repetition(*(tiny if small else full))
    once, again = reading.surprise[reading.first], reading.surprise[reading.second]

    figure = Figure(figsize=(WIDTH, 5.4), layout='constrained')
    along, by_word = figure.subplots(2, gridspec_kw={'height_ratios': [1, 1.15]})
    window = 9
    mean = reading.surprise.unfold(0, window, 1).mean(dim=-1)
    along.plot(reading.surprise, '.', color=GREY, alpha=0.5, markersize=3)
    along.plot(range(window // 2, window // 2 + len(mean)), mean, color='black', linewidth=1.5)
    top = 1.12 * reading.surprise.max().item()
    for where, values, colour, name in (
        (reading.first, once, BLUE, 'first reading'),
        (reading.second, again, ORANGE, 'the same passage again'),
    ):
        along.axvspan(where.start, where.stop, color=colour, alpha=0.15, linewidth=0)
        text = f'{name}\nmean {values.mean().item():.2f}'
        along.text(where.start, top, text, color=colour, va='bottom', weight='bold')
    along.set_title('A passage read before surprises the memory half as much', pad=34)
    along.set(xlabel='word of the text', ylabel='surprise', ylim=(0, top), xlim=(0, len(reading.surprise)))

    places = range(len(once))
    by_word.vlines(places, again, once, color=GREY, alpha=0.5, linewidth=1)
    by_word.plot(places, once, 'o', color=BLUE, markersize=4)
    by_word.plot(places, again, 'o', color=ORANGE, markersize=4)
    by_word.set_title('The passage, word by word', fontsize=9)
    by_word.text(1.01, once[-1], 'first\nreading', color=BLUE, va='center', transform=by_word.get_yaxis_transform())
    by_word.text(1.01, again[-1], 'second', color=ORANGE, va='center', transform=by_word.get_yaxis_transform())
    by_word.set_xticks(places, reading.words[reading.first], rotation=90, fontsize=7.5)
    by_word.set(ylabel='surprise', ylim=(0, 1.3), xlim=(-0.7, len(once) - 0.3))
    by_word.grid(axis='x', visible=False)
    return figure


# retention of a fact


def retention(dim: int, distance: int, sequences: int, **settings: Any) -> Tensor:
    """Cosine similarity between a stored value and the answer to its key after 0 to `distance` further tokens.

    The first token of a sequence stores the fact, the others store random keys and values. The result is a mean over
    `sequences`. `settings` are those of the memory; by default it is linear, corrects itself at every token and forgets
    nothing.
    """
    torch.manual_seed(0)
    defaults = {
        'step': 0.5,
        'batch_size': 1,
        'momentum': False,
        'init_decay_bias': logit(0),
        'default_model_kwargs': {'depth': 1},
    }
    memory = untrained_memory(dim, chunk_size=1, **{**defaults, **settings})
    keys, values = torch.randn(2, sequences, distance + 1, dim)
    fact = stored_values(memory, values)[:, :1]
    state, similarities = None, []
    # in pieces, because `state.updates` holds the weights after each token of a call
    for piece in torch.stack((keys[:, :1].expand_as(keys), keys, values)).split(16, dim=2):
        answers, state = memory(piece, state=state)
        similarities.append(torch.cosine_similarity(answers, fact, dim=-1).mean(dim=0))
    return torch.cat(similarities)


RETENTION: dict[str, dict[str, dict[str, Any]]] = {
    'Forgetting per token': {
        'none': {},
        '1 %': {'init_decay_bias': logit(0.01)},
        '10 %': {'init_decay_bias': logit(0.1)},
        '50 %': {'init_decay_bias': logit(0.5)},
    },
    'Matrices of the network': {
        'three': {'default_model_kwargs': {'depth': 3}},
        'two': {'default_model_kwargs': {'depth': 2}},
        'one': {},
    },
    'Gradients taken at': {
        'initial weights': {'batch_size': None},
        'newest weights': {},
        'newest, with\nmomentum': {'momentum': True, 'init_momentum_bias': logit(0.9), 'step': 0.05},
    },
}


def draw_retention(small: bool) -> Figure:
    sizes = {'dim': 16, 'distance': 8, 'sequences': 2} if small else {'dim': 64, 'distance': 1000, 'sequences': 32}
    distance = sizes['distance']
    figure = Figure(figsize=(WIDTH, 3.5), layout='constrained')
    figure.suptitle('How long a fact lasts depends most of all on forgetting', **TITLE)
    for axes, (name, variants) in zip(figure.subplots(1, 3, sharey=True), RETENTION.items()):
        height = 0.98
        for colour, (label, settings) in zip((BLUE, GREEN, ORANGE, PURPLE), variants.items()):
            similarity = retention(**sizes, **settings)
            # means over windows that grow with the distance
            ends = torch.logspace(0, math.log10(distance + 1), 36).long().unique().tolist()
            means = [similarity[start:end].mean() for start, end in pairwise(ends)]
            axes.plot([math.sqrt(start * (end - 1)) for start, end in pairwise(ends)], means, color=colour, linewidth=2)
            axes.text(
                1, height, label, color=colour, size=8, weight='bold', ha='right', va='top', transform=axes.transAxes
            )
            height -= 0.07 * (1 + label.count('\n'))
        axes.axhline(0, color='black', linewidth=0.8)
        axes.set_title(name, fontsize=9)
        axes.set(xscale='log', xlabel='tokens since the fact', xlim=(1, distance), ylim=(-0.1, 1.02))
        axes.xaxis.set_major_formatter('{x:.0f}')
    figure.axes[0].set_ylabel('cosine similarity of answer and fact')
    return figure


# which chunk answers


def chunk_contributions(
    dim: int, chunks: int, chunk_size: int, sequences: int, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Contribution of each stored chunk to each answer, for a linear memory, by ablation.

    The first half of a sequence stores `chunks` chunks of random keys and values. The second half queries the same keys
    and stores nothing: first the earlier half of the chunks in order, then the later half in reverse. An ablated run
    masks one chunk; the difference that this makes to the answer is the chunk's contribution. Because all gradients are
    taken at the initial weights, which are zero, contributions add up to the answer.

    Returns the contributions, (chunks, sequences, tokens, dim), and the answers and the values stored under the keys,
    both (sequences, tokens, dim), where tokens are those of the second half.
    """
    torch.manual_seed(0)
    memory = untrained_memory(
        dim, chunk_size, step=1.0, batch_size=None, momentum=False, default_model_kwargs={'depth': 1}, **settings
    )
    keys, values = torch.randn(2, sequences, chunks, chunk_size, dim)
    asked = [*range(chunks // 2), *reversed(range(chunks // 2, chunks))]
    views = torch.stack([torch.cat((of, of[:, asked]), dim=1).flatten(1, 2) for of in (keys, keys, values)])
    stored = torch.ones(chunks + 1, 2 * chunks, dtype=torch.bool)
    stored[:, chunks:] = False
    stored[range(chunks), range(chunks)] = False  # the last row is the run without an ablation

    def answers(mask: Tensor) -> Tensor:
        by_token = mask.repeat_interleave(chunk_size).expand(sequences, -1)
        return memory(views, store_mask=by_token)[0][:, chunks * chunk_size :]

    *ablated, complete = (answers(mask) for mask in stored)
    wanted = stored_values(memory, views[2])[:, chunks * chunk_size :]
    return complete - torch.stack(ablated), complete, wanted


def draw_which_chunk(small: bool) -> Figure:
    sizes = (16, 4, 4, 2) if small else (128, 16, 4, 8)
    _, chunks, chunk_size, _ = sizes
    figure = Figure(figsize=(WIDTH, 3.55), layout='constrained')
    figure.suptitle('The chunk that stored a key answers for it; forgetting dims old chunks', **TITLE)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, forgotten) in zip(panels, {'No forgetting': 0, 'Forgetting 5 % per chunk': 0.05}.items()):
        contributions, _, wanted = chunk_contributions(*sizes, init_decay_bias=logit(forgotten))
        shares = (contributions * wanted).sum(dim=-1) / wanted.square().sum(dim=-1)
        by_chunk = shares.mean(dim=1).unflatten(-1, (chunks, chunk_size)).mean(dim=-1)
        edges = (0.5, chunks + 0.5)
        image = axes.imshow(by_chunk.T, cmap='Blues', vmin=0, vmax=1, extent=(*edges, chunks + 0.5, 0.5))
        axes.axhline(chunks // 2 + 0.5, color=ORANGE, linewidth=1.2, linestyle='--')
        axes.set_title(name, fontsize=9)
        axes.set(xlabel='stored chunk', xticks=range(4, chunks + 1, 4), yticks=range(4, chunks + 1, 4))
        axes.grid(visible=False)
    middle = chunks // 2 + 0.5
    panels[0].text(chunks + 0.2, middle - 0.3, 'asked in order', color=ORANGE, ha='right', va='bottom', weight='bold')
    panels[0].text(0.8, middle + 0.4, 'asked in reverse', color=ORANGE, ha='left', va='top', weight='bold')
    panels[0].set_ylabel('chunk of questions')
    figure.colorbar(image, ax=panels, label='share of the stored value', shrink=0.8)
    return figure


# step sizes at which a memory stores, and at which it diverges


def recall_error(chunk_size: int, depth: int, step: float, pairs: int, sequences: int, **settings: Any) -> float:
    """Squared error of the values recalled for the last 16 pairs of a sequence, relative to those of an empty memory.

    Keys are positive, so they point in much the same direction. Gradients are taken at the newest weights, momentum is
    0.5, and nothing is forgotten.
    """
    torch.manual_seed(0)
    memory = untrained_memory(
        64,
        chunk_size,
        step,
        batch_size=chunk_size,
        init_decay_bias=logit(0),
        init_momentum_bias=logit(0.5),
        default_model_kwargs={'depth': depth, 'expansion_factor': 2.0},
        **settings,
    )
    keys, values = torch.randn(2, sequences, pairs, 64)
    keys = keys.relu()
    _, state = memory(torch.stack((keys, keys, values)))
    wanted = stored_values(memory, values)[:, -16:]
    answers = memory.recall(keys[:, -16:], state)
    return ((answers - wanted).square().sum() / wanted.square().sum()).item()


STEPS: dict[str, dict[str, Any]] = {
    'plain steps': {},
    'plain steps,\nnormalised\nmomentum': {'normalized_momentum': True},
    'proximal steps,\nnormalised\nmomentum': {'normalized_momentum': True, 'proximal_steps': True},
}


def draw_stability(small: bool) -> Figure:
    chunks, depths, exponents = ([4], [1, 2], [-4, 0]) if small else ([1, 4, 16, 64], [1, 2, 3], [*range(-4, 9)])
    pairs, sequences = (64, 1) if small else (256, 8)
    figure = Figure(figsize=(WIDTH, 5.4), layout='constrained')
    figure.suptitle('Proximal steps store where plain steps diverge', **TITLE)
    colours = colormaps['Blues_r'].with_extremes(over='#F3C9A5')
    panels = figure.subplots(len(STEPS), len(depths), sharex=True, sharey=True)
    for row, (name, settings) in zip(panels, STEPS.items()):
        for axes, depth in zip(row, depths):
            errors = [
                [recall_error(chunk, depth, 0.5 * 2.0**power, pairs, sequences, **settings) for power in exponents]
                for chunk in chunks
            ]
            image = axes.imshow(errors, cmap=colours, vmin=0, vmax=1, aspect='auto')
            for y, of_chunk in enumerate(errors):
                for x, error in enumerate(of_chunk):
                    if not error < 10:
                        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=ORANGE, linewidth=0))
            axes.grid(visible=False)
            axes.set_yticks(range(len(chunks)), chunks)
            axes.set_xticks(
                range(0, len(exponents), 4),
                [f'1/{2**-power}' if power < 0 else f'{2**power}' for power in exponents[::4]],
            )
        row[0].set_ylabel(f'{name}\n\nchunk', fontsize=8)
    for axes, depth in zip(panels[0], depths):
        axes.set_title(f'{depth} {"matrix" if depth == 1 else "matrices"}', fontsize=9)
    panels[-1][len(depths) // 2].set_xlabel(
        'step size; a plain step of 1 moves the value of a single key to its target'
    )
    label = 'error of recall (dark orange: above 10, or not finite)'
    figure.colorbar(image, ax=panels, label=label, shrink=0.7, extend='max')
    return figure


# results of the benchmarks


def results(section: str, first: str = 'model') -> list[dict[str, str]]:
    """Rows, by column heading, of the table with this first heading in a section of `docs/benchmarks.md`."""
    text = RESULTS.read_text().split(f'<!-- {section} -->\n')[1].split(f'<!-- end of {section} -->')[0]
    (own,) = (part for part in text.split('\n\n') if part.startswith(f'| {first} |'))
    heads, _, *rows = ([cell.strip() for cell in line.split('|')[1:-1]] for line in own.strip().splitlines())
    return [dict(zip(heads, row)) for row in rows]


def mean_and_deviation(cell: str) -> tuple[float, float]:
    mean, deviation = cell.split(' ± ')
    return float(mean), float(deviation)


def draw_lines(axes: Axes, section: str, columns: list[str], colours: Mapping[str, str]) -> None:
    """A line for each model over columns of its table: in colour with standard deviations, or in grey without."""
    order = [*dict.fromkeys(colours.values())]
    for row in results(section):
        means, deviations = zip(*(mean_and_deviation(row[column]) for column in columns))
        if (name := row['model']) not in colours:
            axes.plot(means, color=GREY, linewidth=1)
            continue
        # slightly apart, so that error bars can be distinguished
        places = [place + 0.04 * order.index(colours[name]) for place in range(len(columns))]
        within = [[min(d, m) for m, d in zip(means, deviations)], [min(d, 100 - m) for m, d in zip(means, deviations)]]
        axes.errorbar(places, means, within, fmt='o-', color=colours[name], linewidth=2, elinewidth=1, markersize=4)
    axes.set(ylim=(-2, 103), xlim=(-0.1, len(columns) - 0.8), xticks=range(len(columns)))
    axes.yaxis.set_major_formatter('{x:.0f} %')


def draw_mqar(small: bool) -> Figure:
    columns = ['64/4', '128/8', '256/16', '256/32', '256/64', '512/128', '1024/256']
    axes = (figure := Figure(figsize=(WIDTH, 4), layout='constrained')).subplots()
    colours = {'LMM, linear memory': BLUE, 'MAG': ORANGE, 'MAL': ORANGE, 'attention alone': GREEN}
    draw_lines(axes, 'task, mqar', columns, colours)
    axes.text(4.15, 87, 'LMM, linear memory', color=BLUE, weight='bold')
    axes.text(1.2, 82, 'MAG and MAL', color=ORANGE, weight='bold')
    axes.text(1.2, 30, 'attention alone', color=GREEN, weight='bold')
    axes.text(6, 4, 'all others: below 5 %', color='#555555', weight='bold', ha='right')
    axes.set_xticklabels([column.replace('/', '\n') for column in columns])
    axes.set(xlabel='tokens in the sequence (above), pairs to recall (below)', ylabel='correct answers')
    axes.set_title('Many pairs, far apart: only a linear memory recalls them')
    return figure


def draw_needle(small: bool) -> Figure:
    columns = ['2,048', '4,096', '8,192', '16,384']
    axes = (figure := Figure(figsize=(WIDTH, 3.7), layout='constrained')).subplots()
    draw_lines(axes, 'task, needle', columns, {'MAC': GREEN, 'MAL': ORANGE, 'LMM, linear memory': BLUE})
    axes.text(0.14, 52, 'LMM, linear memory', color=BLUE, weight='bold')
    axes.text(0.3, 28, 'MAL', color=ORANGE, weight='bold')
    axes.text(0.3, 10, 'MAC', color=GREEN, weight='bold')
    axes.text(3.1, 18, 'all others: below 4 %', color='#555555', weight='bold', ha='right')
    axes.set_xticklabels(columns)
    axes.set(xlabel='bytes of text around the needle', ylabel='needles found')
    axes.set_title('A linear memory and MAL find needles, but not with every seed')
    return figure


def draw_long_text(small: bool) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.9), layout='constrained')
    panels = {
        'windows of 128, 9 M parameters': 'task, long text',
        'windows of 512, 21.6 M parameters': 'task, long text, windows of 512',
    }
    lines = {
        'attention alone': (GREEN, '-'),
        'full attention': (GREY, '--'),
        'MAL': (BLUE, '-'),
        'LMM': (ORANGE, '-'),
        'gated delta rule': (PURPLE, '-'),
    }
    for axes, (title, section) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
        for row in results(section, 'position'):
            name, *bits = row.values()
            # full attention only up to the training length, because it is far off the picture beyond
            means = [float(of.split()[0]) for of in bits][: 5 if name == 'full attention' else None]
            colour, style = lines[name]
            axes.plot(means, 'o', linestyle=style, color=colour, linewidth=2, markersize=3, label=name)
        axes.set_xticks(range(len(bits)), [*row][1:], fontsize=7, rotation=45)
        axes.set_title(title, fontsize=9)
    figure.axes[0].set_ylabel('bits per byte')
    figure.supxlabel('position in the text, in bytes', fontsize=10)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle('In equal time, linear memories read better beyond the first kilobyte')
    return figure


def draw_learning(small: bool) -> Figure:
    with (BENCHMARKS / 'learning.csv').open() as file:
        rows = [*csv.DictReader(line for line in file if not line.startswith('#'))]
    runs: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        runs.setdefault(row['run'], []).append((float(row['seconds']), float(row['bits per byte'])))

    axes = (figure := Figure(figsize=(WIDTH, 4), layout='constrained')).subplots()
    for (name, points), colour in zip(runs.items(), (GREY, GREEN, BLUE)):
        axes.plot(*zip(*points), '.-', color=colour, linewidth=2, label=name)
    axes.axvspan(0, runs['this library, bf16, compiled'][1][0], color=BLUE, alpha=0.08, linewidth=0)
    axes.text(4, 1.1, 'compiling, 126 s', color=BLUE, va='bottom')
    axes.text(500, 3.85, 'reference, bf16\n128 steps', color='#555555', weight='bold', ha='right', va='bottom')
    axes.text(490, 2.52, 'this library, fp32, eager\n612 steps', color=GREEN, weight='bold', ha='right', va='bottom')
    axes.text(365, 1.95, 'this library, bf16, compiled\n4,225 steps', color=BLUE, weight='bold', ha='right', va='top')
    axes.set(xlabel='seconds of training', ylabel='validation, bits per byte', xlim=(0, 510), ylim=(1, 8.3))
    axes.set_title('The same learning per step, at 70 times as many steps per second')
    return figure


PICTURES: dict[str, Callable[[bool], Figure]] = {
    'surprise': draw_surprise,
    'retention': draw_retention,
    'which_chunk': draw_which_chunk,
    'stability': draw_stability,
    'learning': draw_learning,
    'mqar': draw_mqar,
    'needle': draw_needle,
    'long_text': draw_long_text,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description='Draw the pictures of docs/pictures.md.')
    parser.add_argument('names', nargs='*', metavar='name', help=f'some of {", ".join(PICTURES)}; default: all')
    parser.add_argument('--folder', type=Path, default=ASSETS, help='where the PNG files go')
    parser.add_argument('--small', action='store_true', help='tiny sizes, to see that everything runs')
    options = parser.parse_args(arguments)
    if unknown := {*options.names} - PICTURES.keys():
        parser.error(f'names must be among {", ".join(PICTURES)}, got {", ".join(sorted(unknown))}')

    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        with rc_context(STYLE), torch.no_grad():
            PICTURES[name](options.small).savefig(options.folder / f'{name}.png')
        print(options.folder / f'{name}.png', flush=True)


if __name__ == '__main__':
    main()
