"""Functions side by side: one after the other, or on streams of a graph that is captured."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch

from titans_pytorch.ops import _streams
from titans_pytorch.ops._streams import side_by_side


class Stream:
    """A stream that writes down on which others it waits, and what runs on it."""

    log: list[tuple[str, ...]]
    current: Stream

    def __init__(self, device, name='side'):
        self.device, self.name = device, name

    def wait_stream(self, other):
        Stream.log.append((self.name, 'waits for', other.name))


@contextlib.contextmanager
def on(stream):
    before, Stream.current = Stream.current, stream
    yield
    Stream.current = before


@pytest.fixture
def capturing(monkeypatch):
    """A capture on streams that do nothing."""
    Stream.log, Stream.current = [], Stream('cuda', 'main')
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
    for _ in range(2):
        Stream.log.clear()
        assert side_by_side(partial(run, 'a'), partial(run, 'b')) == ['a', 'b']
        assert Stream.log == [
            ('side', 'waits for', 'main'),
            ('side', 'runs', 'a'),
            ('main', 'runs', 'b'),
            ('main', 'waits for', 'side'),
        ]
    assert len(_streams._streams._of_device['cuda']) == 1  # the same in both calls


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

    def computed():
        doubled = x * 2
        a, b, c = side_by_side(*(partial(torch.add, doubled, n) for n in range(3)))
        del doubled  # its memory may be taken from here on
        return (a * b).add_(c) - (x + 1)

    expected = computed()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        came = computed()
    for _ in range(3):
        graph.replay()
        assert torch.equal(came, expected)
        x.add_(1.0)
        expected = computed()
