"""The commands on runs of a small model: text, evaluation, conversation; their failures are one line."""

from __future__ import annotations

import hashlib
import io
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same
from hypothesis import given
from hypothesis import strategies as st
from small_runs import TEXT, checkpoint, small_run

from titans_pytorch.commands import main as main_module
from titans_pytorch.commands.evaluation import evaluate
from titans_pytorch.commands.main import main
from titans_pytorch.commands.text import Conversation, characters, generate, read, until
from titans_pytorch.training import BadData, train_bpe
from titans_pytorch.training.runs import Run, open_run

BPE = train_bpe([TEXT], 300)
SHA256 = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_run(tmp_path / 'runs/small', data_sha256=SHA256)


@pytest.fixture(params=['bytes', 'bpe'])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """A run with each vocabulary, in float64."""
    made = open_run(small_run(tmp_path / 'run', BPE if request.param == 'bpe' else None), device='cpu')
    return made._replace(model=made.model.double())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# pieces of text


@given(st.lists(st.text('abc', max_size=3)), st.lists(st.text('abc', min_size=1, max_size=4), max_size=3))
def test_text_ends_before_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    came = b''.join(until((piece.encode() for piece in pieces), [stop.encode() for stop in stops])).decode()
    text, expected = '', None
    for character in ''.join(pieces):
        text += character
        complete = [stop for stop in stops if text.endswith(stop)]
        if complete:
            expected = text[: -max(map(len, complete))]
            break
    assert came == (text if expected is None else expected)


def test_only_the_beginning_of_a_stop_string_is_held_back() -> None:
    pieces = iter([b'one', b' en', b'd', b'END', b' more'])
    shown = until(pieces, [b' end.', b'END'])
    assert [next(shown) for _ in range(3)] == [b'one', b'', b'']
    assert [*shown] == [b' end']
    assert next(pieces) == b' more'


@given(st.text(), st.integers(1, 5))
def test_characters_are_shown_when_they_are_complete(text: str, size: int) -> None:
    content = text.encode()
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    allowed = ''.join('\ufffd' if ord(c) < 32 and c not in '\n\t' or 127 <= ord(c) < 160 else c for c in text)
    assert ''.join(characters(pieces)) == allowed


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert [*characters([b'a\xe4', b'\xb8', b'\xad', b'\xff', b'\xf0\x9f'])] == ['a', '', '中', '\ufffd', '', '\ufffd']


# generate


def test_text_is_that_of_the_samples_of_the_model(run: Run) -> None:
    prompt = TEXT[:200]
    tokens = run.vocabulary.encode(prompt)[None]
    options = {'temperature': 1.1, 'top_k': 40}
    made = run.model.sample(
        tokens, max_new_tokens=60, generator=seeded(), use_cache=True, show_progress=False, **options
    )
    expected = ''.join(characters([run.vocabulary.decode(made[0])]))
    assert ''.join(generate(run, prompt, 60, generator=seeded(), **options)) == expected
    stop = next(c for c in expected[20:] if c.isascii())
    stopped = ''.join(generate(run, prompt, 60, ['not in it', stop], generator=seeded(), **options))
    assert stopped == expected[: expected.index(stop)]


def test_a_long_prompt_is_read_in_pieces(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = run.vocabulary.encode(TEXT)[:150]
    expected = read(run, tokens)
    monkeypatch.setattr('titans_pytorch.commands.text.PIECE', 32)
    assert_same(read(run, tokens), expected, 1e-9)
    assert read(run, tokens[:0]) is None


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def text(*arguments: str) -> str:
        assert main(['generate', *arguments, '--length', '40', '--device', 'cpu']) == 0
        shown = capsys.readouterr()
        assert 'titans_enwik8_best.pt after 7 steps, on cpu' in shown.err
        return shown.out

    monkeypatch.chdir(folder.parents[1])
    (folder / 'prompt.txt').write_bytes(b'caf\xc3\xa9')
    by_argument = text('café', '--seed', '3')
    assert text('café', '--seed', '3', '--run', str(folder)) == by_argument
    assert text('--file', str(folder / 'prompt.txt'), '--seed', '3') == by_argument
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'caf\xc3\xa9')))
    assert text('--seed', '3') == by_argument
    assert text('café', '--seed', '4') != by_argument
    assert text('café') != text('café')  # without a seed
    expected = generate(open_run(folder, device='cpu'), 'café', 40, temperature=0.0)
    assert text('café', '--temperature', '0', '--top-p', '0.5', '--min-p', '0.2') == ''.join(expected) + '\n'
    stop = next(c for c in by_argument if c.isascii())
    stopped = by_argument[: by_argument.index(stop)]
    assert text('café', '--seed', '3', '--stop', '\\n\\n', '--stop', stop) == stopped + '\n'


