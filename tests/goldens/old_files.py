"""Make the folders of `tests/fixtures/v0_1`: what users of that version have on their disks.

    python tests/goldens/old_files.py OUTPUT

`README.md` beside the fixtures names the commit at which this was run.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from freeze import (
    REPOSITORY,
    Workplace,
    private_folders,
    restart_in_environment,
    temporary_folder,
)

TEXT = {".json", ".jsonl", ".yaml", ".csv", ".md", ".txt"}
SMALL = {"d_sae": 24, "k": 4}
# What is written out although nothing has to be: later versions know these keys no more.
EXPLICIT = {
    "decode_kernel": "embedding_bag",
    "cuda_graphs": False,
    "b_dec_init": "mean",
    "topk_threshold_lr": 0.05,
}


def recipes() -> dict[str, Any]:
    """Recipes by file name; paths are relative to the folder they are in."""
    from inputs import CORE, GROUND_TRUTH, PROTOCOL, training_recipe

    small = training_recipe(sae=SMALL)
    small["training"]["tokens"] = 80 * 128
    long = training_recipe(sae=SMALL)
    # 200 short steps with a checkpoint after every fifth: Ctrl-C comes long before the last.
    long["training"] |= {"tokens": 200 * 128, "n_checkpoints": 40, "keep_checkpoints": 1}
    explicit = {**small, "sae": {**SMALL, **EXPLICIT}}
    explicit["training"] = {**small["training"], "keep_checkpoints": 0}
    comparison = {
        **GROUND_TRUTH,
        "l0": [3],
        "saes": {"default": {"preset": "default"}, "batchtopk": {"architecture": "batchtopk"}},
    }
    comparison["training"] = {**comparison["training"], "tokens": 20 * 128}
    return {
        "finished.yaml": small,
        "explicit.yaml": explicit,
        "interrupted.yaml": long,
        "comparison.yaml": comparison,
        "evaluation.yaml": {**PROTOCOL, "evaluations": {"core": CORE}},
    }


def make(work: Workplace) -> None:
    """Run the commands, each into a folder of its own."""
    checkpoints = work.folder / "interrupted" / "checkpoints"

    def some_steps_are_done() -> bool:
        return any(int(path.name) >= 20 * 128 for path in checkpoints.glob("[0-9]*"))

    def done(status: int, *words: str | Path, **options: Any) -> None:
        record = work.run(*words, **options)
        if record["status"] != status:
            raise SystemExit(json.dumps(record, indent=1))

    for name in ("finished", "explicit"):
        done(0, "train", "-c", f"{name}.yaml", "-o", work.folder / name)
    interrupted = ("train", "-c", "interrupted.yaml", "-o", work.folder / "interrupted")
    done(130, *interrupted, stop_when=some_steps_are_done)
    comparison = work.folder / "comparison"
    done(0, "compare", "-c", "comparison.yaml", "-o", comparison, "--no-page")
    run = work.folder / "finished"
    done(0, "eval", run, "-c", "evaluation.yaml", "-o", work.folder / "evaluation")


def main() -> None:
    """Make the folders and leave them in OUTPUT, with no path of this machine in them."""
    restart_in_environment(REPOSITORY)
    output = Path(sys.argv[1])
    with temporary_folder() as folder:
        work = Workplace(folder, output)
        os.environ |= private_folders(folder)
        # After the environment is set: it imports transformers.
        from inputs import write_inputs

        work.inputs.mkdir()
        write_inputs(work.inputs)
        for name, recipe in recipes().items():
            (work.inputs / name).write_text(yaml.safe_dump(recipe))
        make(work)
        # Of the same length: a checkpoint knows the sizes of its files.
        elsewhere = "/home/ada/saes".ljust(len(str(folder)), "-")[: len(str(folder))]
        for name in ("finished", "explicit", "interrupted", "comparison", "evaluation"):
            shutil.copytree(folder / name, output / name, dirs_exist_ok=True)
        for name in recipes():
            shutil.copyfile(work.inputs / name, output / name)
        for path in output.rglob("*"):
            if path.suffix in TEXT:
                text = path.read_text().replace(str(folder), elsewhere)
                path.write_text(text.replace(str(REPOSITORY), "/home/ada/msae"))


if __name__ == "__main__":
    main()
