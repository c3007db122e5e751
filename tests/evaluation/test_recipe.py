"""Evaluation configs: what is read, what is refused, where paths lead."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import find_recipe
from msae_plugin.evaluation.recipe import EvalConfig

CORE = {"core": {"context_size": 64}}


def config(evaluations: Any = None, *overrides: str, **values: Any) -> EvalConfig:
    return EvalConfig.from_dict(
        {"evaluations": CORE if evaluations is None else evaluations, **values}, overrides
    )


def refusal(evaluations: Any = None, *overrides: str, **values: Any) -> str:
    with pytest.raises(InputError) as caught:
        config(evaluations, *overrides, **values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_exactly_the_given_keys_in_the_types_of_saebench() -> None:
    loaded = config(
        {
            "core": {"context_size": "64", "batch_size_prompts": 2.0},
            "scr": {"probe_lr": "1e-3", "llm_batch_size": None},
            "meta_structure": None,
        }
    )
    assert loaded.evaluations == {
        "core": {"context_size": 64, "batch_size_prompts": 2},
        "scr": {"probe_lr": 1e-3},
        "meta_structure": {},
    }
    assert isinstance(loaded.evaluations["core"]["batch_size_prompts"], int)
    assert (loaded.model.name, loaded.model.dtype, loaded.seeds) == (None, "float32", [42])
    assert EvalConfig.from_dict(loaded.to_dict()) == loaded


REFUSED: list[tuple[Any, tuple[str, ...], str]] = [
    ({"kore": {}}, (), "evaluation 'kore' is not known: did you mean core?"),
    ({"mdl": {}}, (), "evaluation 'mdl' is not known: choose from core,"),
    ({}, (), "'evaluations' is empty"),
    ({"core": {"contxt_size": 3}}, (), "unknown key 'contxt_size' in 'evaluations.core': did you"),
    ({"core": {"context_size": "many"}}, (), "'evaluations.core.context_size' must be a whole"),
    ({"core": {"context_size": 1}}, (), "evaluations.core.context_size must be at least 2, not 1"),
    ({"core": {"context_size": None}}, (), "must be a whole number, not None"),
    ({"core": {"model_name": "x"}}, (), "core.model_name is not to be set: the model is model.n"),
    ({"core": {"random_seed": 1}}, (), "seeds are in seeds"),
    ({"core": {"llm_dtype": "float32"}}, (), "the model's dtype is model.dtype"),
    ({"core": {"compute_kl": True}}, (), "core always computes it"),
    ({"core": 3}, (), "'evaluations.core' must be a mapping"),
    ({"sparse_probing": {"k_values": []}}, (), "k_values is empty"),
    ({"sparse_probing": {"k_values": [0]}}, (), "no field for 0: choose from 1, 2, 5, 10"),
    ({"sparse_probing": {"k_values": [3]}}, (), "no field for 3: choose from 1, 2, 5, 10"),
    ({"sparse_probing": {"k_values": [1, 1]}}, (), "k_values has 1 twice"),
    ({"sparse_probing": {"k_values": ["one"]}}, (), "'evaluations.sparse_probing.k_values[0]' mu"),
    ({"sparse_probing": {"probe_test_set_size": -4}}, (), "must be at least 1, not -4"),
    (
        {"sparse_probing": {"dataset_names": ["fancyzhx/agnews"]}},
        (),
        "'fancyzhx/agnews' is not known: did you mean fancyzhx/ag_news?",
    ),
    (
        {"sparse_probing": {"dataset_names": ["packaged:bbc-topic"]}},
        (),
        "did you mean packaged:bbc-topics",
    ),
    ({"sparse_probing_sae_probes": {"ks": [7]}}, (), "no field for 7"),
    ({"sparse_probing_sae_probes": {"setting": "scarcity"}}, (), "must be normal, not 'scarcity'"),
    ({"sparse_probing_sae_probes": {"binarize": True}}, (), "does not find sae-probes' results"),
    ({"sparse_probing_sae_probes": {"results_path": "x"}}, (), "results go to --output"),
    ({"sparse_probing_sae_probes": {"dataset_names": ["1_x"]}}, (), "'1_x' is not known"),
    (
        {"sparse_probing_sae_probes": {"dataset_names": ["117_us_state"]}},
        (),
        "did you mean 117_us_state_FL",
    ),
    (
        {"sparse_probing_sae_probes": {"dataset_names": ["117_us_state_FL"] * 2}},
        (),
        "twice: give it once",
    ),
    ({"sparse_probing_sae_probes": {"reg_type": "l3"}}, (), "must be l1 or l2"),
    ({"sparse_probing_sae_probes": {"baseline_method": "svm"}}, (), "must be logreg or"),
    ({"sparse_probing_sae_probes": {"model_cache_path": "x"}}, (), "caches are in cache"),
    ({"sparse_probing": {"dataset_names": ["fancyzhx/ag_news"] * 2}}, (), "twice: give it once"),
    ({"sparse_probing": {"llm_dtype": "bfloat16"}}, (), "the model's dtype is model.dtype"),
    ({"scr": {"perform_scr": True}}, (), "the evaluations are scr and tpp"),
    ({"tpp": {"n_values": [3]}}, (), "no field for 3: choose from 2, 5, 10"),
    ({"scr": {"dataset_names": ["fancyzhx/ag_news"]}}, (), "'fancyzhx/ag_news' is not known"),
    ({"scr": {"column1_vals_lookup": {"a": [["one"]]}}}, (), "evaluations.scr.column1_vals_look"),
    ({"ravel": {"train_mdas": True}}, (), "it ignores the SAE"),
    ({"ravel": {"train_test_split": 1.5}}, (), "must be between 0 and 1, not 1.5"),
    ({"absorption": {"min_feats_for_eval": 0}}, (), "min_feats_for_eval"),
    ({"autointerp": {"override_latents": [1]}}, (), "with override_latents set n_latents: null"),
    ({"meta_structure": {"learning_rate": "nan"}}, (), "must be a finite number"),
    (CORE, ("seeds=[]",), "'seeds' is empty"),
    (CORE, ("seeds=[1, 2, 1]",), "'seeds' has 1 twice"),
    (CORE, ("seeds=[-1]",), "'seeds' has -1"),
    (CORE, ("seeds=[a]",), "'seeds[0]' must be a whole number"),
    (CORE, ("model.dtype=int8",), "'model.dtype' must be one of float32"),
    (CORE, ("model.device=gpu",), "'model.device' must be auto, cpu"),
    (CORE, ("modell.name=x",), "unknown key 'modell': did you mean 'model'?"),
    (CORE, ("hook=blocks.3",), "names a block, not a hook point"),
    (CORE, ("hook=model.layers.3.mlp",), "SAEBench reads TransformerLens' hook points"),
    (CORE, ("seeds",), "--set 'seeds' is not of the form"),
    (CORE, ("evaluations.core=null",), "'evaluations' is empty"),
    (CORE, ("evaluations.core.context_size.x=1",), "'evaluations.core.context_size' has no keys"),
]


@pytest.mark.parametrize(("evaluations", "overrides", "said"), REFUSED, ids=lambda v: str(v)[:40])
def test_refusals_say_what_is_wrong(evaluations: Any, overrides: Any, said: str) -> None:
    assert said in refusal(evaluations, *overrides)


def test_a_latent_or_a_number_of_latents() -> None:
    loaded = config({"autointerp": {"n_latents": None, "override_latents": [0, 7]}})
    assert loaded.evaluations["autointerp"] == {"n_latents": None, "override_latents": [0, 7]}


def test_overrides() -> None:
    loaded = config(
        CORE,
        "evaluations.core.context_size=32",
        "evaluations.tpp={llm_batch_size: 8}",
        "evaluations.absorption.max_k_value=3",
        "seeds=[0, 1]",
        "model.name=gpt2",
        "hook=model.layers.4",
    )
    assert loaded.evaluations == {
        "core": {"context_size": 32},
        "tpp": {"llm_batch_size": 8},
        "absorption": {"max_k_value": 3},
    }
    assert (loaded.seeds, loaded.model.name) == ([0, 1], "gpt2")
    assert loaded.hook == "blocks.4.hook_resid_post"
    assert list(config({**CORE, "tpp": {}}, "evaluations.tpp=null").evaluations) == ["core"]


FILE = """
model: {name: ./models/mine}
cache: caches
datasets: {"fancyzhx/ag_news": data/ag_news, "Skylion007/openwebtext": data/web}
evaluations:
  core: {dataset: texts/reviews.jsonl}
  sparse_probing: {dataset_names: [fancyzhx/ag_news]}
  unlearning:
    model: some-lab/instruct
    forget_corpus: bio.jsonl
    questions: {wmdp-bio: questions, human_aging: some-lab/aging}