def test_the_package_is_a_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['titans_pytorch', 'generate', 'a', '--length', '3', '--run', str(folder)])
    with pytest.raises(SystemExit) as done:
        runpy.run_module('titans_pytorch', run_name='__main__')
    assert done.value.code == 0
    assert capsys.readouterr().out


# evaluate


@pytest.mark.parametrize(
    ('context', 'piece', 'limit', 'count'),
    [(16, 1024, None, None), (50, 16, None, None), (64, 32, 200, 3), (90, 64, 8, 1)],
)
@torch.no_grad()
def test_bits_per_byte_are_those_of_windows_read_at_once(
    run: Run, context: int, piece: int, limit: int | None, count: int | None, monkeypatch
) -> None:
    monkeypatch.setattr('titans_pytorch.commands.evaluation.PIECE', piece)
    text, seen = run.vocabulary.encode(TEXT[: TEXT.index(b'24 times')]), []
    came = evaluate(run, text.to(torch.int16), context, limit, batch_tokens=4 * piece, progress=seen.append)
    count = (len(text) - 1) // context if count is None else count
    last, nats, size = len(text) - context - 1, 0.0, 0
    for number in range(count):
        start = number * last // max(1, count - 1)
        window = text[start : start + context + 1]
        nats += F.cross_entropy(run.model(window[None, :-1])[0], window[1:], reduction='sum').item()
        size += len(run.vocabulary.decode(window[1:]))
    assert came.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-9)
    assert (came.context, came.bytes, came.tokens) == (context, size, count * context)
    assert sum(seen) == came.tokens


def test_a_text_shorter_than_the_context_is_refused(run: Run) -> None:
    with pytest.raises(BadData, match='the text has 16 tokens, too few for a context of 16'):
        evaluate(run, torch.arange(16), 16)


