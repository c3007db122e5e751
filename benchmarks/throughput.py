"""Tokens per second from text to trained SAE: `msae train`, SAELens, sparsify, dictionary-learning.

    python benchmarks/throughput.py                                  # all, about half an hour
    python benchmarks/throughput.py --trainers saelens ours ours-default --repeats 5

Every trainer reads the same documents, runs the same layer of the same language model (SmolLM2 of
the packages, from one folder) and trains one SAE of the same width, k and batch. A trainer runs in
a process of its own, on one torch thread, at two lengths in turn with the others. Rates come from
the difference of the two lengths, so that imports, loading, and what is done once at the end
cancel; those are the column "once". Processor time stands beside wall time: on a machine that does
other work only the first can be compared.

What the trainers differ in and cannot be told: sparsify has TopK, runs the whole language model and
has no buffer that mixes activations; dictionary-learning computes BatchTopK densely. All run the
language model in bfloat16. "expl. variance" is that of the saved SAE on the same 4,096 held-out
activations.

sparsify and dictionary-learning are installed into build/throughput, without what the project's
environment has; dictionary-learning pins transformers below 5, and gets its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msae_plugin.models.packaged import prepare_packaged_model

HERE = Path(__file__).parent
WORK = HERE.parent / "build" / "throughput"
MODEL, LAYER, CONTEXT, D_IN = "packaged:smollm2-135m", 9, 128, 576
# Sequences in the buffers that mix activations. A larger one is filled further beyond the last
# batch, by another amount at each length: noise in a rate from the difference of two lengths.
BUFFER = 16


@dataclass(frozen=True)
class Trainer:
    """A script of `trainers/` and what it needs beside the project's environment."""

    script: str
    arguments: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    version_of: str = "msae-plugin"


# fmt: off
_SPARSIFY = (
    "eai-sparsify==1.3.3", "schedulefree", "simple-parsing", "natsort", "docstring-parser",
    "accelerate", "psutil",
)
_DICTIONARY_LEARNING = (
    "dictionary-learning==0.1.0", "nnsight==0.3.7", "transformers<5", "huggingface-hub<1",
    "tokenizers<0.23", "accelerate", "python-socketio", "python-engineio", "simple-websocket",
    "wsproto", "bidict", "msgspec", "websocket-client", "h11", "zstandard", "circuitsvis",
    "importnb", "wandb",
)
# fmt: on
TRAINERS = {
    "saelens": Trainer("sae_lens_runner", version_of="sae-lens"),
    "ours": Trainer("msae_train", ("batchtopk",)),
    "ours-default": Trainer("msae_train", ("default",)),
    "ours-nested": Trainer("msae_train", ("nested",)),
    "sparsify": Trainer("sparsify_trainer", packages=_SPARSIFY, version_of="eai-sparsify"),
    "dictionary-learning": Trainer(
        "dictionary_learning_loop",
        packages=_DICTIONARY_LEARNING,
        version_of="dictionary-learning",
    ),
}


@dataclass(frozen=True)
class Measured:
    """One run of a trainer."""

    wall: float
    processor: float
    peak_gib: float
    explained_variance: float


def environment(trainer: Trainer, name: str) -> dict[str, str]:
    """The variables of a trainer's process; installs its packages on first use."""
    paths = [str(HERE.parent)]
    if trainer.packages:
        site = WORK / "site" / name
        if not (site / "complete").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
            subprocess.run([*pip, str(site), *trainer.packages], check=True)
            (site / "complete").touch()
        paths.insert(0, str(site))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(WORK / "datasets"),
        "WANDB_MODE": "disabled",
        "SPARSIFY_DISABLE_TRITON": "1",  # its sparse decoder has no other way to run on a CPU
    }


def version(trainer: Trainer, name: str) -> str:
    """The version measured."""
    own = [str(WORK / "site" / name)] if trainer.packages else []
    found = importlib.metadata.distributions(name=trainer.version_of, path=own + sys.path)
    return next(iter(found)).version


def run(name: str, task: dict[str, Any]) -> Measured:
    """Run a trainer once, alone in its process.

    Raises:
        RuntimeError: If it fails; its output is shown.
    """
    trainer = TRAINERS[name]
    folder = WORK / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({**task, "output": str(folder / "output")}))
    command = [
        sys.executable,
        str(HERE / "trainers" / f"{trainer.script}.py"),
        str(folder / "task.json"),
    ]
    log = folder / "log.txt"
    shutil.rmtree(folder / "output", ignore_errors=True)
    begin = os.times().elapsed
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *trainer.arguments],
            env=environment(trainer, name),
            stdout=stream,
            stderr=stream,
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{name} failed:\n{log.read_text()[-3000:]}")
    last = [
        line for line in log.read_text().splitlines() if line.startswith("explained variance ")
    ][-1]
    return Measured(
        wall=os.times().elapsed - begin,
        processor=usage.ru_utime + usage.ru_stime,
        peak_gib=usage.ru_maxrss / 2**20,
        explained_variance=float(last.split()[-1]),
    )


def prepare_inputs(tokens: int) -> dict[str, str]:
    """Model folder, text and held-out activations that all trainers share."""
    from trainers.inputs import write_inputs  # loads the language model: not for --help

    model = prepare_packaged_model(MODEL)
    return write_inputs(WORK / "inputs", model, tokens, layer=LAYER, context=CONTEXT)


def main(arguments: list[str] | None = None) -> None:
    """Print one row per trainer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=[6144, 67584], metavar=("SHORT", "LONG")
    )
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-3, help="of those that use Adam")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    short, long = chosen.tokens

    task: dict[str, Any] = {
        **prepare_inputs(2 * long), "layer": LAYER, "context": CONTEXT, "d_in": D_IN,
        "buffer": BUFFER,
        "d_sae": chosen.d_sae, "k": chosen.k, "batch": chosen.batch, "lr": chosen.lr,
    }  # fmt: skip
    runs: dict[tuple[str, int], list[Measured]] = {}
    for repeat in range(chosen.repeats):
        for tokens in (short, long):
            for name in chosen.trainers:
                measured = run(name, {**task, "tokens": tokens, "seed": repeat})
                runs.setdefault((name, tokens), []).append(measured)
                print(f"{name} {tokens} tokens: {measured}", file=sys.stderr, flush=True)

    print(f"torch {torch.__version__}, SmolLM2-135M, layer {LAYER}, {chosen}")
    print(
        "| trainer | version | tokens/s of processor | of wall | once, s | GiB | expl. variance |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in chosen.trainers:
        brief, whole = runs[name, short], runs[name, long]
        pairs = list(zip(brief, whole, strict=True))
        rates = [(long - short) / (b.processor - a.processor) for a, b in pairs]
        walls = [(long - short) / (b.wall - a.wall) for a, b in pairs]
        once = [a.processor - short / rate for (a, _), rate in zip(pairs, rates, strict=True)]
        print(
            f"| {name} | {version(TRAINERS[name], name)} | {_median_and_range(rates)} "
            f"| {_median_and_range(walls)} | {statistics.median(once):.0f} "
            f"| {max(m.peak_gib for m in whole):.1f} "
            f"| {statistics.mean(m.explained_variance for m in whole):.3f} |"
        )


def _median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    main()
