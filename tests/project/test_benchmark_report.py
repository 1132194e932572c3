"""How the benchmarks say what they measured: in words, as a summary, between a page's marks, and as a picture."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.chart import write_chart
from benchmarks.paired import Timings
from benchmarks.report import HEADLINE_GROUPS, Report, write_markdown
from benchmarks.row import Row, at_least, counted, in_words, overhead, quartiles_in_words, speedup, times_as_long
from tests.support.launch import refused

ROOT = Path(__file__).parents[2]
MACHINE = {"date": "2026-01-01", "CPU": "a CPU", "threads": "1", "GPU": "none used"}
GLANCE = "<!-- begin: at a glance -->", "<!-- end: at a glance -->"
LAST_RUN = "<!-- begin: last run -->", "<!-- end: last run -->"


def timings(ours: float, rival: float) -> Timings:
    """Three rounds in which ours takes a little less than said, as long, and a little more."""
    return Timings({"twloss": [0.9 * ours, ours, 1.1 * ours], "rival": [rival] * 3})


def report(rows: dict[str, list[Row]]) -> Report:
    return Report(MACHINE, True, dict.fromkeys(rows, "What it measures"), rows, dict.fromkeys(rows, 1.0))


def full_report() -> Report:
    return report(
        {
            "sync_cost": [speedup("2 ranks", timings(1e-3, 9e-3), "twloss", "rival", headline="compute() of 2 ranks")],
            "tracking_cost": [
                overhead("4 × 10", timings(3e-3, 1e-3), "twloss", "rival"),
                overhead("4,096 × 10", timings(1e-3, 2e-3), "twloss", "rival", headline="eager step"),
            ],
            "kernels": [counted("4 × 10", "kernels", 12)],
        }
    )


@pytest.mark.parametrize(
    ("ours", "words", "quartiles"),
    [(1.0, "4.30× faster", "4.10 – 4.54"), (18.7, "4.35× slower", "4.12 – 4.56"), (4.3, "1.00× faster", "0.95 – 1.06")],
)
def test_a_speedup_below_1_is_said_as_a_slowdown(ours: float, words: str, quartiles: str) -> None:
    row = speedup("4 × 10", timings(ours, 4.3), "twloss", "rival", at_least(4))
    assert in_words(row) == words
    assert quartiles_in_words(row) == quartiles
    assert times_as_long(row) == pytest.approx(ours / 4.3)


def test_json_keeps_the_ratio_and_the_page_says_it_in_words(tmp_path: Path) -> None:
    row = speedup("4 × 10", timings(18.7, 4.3), "twloss", "rival", at_least(4))
    assert row.as_json()["measured"] == pytest.approx(0.23, abs=1e-3)
    assert row.as_json()["measured_unit"] == "× faster"
    assert row.as_json()["goal"] == "≥ 4"
    slow = report({"step_cost": [row]})
    assert slow.missed() == ["step_cost: 4 × 10, against rival: measured 4.35× slower, goal ≥ 4× faster"]
    write_markdown(slow, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "4.35× slower (4.12 – 4.56) | ≥ 4× faster | no |" in page
    assert "0.23" not in page


def test_an_overhead_is_said_as_it_is() -> None:
    row = overhead("4 × 10", timings(1.26, 2.0), "twloss", "rival")
    assert in_words(row) == "0.63× as long"
    assert times_as_long(row) == row.measured


def test_the_summary_has_the_rows_with_a_headline_group_by_group() -> None:
    headlines = full_report().headlines()
    assert [[row.headline for row in rows] for rows in headlines.values()] == [["eager step"], ["compute() of 2 ranks"]]
    assert list(headlines) == [title for title in HEADLINE_GROUPS if title in headlines]


def test_headlines_are_of_benchmarks_that_exist_and_a_benchmark_with_one_has_a_group() -> None:
    grouped = [name for names in HEADLINE_GROUPS.values() for name in names]
    assert set(grouped) <= {*BENCHMARKS, "torchrec_metrics"}
    files = {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if "HEADLINES" in path.read_text(encoding="utf-8")
    }
    assert files == {"compiled" if name == "compile" else name for name in grouped}


def test_the_summary_and_the_tables_go_between_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marked = ["# Title", *GLANCE, "between", LAST_RUN[0], "old", LAST_RUN[1], "after"]
    page.write_text("\n".join(marked) + "\n", encoding="utf-8")
    write_markdown(full_report(), page)
    once = page.read_text(encoding="utf-8")
    before, _, rest = once.partition(GLANCE[0])
    glance, _, rest = rest.partition(GLANCE[1])
    between, _, rest = rest.partition(LAST_RUN[0])
    last_run, _, after = rest.partition(LAST_RUN[1])
    assert (before, between, after) == ("# Title\n", "\nbetween\n", "\nafter\n")
    assert "| eager step | 1,000 µs | 2,000 µs | 0.50× as long |" in glance
    assert "### kernels" in last_run
    assert "old" not in once
    write_markdown(full_report(), page)
    assert page.read_text(encoding="utf-8") == once


def test_a_run_without_a_headline_leaves_the_summary_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n".join([GLANCE[0], "kept", GLANCE[1], *LAST_RUN]), encoding="utf-8")
    write_markdown(report({"kernels": [counted("4 × 10", "kernels", 12)]}), page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("\n".join([GLANCE[0], "kept", GLANCE[1]]))
    assert "### kernels" in text


def test_a_file_without_marks_becomes_the_summary_and_the_tables(tmp_path: Path) -> None:
    write_markdown(full_report(), tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text.startswith(GLANCE[0])
    assert text.endswith(f"{LAST_RUN[1]}\n")


def test_the_benchmarks_page_has_both_marks_and_the_chart() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    places = [text.index(mark) for mark in (*GLANCE, "](at-a-glance.svg)", *LAST_RUN)]
    assert places == sorted(places)
    assert (ROOT / "docs" / "at-a-glance.svg").samefile(ROOT / "benchmarks" / "at-a-glance.svg")


def test_the_chart_has_the_headlines_and_what_was_measured(tmp_path: Path) -> None:
    write_chart(full_report(), tmp_path / "chart.svg")
    texts = [text for element in ElementTree.parse(tmp_path / "chart.svg").iter() if (text := element.text)]
    expected = {"eager step", "0.50× as long", "compute() of 2 ranks", "9.00× faster", "2026-01-01, a CPU, threads: 1"}
    assert expected | set(full_report().headlines()) <= set(texts)
    assert "4 × 10" not in texts


def test_the_charts_format_is_that_of_the_suffix(tmp_path: Path) -> None:
    for name in ("chart.svg", "again.svg", "chart.png"):
        write_chart(full_report(), tmp_path / name)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "chart.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_a_chart_that_can_not_be_drawn_is_refused_before_the_run() -> None:
    assert ".png, .svg" in refused(main, "--plot", "run.gif")
    assert "tracking_cost" in refused(main, "--only", "kernels", "--plot", "run.svg")
