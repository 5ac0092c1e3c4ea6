"""stdout and stderr that no run depends on, and the last words of one that failed."""

from __future__ import annotations

import io
import os
import re
import sys
import traceback

# Of torch's messages: a loader's process that died, or had no room in shared memory.
_LOADER = re.compile(
    r"(?:DataLoader worker \(pid.*\)|Pin memory thread) (?:is )?"
    r"(killed by signal: [\w ]+|exited unexpectedly)"
    r"|(unable to [^<\n]*</?torch_[^\n]*)"
)
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")


class _Patient(io.FileIO):
    """A file that forgets what it cannot write: no reader, no terminal, no room."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError:
            return len(data)


def protect() -> None:
    """Make writing to stdout and stderr never fail, whatever became of the other end.

    What an ASCII terminal cannot show is escaped.
    """
    for number in range(3):  # otherwise the next files would get the numbers of closed ones
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _patient(stream))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _patient(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The stream, over a file that forgets what it cannot write."""
    stream.reconfigure(errors="backslashreplace")
    unbuffered = isinstance(stream.buffer, io.RawIOBase)
    if type(stream.buffer if unbuffered else stream.buffer.raw) is not io.FileIO:  # type: ignore[attr-defined]
        return stream  # a console of Windows
    raw = _Patient(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[type-var]
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def lost_process(error: Exception, several: bool) -> str:
    """What to say of an error that comes from another process or from the system's limits.

    Args:
        error: that the script ended with.
        several: whether it ran in several processes.

    Returns:
        One line, or '' for any other error.
    """
    text = str(error)
    if "Too many open files" in text or "items of ancdata" in text:
        return "too many open files: give fewer --workers, or raise the limit (ulimit -n 4096)"
    how = found[1] or found[2] if (found := _LOADER.search(text)) else ""
    # Torch may see the broken connection to a dead process before the death.
    if isinstance(error, (OSError, EOFError)) and "DataLoader worker process" not in text:
        frames = traceback.walk_tb(error.__traceback__)
        code = {os.path.basename(frame.f_code.co_filename) for frame, _ in frames}
        # fetch.py is in it if the data was read in this process.
        how = type(error).__name__ if "dataloader.py" in code and "fetch.py" not in code else ""
    if how:
        return (
            f"a loader process failed ({how}); most often memory or shared memory "
            "ran out: give fewer --workers, or a container more shared memory (--shm-size); "
            "train.py goes on from its last saved state with --resume auto"
        )
    if several and any(sign in text for sign in _LOST):
        reason = (text.splitlines() or [""])[0][:200]
        return f"another process died, see its message above ({reason})"
    return ""