"""


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = tmp_path / "protocols", tmp_path / "elsewhere"
    for folder in (home / "questions", elsewhere / "some-lab" / "aging"):
        folder.mkdir(parents=True)
    (home / "mine.yaml").write_text(FILE)
    monkeypatch.chdir(elsewhere)
    loaded = EvalConfig.load(Path("../protocols/mine.yaml"))
    assert loaded.model.name == str(home / "models" / "mine")
    assert loaded.cache == str(home / "caches")
    assert loaded.evaluations["core"]["dataset"] == str(home / "texts" / "reviews.jsonl")
    unlearning = loaded.evaluations["unlearning"]
    assert unlearning["model"] == "some-lab/instruct"
    assert unlearning["forget_corpus"] == str(home / "bio.jsonl")
    # A folder of that name beside the file is meant; one in the working directory is not.
    assert unlearning["questions"] == {
        "wmdp-bio": str(home / "questions"),
        "human_aging": "some-lab/aging",
    }
    assert loaded.evaluations["sparse_probing"]["datasets"] == {
        "fancyzhx/ag_news": str(home / "data" / "ag_news")
    }
    # What is typed is relative to where it is typed.
    typed = EvalConfig.load(
        home / "mine.yaml", ["cache=mine", "evaluations.core.dataset=./some-lab"]
    )
    assert typed.cache == str(elsewhere / "mine")
    assert typed.evaluations["core"]["dataset"] == str(elsewhere / "some-lab")
    assert EvalConfig.from_dict(loaded.to_dict()) == loaded


def test_local_copies_go_to_the_evaluations_that_read_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    copies = {
        "LabHC/bias_in_bios": "/bios",
        "Skylion007/openwebtext": "/web",
        "adamkarvonen/ravel_prompts": "/ravel",
        "some/other": "/other",
    }
    loaded = config(
        {
            "core": {"dataset": "Skylion007/openwebtext"},
            "scr": {},
            "sparse_probing": {"dataset_names": ["fancyzhx/ag_news"]},
            "ravel": {},
        },
        datasets=copies,
    )
    assert loaded.evaluations == {
        "core": {"dataset": "/web"},
        "scr": {"datasets": {"LabHC/bias_in_bios": "/bios"}},
        "sparse_probing": {"dataset_names": ["fancyzhx/ag_news"]},
        "ravel": {"datasets": {"adamkarvonen/ravel_prompts": "/ravel"}},
    }
    assert "none of the evaluations reads 'some/other'" in caplog.text


def test_files_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("offline", "eval").name == "offline.yaml"
    (tmp_path / "offline").write_text("evaluations: {core: }")
    assert EvalConfig.load("offline").evaluations == {"core": {}}
    with pytest.raises(InputError, match="'offlin' does not exist; did you mean offline"):
        EvalConfig.load("offlin")
    with pytest.raises(InputError, match="is a folder; shipped ones are offline,"):
        EvalConfig.load(tmp_path)
    (tmp_path / "broken.yaml").write_text("evaluations: {core: {}}\nseed: 3")
    with pytest.raises(InputError, match="unknown key 'seed': did you mean 'seeds'"):
        EvalConfig.load(tmp_path / "broken.yaml")


def test_core_below_float32_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {dtype: bfloat16}\nevaluations: {core: {}, tpp: {}}")
    with caplog.at_level(logging.WARNING):
        loaded = EvalConfig.load(file)
    (warning,) = loaded.warnings()
    assert "core in bfloat16: SAEBench rounds its numbers to 3 digits" in warning
    assert f"mine.yaml: {warning}" in caplog.text
    assert config({"tpp": {}}, "model.dtype=bfloat16").warnings() == []
    assert config().warnings() == []


def test_without_sae_bench_the_rest_is_still_checked(without: Callable[..., None]) -> None:
    without("sae_bench")
    assert config({"core": {"anything": 5}}).evaluations == {"core": {"anything": 5}}
    assert "is not to be set" in refusal({"core": {"model_name": "x"}})
    assert "must be at least 2" in refusal({"core": {"context_size": 0}})


def test_importing_imports_no_saebench() -> None:
    code = (
        "import sys, msae_plugin.evaluation.recipe, msae_plugin.evaluation.preflight, "
        "msae_plugin.saes.load\n"
        "print([m for m in sys.modules if m.startswith(('sae_bench', 'sae_probes'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
