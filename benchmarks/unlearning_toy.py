"""Unlearning on the toy instruct model: trained SAEs against untrained ones, seed by seed.

    python benchmarks/unlearning_toy.py --seeds 0 1 2 3

The toy model is trained once and found again afterwards. Each seed gives a trained SAE and the same
SAE before its first step at the same L0; both go through SAEBench's sweep with the settings of
`ToyInstruct.unlearning_settings`, which `--set` changes for trials (a name of `ToySAERecipe` or of
the settings, its value in JSON). The last lines are means and ranges.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import torch

from msae_plugin.common.files import tensors_sha256
from msae_plugin.evaluation.outcomes import EvaluationRun, ModelContext
from msae_plugin.evaluation.saebench.adapter import run_evaluation
from msae_plugin.models.loading import load_language_model
from msae_plugin.saes.load import EvaluatedSAE

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the toy model of the tests
from toy_instruct import (
    TOY_HOOK,
    ToySAERecipe,
    prepare_toy_instruct,
    toy_activations,
    train_toy_sae,
    untrained_toy_sae,
)

COLUMNS = (
    "unlearning_score",
    "n_forget_features",
    "n_qualifying_interventions",
    "n_interventions",
    "best_retained_accuracy",
    "lowest_forget_accuracy",
)
MAKERS = {"trained": train_toy_sae, "untrained": untrained_toy_sae}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    changes = {name: json.loads(value) for name, value in (word.split("=", 1) for word in args.set)}
    of_sae = {field.name for field in fields(ToySAERecipe)} & changes.keys()
    recipe = ToySAERecipe(**{name: changes.pop(name) for name in of_sae})
    toy = prepare_toy_instruct()
    settings = toy.unlearning_settings()
    unknown = changes.keys() - settings.keys()
    if unknown:
        parser.error(f"--set: neither the recipe nor the settings have {', '.join(unknown)}")
    model = load_language_model(str(toy.folder), [TOY_HOOK])
    activations = toy_activations(toy, model)
    subjects: list[EvaluatedSAE] = []
    for seed in args.seeds:
        for kind, make in MAKERS.items():
            sae = make(toy, model, seed, recipe, activations)
            name, digest = f"{kind}{seed}", tensors_sha256(sae.state_dict())
            subjects.append(EvaluatedSAE(name, name, sae, digest, "toy-instruct", TOY_HOOK))
    with tempfile.TemporaryDirectory(prefix="msae-toy-") as folder:
        context = ModelContext(
            language_model=model,
            weights_sha256=tensors_sha256(model.model.state_dict()),
            dtype="float32",
            device="cpu",
            name="toy-instruct",
            cache=Path(folder) / "cache",
        )
        run = EvaluationRun("unlearning", context, settings | changes, 42, Path(folder) / "out")
        outcomes = run_evaluation(run, subjects)
    print("| SAE | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for name, outcome in outcomes.items():
        cells = [f"{outcome.metrics.get(column, float('nan')):.3g}" for column in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + f" | {outcome.reason or ''}")
    for kind in MAKERS:
        scores = [
            outcome.metrics["unlearning_score"]
            for name, outcome in outcomes.items()
            if name.rstrip("0123456789") == kind and outcome.status == "measured"
        ]
        if scores:
            mean = sum(scores) / len(scores)
            print(f"{kind}: mean {mean:.2f}, {min(scores):.2f} to {max(scores):.2f}")


if __name__ == "__main__":
    main()
