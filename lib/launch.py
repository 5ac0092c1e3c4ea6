"""What a launcher such as torchrun says in the environment, and how its processes meet."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent import futures
from datetime import datetime, timedelta
from typing import TypeVar

from lib.errors import InputError

T = TypeVar("T")
PATIENCE = 10.0  # seconds of waiting for other processes before one says so
SET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
REMEDY = "start several processes with torchrun, or for one: unset"


def number(name: str, default: int = 0, least: int = 0) -> int:
    """A number in the environment; ``default`` where it is not set or empty.

    Raises:
        InputError: it is no number, or less than ``least``.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise InputError(
            f"the environment has {name}={text}, which is no whole number from {least} on: "
            f"{REMEDY} {name}"
        )
    return int(text)


def processes() -> tuple[int, int]:
    """Rank of this process and number of all, checked with what else a launcher sets.

    Raises:
        InputError: a variable is missing or wrong.
    """
    rank, world = number("RANK"), number("WORLD_SIZE", 1, least=1)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", RESTARTS):
        number(name)
    if world > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name, "").strip():
                raise InputError(
                    f"the environment has WORLD_SIZE={world} but no {name}: {REMEDY} WORLD_SIZE"
                )
        if not 1 <= (port := number("MASTER_PORT")) <= 65535:
            raise InputError(
                f"the environment has MASTER_PORT={port}, which is no port (1 to 65535): "
                f"{REMEDY} {' '.join(SET)}"
            )
    if rank >= world:
        among = f"WORLD_SIZE={world}" if os.environ.get("WORLD_SIZE") else "no WORLD_SIZE"
        raise InputError(
            f"the environment has RANK={rank} but {among}; ranks count from 0: "
            f"{REMEDY} RANK WORLD_SIZE"
        )
    return rank, world


def meet(connect: Callable[[], T], timeout: timedelta) -> T:
    """Wait for the other processes, and say so if it takes long.

    Args:
        connect: does it; runs in a thread, so that signals can end the waiting.
        timeout: after which it has failed.

    Returns:
        What ``connect`` returned.

    Raises:
        InputError: they did not meet.
    """
    rank, world = processes()
    address, port = os.environ["MASTER_ADDR"].strip(), number("MASTER_PORT")
    result: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            result.set_result(connect())
        except Exception as e:  # raised again below
            result.set_exception(e)

    until = datetime.now() + timeout
    threading.Thread(target=run, daemon=True).start()
    who = f"process {rank} of {world} at {address}:{port}"
    late = not futures.wait([result], PATIENCE).done
    if late and rank and _answers(address, port):  # process 0, which speaks; or so it seems
        late = not futures.wait([result], 2 * PATIENCE).done
    if late:
        logging.getLogger("lavt").warning(
            f"{who} waits for the others until {until:%H:%M:%S}; "
            f"if only one was meant: unset {' '.join(SET)}"
        )
    # Torch itself waits for ever where another program answers at this port.
    left = (until - datetime.now()).total_seconds()
    try:
        return result.result(left)
    except (RuntimeError, ValueError, OSError, futures.TimeoutError) as e:
        reason = (str(e).splitlines() or ["the time is up"])[0][:200]
        raise InputError(
            f"{who} did not meet the others ({reason}): {REMEDY} {' '.join(SET)}"
        ) from e


def _answers(address: str, port: int) -> bool:
    """Whether process 0 is there, which then speaks for all that wait."""
    try:
        socket.create_connection((address, port), 2).close()
    except OSError:
        return False
    return True
