"""The one exception that a user's own input can cause."""

from __future__ import annotations

import re

LONGEST = 2000  # characters; names in untrusted files may be long

# A DataLoader worker's exception is raised again in the main process with the worker's
# whole traceback as its message; the traceback's last line has the message we wrote.
_WORKER = re.compile(r"Caught \w+ in .*^(?:\w+\.)*InputError: ([^\n]*)", re.DOTALL | re.MULTILINE)


class InputError(Exception):
    """Bad input, in one line that names the thing and the remedy.

    The scripts print it as ``error: <message>`` and exit with code 2. Raise it for bad input only,
    never for a bug.

    Args:
        message: one line. Line breaks (a file name may have them) become spaces, characters
            that could control a terminal are escaped, a long one is shortened in the middle,
            and torch's report of a DataLoader worker is reduced to the worker's own line.
    """

    def __init__(self, message: str) -> None:
        worker = _WORKER.match(message)
        line = " ".join((worker[1] if worker else message).splitlines())
        if not line.isprintable():
            line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        if len(line) > LONGEST:
            line = f"{line[: LONGEST * 3 // 4]} … {line[-LONGEST // 4 :]}"
        super().__init__(line)
