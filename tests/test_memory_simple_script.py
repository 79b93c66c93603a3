"""The demonstration at the root of the repository: it must see that the memory learns, and see when it does not."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / 'test_memory_simple.py'


@pytest.fixture(scope='module')
def script() -> ModuleType:
    spec = spec_from_file_location('memory_demonstration', SCRIPT)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_script_ends_with_its_verdict() -> None:
    done = subprocess.run([sys.executable, SCRIPT], cwd=SCRIPT.parent, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith('The memory learned.\n')


@pytest.mark.parametrize('max_step', ['1e-6', '100'])  # hardly a step, and one so large that it diverges
def test_a_memory_that_does_not_learn_is_told(
    script: ModuleType, max_step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(['--max-step', max_step]) == 1
    assert capsys.readouterr().out.endswith('The memory did NOT learn.\n')


def test_recall_improves_while_pairs_are_shown_once(script: ModuleType) -> None:
    before, *first_showing = script.show_pairs(max_step=1.0)[:5]

    recall = [row.recall for row in first_showing]
    assert recall == sorted(recall, reverse=True)
    assert recall[-1] < 0.7 * before.recall


def test_every_condition_counts(script: ModuleType) -> None:
    learned = [script.Row(0, float('nan'), 1.0, 1.0), *[script.Row(8, 1.0, 0.5, 1.0)] * 4]
    learned += [script.Row(16, 0.1, 0.1, 1.0)] * 4
    assert [holds for holds, _ in script.judge(learned)] == [True, True, True]

    still_surprised = [*learned[:-4], *[script.Row(16, 0.9, 0.1, 1.0)] * 4]
    assert [holds for holds, _ in script.judge(still_surprised)] == [False, True, True]

    poor_recall = [*learned[:-1], script.Row(16, 0.1, 0.5, 3.0)]
    assert [holds for holds, _ in script.judge(poor_recall)] == [True, False, True]

    a_rule_not_a_memory = [*learned[:-1], script.Row(16, 0.1, 0.1, 0.1)]
    assert [holds for holds, _ in script.judge(a_rule_not_a_memory)] == [True, True, False]
