"""The demo from start to end: options come in, the exit status goes out."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from rich.console import Console

from twloss.demo.movielens import Split, load_movielens
from twloss.demo.one_process import base_rate_losses, one_process_losses
from twloss.demo.options import Options
from twloss.demo.process_group import process_group, rank_and_world_size
from twloss.demo.ranker import Ranker, build_ranker
from twloss.demo.report import print_check, print_segments, print_table
from twloss.demo.training import Point, train

__all__ = ["run"]


def run(options: Options) -> int:
    """Train, evaluate, report: 0 if the evaluation over all ranks gave what one process gets, else 1."""
    # Batches this small gain nothing from threads, which on a busy machine wait for each other: 58 s instead of 15 s.
    torch.set_num_threads(1)
    with process_group(options.device) as device:
        rank, _ = rank_and_world_size()
        console = Console(quiet=rank > 0)
        split = load_movielens(device)
        torch.manual_seed(options.seed)
        ranker = build_ranker(split.train)
        points = train(ranker, split, options, console)
        equal = rank > 0 or _report(ranker, split, points, options, console)
        if dist.is_initialized():
            dist.barrier()  # Rank 0 reports alone; the others stay until it has.
    return 0 if equal else 1


def _report(ranker: Ranker, split: Split, points: Sequence[Point], options: Options, console: Console) -> bool:
    """Table, picture and check, without a collective; whether the check holds."""
    _, world_size = rank_and_world_size()
    base_rate = base_rate_losses(split)
    title = f"MovieLens, epochs: {options.epochs}, ranks: {world_size}, device: {options.device}, seed: {options.seed}"
    print_table(console, title, points, base_rate, len(split.eval))
    if options.by is not None:
        print_segments(console, options.by, points[-1].eval)
    if options.plot is not None:
        # Who wants no picture needs no matplotlib.
        curves = importlib.import_module("twloss.demo.curves")
        curves.save_curves(options.plot, points, base_rate)
    return print_check(console, points[-1].eval, one_process_losses(ranker, split.eval), world_size)
