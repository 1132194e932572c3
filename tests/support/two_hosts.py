"""Two hosts on one machine: network namespaces, with one cable between them and nothing else that they share.

It takes the command ``ip``, of Debian's package iproute2, and the right to make a namespace, which root has on most
machines. Neither host knows the other's name, and its own name leads to its loopback address, as Debian has it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.patience import SECONDS

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.0.0.1", "10.0.0.2")
INTERFACE = "eth0"
# Where `ip netns exec` takes a namespace's own files of /etc from.
ETC = Path("/etc/netns")


class NoNamespacesError(Exception):
    """This machine has no network namespaces; the message says why."""


class Host:
    """One of the two."""

    def __init__(self, namespace: str, directory: Path) -> None:
        self.namespace = namespace
        self._output = directory / f"{namespace}.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, script: str, **variables: str) -> None:
        """Start lines of a shell there, from the root of the checkout."""
        environment = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
        environment.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1", **variables)
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "bash", "-euc", script],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def output(self) -> str:
        """What was printed so far."""
        return self._output.read_text(errors="replace")

    def wait(self) -> int:
        """The exit status, once there is one."""
        assert self._process is not None
        return self._process.wait(SECONDS)

    def has_ended(self) -> bool:
        """Whether there is an exit status."""
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """End all processes of this host at once, as a machine does that its scheduler takes away."""
        for process in _ip("netns", "pids", self.namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def cut(self) -> None:
        """Take the cable away: nothing arrives any more, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "down")


def wait_for(text: str, *hosts: Host) -> None:
    """Wait until one of these hosts has printed this; an AssertionError, once it can't or takes minutes."""
    end = time.monotonic() + SECONDS
    while True:
        is_over = time.monotonic() > end or all(host.has_ended() for host in hosts)
        outputs = [host.output() for host in hosts]
        if any(text in output for output in outputs):
            return
        assert not is_over, "\n".join(outputs)
        time.sleep(0.02)


@contextmanager
def two_hosts(directory: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts, ``ADDRESSES``, which are gone at the end with all that runs there.

    Args:
        directory: for what they print.

    Raises:
        NoNamespacesError: where this machine has none.
    """
    hosts = Host(f"twloss-{os.getpid()}-a", directory), Host(f"twloss-{os.getpid()}-b", directory)
    try:
        _connect(hosts)
        yield hosts
    finally:
        for host in hosts:
            with suppress(NoNamespacesError):
                host.kill()
            with suppress(NoNamespacesError):
                _ip("netns", "delete", host.namespace)
            shutil.rmtree(ETC / host.namespace, ignore_errors=True)


def _connect(hosts: tuple[Host, Host]) -> None:
    names = [host.namespace for host in hosts]
    for name in names:
        _ip("netns", "add", name)
        (ETC / name).mkdir(parents=True)
        (ETC / name / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
    ends = [["name", INTERFACE, "netns", name] for name in names]
    _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
    for name, address in zip(names, ADDRESSES):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-n", name, "link", "set", interface, "up")


def _ip(*words: str) -> str:
    if shutil.which("ip") is None:
        raise NoNamespacesError("it takes the command ip, of Debian's package iproute2")
    process = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if process.returncode:
        raise NoNamespacesError(f"ip {' '.join(words)}: {process.stderr.strip()}")
    return process.stdout
