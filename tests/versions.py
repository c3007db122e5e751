"""The suite against other versions of what the package stands on: `make test-versions`.

    python tests/versions.py                      # the oldest versions that pyproject.toml allows
    python tests/versions.py newest               # the newest that it allows
    python tests/versions.py canary               # the newest of everything, caps lifted: may fail
    python tests/versions.py oldest --python 3.12 --tests tests/architecture

Each set is an environment of its own under build/versions, made by uv, which resolves to the
lowest versions as pip cannot; an interpreter that the machine lacks is named and skipped. What is
installed is printed, so that a pass says what it was with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "versions"
SHOWN = (
    "sae-lens", "transformer-lens", "sae-bench", "torch", "transformers", "datasets",
    "huggingface-hub", "numpy", "pydantic", "typer",
)  # fmt: skip
# Without `eval`, whose torchvision wants the newest torch.
EXTRAS = "demo,report,serve"
TOOLS = (
    "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "httpx>=0.27", "jsonschema>=4.20",
    "zstandard>=0.22",
)  # fmt: skip
RESOLUTION = {"oldest": "lowest-direct", "newest": "highest", "canary": "highest"}
# Suites that need the extra `eval` or what only a checkout for developers has.
LEFT_OUT = ("tests/evaluation", "tests/hub", "tests/reporting")


def make_environment(versions: str, python: str) -> Path:
    """An environment with the versions of a set; its interpreter."""
    folder = WORK / f"{versions}-{python}"
    interpreter = folder / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["uv", "venv", "--quiet", "--python", python, str(folder)], check=True)
    command = ["uv", "pip", "install", "--quiet", "--python", str(interpreter)]
    if versions == "canary":
        overrides = WORK / "overrides.txt"
        overrides.write_text("transformer-lens\nsae-lens\n")
        command += ["--override", str(overrides), "--prerelease", "allow"]
    command += ["--resolution", RESOLUTION[versions], f"{ROOT}[{EXTRAS}]", *TOOLS]
    subprocess.run(command, check=True)
    return interpreter


def main() -> int:
    """The exit status of the suite; that of a canary is printed and not returned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="?", choices=list(RESOLUTION), default="oldest")
    parser.add_argument("--python", default=f"3.{sys.version_info.minor}")
    parser.add_argument("--tests", nargs="*", default=["tests"])
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
    listed = subprocess.run(
        ["uv", "pip", "list", "--python", str(python)], check=True, capture_output=True, text=True
    )
    print("\n".join(line for line in listed.stdout.splitlines() if line.split()[0] in SHOWN))
    ignored = [f"--ignore={path}" for path in LEFT_OUT if path not in chosen.tests]
    suite = [str(python), "-m", "pytest", "-n", "2", *chosen.tests, *ignored]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    status = subprocess.run(suite, cwd=ROOT, env=own, check=False).returncode
    print(f"{chosen.versions}, CPython {chosen.python}: {'passed' if status == 0 else 'failed'}")
    return 0 if chosen.versions == "canary" else status


if __name__ == "__main__":
    sys.exit(main())
