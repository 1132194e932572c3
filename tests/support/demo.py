"""The demo in this process, on ranks that are there, and as users start it; and the numbers of what it prints."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import NamedTuple
from unittest import mock

import torch.distributed as dist

from tests.support.launch import torchrun
from tests.support.patience import SECONDS
from twloss.demo.start import main

PYTHON = [sys.executable, "-W", "error"]
LAUNCHERS = {1: PYTHON, 2: torchrun(2)}
# 26 full batches and one of a single row: the second of two ranks has nothing to train on in the last step.
QUICK = ["--epochs", "1", "--batch-size", "3077", "--by", "decade"]
EVENTS: dict[str, Callable[[float], bool]] = {
    "like": lambda rating: rating >= 4,
    "love": lambda rating: rating == 5,
    "dislike": lambda rating: rating <= 2,
}
BINARY = tuple(EVENTS)


class Table(NamedTuple):
    """A line of the printed table."""

    train: float
    eval: float
    base_rate: float
    gain: float
    quality: tuple[float, ...]
    """Normalised entropy and calibration; none in the lines of the stars and of all tasks."""
    trained_rows: int
    eval_rows: int


class Printed(NamedTuple):
    """What a run has printed."""

    text: str
    table: dict[str, Table]
    by_decade: dict[str, list[float]]
    """The numbers of each line of the table by decade."""
    over_ranks: float
    one_process: float


def environment(**variables: str) -> dict[str, str]:
    """The variables of a command: this process's, without those of a rank."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**inherited, "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "80", "OMP_NUM_THREADS": "1", **variables}


def run_here(*arguments: str) -> str:
    """Run the demo in this process, to its end; what it printed."""
    output = io.StringIO()
    variables = {"COLUMNS": "80", "RANK": "0", "WORLD_SIZE": "1"}
    if dist.is_initialized():
        variables.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    with (
        mock.patch.object(sys, "argv", ["twloss", *arguments]),
        mock.patch.dict(os.environ, variables),
        redirect_stdout(output),
    ):
        status = main()
    assert status == 0, output.getvalue()
    return output.getvalue()


def run_on_rank(rank: int, *arguments: str) -> str:
    """The same, for ``RankPool.run``."""
    return run_here(*arguments)


def start(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(**variables), timeout=SECONDS, check=False
    )


def succeed(world_size: int, *arguments: str) -> Printed:
    """Run the demo and read what it printed."""
    process = start([*LAUNCHERS[world_size], "-m", "twloss", *arguments])
    assert process.returncode == 0, process.stdout + process.stderr
    # With OMP_NUM_THREADS set, torchrun has nothing to say either.
    assert process.stderr == ""
    return read(process.stdout)


def read(text: str) -> Printed:
    """The numbers of a run's output."""
    lines = re.findall(r"^ +(like|love|dislike|stars|all \(mean\)) +(\d.+?) *$", text, re.MULTILINE)
    table = {task: read_line(cells.replace(",", "").split()) for task, cells in lines}
    over_ranks, one_process = re.findall(r"^eval loss (?:over|of) .*: +(\S+)$", text, re.MULTILINE)
    decades = re.findall(r"^ +(\d{4}s|other) +(\d.+?) *$", text, re.MULTILINE)
    by_decade = {decade: [float(cell) for cell in cells.replace(",", "").split()] for decade, cells in decades}
    return Printed(text, table, by_decade, float(over_ranks), float(one_process))


def read_line(cells: list[str]) -> Table:
    train, evaluation, base_rate, gain, *quality, trained_rows, eval_rows = cells
    losses = float(train), float(evaluation), float(base_rate), float(gain.rstrip("%"))
    return Table(*losses, tuple(map(float, quality)), int(trained_rows), int(eval_rows))
