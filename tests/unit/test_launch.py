"""A launcher's variables in the environment, and waiting for other processes."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
from datetime import timedelta

import pytest
from torch.distributed.rendezvous import rendezvous

import utils
from lib import launch
from lib.errors import InputError

MANY = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launch.SET, launch.RESTARTS):
        monkeypatch.delenv(name, raising=False)


def put(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", launch.RESTARTS: ""}, (0, 1)),
        ({"RANK": "0"}, (0, 1)),
        ({"RANK": " 0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "x"}, (0, 1)),
        ({"MASTER_ADDR": "somewhere", "MASTER_PORT": "29500"}, (0, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"}, (0, 1)),
        (MANY | {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_sound_environments(
    variables: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, variables)
    assert launch.processes() == expected
    if expected == (0, 1):
        info = utils.init_distributed("cpu")
        assert (info.rank, info.world) == expected


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "one"}, "RANK=one"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "1.0"}, "RANK=1.0"),
        ({"RANK": "1"}, "RANK=1 but no WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 but WORLD_SIZE=1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but no RANK"),
        (MANY | {"RANK": ""}, "WORLD_SIZE=2 but no RANK"),
        (MANY | {"RANK": "2"}, "RANK=2 but WORLD_SIZE=2"),
        (MANY | {"MASTER_ADDR": ""}, "WORLD_SIZE=2 but no MASTER_ADDR"),
        (MANY | {"MASTER_PORT": ""}, "WORLD_SIZE=2 but no MASTER_PORT"),
        (MANY | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        (MANY | {"MASTER_PORT": "0"}, "MASTER_PORT=0"),
        (MANY | {"MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
        ({"LOCAL_WORLD_SIZE": "-2"}, "LOCAL_WORLD_SIZE=-2"),
        ({launch.RESTARTS: "twice"}, f"{launch.RESTARTS}=twice"),
    ],
)
def test_wrong_environments(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, variables)
    with pytest.raises(InputError, match=rf"{re.escape(named)}\b.*torchrun.*unset") as caught:
        utils.init_distributed("cpu")
    assert "\n" not in str(caught.value)


def test_a_script_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "a")
    with pytest.raises(SystemExit) as ended:
        utils.run_script(lambda argv: None)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: the environment has RANK=a,")


def test_restarts_count_only_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.RESTARTS, "2")
    assert utils.restarts() == 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert utils.restarts() == 2


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lone_process_says_what_it_waits_for(
    rank: int, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(monkeypatch, MANY | {"RANK": str(rank), "MASTER_PORT": str(port)})
    monkeypatch.setattr(launch, "PATIENCE", 0.2)
    monkeypatch.setattr(utils, "default_pg_timeout", timedelta(seconds=2))
    monkeypatch.setattr(logging.getLogger("lavt"), "propagate", True)
    with pytest.raises(InputError, match=rf"process {rank} of 2 at 127.0.0.1:{port} did not meet"):
        utils.init_distributed("cpu")
    [line] = set(caplog.messages)
    assert f"process {rank} of 2 at 127.0.0.1:{port} waits for the others until " in line
    assert "unset RANK WORLD_SIZE" in line


def test_another_program_at_the_port(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(monkeypatch, MANY | {"RANK": "1", "MASTER_PORT": str(port)})
    monkeypatch.setattr(launch, "PATIENCE", 0.2)
    monkeypatch.setattr(logging.getLogger("lavt"), "propagate", True)
    monkeypatch.setattr(utils, "default_pg_timeout", timedelta(seconds=2))
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(InputError, match="did not meet the others"),
    ):
        utils.init_distributed("cpu")
    assert "process 1 of 2 at 127.0.0.1" in caplog.messages[0]


def test_waiting_can_be_stopped(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, MANY | {"MASTER_PORT": str(port)})
    monkeypatch.setattr(utils, "default_pg_timeout", timedelta(seconds=20))
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with utils.StopSignals(), pytest.raises(utils.Stopped, match="SIGTERM"):
        utils.init_distributed("cpu")
    timer.join()


def test_only_process_0_speaks_at_first_once_it_is_there(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(monkeypatch, MANY | {"RANK": "1", "WORLD_SIZE": "3", "MASTER_PORT": str(port)})
    monkeypatch.setattr(launch, "PATIENCE", 1.2)
    monkeypatch.setattr(logging.getLogger("lavt"), "propagate", True)
    wait = timedelta(seconds=3)
    monkeypatch.setattr(utils, "default_pg_timeout", wait)

    def process_0() -> None:
        with contextlib.suppress(RuntimeError):
            next(rendezvous("env://", 0, 3, timeout=wait))

    first = threading.Thread(target=process_0)
    first.start()
    with pytest.raises(InputError, match="process 1 of 3"):
        utils.init_distributed("cpu")
    first.join()
    assert not caplog.messages
