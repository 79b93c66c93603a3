"""Ctrl-C and SIGTERM, deferred until the work at hand is saved."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType


class Interrupted(BaseException):
    """A signal that ends the work at hand immediately."""


class Signals:
    """Ctrl-C and SIGTERM: deferred while `wait` is set, immediate otherwise. A second signal is never deferred.

        with Signals() as signals:
            while signals.received is None:
                signals.wait = True   # a step is finished before the run ends
                ...

    Raises:
        Interrupted: at whatever line the signal arrives, unless it is deferred.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.wait = False

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, signal.Signals(number)
        if not (first and self.wait):
            raise Interrupted
        if os.environ.get('RANK', '0') == '0':
            # written to the descriptor, because the signal may have interrupted a print
            with contextlib.suppress(OSError, ValueError, AttributeError):
                text = (
                    f'\n{self.received.name}: this step is finished and saved; a second signal ends the run at once\n'
                )
                os.write(sys.stderr.fileno(), text.encode())

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
