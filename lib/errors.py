"""The one exception that a user's own input can cause."""

from __future__ import annotations

import re

# A DataLoader worker's exception is raised again in the main process with the worker's
# whole traceback as its message; the traceback's last line has the message we wrote.
_WORKER = re.compile(r"Caught \w+ in .*^(?:\w+\.)*InputError: ([^\n]*)", re.DOTALL | re.MULTILINE)


class InputError(Exception):
    """Bad input, in one line that names the thing and the remedy.

    The scripts print it as ``error: <message>`` and exit with 2; it is never a bug's
    disguise, so nothing but input may raise it.

    Args:
        message: one line. Line breaks (a file name may have them) become spaces, and
            torch's report of a DataLoader worker is cut back to the worker's own line.
    """

    def __init__(self, message: str) -> None:
        worker = _WORKER.match(message)
        super().__init__(" ".join((worker[1] if worker else message).splitlines()))
