"""What a person who waits for two workers sees: how far the run is, and the file that has just been done.

Of tests that several workers run, pytest shows dots alone, since the files come in no order.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

__all__ = ["Progress"]


class Progress:
    """A line for each file whose tests are done, in the process that the workers report to."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter
        self._left: Counter[str] = Counter()
        self._total, self._started = 0, time.monotonic()

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Each worker has found all tests, of which it will run some."""
        self._left = Counter(map(file_of, ids))
        self._total = len(ids)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No dot for a test that went well."""
        is_well = isinstance(report, pytest.TestReport) and report.passed and not hasattr(report, "wasxfail")
        return ("passed" if report.when == "call" else "", "", "") if is_well else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test is done with its teardown, and a file with its last test."""
        if report.when != "teardown":
            return
        file = file_of(report.nodeid)
        self._left[file] -= 1
        if not self._left[file]:
            share = 1 - self._left.total() / self._total
            seconds = time.monotonic() - self._started
            self._reporter.ensure_newline()
            self._reporter.write_line(f"[{share:4.0%}] {seconds // 60:3.0f}:{seconds % 60:02.0f}  {file}")


def file_of(nodeid: str) -> str:
    """The file of a test."""
    return nodeid.partition("::")[0]
