"""Text from a run: continuations as a stream of characters, and conversations whose state can be saved."""

from __future__ import annotations

import codecs
import hashlib
import unicodedata
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.models.state import ModelState
from titans_pytorch.training.checkpoints import BadCheckpoint, read_checkpoint, write_checkpoint
from titans_pytorch.training.files import RunError
from titans_pytorch.training.runs import Run
from titans_pytorch.utils.shapes import Int

PIECE = 2048
"""Tokens that one call of the model reads."""


@torch.no_grad()
def read(run: Run, tokens: Int[Tensor, ' n'], state: ModelState | None = None) -> ModelState | None:
    """The state after reading `tokens` in pieces, so that the memory needed does not depend on their number."""
    for piece in tokens.to(run.machine.device).unsqueeze(0).split(PIECE, dim=1) if len(tokens) else ():
        with run.machine.autocast():
            _, state = run.model(piece, state=state, return_state=True, return_hidden=True, disable_flex_attn=True)
    return state


def continuation(
    run: Run, prompt: Int[Tensor, ' n'], length: int, state: ModelState | None = None, **sampling: Any
) -> Iterator[int]:
    """Yield up to `length` tokens that continue `prompt`, which has at least one token and follows `state`.

    `sampling` are arguments of the model's `stream`, such as `temperature`, `top_p` and `generator`.
    """
    state = read(run, prompt[:-1], state)
    last = prompt[-1:].to(run.machine.device).unsqueeze(0)
    stream = run.model.stream(last, max_new_tokens=length, state=state, **sampling)
    while True:
        with run.machine.autocast():  # not around `yield`, where it would stay enabled for the caller
            token = next(stream, None)
        if token is None:
            return
        yield int(token)


def until(pieces: Iterable[bytes], stops: Sequence[bytes]) -> Iterator[bytes]:
    """Yield `pieces` up to the first complete string of `stops`, holding back only what may be the beginning of one.

    The concatenated result does not depend on how the text is split into pieces.
    """
    held = b''
    for piece in pieces:
        held += piece
        found = [(start + len(stop), start) for stop in stops if (start := held.find(stop)) >= 0]
        if found:
            _, start = min(found)
            yield held[:start]
            return
        begun = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - begun]
        held = held[len(held) - begun :]
    yield held


def characters(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield text for a terminal: characters as soon as they are complete, with a replacement for bytes that are not
    UTF-8 and for control characters."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    for piece in pieces:
        yield _shown(decoder.decode(piece))
    yield _shown(decoder.decode(b'', final=True))


def _shown(text: str) -> str:
    return ''.join('\N{REPLACEMENT CHARACTER}' if _controls(c) else c for c in text)


def _controls(character: str) -> bool:
    return unicodedata.category(character) == 'Cc' and character not in '\n\t'


def generate(
    run: Run, prompt: str | bytes, length: int = 256, stops: Sequence[str] = (), **sampling: Any
) -> Iterator[str]:
    """Yield text that continues `prompt`, as it comes, up to `length` tokens or the first of the strings `stops`."""
    tokens = run.vocabulary.encode(prompt.encode() if isinstance(prompt, str) else prompt)
    if not len(tokens):
        raise ValueError('prompt must not be empty')
    pieces = (run.vocabulary.decode([token]) for token in continuation(run, tokens, length, **sampling))
    yield from characters(until(pieces, [stop.encode() for stop in stops]))


class Conversation:
    """A conversation that is held in full by the model's state, at constant size: no earlier turn is read again.

    Args:
        template: the text around a message; `{message}` stands for it, and the answer follows.
        stops: strings that end an answer.
    """

    def __init__(self, run: Run, template: str = '\nYou: {message}\nModel: ', stops: Sequence[str] = ('\n',)):
        if '{message}' not in template:
            raise ValueError(f'template must contain {{message}}, got {template!r}')
        self.run = run
        self.template = template
        self.stops = [stop.encode() for stop in stops]
        self.state: ModelState | None = None

    def turn(self, message: str) -> Int[Tensor, ' n']:
        """A message in its template, as tokens.

        Raises:
            ValueError: for an empty text, and for one that the vocabulary has no tokens for.
        """
        # a terminal passes on bytes that are not UTF-8
        tokens = self.run.vocabulary.encode(
            self.template.replace('{message}', message).encode('utf-8', 'surrogateescape')
        )
        if not len(tokens):
            raise ValueError('message must not be empty, as there is nothing around it')
        return tokens

    def answer(self, message: str, length: int = 256, **sampling: Any) -> Generator[str, None, None]:
        """Yield the answer to a message as it comes. If closed early, the state holds as much of it as has come; after
        an error, the state is what it was before."""
        vocabulary, tokens, turn = self.run.vocabulary, [], self.turn(message)
        before = read(self.run, turn[:-1], self.state)

        def pieces() -> Iterator[bytes]:
            for token in continuation(self.run, turn[-1:], length, before, **sampling):
                tokens.append(token)
                yield vocabulary.decode([token])

        def keep() -> None:
            self.state = read(self.run, torch.cat((turn[-1:], torch.tensor(tokens, dtype=torch.long))), before)

        try:
            yield from characters(until(pieces(), self.stops))
        except (GeneratorExit, KeyboardInterrupt):
            keep()
            raise
        keep()

    def save(self, path: str | Path) -> None:
        """Write the state to a file."""
        state = None if self.state is None else self.state.to('cpu')
        write_checkpoint(Path(path), {'state': state, 'weights_sha256': weights_sha256(self.run)})

    def load(self, path: str | Path) -> None:
        """Continue from the state in a file.

        Raises:
            RunError: for a damaged file, and for a conversation with a model of other weights.
        """
        content = read_checkpoint(Path(path))
        if 'state' not in content:
            raise BadCheckpoint(f'{path} holds no conversation')
        if content.get('weights_sha256') != weights_sha256(self.run):
            raise RunError(
                f'the conversation in {path} is not with {self.run.checkpoint}: give another file to --state'
            )
        self.state = None if content['state'] is None else content['state'].to(self.run.machine.device)


def weights_sha256(run: Run) -> str:
    """Digest of the weights of a run."""
    digest = hashlib.sha256()
    for weight in run.model.state_dict().values():
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
