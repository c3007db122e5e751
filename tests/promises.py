"""Write docs/promises.md: what the package promises, and the tests that hold it.

    python tests/promises.py                  write the page from the marks in the tests
    python tests/promises.py --run [TEST...]  run the marked tests, all or those of some files,
                                              and write down the day on which they passed

A test says what it holds by `@pytest.mark.promise("...")`.
"""

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "promises.md"
PASSED = TESTS / "promises.json"
HEAD = """# Promises

What you may rely on, and the tests that hold it. `python tests/promises.py` writes this page from
the marks in the tests, and a test fails where the two differ. `make test` runs all of these tests
but the slow ones, `make test-slow` those. The day is that of the last run of
`python tests/promises.py --run` in which every test of the row passed.

| promise | held by | passed on |
|---|---|---|
"""


def marks(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Promise, name of the test and whether it is slow, in the order of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        texts = [ast.unparse(decorator) for decorator in node.decorator_list]
        for decorator, text in zip(node.decorator_list, texts, strict=True):
            if text.startswith("pytest.mark.promise(") and isinstance(decorator, ast.Call):
                yield ast.literal_eval(decorator.args[0]), node.name, "pytest.mark.slow" in texts


def promises() -> dict[str, list[tuple[str, bool]]]:
    """Tests, as `file::name` and whether they are slow, by promise."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for promise, name, slow in marks(path):
            test = f"{path.relative_to(TESTS).as_posix()}::{name}"
            found.setdefault(promise, []).append((test, slow))
    return dict(sorted(found.items()))


def page() -> str:
    """The contents of docs/promises.md."""
    passed = json.loads(PASSED.read_text(encoding="utf-8"))
    rows = []
    for promise, tests in promises().items():
        held = [f"`tests/{test}`" + (" (slow)" if slow else "") for test, slow in tests]
        days = [passed.get(test) for test, _ in tests]
        day = min(days) if all(days) else "-"
        rows.append(f"| {promise} | {'<br>'.join(held)} | {day} |\n")
    return HEAD + "".join(rows)


def run(files: Sequence[str]) -> int:
    """Run marked tests, and keep the day for those that passed; pytest's exit status."""
    wanted = [test for tests in promises().values() for test, _ in tests]
    chosen = [t for t in wanted if not files or any(t.startswith(file) for file in files)]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", "promise", f"--junitxml={results}"]
        names = [str(TESTS / test) for test in dict.fromkeys(chosen)]
        status = subprocess.run([*command, *names], check=False, cwd=TESTS.parent).returncode
        record(results, chosen)
    return status


def record(results: Path, chosen: Sequence[str]) -> None:
    """Take the outcomes of a run over: a test counts where all its cases passed."""
    passed: dict[str, bool] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        file = case.attrib["classname"].removeprefix("tests.").replace(".", "/") + ".py"
        test = f"{file}::{case.attrib['name'].partition('[')[0]}"
        passed[test] = passed.get(test, True) and not list(case)
    days: dict[str, str] = json.loads(PASSED.read_text(encoding="utf-8"))
    today = datetime.now(timezone.utc).date().isoformat()
    for test in chosen:
        days.pop(test, None)
        if passed.get(test):
            days[test] = today
    PASSED.write_text(json.dumps(dict(sorted(days.items())), indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Run the tests if asked to, and write the page."""
    status = run(sys.argv[2:]) if sys.argv[1:2] == ["--run"] else 0
    PAGE.write_text(page(), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
