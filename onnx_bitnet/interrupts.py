"""Signals end a command as an exception does, so that staged files go away and the user is told."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class Interrupted(SystemExit):
    """A signal has come; `told` says that the user knows what is left of the work."""

    told = False


def run(command: Callable[[], object], say: Callable[[str], None]) -> NoReturn:
    """Call a command and end the process: with 0, with the code it exits with, or with 128 + a signal."""
    # Libraries may replace the exception by one of their own (numpy's tofile does): the signal is noted down.
    received: list[int] = []

    def stop(number: int, _frame: object) -> NoReturn:
        received.append(number)
        raise Interrupted(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        command()
    except BaseException as error:
        if not received:
            raise
        if not (isinstance(error, Interrupted) and error.told):
            say("interrupted; nothing was written")
        sys.exit(128 + received[0])
    sys.exit(0)
