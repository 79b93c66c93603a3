"""The script that draws the pictures of the documentation, at tiny sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / 'benchmarks'))
import pictures


@pytest.mark.parametrize('name', pictures.PICTURES)
def test_every_picture_is_drawn(name, tmp_path):
    pictures.main([name, '--small', '--folder', str(tmp_path)])
    assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')


def test_every_picture_is_committed_and_shown():
    names = {path.stem for path in pictures.ASSETS.glob('*.png')}
    assert names == pictures.PICTURES.keys()
    page = (pictures.ASSETS.parent / 'pictures.md').read_text()
    assert all(f'assets/{name}.png' in page for name in names)


def test_an_unknown_picture_is_refused(capsys):
    with pytest.raises(SystemExit):
        pictures.main(['portrait'])
    assert 'got portrait' in capsys.readouterr().err


@torch.no_grad()
def test_a_repeated_passage_surprises_less():
    reading = pictures.read_with_repetition(dim=256, length=60, start=7, passage=16, after=16)
    assert reading.words[reading.first] == reading.words[reading.second]
    assert reading.surprise[reading.second].mean() < 0.8 * reading.surprise[reading.first].mean()


@torch.no_grad()
def test_an_empty_memory_is_surprised_by_the_whole_value():
    reading = pictures.read_with_repetition(dim=32, length=20, start=7, passage=4, after=4)
    assert torch.allclose(reading.surprise[:4], torch.ones(4))


@torch.no_grad()
def test_a_fact_is_known_at_once_and_forgotten_sooner_with_decay():
    kept, forgotten = (
        pictures.retention(dim=32, distance=8, sequences=4, init_decay_bias=pictures.logit(share)) for share in (0, 0.5)
    )
    assert kept.shape == (9,) and torch.allclose(kept[:1], torch.ones(1))
    assert forgotten[8] < 0.5 * kept[8]


@torch.no_grad()
@pytest.mark.parametrize('forgotten', [0, 0.05])
def test_contributions_of_chunks_add_up_to_the_answer(forgotten):
    settings = {'init_decay_bias': pictures.logit(forgotten)}
    contributions, answers, _ = pictures.chunk_contributions(16, 4, 4, 2, **settings)
    assert contributions.shape == (4, 2, 16, 16)
    assert torch.allclose(contributions.sum(dim=0), answers, atol=1e-5)


def test_tables_are_read_by_their_columns():
    rows = {row['model']: row for row in pictures.results('task, mqar')}
    assert pictures.mean_and_deviation(rows['LMM, linear memory']['256/64']) == (86.2, 3.1)
