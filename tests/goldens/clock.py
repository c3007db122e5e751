"""Take out of a record what the clock and the machine put in."""

import html
import re
from collections.abc import Callable
from typing import Any

MASK = "CLOCK"
# Keys of JSON, columns of tables.
_CLOCK = re.compile(
    r"seconds|per_second|elapsed|duration|started|finished|created|datetime|timestamp|memory|"
    r"hostname|_ms$|ms/step|tokens/s|time of the run|training time|^cost$|^versions?$|_version$|"
    r"commit|^platform$|^python$|eval_id|^packages$"
)
_LAST_NUMBER = re.compile(r"-?[\d.,]+( ± [\d.,]+)?\s*$")
_ROW = re.compile(r"<tr.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<t[hd]\b.*?</t[hd]>", re.DOTALL)


def without_clock(record: dict[str, Any]) -> dict[str, Any]:
    """A record of `Workplace.record` in which times, dates and versions are masked."""
    for command in record["commands"]:
        # A table pads its times, which are not equally long.
        lines = [line.rstrip() if "TIME" in line else line for line in command["stdout"]]
        command["stdout"] = _terminal(lines)
    for path, contents in record["files"].items():
        if not contents:
            continue
        if "table" in contents:
            contents["table"] = _columns(contents["table"], list, lambda row: row)
        elif "text" in contents and path.endswith(".md"):
            contents["text"] = _markdown(contents["text"])
        elif "text" in contents and path.endswith(".html"):
            contents["text"] = _page("\n".join(contents["text"])).splitlines()
        elif "json" in contents or "rows" in contents:
            record["files"][path] = _values(contents)
    return record


def without_numbers(command: dict[str, Any]) -> dict[str, Any]:
    """A command that never prints the same numbers twice."""
    for stream in ("stdout", "stderr"):
        lines = [re.sub(r"\d[\d.,e+-]*", "N", line) for line in command[stream]]
        # Columns are as wide as their numbers are long.
        command[stream] = [re.sub(r"[ ━─]+", " ", line) for line in lines]
    return command


def _values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: MASK if _masked(key, item) else _values(item) for key, item in value.items()}
    return [_values(item) for item in value] if isinstance(value, list) else value


def _masked(key: str, item: Any) -> bool:
    """Also the size of a configuration in a checkpoint's list: its keys are compared, not that."""
    return bool(_CLOCK.search(key)) or (key.endswith(".json") and isinstance(item, int))


def _columns(
    rows: list[Any], cells_of: Callable[[Any], list[str]], made: Callable[[list[str]], Any]
) -> list[Any]:
    """Mask the columns whose heading is the clock's, and numbers of rows that are."""
    headings = cells_of(rows[0]) if rows else []
    timed = {index for index, heading in enumerate(headings) if _CLOCK.search(_plain(heading))}
    masked = rows[:1]
    for row in rows[1:]:
        cells = cells_of(row)
        row_is_timed = any(_CLOCK.search(_plain(cell)) for cell in cells if "/" in cell)
        masked.append(
            made(
                [
                    MASK
                    if index in timed or (row_is_timed and _LAST_NUMBER.fullmatch(_plain(cell)))
                    else cell
                    for index, cell in enumerate(cells)
                ]
            )
            if timed or row_is_timed
            else row
        )
    return masked


def _plain(cell: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>|\\", "", cell)).strip()


def _markdown(lines: list[str]) -> list[str]:
    found: list[str] = []
    table: list[str] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        found += _columns(table, lambda row: row[1:-1].split("|"), lambda c: f"|{'|'.join(c)}|")
        table = []
        found.append(line)
    return found[:-1]


def _page(text: str) -> str:
    def table(found: re.Match[str]) -> str:
        rows = _ROW.findall(found[0])
        for before, after in zip(rows, _columns(rows, _CELL.findall, "".join), strict=True):
            if before != after:
                text_of[before] = f"<tr>{after}</tr>"
        return _ROW.sub(lambda row: text_of.get(row[0], row[0]), found[0])

    text_of: dict[str, str] = {}
    return re.sub(r"<table.*?</table>", table, text, flags=re.DOTALL)


def _terminal(lines: list[str]) -> list[str]:
    """Tables on the terminal whose last column is a time, which is as wide as its numbers."""
    if not any(line.rstrip().endswith("ms/step") for line in lines):
        return lines
    found: list[str] = []
    timed = False
    for line in lines:
        timed = timed and bool(line.strip())
        masked = _LAST_NUMBER.sub(MASK, line) if timed else line
        found.append(re.sub(r"[ ─]+", " ", masked))
        timed = timed or line.rstrip().endswith("ms/step")
    return found
