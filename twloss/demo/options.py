"""The command line, checked before anything slow starts: arguments come in, ``Options`` go out."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

__all__ = ["Options", "parse_options", "refuse"]

_UNTIL_ENDED = 600.0  # seconds


class Options(NamedTuple):
    """What the user chose."""

    epochs: int
    batch_size: int
    device: str
    seed: int
    plot: Path | None
    log_every_step: bool = False
    by: str | None = None


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """The options in ``arguments`` (None: the command line's); exits with status 2 and one message if any is wrong."""
    parser = _Parser(
        prog="python -m twloss",
        description="Train a small ranker with four tasks on MovieLens, three binary ones and a regression, and "
        "evaluate it. On several ranks: torchrun --standalone --nproc-per-node=2 -m twloss. The number of ranks does "
        "not change the result.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--epochs", type=_whole_number(1), default=6, metavar="N", help="default: %(default)s")
    add(
        "--batch-size",
        type=_whole_number(1),
        default=1024,
        metavar="ROWS",
        help="rows a step, over all ranks together (default: %(default)s)",
    )
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cuda takes one GPU a rank; no mps, which lacks float64 (default: %(default)s)",
    )
    add("--seed", type=_whole_number(0), default=0, metavar="N", help="default: %(default)s")
    add(
        "--plot",
        type=_picture,
        metavar="FILE",
        help="draw the losses over the course of the training; the name's ending is the format (PNG without one)",
    )
    add("--log-every-step", action="store_true", help="print each step's loss over all ranks, one step later")
    add("--by", choices=["decade"], help="print a table by the decade of the movie too")
    options = Options(**vars(parser.parse_args(arguments)))
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if options.device == "cuda" and gpus < ranks:
        parser.error(f"argument --device: got cuda for {ranks} rank(s) of this machine, which has {gpus} GPU(s)")
    return options


def refuse(message: str) -> NoReturn:
    """Print one message to stderr and exit with status 2."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # The first rank of this machine says the same, however late it starts, and torchrun then ends the others.
        time.sleep(_UNTIL_ENDED)
    sys.stderr.write(message)
    raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(f"{self.format_usage()}{self.prog}: error: {message}\n")


def _whole_number(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        # 2^63 is where torch's seeds end.
        if not text.isdecimal() or int(text) not in range(least, 2**63):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number >= {least}")
        return int(text)

    return whole_number


def _picture(text: str) -> Path:
    path, is_new = Path(text), not Path(text).exists()
    try:
        path.open("ab").close()
    except OSError as error:
        message = f"got {text!r}, expected a file that can be written: {error.strerror}"
        raise argparse.ArgumentTypeError(message) from None
    if is_new:
        path.unlink(missing_ok=True)
    formats = _formats()
    if path.suffix and formats and path.suffix.lower() not in formats:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a name that ends in {', '.join(formats)}")
    return path


def _formats() -> list[str]:
    """The formats that matplotlib can write; none without it, of which there is something else to say."""
    try:
        figure = importlib.import_module("matplotlib.figure").Figure()
    except ModuleNotFoundError:
        return []
    return sorted(f".{name}" for name in figure.canvas.get_supported_filetypes())
