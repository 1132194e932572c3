"""The benchmarks' smoke run: every one runs, and its report is complete.

Whether timing goals are met is for a full run on a quiet machine; the smoke run asserts counts, bytes and exactness.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from tests.support.launch import refused
from tests.support.patience import SECONDS

BENCHMARKS = [
    "step_cost",
    "tracking_cost",
    "quality_cost",
    "validate_cost",
    "segments_cost",
    "mixed_types",
    "limit",
    "kernels",
    "calls",
    "memory",
    "sync_cost",
    "log_every_step",
    "global_batch_cost",
    "precision",
    "scale",
    "compile",
    "first_call",
]


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.mark.exhaustive
def test_the_smoke_run_reports_every_benchmark_and_meets_what_no_load_changes(tmp_path: Path) -> None:
    out, plot, markdown = tmp_path / "run.json", tmp_path / "run.png", tmp_path / "run.md"
    done = run_benchmarks("--quick", "--out", str(out), "--plot", str(plot), "--markdown", str(markdown))
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert list(report["benchmarks"]) == BENCHMARKS
    assert report["missed"] == []
    assert report["machine"]["threads"] == "1"
    for benchmark in report["benchmarks"].values():
        asserted = [row for row in benchmark["rows"] if row["asserted"]]
        assert all(row["met"] and not row["timed"] for row in asserted)
        assert any(row["goal"] for row in benchmark["rows"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert all(f"### {name}" in markdown.read_text(encoding="utf-8") for name in BENCHMARKS)


@pytest.mark.exhaustive
def test_markdown_goes_between_a_files_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin: last run -->\nold\n<!-- end: last run -->\nafter\n", encoding="utf-8")
    run_benchmarks("--quick", "--only", "kernels", "--markdown", str(page))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- begin: last run -->\n")
    assert text.endswith("<!-- end: last run -->\nafter\n")
    assert "### kernels" in text
    assert "old" not in text


def test_a_benchmark_that_does_not_exist_is_refused_with_the_names_of_those_that_do() -> None:
    assert set(BENCHMARKS) <= set(re.findall(r"\w+", refused(main, "--only", "step_costs")))
