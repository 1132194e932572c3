"""Run the benchmarks: ``python -m benchmarks [--quick] [--only NAME …] [--device cuda] [--out F] [--plot F]``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.bandwidth import bandwidth
from benchmarks.calls import calls
from benchmarks.chart import SUFFIXES, write_chart
from benchmarks.compiled import compile_cost
from benchmarks.first_call import first_call
from benchmarks.global_batch_cost import global_batch_cost
from benchmarks.kernels import kernels
from benchmarks.limit import limit
from benchmarks.log_every_step import log_every_step
from benchmarks.machine import describe_machine, steady_machine
from benchmarks.memory import memory
from benchmarks.mixed_types import mixed_types
from benchmarks.precision import precision
from benchmarks.quality_cost import quality_cost
from benchmarks.report import HEADLINE_GROUPS, Report, as_glance, as_table, write_json, write_markdown
from benchmarks.row import Row
from benchmarks.scale import scale
from benchmarks.segments_cost import segments_cost
from benchmarks.step_cost import step_cost
from benchmarks.sync_cost import sync_cost
from benchmarks.torchrec_metrics import torchrec_metrics
from benchmarks.tracking_cost import tracking_cost
from benchmarks.validate_cost import validate_cost
from benchmarks.workload import Setting

Benchmark = Callable[[Setting], Iterator[Row]]

BENCHMARKS: dict[str, Benchmark] = {
    "step_cost": step_cost,
    "tracking_cost": tracking_cost,
    "quality_cost": quality_cost,
    "validate_cost": validate_cost,
    "segments_cost": segments_cost,
    "mixed_types": mixed_types,
    "limit": limit,
    "kernels": kernels,
    "calls": calls,
    "memory": memory,
    "sync_cost": sync_cost,
    "log_every_step": log_every_step,
    "global_batch_cost": global_batch_cost,
    "precision": precision,
    "scale": scale,
    "compile": compile_cost,
    "first_call": first_call,
    # In an environment of its own.
    **({"torchrec_metrics": torchrec_metrics} if find_spec("torchrec") else {}),
}
# With --device cuda: the ranks are gloo processes on the CPU, and one GPU has no ranks; a GPU has a bandwidth to reach.
CUDA_BENCHMARKS: dict[str, Benchmark] = {
    **{
        name: run
        for name, run in BENCHMARKS.items()
        if name not in ("sync_cost", "log_every_step", "global_batch_cost", "torchrec_metrics")
    },
    "bandwidth": bandwidth,
}


def main() -> int:
    """Run, print, write; 1 if a goal is missed."""
    arguments = _arguments()
    steady_machine()
    setting = Setting(torch.device(arguments.device), arguments.quick)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    report = _run(setting, arguments.only, console)
    for write, path in (
        (write_json, arguments.out),
        (write_chart, arguments.plot),
        (write_markdown, arguments.markdown),
    ):
        if path is not None:
            write(report, path)
    missed = report.missed()
    for line in missed:
        console.print(f"MISSED {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    console.print("a goal is missed" if missed else "every asserted goal is met")
    if report.headlines():
        console.print(as_glance(report))
    return 1 if missed else 0


def _run(setting: Setting, only: list[str] | None, console: Console) -> Report:
    """Run the benchmarks one after the other; each one's table is printed when it is done."""
    known = CUDA_BENCHMARKS if setting.device.type == "cuda" else BENCHMARKS
    chosen = {name: run for name, run in known.items() if only is None or name in only}
    titles = {name: (run.__doc__ or "").strip().rstrip(".") for name, run in chosen.items()}
    asserts_timing = not setting.quick and setting.device.type == "cpu"
    report = Report(describe_machine(setting.device), asserts_timing, titles, {}, {})
    for key, value in report.machine.items():
        console.print(f"{key}: {value}", highlight=False)
    with _progress() as progress:
        bar = progress.add_task("", total=len(chosen), name="", case="")
        for name, run in chosen.items():
            progress.update(bar, name=name, case="…")
            started, report.rows[name] = time.perf_counter(), []
            for row in run(setting):
                report.rows[name].append(row)
                progress.update(bar, case=row.case)
            report.seconds[name] = time.perf_counter() - started
            console.print(as_table(report, name))
            progress.advance(bar)
    return report


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[name]}: {task.fields[case]}", markup=False),
        console=Console(stderr=True),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="twloss beside what people use today.")
    names = list(BENCHMARKS | CUDA_BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="a smoke run: few rounds; timing shown, not asserted")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the summary, as PNG or SVG")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the summary and the tables, between a file's marks"
    )
    arguments = parser.parse_args()
    _check(parser, arguments)
    return arguments


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse what cannot be run or written, before the run."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    known = CUDA_BENCHMARKS if arguments.device == "cuda" else BENCHMARKS
    unknown = [name for name in arguments.only or () if name not in known]
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: not with --device {arguments.device}")
    if arguments.plot is not None and arguments.plot.suffix not in SUFFIXES:
        parser.error(f"--plot {arguments.plot}: expected a suffix of {', '.join(SUFFIXES)}")
    drawn = [name for names in HEADLINE_GROUPS.values() for name in names]
    if arguments.plot is not None and arguments.only and not set(drawn) & set(arguments.only):
        parser.error(f"--plot draws only {', '.join(drawn)}")


if __name__ == "__main__":
    sys.exit(main())
