"""The one table, in every rendering."""

from __future__ import annotations

from rich.console import Console

from msae_plugin.common.table import Column, Spread, Table

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


def test_a_terminal_reads_no_style_in_a_name():
    console = Console(width=80)
    with console.capture() as capture:
        console.print(TABLE.terminal(title="Title"))
    assert HOSTILE in capture.get()
    assert "0.8000 ± 0.0500" in capture.get()
