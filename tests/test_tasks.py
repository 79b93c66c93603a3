"""The tasks of `benchmarks/tasks`, tiny and on the CPU: the data is what it should be, and every model trains."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TASKS = Path(__file__).resolve().parent.parent / 'benchmarks' / 'tasks'
sys.path.append(str(TASKS))
import enwik8  # noqa: E402
import long_text  # noqa: E402
import models  # noqa: E402
import mqar  # noqa: E402
import needle  # noqa: E402
import runs  # noqa: E402
import step_sizes  # noqa: E402
import text as texts  # noqa: E402
import word_problem  # noqa: E402

from titans_pytorch.training import open_run  # noqa: E402

TINY = {'dim': 16, 'depth': 1, 'dim_head': 8, 'segment_len': 8, 'neural_memory_segment_len': 4}


SMALL_TEXT = {'trained': 48, 'tested': 64, 'stride': 32, 'piece': 24, 'batch': 2, 'edges': (0, 16, 32)}


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / 'text'
    path.write_bytes(b'The needle is in the haystack. ' * 400)
    return path


def test_models_have_equally_many_parameters():
    sizes = {'num_tokens': 64, **TINY, 'dim': 64, 'dim_head': 16}
    counts = {name: models.num_parameters(models.build(name, 0, **sizes)) for name in models.MODELS}
    assert max(counts.values()) < 1.02 * min(counts.values()), counts


def test_every_query_of_mqar_is_a_key_whose_value_came_before():
    tokens, places, values = mqar.examples(5, 64, 6, 512, torch.Generator().manual_seed(0))
    assert tokens.shape == (5, 64) and places.shape == values.shape == (5, 6)
    for row, where, answers in zip(tokens.tolist(), places.tolist(), values.tolist()):
        pairs = dict(zip(row[0:12:2], row[1:12:2]))
        assert len(pairs) == 6 and len({*where}) == 6 and min(where) >= 12
        assert [pairs[row[place]] for place in where] == answers
        assert all(token >= 256 for place, token in enumerate(row) if place >= 12 and place not in where)


def test_the_needle_is_in_the_text_and_its_question_at_the_end():
    batch = torch.full((6, 100), ord('.'))
    for row in needle.hidden_needle(batch, torch.Generator().manual_seed(0)).tolist():
        content = bytes(row).decode()
        question, answer = content[-11:-4], content[-4:]
        assert len(content) == 100 and question.startswith('[[') and question.endswith('=')
        assert content.count(question) == 2 and f'{question}{answer}]]' in content[:-11]


def test_every_one_of_many_needles_is_asked_for_behind_it():
    batch = torch.full((6, 300), ord('.'))
    rows, answers = needle.hidden_needles(batch, 5, torch.Generator().manual_seed(0))
    assert answers.shape == (6, 5 * needle.LETTERS)
    for row, places in zip(rows.tolist(), answers.unflatten(1, (5, -1)).tolist()):
        content = bytes(row).decode()
        assert len(content) == 300 and content.count('[[') == content.count(']]') == 10
        for place in places:
            whole = content[place[0] - needle.QUESTION : place[-1] + 1]
            assert whole.startswith('[[') and whole[6] == '='
            assert content.count(whole) == 2 and content.rindex(whole) == place[0] - needle.QUESTION


@pytest.mark.parametrize('name', models.MODELS)
def test_mqar_trains(name):
    settings = {'training': runs.Training('cpu', 2, 1e-2), 'tokens': 64, 'vocabulary': 32}
    came = mqar.run(name, 0, **settings, trained=[(32, 2)], tested=[(32, 2), (64, 4)], **TINY)
    assert came['accuracy'].keys() == {'32/2', '64/4'} and all(0 <= share <= 1 for share in came['accuracy'].values())


def test_compiled_steps_train_in_the_same_way():
    batch, losses = mqar.examples(4, 32, 2, 32, torch.Generator().manual_seed(0)), []
    for compiled in (False, True):
        model = models.build('attention alone', 0, num_tokens=32, **TINY)
        trainer = runs.Trainer(model, mqar.loss, runs.Training('cpu', 2, 1e-2, compile=compiled))
        losses.append([trainer.step(*batch).item() for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0][1] < losses[0][0]


def test_a_model_learns_mqar():
    settings = {'training': runs.Training('cpu', 250, 1e-2), 'tokens': 512, 'vocabulary': 16}
    sizes = {**TINY, 'dim': 32, 'dim_head': 16, 'depth': 2, 'segment_len': 16}
    came = mqar.run('attention alone', 0, **settings, trained=[(16, 2)], tested=[(16, 2)], **sizes)
    assert came['accuracy']['16/2'] > 0.4  # a guess among the values is right in one of eight


@pytest.mark.parametrize('name', ['attention alone', 'MAC, paper order', 'LMM, no decay'])
def test_needle_and_enwik8_train(name, text_file):
    settings = {'training': runs.Training('cpu', 3, 1e-2), 'data': text_file}
    came = needle.run(name, 0, **settings, tokens=128, trained=[64], tested=[48], examples=2, **TINY)
    assert 0 <= came['accuracy']['48'] <= 1
    came = enwik8.run(name, 0, **settings, batch=2, trained=48, tested=64, num_windows=4, **TINY)
    assert came['steps'] == 3 and 0 < came['late'] < 9 and 0 < came['whole'] < 9


def test_swaps_lead_to_the_orders_they_should():
    table = word_problem.group_table(3)
    swaps, orders = word_problem.examples(4, 9, table, torch.Generator().manual_seed(0))
    all_orders, all_swaps = [*itertools.permutations('abc')], [(0, 0), (0, 1), (0, 2), (1, 2)]
    for row, targets in zip(swaps.tolist(), orders.tolist()):
        items = [*'abc']
        for swap, target in zip(row, targets):
            i, j = all_swaps[swap]
            items[i], items[j] = items[j], items[i]
            assert all_orders[target] == tuple(items)


@pytest.mark.parametrize('name', word_problem.MODELS)
def test_word_problem_trains(name):
    settings = {'training': runs.Training('cpu', 2, 1e-2), 'group': 3, 'batch': 2}
    came = word_problem.run(name, 0, **settings, trained=4, tested=[4, 6], dim=16, dim_head=8)
    assert came['accuracy'].keys() == {'4', '6'}


@pytest.mark.parametrize('name', ['chunk 4, depth 1, proximal, 4', 'chunk 16, depth 1, plain, 1/16'])
def test_step_sizes_train(name):
    came = step_sizes.run(name, 0, runs.Training('cpu', 2, 1e-2))
    assert came['steps'] == 2 and 0 <= came['accuracy'] <= 1


def test_plain_steps_that_are_too_large_diverge():
    came = step_sizes.run('chunk 4, depth 3, plain, 4', 0, runs.Training('cpu', 2, 1e-2))
    assert came['steps'] == 0 and math.isnan(came['accuracy'])


def test_a_linear_memory_learns_parity():
    settings = {'training': runs.Training('cpu', 150, 1e-2), 'group': 2, 'batch': 16}
    came = word_problem.run('linear, steps to 2', 0, **settings, trained=8, tested=[8], dim=32, dim_head=16)
    assert came['accuracy']['8'] > 0.9


@pytest.mark.parametrize('name', models.ARCHITECTURES)
def test_bits_of_a_stream_are_those_of_one_pass(name):
    model = models.build(name, 0, memory_batch=4, memory={'init_adaptive_step_bias': -2.0}, num_tokens=256, **TINY)
    windows = torch.randint(0, 256, (2, 49), generator=torch.Generator().manual_seed(0))
    in_pieces, at_once = (long_text.bits_of_stream(model.double(), windows, piece) for piece in (13, 48))
    torch.testing.assert_close(in_pieces, at_once, rtol=0, atol=1e-11)


def test_arguments_of_memories_come_from_the_command_line():
    chosen = ['--memory-batch', '4', '--memory', '{"lookahead_gradients": true}']
    options = runs.parser('', ['LMM'], steps=1, small_steps=1).parse_args(chosen)
    settings = {name: value for name, value in runs.settings(options, {}).items() if name != 'training'}
    model = models.build('LMM', 0, num_tokens=256, **TINY, **settings)
    assert all(memory.lookahead_gradients for memory in model._memories)


def test_bins_of_long_text_hold_the_bits_of_their_positions():
    model = models.build('attention alone', 0, num_tokens=256, **TINY).double()
    text = torch.randint(0, 256, (70,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = long_text.bits_by_position(model, text, 32, 16, 8, 2, (0, 8, 32))
    windows = torch.stack([text[start : start + 33] for start in (0, 16, 32)]).long()
    each = long_text.bits_of_stream(model, windows, 32)
    expected = torch.stack([each[:, :8].mean(dim=1), each[:, 8:].mean(dim=1)], dim=1)
    torch.testing.assert_close(found, expected)
    assert long_text.labels(long_text.EDGES)[:3] == ['0–512', '512–1024', '1–2K']


def test_long_text_trains_for_equal_time_and_reports(text_file, tmp_path, monkeypatch, capsys):
    saved, picture, trained = tmp_path / 'runs.jsonl', tmp_path / 'picture.png', tmp_path / 'runs'
    monkeypatch.setattr(long_text, 'SMALL', {**SMALL_TEXT, **TINY})
    command = ['long_text.py', '--small', '--device', 'cpu', '--models', 'MAG', 'attention alone']
    given = ['--data', str(text_file), '--memory-batch', '4', '--seconds', '0.2', '--json', str(saved)]
    monkeypatch.setattr(sys, 'argv', [*command, *given, '--save', str(trained)])
    long_text.main()
    results = [json.loads(line)['result'] for line in saved.read_text().splitlines()]
    assert [result['model'] for result in results] == ['MAG', 'attention alone']
    for result in results:
        assert result['trained_seconds'] >= 0.2 and result['bytes'] == result['steps'] * 2 * 48
        assert [*result['bits']] == ['0–16', '16–32', '32–64'] and 0 < min(result['bits'].values()) < 9
        assert 0 < result['median_norm'] <= result['worst_norm']

        run = open_run(trained / f'{result["model"]}, seed 0', device='cpu', precision='fp32')
        assert run.steps == result['steps'] and models.num_parameters(run.model) == result['parameters']
        text = texts.read(text_file)
        held_out = text[len(text) * 19 // 20 :]
        tested = {name: SMALL_TEXT[name] for name in ('stride', 'piece', 'batch')}
        bits = long_text.bits_by_position(run.model, held_out, 64, **tested, edges=(0, 16, 32, 64))
        torch.testing.assert_close(bits.mean(dim=0).tolist(), [*result['bits'].values()], rtol=0, atol=1e-5)

    capsys.readouterr()
    pytest.importorskip('matplotlib')
    monkeypatch.setattr(sys, 'argv', ['long_text.py', '--report', str(saved), '--plot', str(picture)])
    long_text.main()
    table = capsys.readouterr().out
    assert '| position | 0–16 | 16–32 | 32–64 |' in table and '| minus attention alone |' in table
    assert picture.stat().st_size > 1000


def test_no_decay_forgets_nothing_and_stays_so():
    model = models.build('LMM, no decay', 0, num_tokens=32, **TINY)
    decay = model.layers[0].memory.to_decay_factor
    assert not any(p.requires_grad for p in decay.parameters())
    assert decay(torch.randn(2, 3, 16)).sigmoid().max() < 1e-12


def test_tables_show_spread_and_what_diverged():
    assert runs.spread([1.0, 2.0, 3.0], 1) == '2.0 ± 1.0'
    assert runs.spread([1.0, float('nan'), 3.0], 1) == '2.0 ± 1.4 (1 diverged)'
    assert runs.spread([1.0, float('inf')], 1) == '1.0 (1 diverged)'
    assert runs.spread([float('nan')] * 2, 1) == 'diverged (2)'


HELP = """
import runpy
for script in ('mqar', 'needle', 'word_problem', 'step_sizes', 'enwik8', 'long_text'):
    try:
        runpy.run_path(f'{script}.py', run_name='__main__')
    except SystemExit as ended:
        print('status of', script, ended.code)
"""


def test_a_command_says_what_it_does():
    """As scripts in their own folder, all in one process, as it imports PyTorch but once."""
    done = subprocess.run([sys.executable, '-c', HELP, '--help'], cwd=TASKS, capture_output=True, text=True)
    for script in ('mqar', 'needle', 'word_problem', 'step_sizes', 'enwik8', 'long_text'):
        text, _, done.stdout = done.stdout.partition(f'status of {script} 0\n')
        assert '--seeds' in text, done.stderr
