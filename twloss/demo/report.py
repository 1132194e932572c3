"""What is printed at the end: losses come in, a table and the check of the evaluation go to the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from twloss.demo.movielens import DECADES, TASKS
from twloss.demo.training import Losses, Point, Results

__all__ = ["print_check", "print_segments", "print_table"]

# Summing 20,000 rows in another order changes 1e-15 of the sum; a row that is lost or counted twice, 1e-5.
TOLERANCE = 1e-12

CAPTION = (
    "train loss: over the last {interval:,} rows trained on, with some of their ids made unknown. eval loss: after "
    "the training, on the latest ratings, all of them later than the training rows. The loss of the stars is the "
    "squared error, the others are in nats. base rate: the eval loss of always predicting the training rows' share of "
    "positives, or their mean stars. eval NE: the normalised entropy, eval loss over the entropy of the eval rows' own "
    "share of positives. calibration: positives predicted for each one observed. Batches are global, and so are all "
    "numbers: any number of ranks gives these, those of one process."
)


HEADINGS = (
    "train\nloss",
    "eval\nloss",
    "base\nrate",
    "eval\ngain",
    "eval\nNE",
    "cali-\nbration",
    "rows\ntrained",
    "rows\neval",
)


def print_table(console: Console, title: str, points: Sequence[Point], base_rate: Losses, eval_rows: int) -> None:
    """A line for each task, and one for the global loss."""
    last = points[-1]
    caption = CAPTION.format(interval=last.rows_seen - (points[-2].rows_seen if len(points) > 1 else 0))
    # Narrow enough for 80 columns.
    table = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("task", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for key, base in base_rate.items():
        losses = (f"{value:.4f}" for value in (last.train[key], last.eval[key], base))
        gain = f"{1 - last.eval[key] / base:.1%}"
        task = "all (mean)" if key == "loss" else key.removeprefix("loss/")
        of_task = (last.eval.get(f"{name}/{task}") for name in ("ne", "calibration"))
        quality = ("" if value is None else f"{value:.3f}" for value in of_task)
        table.add_row(task, *losses, gain, *quality, f"{last.rows_seen:,}", f"{eval_rows:,}")
    console.print(table)


def print_segments(console: Console, dimension: str, results: Results) -> None:
    """A line for each cell of a dimension of the segments: the rows evaluated, and each task's loss and its NE."""
    table = Table(title=f"eval, by {dimension} of the movie", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column(dimension, no_wrap=True)
    quantities = {"rows": f"weight/{TASKS[0]}"}
    for task in TASKS:
        quantities[f"{task}\nloss"] = f"loss/{task}"
        if f"ne/{task}" in results:
            quantities[f"{task}\nNE"] = f"ne/{task}"
    for heading in quantities:
        table.add_column(heading, justify="right")
    for cell in (*DECADES, "other"):
        rows, *values = (results[f"{key}/{dimension}={cell}"] for key in quantities.values())
        table.add_row(cell, f"{rows:,.0f}", *(f"{value:.3f}" for value in values))
    console.print(table)


def print_check(console: Console, losses: Losses, expected: Losses, world_size: int) -> bool:
    """Print, and return, whether an evaluation over ranks gave the losses of one process."""
    differences = [abs(losses[key] - value) / abs(value) for key, value in expected.items()]
    # all(), not max(), which may pass over a NaN.
    equal = all(difference <= TOLERANCE for difference in differences)
    verdict = "equal" if equal else "NOT EQUAL, so rows were lost, counted twice or not finite"
    console.print(
        f"eval loss over {world_size} rank(s):   {losses['loss']!r}",
        f"eval loss of one process: {expected['loss']!r}",
        f"check: {verdict} (largest relative difference of any loss {max(differences):.1e}, limit {TOLERANCE:.0e})",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    return equal
