"""Which questions the model answers, found once per model and questions and kept on disk.

SAEBench asks every question in all 24 orders of its choices, with and without the question itself:
by far most of the evaluation's work, and the same for every SAE. Its files are written by its own
code into a keyed folder, and copied from there into the artifacts of each SAE.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_bench.evals.unlearning.utils import metrics
from transformer_lens import HookedTransformer

from msae_plugin.common.cache import is_complete, keyed_folder, mark_complete, versions
from msae_plugin.evaluation.outcomes import ModelContext, Reporter
from msae_plugin.evaluation.saebench.patching import evaluation_environment
from msae_plugin.evaluation.saebench.unlearning.data import Questions
from msae_plugin.evaluation.saebench.unlearning.model import LetterAnswers

_KIND = "unlearning"
_DATA = "data"
_VERSIONS = ("sae-bench", "transformer-lens", "torch", "transformers", "tokenizers")
# It orders the ids in SAEBench's train and test files, which nothing reads: not the run's seed.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Knowledge:
    """What the model knows of one set of questions.

    Args:
        questions: The questions.
        answerable: How many it answers right in all 24 orders.
        folder: Folder with SAEBench's files on them.
    """

    questions: Questions
    answerable: int
    folder: Path

    def copy_to(self, artifacts: Path) -> None:
        """Put SAEBench's files where its code looks for them."""
        shutil.copytree(self.folder / _DATA, artifacts / _DATA, dirs_exist_ok=True)


def find_knowledge(
    context: ModelContext,
    model: HookedTransformer,
    answers: LetterAnswers,
    questions: Mapping[str, Questions],
    batch_size: int,
    report: Reporter,
) -> dict[str, Knowledge]:
    """Ask all questions, or read what was answered before. SAEBench must be adapted already.

    Args:
        context: The model and the root of the caches.
        model: The same model.
        answers: What answers in SAEBench's place.
        questions: By SAEBench's name.
        batch_size: Prompts at a time.
        report: Shows progress.

    Returns:
        By name, in the order of `questions`.
    """
    found: dict[str, Knowledge] = {}
    for name, asked in questions.items():
        key = _key(context, asked, answers, batch_size)
        folder = keyed_folder(context.cache, _KIND, key)
        if not is_complete(folder):
            answers.progress = partial(report, f"unlearning: asking {name} in all orders")
            try:
                with evaluation_environment(_SPLIT_SEED):
                    _ask(model, folder, name, batch_size)
            finally:
                answers.progress = None
            mark_complete(folder, key)
        found[name] = Knowledge(asked, len(_answerable(folder, name)), folder)
    return found


def _key(
    context: ModelContext, questions: Questions, answers: LetterAnswers, batch_size: int
) -> dict[str, Any]:
    prompts = [
        metrics.convert_wmdp_data_to_prompt(
            row["question"], row["choices"], prompt_format="GEMMA_INST_FORMAT"
        )
        for row in questions.rows
    ]
    return {
        "weights": context.weights_sha256,
        "dtype": context.dtype,
        "device": torch.device(context.device).type,
        "name": questions.name,
        "questions": questions.sha256,
        "tokens": answers.fingerprint(prompts),
        "batch_size": batch_size,
        "versions": versions(*_VERSIONS),
    }


def _ask(model: HookedTransformer, folder: Path, name: str, batch_size: int) -> None:
    metrics.save_target_question_ids(model, batch_size, str(folder), name)
    # Without any answerable question SAEBench's baseline stacks an empty list.
    if len(_answerable(folder, name)):
        metrics.get_baseline_metrics(
            model, batch_size, str(folder), name, {"target_metric": "correct"}
        )


def _answerable(folder: Path, name: str) -> list[int]:
    """Indices of the questions that are answered right in all orders."""
    full_name = name if name == "wmdp-bio" else f"mmlu-{name.replace('_', '-')}"
    file = folder / _DATA / "question_ids" / "all" / f"{full_name}_correct.csv"
    return [int(line) for line in file.read_text().split()]
