"""Write docs/promises.md: what the package promises, and the tests that hold it.

    python tests/promises.py                write the page from the marks in the tests
    pytest --record-promises -m promise     run the marked tests, slow ones as well, and write down
                                            the day of each that passed; any other choice of whole
                                            tests goes as well

A test says what it holds by `@pytest.mark.promise("...")`.
"""

import ast
import json
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "promises.md"
PASSED = TESTS / "promises.json"
HEAD = """# Promises

What you may rely on, and the tests that hold it. `python tests/promises.py` writes this page from
the marks in the tests, and a test fails where the two differ. `make test` runs all of these tests
but the slow ones, `make test-slow` those. A test has the day of its last run with
`pytest --record-promises`, if every case of it passed.

| promise | held by | passed on |
|---|---|---|
"""


def marks(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Promise, name of the test and whether it is slow, in the order of a file.

    A test of which some cases are slow is there twice.
    """
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        texts = [ast.unparse(decorator) for decorator in node.decorator_list]
        slow = {any(text == "pytest.mark.slow" for text in texts)}
        slow |= {True for text in texts if "parametrize(" in text and "pytest.mark.slow" in text}
        for decorator, text in zip(node.decorator_list, texts, strict=True):
            if text.startswith("pytest.mark.promise(") and isinstance(decorator, ast.Call):
                promise = ast.literal_eval(decorator.args[0])
                yield from ((promise, node.name, some) for some in sorted(slow))


def promises() -> dict[str, list[tuple[str, bool]]]:
    """Tests, as `file::name` and whether they are slow, by promise."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for promise, name, slow in marks(path):
            test = f"{path.relative_to(TESTS).as_posix()}::{name}"
            found.setdefault(promise, []).append((test, slow))
    return dict(sorted(found.items()))


def label(test: str, slow: bool) -> str:
    """What a test is called in promises.json."""
    return f"{test} (slow)" if slow else test


def page() -> str:
    """The contents of docs/promises.md."""
    passed = json.loads(PASSED.read_text(encoding="utf-8"))
    rows = []
    for promise, tests in promises().items():
        held = [f"`tests/{test}`" + (" (slow)" if slow else "") for test, slow in tests]
        days = [passed.get(label(test, slow), "-") for test, slow in tests]
        rows.append(f"| {promise} | {'<br>'.join(held)} | {'<br>'.join(days)} |\n")
    return HEAD + "".join(rows)


class Recorder:
    """Keeps the day on which every case of a marked test passed; a plugin of pytest."""

    def __init__(self) -> None:
        self._passed: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of setup, call and teardown of each case, in whichever process."""
        if "promise" in report.keywords:
            test = report.nodeid.removeprefix("tests/").partition("[")[0]
            test = label(test, "slow" in report.keywords)
            self._passed[test] = self._passed.get(test, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        """Write the days down: what failed or was skipped has none."""
        days: dict[str, str] = json.loads(PASSED.read_text(encoding="utf-8"))
        today = datetime.now(timezone.utc).date().isoformat()
        for test, passed in self._passed.items():
            days.pop(test, None)
            if passed:
                days[test] = today
        marked = {label(*test) for tests in promises().values() for test in tests}
        kept = {test: day for test, day in sorted(days.items()) if test in marked}
        PASSED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
