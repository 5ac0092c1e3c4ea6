"""Two machines: two network namespaces that see each other over one cable and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.parity.same_run import run_differences
from tests.dist.conftest import Undisturbed
from tests.scripts import REPO, TIMEOUT, environment

# Private to the two namespaces, so the same for any number of test runs at once.
ADDRESS = "10.77.0.{}"
PORT = 29500
LINK = "veth0"
WEIGHTS = 4_000_000  # bytes: every process sends more than this in each step


@dataclass(frozen=True)
class Machine:
    """A network namespace with an address of its own.

    Attributes:
        name: of the namespace, unique on this computer.
        number: 1 or 2; machine 1 holds the rendezvous.
    """

    name: str
    number: int

    @property
    def address(self) -> str:
        """Its IPv4 address."""
        return ADDRESS.format(self.number)

    def start(self, cwd: Path, script: str, *options: str) -> subprocess.Popen[str]:
        """``torchrun`` of one process on this machine, as its part of two."""
        launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        rendezvous = ["--rdzv_backend", "c10d", "--rdzv_id", "two", "--local_addr", self.address]
        rendezvous += ["--rdzv_endpoint", f"{ADDRESS.format(1)}:{PORT}"]
        # Both have this computer's name, so which of them holds the rendezvous is said outright.
        rendezvous += ["--rdzv_conf", f"is_host={self.number == 1}"]
        command = [sys.executable, *launcher, *rendezvous, str(REPO / script), *options]
        with (cwd / f"machine{self.number}.txt").open("w") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=cwd,
                env=environment() | {"GLOO_SOCKET_IFNAME": LINK},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def received(self) -> int:
        """Bytes that came over the cable."""
        shown = ip("-n", self.name, "-s", "-j", "link", "show", LINK).stdout
        return int(json.loads(shown)[0]["stats64"]["rx"]["bytes"])

    def remove(self) -> None:
        """End every process on the machine, and the machine."""
        for pid in ip("netns", "pids", self.name).stdout.split():
            with suppress(ProcessLookupError):  # ended in this moment
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "del", self.name)


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    """Run ``ip``; the caller looks at its return code where it can fail."""
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines joined by a cable; skips where this system lets nobody make them."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (package iproute2)")
    run_id = uuid.uuid4().hex[:8]
    pair = (Machine(f"lavt-{run_id}-1", 1), Machine(f"lavt-{run_id}-2", 2))
    with ExitStack() as stack:
        for machine in pair:
            added = ip("netns", "add", machine.name)
            if added.returncode:
                pytest.skip(f"needs root, to make network namespaces: {added.stderr.strip()}")
            stack.callback(machine.remove)
        one, two = (machine.name for machine in pair)
        cable = ["name", LINK, "netns", one, "type", "veth", "peer", "name", LINK, "netns", two]
        linked = ip("link", "add", *cable)
        if linked.returncode:
            pytest.skip(f"needs veth pairs: {linked.stderr.strip()}")
        for machine in pair:
            for words in (
                ["addr", "add", f"{machine.address}/30", "dev", LINK],
                ["link", "set", LINK, "up"],
                ["link", "set", "lo", "up"],
            ):
                done = ip("-n", machine.name, *words)
                assert done.returncode == 0, done.stderr
        yield pair


def test_two_machines_give_what_one_gives(
    machines: tuple[Machine, Machine], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Same weights, optimizer, best score and metrics lines as two processes of one machine."""
    jobs = [machine.start(tmp_path, "train.py", *undisturbed.options) for machine in machines]
    codes = [job.wait(timeout=TIMEOUT) for job in jobs]
    output = "".join(path.read_text() for path in sorted(tmp_path.glob("machine*.txt")))
    assert codes == [0, 0], output
    assert "world=2" in output
    assert all(machine.received() > WEIGHTS for machine in machines)
    assert run_differences(undisturbed.folder, tmp_path) == []