def test_evaluate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ['evaluate', '--run', str(folder), '--context', '150', '--device', 'cpu']
    assert main([*arguments, '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['text'] == f'test split of {folder / "text.txt"}'
    assert result['steps'] == 7
    assert [row['context'] for row in result['contexts']] == [128, 150]
    assert 6 < result['contexts'][0]['bits_per_byte'] < 12  # not trained: about 8 bits per byte

    (tmp_path / 'other.txt').write_bytes(TEXT[:700])
    assert main([*arguments, '--tokens', '300', '--data', str(tmp_path / 'other.txt')]) == 0
    head, titles, *rows = capsys.readouterr().out.splitlines()
    assert head == f'{tmp_path / "other.txt"}, 300 of its 700 tokens'
    assert titles.split() == ['context', 'bits', 'per', 'byte', 'bytes', 'seconds']
    assert [row.split()[::2] for row in rows] == [['128', '256'], ['150', '300']]

    # by default, contexts that the text and the limit have
    assert main([*arguments[:3], '--tokens', '200', '--data', str(tmp_path / 'other.txt'), '--json']) == 0
    assert [row['context'] for row in json.loads(capsys.readouterr().out)['contexts']] == [128, 200]
    assert main(['evaluate', '--run', str(folder), '--data', str(tmp_path / 'other.txt'), '--json']) == 0
    assert [row['context'] for row in json.loads(capsys.readouterr().out)['contexts']] == [128, 512]


# chat


def turn_tokens(run: Run, text: str) -> torch.Tensor:
    return run.vocabulary.encode(text.encode())


def test_the_state_of_a_conversation_is_that_of_its_text(run: Run, tmp_path: Path) -> None:
    conversation = Conversation(run, stops=('\n', 'e'))
    spoken, messages = [], ('What is 7 times 7?', '中文', 'And 8?')
    options = {'temperature': 1.0, 'top_k': 50}
    for number, message in enumerate(messages):
        if number == 2:  # another process goes on
            conversation.save(tmp_path / 'state.pt')
            conversation = Conversation(run, stops=('\n', 'e'))
            conversation.load(tmp_path / 'state.pt')
        tokens = turn_tokens(run, f'\nYou: {message}\nModel: ')
        made = run.model.sample(
            torch.cat((*spoken, tokens))[None],
            max_new_tokens=24,
            generator=seeded(number),
            show_progress=False,
            **options,
        )[0]
        # up to the token that completes a stop string
        ends = [n for n in range(1, 25) if run.vocabulary.decode(made[:n]).endswith((b'\n', b'e'))]
        made = made[: ends[0]] if ends else made
        shown = ''.join(conversation.answer(message, 24, generator=seeded(number), **options))
        assert ''.join(characters(until([run.vocabulary.decode(made)], [b'\n', b'e']))) == shown
        spoken += [tokens, made]
        assert_same(conversation.state, read(run, torch.cat(spoken)), 1e-8)


def test_an_answer_that_was_interrupted_stays_in_the_state(run: Run) -> None:
    conversation = Conversation(run, template='{message}', stops=())
    answer = conversation.answer('one', 50, generator=seeded())
    shown = [next(answer) for _ in range(4)]
    answer.close()
    tokens = [
        *turn_tokens(run, 'one'),
        *run.model.sample(
            turn_tokens(run, 'one')[None], max_new_tokens=4, temperature=1.5, generator=seeded(), show_progress=False
        )[0],
    ]
    assert len(shown) == 4
    assert_same(conversation.state, read(run, torch.stack(tokens)), 1e-9)


def test_a_failed_answer_leaves_the_state_as_it_was(run: Run) -> None:
    with pytest.raises(ValueError, match="template must contain {message}, got 'hello'"):
        Conversation(run, 'hello')
    conversation = Conversation(run)
    list(conversation.answer('one', 3, generator=seeded()))
    before, calls = conversation.state, []

    def fails_later(logits):
        calls.append(logits)
        return logits if len(calls) < 3 else logits * float('nan')

    for wrong in ({'length': -1}, {'temperature': 'warm'}, {'filter_fn': fails_later, 'filter_kwargs': {}}):
        with pytest.raises((ValueError, TypeError)):
            list(conversation.answer('two', **wrong))
        assert conversation.state is before
    assert len(calls) == 3


def test_chat(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    def chat(*messages: str, state: str = 'chat.pt') -> list[str]:
        lines = iter(messages)

        def asked(prompt: str) -> str:
            if (line := next(lines, None)) is None:
                raise EOFError
            return line

        monkeypatch.setattr('builtins.input', asked)
        path = str(tmp_path / state)
        assert main(['chat', '--run', str(folder), '--state', path, '--temperature', '0', '--length', '12']) == 0
        return capsys.readouterr().out.splitlines()

    together = chat('one', 'two', 'three', state='together.pt')
    assert [line[:7] for line in together[:3]] == ['Model: '] * 3
    # the conversation goes on where it was left
    apart = [line for message in ('one', 'two', 'three') for line in chat(message)]
    assert [line for line in apart if line] == [line for line in together if line]
    sizes = {path.stat().st_size for path in tmp_path.glob('*.pt')}
    assert max(sizes) - min(sizes) < 4096

    # as a terminal gives bytes that are not UTF-8
    assert chat('who \udcff?', state='bytes.pt')[0].startswith('Model: ')

    # a message that cannot be read does not end the conversation
    monkeypatch.setattr(main_module, 'input', lambda prompt: next(lines), raising=False)
    lines = iter(['', 'more'])
    with pytest.raises(StopIteration):
        main(['chat', '--run', str(folder), '--template', '{message}', '--length', '3'])
    refused, answered = capsys.readouterr().out.splitlines()[:2]
    assert refused.endswith('message must not be empty, as there is nothing around it')
    assert answered.startswith('Model: ')

    checkpoint(folder / 'titans_enwik8_best.pt', 8, seed=1)
    with pytest.raises(SystemExit, match=r'the conversation in .*chat.pt is not with .*best.pt'):
        chat('four')


def test_ctrl_c_ends_an_answer_and_then_the_conversation(folder: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    messages = iter(['hello'])
    monkeypatch.setattr(
        'builtins.input', lambda prompt: next(messages, None) or (_ for _ in ()).throw(KeyboardInterrupt)
    )
    decoded = []

    def interrupted(self, tokens):
        decoded.append(tokens)
        if len(decoded) == 3:
            raise KeyboardInterrupt
        return b'x'

    monkeypatch.setattr('titans_pytorch.training.vocabulary.ByteVocabulary.decode', interrupted)
    assert main(['chat', '--run', str(folder), '--state', str(tmp_path / 'chat.pt')]) == 0
    assert capsys.readouterr().out == 'Model: xx\n\n'
    assert (tmp_path / 'chat.pt').exists()


# failures


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['generate', 'a', '--run', 'none'], 'there is no run in none: train one'),
        (['evaluate', '--run', 'runs/small', '--device', 'cuda:99'], 'device cuda:99 cannot be used here'),
        (['chat', '--run', 'runs/small', '--checkpoint', 'no.pt'], 'there is no checkpoint runs/small/no.pt'),
        (['generate', 'a', '--file', 'b'], 'give a prompt or a --file, not both'),
        (['generate', '--file', 'none.txt'], "FileNotFoundError: .*none.txt'"),
        (['chat', '--state', 'runs/small/titans_enwik8_best.pt'], 'best.pt holds no conversation'),
        (['chat', '--state', 'nowhere/chat.pt'], '--state nowhere/chat.pt cannot be written: No such'),
        (['evaluate', '--data', 'none.txt'], 'none.txt'),
        (['evaluate', '--context', '1000000'], 'too few for a context of'),
        (['evaluate', '--data', 'short.txt'], 'too few for a context of 128: give a smaller --context, or other text'),
        (['evaluate', '--run', 'none', '--tokens', '5', '--context', '9'], '--tokens must be at least --context=9, or'),
        (['generate', 'a', '--run', 'short.txt'], 'short.txt is corrupt, or no checkpoint'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_failures_are_one_line(arguments: list[str], message: str, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder.parents[1])
    Path('short.txt').write_bytes(TEXT[:100])
    monkeypatch.setattr('builtins.input', lambda prompt: pytest.fail('the conversation has begun'))
    with pytest.raises(SystemExit, match=message) as ended:
        main(arguments)
    assert '\n' not in str(ended.value.code)


def test_a_text_too_short_for_the_longest_context_is_refused_before_any_result(folder: Path, capsys) -> None:
    with pytest.raises(SystemExit, match='too few for a context of 1000000'):
        main(['evaluate', '--run', str(folder), '--context', '1000000'])
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    ('command', 'option', 'value', 'message'),
    [
        ('generate', '--length', '-1', 'must be an integer below 2**62, at least 0'),
        ('generate', '--length', str(2**63 - 1), 'must be an integer below 2**62, at least 0'),
        ('chat', '--template', 'hello', 'must contain {message}'),
        ('generate', '--seed', str(2**63), 'must be an integer below 2**63, at least 0'),
        ('chat', '--temperature', 'nan', 'must be a finite number, at least 0'),
        ('chat', '--temperature', 'inf', 'must be a finite number, at least 0'),
        ('chat', '--top-p', '3', 'must be a finite number, from 0 to 1'),
        ('chat', '--top-k', 'few', 'must be an integer below 2**63, at least 1'),
        ('evaluate', '--tokens', '-1', 'must be an integer below 2**63, at least 0'),
        ('evaluate', '--context', '0', 'must be an integer below 2**63, at least 1'),
    ],
)
def test_options_are_checked_before_the_run_is_opened(command, option, value, message, capsys) -> None:
    with pytest.raises(SystemExit):
        main([command, option, value])
    assert f'argument {option}: {message}, got {value!r}' in capsys.readouterr().err


def test_an_empty_stop_string_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(['generate', 'a', '--stop', ''])
    assert 'argument --stop: must not be empty' in capsys.readouterr().err
