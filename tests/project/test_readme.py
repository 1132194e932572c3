"""The README's table of errors is what the tests measure. Its code blocks run as doctests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cases import Settings
from tests.support.gradient_errors import measure
from tests.support.rank_pool import RankPool

README = Path(__file__).parents[2] / "README.md"


def rows_of_the_table() -> list[list[str]]:
    lines = README.read_text(encoding="utf-8").partition("<!-- table: errors -->")[2].splitlines()[3:]
    table = lines[: next(n for n, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_table_has_every_reduction() -> None:
    assert len({(row[0], row[1]) for row in rows_of_the_table()}) == 10


@pytest.mark.parametrize("row", rows_of_the_table(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_table_of_errors_is_measured(row: list[str], two_ranks: RankPool, three_ranks: RankPool) -> None:
    task_reduction, reduction, *plain, exact = row
    case = Settings(3, task_reduction, reduction)
    measured = [measure(pool, case, global_batch=False) for pool in (two_ranks, three_ranks)]
    values = [value for errors in measured for value in (errors.loss, errors.gradient)]
    assert [float(cell.rstrip("%")) / 100 for cell in plain] == pytest.approx(values, abs=0.006)
    assert exact == "≤ 1e-14"
    for pool in (two_ranks, three_ranks):
        errors = measure(pool, case, global_batch=True)
        assert max(errors.loss, errors.gradient) <= 1e-14
