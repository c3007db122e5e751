"""Write down what the commands do: messages, files, tensors and numbers of tiny recipes.

    python tests/goldens/freeze.py OUTPUT [--of CHECKOUT] [--only NAME ...] [--fresh]
    python tests/goldens/compare.py OUTPUT OTHER_OUTPUT

Only `python -m msae_plugin` is called, so that the program outlives any move of a module. The
commands run in forks of one process that has imported the libraries (SAELens alone takes ten
seconds); `--fresh` gives each command an interpreter of its own instead.
"""

import argparse
import csv
import hashlib
import importlib
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clock import without_clock

SECONDS_PER_COMMAND = 300
REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "160",
    "TERM": "dumb",
    "NO_COLOR": "1",
}
SLOW_IMPORTS = (
    "sae_lens.synthetic",
    "sae_bench.evals.core.main",
    "sae_bench.evals.sparse_probing.main",
    "msae_plugin",
)

# Hashes of files, of paths, of settings: a letter in it tells one from the digits of a number.
_HEX = re.compile(r"\b(?=[0-9]*[a-f])[0-9a-f]{12,64}\b")


class Workplace:
    """A temporary folder in which commands run, and what is recorded of them."""

    def __init__(
        self, folder: Path, output: Path, fresh: bool = False, repository: Path = REPOSITORY
    ) -> None:
        self.folder, self.output, self.fresh = folder, output, fresh
        self.repository = repository
        self.inputs = folder / "in"

    def run(
        self, *words: str | Path, stop_when: Callable[[], bool] | None = None
    ) -> dict[str, Any]:
        """Run `msae` with these words in the folder of the inputs; Ctrl-C comes at `stop_when`."""
        arguments = [str(word) for word in words]
        streams = {name: self.folder / name for name in ("stdout", "stderr")}
        start = self._start_interpreter if self.fresh else self._start_fork
        with streams["stdout"].open("wb") as out, streams["stderr"].open("wb") as error:
            child = start(arguments, out.fileno(), error.fileno())
            status = self._wait(child, stop_when)
        said = {name: self.normal(path.read_text()).splitlines() for name, path in streams.items()}
        return {
            "command": [self.normal(word) for word in arguments],
            "status": status,
            "stdout": said["stdout"],
            # What is said in between depends on how fast the machine is.
            "stderr": [line for line in said["stderr"] if not _is_progress(line)],
        }

    def _start_interpreter(self, arguments: list[str], out: int, error: int) -> int:
        return subprocess.Popen(
            [sys.executable, "-m", "msae_plugin", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            cwd=self.inputs,
        ).pid

    def _start_fork(self, arguments: list[str], out: int, error: int) -> int:
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(error, 2)
            os.chdir(self.inputs)
            sys.argv = ["msae", *arguments]
            try:
                runpy.run_module("msae_plugin", run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as leaving:
                status = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
            imported = sorted(name for name in sys.modules if name.startswith("msae_"))
            (self.folder / ".imported").write_text("\n".join(imported))
        except BaseException as failure:  # noqa: BLE001 - a fork ends here, whatever happened
            sys.stderr.write(f"{type(failure).__name__}: {failure}\n")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _wait(self, child: int, stop_when: Callable[[], bool] | None) -> int:
        deadline = time.monotonic() + SECONDS_PER_COMMAND
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            if stop_when is not None and stop_when():
                os.kill(child, signal.SIGINT)
                stop_when = None
            time.sleep(0.005)
        # What one fork imported, the next ones find imported.
        if (learnt := self.folder / ".imported").exists():
            for name in set(learnt.read_text().split()) - set(sys.modules):
                importlib.import_module(name)
            learnt.unlink()
        return os.waitstatus_to_exitcode(ended[1])

    def normal(self, text: str) -> str:
        """The text without paths of this machine, times, dates and versions."""
        named = ((self.folder, "WORK"), (self.repository, "REPOSITORY"), (Path.home(), "~"))
        for path, name in named:
            text = text.replace(str(path), name)
        text = re.sub(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?(\.\d+)?(Z|\+00:00)?)?", "DATE", text)
        text = re.sub(r"[\d,.]+(k|M)? tokens (per second|/s)", "N tokens per second", text)
        text = re.sub(r"\b\d+(\.\d+)? ?(seconds|s|min|minutes|h)\b", "TIME", text)
        text = re.sub(r"\b\d+:\d\d(:\d\d)?\b", "TIME", text)
        text = re.sub(r"\b\d+\.\d+\.\d+\S*", "VERSION", text)
        return _HEX.sub("HASH", text)

    def record(
        self, name: str, commands: list[dict[str, Any]], *folders: str, names_only: bool = False
    ) -> None:
        """Write OUTPUT/NAME.json: the commands and every file below these folders."""
        files: dict[str, Any] = {}
        for folder in folders:
            root = self.folder / folder
            for path in sorted(root.rglob("*")):
                if path.is_file():
                    inside = self._name(path.relative_to(self.folder))
                    files[inside] = None if names_only else self._contents(path, name, inside)
        contents = without_clock({"commands": commands, "files": files})
        text = json.dumps(contents, indent=1, sort_keys=True, ensure_ascii=False)
        (self.output / f"{name}.json").write_text(text + "\n")

    def _name(self, path: Path) -> str:
        return _HEX.sub("HASH", str(path))

    def _contents(self, path: Path, case: str, name: str) -> Any:
        if path.suffix == ".safetensors":
            copy = self.output / "tensors" / case / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            return {"tensors": _tensors(path)}
        if path.suffix == ".json":
            return {"json": self._value(json.loads(path.read_text()))}
        if path.suffix == ".jsonl":
            return {"rows": [self._value(json.loads(row)) for row in path.read_text().splitlines()]}
        if path.suffix in (".yaml", ".yml", ".md", ".txt", ".csv", ".html", ".log"):
            # Figures inside the page are files beside it.
            text = re.sub(r"data:[a-z/+]+;base64,[A-Za-z0-9+/=]+", "FIGURE", path.read_text())
            text = self.normal(text)
            if path.suffix == ".csv":
                return {"table": list(csv.reader(text.splitlines()))}
            return {"text": text.splitlines()}
        return {"kind": path.suffix}

    def _value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self.normal(str(key)): self._value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if isinstance(value, str):
            return self.normal(value)
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value


def restart_in_environment(repository: Path) -> None:
    """Start this program again where the environment is another: it is read at the start."""
    # In front of any installed version.
    wanted = {**ENVIRONMENT, "PYTHONPATH": str(repository)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


@contextmanager
def temporary_folder() -> Generator[Path, None, None]:
    """A folder with no character in its name that Markdown or a URL would write differently."""
    folder = Path(tempfile.gettempdir()).resolve() / f"goldens{os.urandom(4).hex()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def private_folders(folder: Path) -> dict[str, str]:
    """Variables that keep caches of the libraries, and their settings, inside a folder."""
    names = ("HF_HOME", "MSAE_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR")
    return {name: str(folder / ".home" / name.lower()) for name in names}


def _is_progress(line: str) -> bool:
    if line.startswith(("error:", "failed:", "missing:", "warning:")):
        return False
    return not line.strip() or bool(re.search(r"\d ?%|\d+/\d+$|TIME|tokens per second", line))


def _tensors(path: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for name, tensor in load_file(path).items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        values = tensor.double()
        found[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype),
            "sha256": hashlib.sha256(raw).hexdigest(),
            "mean": float(values.mean()),
            "norm": float(values.norm()),
            "min": float(values.min()),
            "max": float(values.max()),
        }
    return found


def main() -> None:
    """Run every case and write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--of", type=Path, default=REPOSITORY, help="another checkout")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--fresh", action="store_true")
    given = parser.parse_args()
    repository = given.of.resolve()
    restart_in_environment(repository)
    output = given.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with temporary_folder() as folder:
        os.environ |= private_folders(folder)
        if not given.fresh:
            for name in SLOW_IMPORTS:
                importlib.import_module(name)
            import torch

            torch.set_num_threads(1)
        # After the environment is set: they import transformers.
        from cases import CASES
        from inputs import write_inputs

        work = Workplace(folder, output, given.fresh, repository)
        work.inputs.mkdir()
        write_inputs(work.inputs)
        for name, case in CASES.items():
            if given.only is not None and name not in given.only:
                continue
            started = time.perf_counter()
            case(work, name)
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
