"""The one table, in every rendering."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from msae_plugin.common.table import Column, Spread, Table, csv_cell

HOSTILE = "[red]a_b|<i>"
TABLE = Table(
    "t",
    "A caption.",
    [Column("sae", "SAE"), Column("f1", "F1", "share"), Column("gain", "gain", signed=True)],
    [[HOSTILE, Spread(0.8, 0.05, 3), 0.25], ["b", None, -0.5]],
)


def test_markdown_shows_names_literally_and_aligns_numbers():
    assert TABLE.markdown().splitlines() == [
        "| SAE | F1 (share) | gain |",
        "|---|---:|---:|",
        r"| \[red\]a\_b\|\<i\> | 0.8000 ± 0.0500 | +0.2500 |",
        "| b | not measured | −0.5000 |",
    ]


def test_csv_keeps_all_digits_with_spread_and_count_beside_the_mean():
    assert TABLE.csv().splitlines() == [
        "sae,f1,f1 std,f1 n,gain",
        f"{HOSTILE},0.8,0.05,3,0.25",
        "b,,,,-0.5",
    ]


@pytest.mark.promise(
    "Text from outside stays text: in the page, the card, tables, spreadsheets and the terminal."
)
def test_a_terminal_reads_no_style_in_a_name():
    console = Console(width=80)
    with console.capture() as capture:
        console.print(TABLE.terminal(title="Title"))
    assert HOSTILE in capture.get()
    assert "0.8000 ± 0.0500" in capture.get()


@pytest.mark.promise(
    "Text from outside stays text: in the page, the card, tables, spreadsheets and the terminal."
)
@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "-", "\uff1d1"]
)
def test_a_spreadsheet_executes_no_cell(text):
    table = Table("t", "", [Column(text, "SAE"), Column("f1", "F1")], [[text, -0.5], ["a=b", 1]])
    header, first, second = csv.reader(io.StringIO(table.csv()))
    assert header == [f"'{text}", "f1"]
    assert first == [f"'{text}", "-0.5"]
    assert second == ["a=b", "1"]


@pytest.mark.parametrize("value", [-0.5, "-0.5", "+1e-3", None, 3])
def test_numbers_are_written_as_they_are(value):
    assert csv_cell(value) == value
