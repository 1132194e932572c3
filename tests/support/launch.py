"""Examples as users start them: as a script, through torchrun, and as if torchrun had started this rank."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from unittest import mock

import pytest
import torch.distributed as dist

from tests.support.patience import SECONDS

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")


def torchrun(world_size: int) -> list[str]:
    """The words before a script's name that start it on so many ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]


def script(world_size: int, path: str, *arguments: str) -> dict[str, float]:
    """Run a script as ``python`` would, but in this process, or through torchrun; the numbers that it printed."""
    if world_size > 1:
        return command(*torchrun(world_size), path, *arguments)
    output = io.StringIO()
    with mock.patch.object(sys, "argv", [path, *arguments]), redirect_stdout(output):
        runpy.run_path(path, run_name="__main__")
    return numbers_in(output.getvalue())


def refused(main: Callable[[], int], *arguments: str) -> str:
    """What a program with these arguments says on stderr, and nothing elsewhere, before it leaves with status 2."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["program", *arguments]),
        redirect_stdout(output),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as refusal,
    ):
        main()
    assert (refusal.value.code, output.getvalue()) == (2, "")
    return errors.getvalue()


def command(*words: str) -> dict[str, float]:
    """Run a command to its end; the numbers that it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    process = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return numbers_in(process.stdout)


def numbers_in(text: str) -> dict[str, float]:
    """The numbers of the lines "key value", each key once: one rank prints."""
    results: dict[str, float] = {}
    for line in text.splitlines():
        key, _, number = line.strip().rpartition(" ")
        with suppress(ValueError):
            value = float(number)
            assert key.strip() not in results, line
            results[key.strip()] = value
    return results


@contextmanager
def as_if_from_torchrun() -> Iterator[None]:
    """What torchrun tells a rank, for frameworks that look there although the process group is there already."""
    if not dist.is_initialized():
        yield
        return
    values = {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), dist.get_rank()),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), dist.get_world_size()),
        "GROUP_RANK": 0,
        "TORCHELASTIC_RUN_ID": "tests",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
        "OMP_NUM_THREADS": 1,
    }
    with mock.patch.dict(os.environ, {key: str(value) for key, value in values.items()}):
        yield
