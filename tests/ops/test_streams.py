"""Functions side by side: one after the other, or on streams of a graph that is captured."""

from __future__ import annotations

import contextlib
from functools import partial
from threading import Thread

import pytest
import torch

from titans_pytorch.ops import _streams
from titans_pytorch.ops._streams import side_by_side


class Stream:
    """A stream that writes down on which others it waits, and what runs on it."""

    log: list[tuple[str, ...]]
    current: Stream
    number = 0

    def __init__(self, device, name=None):
        Stream.number += 1
        self.device, self.name = device, name or f'side {Stream.number}'

    def wait_stream(self, other):
        Stream.log.append((self.name, 'waits for', other.name))


@contextlib.contextmanager
def on(stream):
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


@pytest.fixture
def capturing(monkeypatch):
    """A capture on streams that do nothing."""
    Stream.log, Stream.current, Stream.number = [], Stream('cuda', 'main'), 0
    monkeypatch.setattr(_streams, '_is_capturing', lambda: True)
    monkeypatch.setattr(_streams, '_streams', _streams._Streams())
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: Stream.current)
    monkeypatch.setattr(torch.cuda, 'Stream', Stream)
    monkeypatch.setattr(torch.cuda, 'stream', on)


def run(name):
    Stream.log.append((Stream.current.name, 'runs', name))
    return name


@torch.no_grad()
def test_each_function_has_a_stream_while_a_graph_is_captured(capturing):
    assert side_by_side(partial(run, 'a'), partial(run, 'b'), partial(run, 'c')) == ['a', 'b', 'c']
    expected = [
        ('side 1', 'waits for', 'main'),
        ('side 2', 'waits for', 'main'),
        ('side 1', 'runs', 'a'),
        ('side 2', 'runs', 'b'),
        ('main', 'runs', 'c'),
        ('main', 'waits for', 'side 1'),
        ('main', 'waits for', 'side 2'),
    ]
    assert Stream.log == expected
    Stream.log.clear()
    side_by_side(partial(run, 'a'), partial(run, 'c'))
    assert Stream.log == [entry for entry in expected if 'side 2' not in entry]  # the same stream as before


@torch.no_grad()
def test_functions_within_functions_have_other_streams(capturing):
    side_by_side(partial(side_by_side, partial(run, 'a'), partial(run, 'b')), partial(run, 'c'))
    assert [entry for entry in Stream.log if 'runs' in entry] == [
        ('side 2', 'runs', 'a'),
        ('side 1', 'runs', 'b'),
        ('main', 'runs', 'c'),
    ]


@torch.no_grad()
def test_each_thread_has_its_own_streams(capturing):
    side_by_side(partial(run, 'a'), partial(run, 'b'))
    other = Thread(target=torch.no_grad()(side_by_side), args=(partial(run, 'a'), partial(run, 'b')))
    other.start()
    other.join()
    assert [entry[0] for entry in Stream.log if 'runs' in entry] == ['side 1', 'main', 'side 2', 'main']


@torch.no_grad()
def test_streams_are_joined_after_an_error(capturing):
    def fail():
        raise ValueError('own error')

    with pytest.raises(ValueError, match='own error'):
        side_by_side(partial(run, 'a'), fail, partial(run, 'c'))
    assert Stream.log[-2:] == [('main', 'waits for', 'side 1'), ('main', 'waits for', 'side 2')]
    assert Stream.current.name == 'main'


def test_with_gradients_functions_run_on_one_stream(capturing):
    assert side_by_side(partial(run, 'a'), partial(run, 'b')) == ['a', 'b']
    assert Stream.log == [('main', 'runs', 'a'), ('main', 'runs', 'b')]


@torch.no_grad()
def test_without_a_capture_functions_run_one_after_the_other():
    assert side_by_side(lambda: 1, lambda: 2, lambda: 3) == [1, 2, 3]


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_with_several_streams_computes_the_same():
    x = torch.randn(1 << 20, device='cuda')

    def added(doubled, n):
        streams.append(torch.cuda.current_stream().cuda_stream)
        return doubled + n

    def computed():
        doubled = x * 2
        a, b, c = side_by_side(*(partial(added, doubled, n) for n in range(3)))
        del doubled  # its memory may be taken from here on
        return (a * b).add_(c) - (x + 1)

    streams = []
    expected = computed()
    assert len({*streams}) == 1
    streams.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        came = computed()
    assert len({*streams}) == 3
    for _ in range(3):
        graph.replay()
        assert torch.equal(came, expected)
        x.add_(1.0)
        expected = computed()
