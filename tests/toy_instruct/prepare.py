"""The folder of the toy model, made on first use and found again afterwards."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import default_cache_dir, folder_written_atomically, write_json_atomic
from toy_instruct.invented_facts import (
    FORGET_QUESTIONS,
    RETAIN_QUESTIONS,
    Question,
    Subject,
    invent,
    lettered,
)
from toy_instruct.tokeniser import word_tokeniser
from toy_instruct.training import ORDERS, Recipe, train

logger = logging.getLogger(__name__)

TOY_HOOK = "blocks.0.hook_resid_post"
"""Where the toy's SAEs read: the words are there, the right choice is not yet marked. One layer
further on, the facts have been looked up, and clamping what the words are changes no answer."""

# Part of the key: raised whenever the code makes another model of the same recipe.
_CODE_VERSION = 1
_MIN_LEARNED = 0.95
_MODEL, _FORGET, _RETAIN = "model", "forget.jsonl", "retain.jsonl"


@dataclass(frozen=True)
class ToyInstruct:
    """A small model that knows two invented subjects by heart, and their questions and text."""

    folder: Path
    questions: Mapping[str, Path]
    forget_corpus: Path
    retain_corpus: Path

    def load_questions(self) -> dict[str, list[Question]]:
        """The questions by SAEBench's name of them."""
        return {
            name: [
                Question(row["question"], tuple(row["choices"]), row["answer"])
                for row in json.loads(file.read_text(encoding="utf-8"))
            ]
            for name, file in self.questions.items()
        }

    def unlearning_settings(self) -> dict[str, Any]:
        """Settings under which SAEBench's unlearning evaluation means something on this model."""
        return {
            "dataset_names": [FORGET_QUESTIONS, RETAIN_QUESTIONS],
            "questions": {name: str(path) for name, path in self.questions.items()},
            "forget_corpus": str(self.forget_corpus),
            "retain_corpus": str(self.retain_corpus),
            "dataset_size": 512,
            "seq_len": 64,
            "n_features_list": [10, 20],
            "multipliers": [25, 100],
            # SAEBench's .01 lets through what is active on a whole everyday word: each makes up
            # less than that of this text, and an untrained SAE scored .42 with it. With .003 a
            # latent on one word of the guilds passes, and costs the question that asks for it.
            "retain_thresholds": [0.0001, 0.0003, 0.001],
            "llm_batch_size": 32,
        }


def prepare_toy_instruct(
    cache_dir: Path | None = None, recipe: Recipe | None = None
) -> ToyInstruct:
    """Train the toy model once, or find it.

    The folder appears under its final name only when complete. With one thread on a slow core the
    training takes half a minute.
    """
    recipe = recipe or Recipe()
    subjects = invent(recipe.documents, recipe.seed)
    root = cache_dir if cache_dir is not None else default_cache_dir()
    target = root / f"toy-instruct-{_digest(recipe, subjects)}"
    if not target.is_dir():
        logger.info("training the toy instruct model once, into %s", target)
        try:
            with folder_written_atomically(target) as folder:
                _write(folder, recipe, subjects)
        except OSError as error:
            raise InputError(
                f"the toy model cannot be written to {target} ({error.strerror}): name another "
                "cache folder with MSAE_CACHE"
            ) from error
    return ToyInstruct(
        folder=target / _MODEL,
        questions={name: target / f"{name}.json" for name in subjects},
        forget_corpus=target / _FORGET,
        retain_corpus=target / _RETAIN,
    )


def _digest(recipe: Recipe, subjects: Mapping[str, Subject]) -> str:
    key = {
        "code": _CODE_VERSION,
        "recipe": asdict(recipe),
        "subjects": {name: asdict(subject) for name, subject in subjects.items()},
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _write(folder: Path, recipe: Recipe, subjects: Mapping[str, Subject]) -> None:
    texts = [
        text
        for name, subject in subjects.items()
        for text in (
            *subject.documents,
            *(lettered(name, question, ORDERS[0]) for question in subject.questions),
        )
    ]
    tokenizer = word_tokeniser(["user model Answer: (", *texts])
    model, learned = train(recipe, subjects, tokenizer)
    for name, subject in subjects.items():
        if learned[name] < _MIN_LEARNED * len(subject.questions):
            raise RunFailure(
                f"the toy model answers {learned[name]} of {len(subject.questions)} questions of "
                f"{name} right in all orders: change its recipe"
            )
        rows = [question.to_dict() for question in subject.questions]
        write_json_atomic(folder / f"{name}.json", rows)
    for name, file in ((FORGET_QUESTIONS, _FORGET), (RETAIN_QUESTIONS, _RETAIN)):
        lines = (json.dumps({"text": document}) for document in subjects[name].documents)
        (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    model.save_pretrained(folder / _MODEL)
    tokenizer.save_pretrained(folder / _MODEL)
    write_json_atomic(folder / "recipe.json", {**asdict(recipe), "learned": learned})
