"""What `others` and `command` rely on in SAEBench: fails when upstream changes it."""

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import sae_bench
from sae_bench.evals.absorption import common as absorption_common
from sae_bench.evals.absorption import main as absorption_main
from sae_bench.evals.autointerp import main as autointerp_main
from sae_bench.evals.meta_structure import main as meta_structure_main
from sae_bench.evals.ravel import instance as ravel_instance
from sae_bench.evals.ravel import main as ravel_main
from sae_bench.evals.scr_and_tpp import dataset_creation
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp_main
from sae_bench.sae_bench_utils import dataset_utils, general_utils
from sae_probes.run_baselines import METHODS

from msae_plugin.evaluation.outcomes import reliability
from msae_plugin.evaluation.preflight import RAVEL_ARCHITECTURES, RAVEL_DATASET, RAVEL_FILES
from msae_plugin.evaluation.recipe import SCHEMAS, config_class, reported_counts, result_fields

MODULES: dict[str, Any] = {
    "absorption": absorption_main,
    "scr": scr_and_tpp_main,
    "ravel": ravel_main,
    "autointerp": autointerp_main,
    "meta_structure": meta_structure_main,
}


@pytest.mark.parametrize("kind", MODULES)
def test_run_eval_takes_what_it_is_given(kind: str) -> None:
    parameters = inspect.signature(MODULES[kind].run_eval).parameters
    expected = {"config", "selected_saes", "device", "output_path", "force_rerun"}
    expected |= {"api_key"} if kind == "autointerp" else set()
    expected |= {"save_activations", "clean_up_activations"} if kind == "scr" else set()
    assert expected <= parameters.keys()
    required = {n for n, p in parameters.items() if p.default is inspect.Parameter.empty}
    assert required <= expected


def test_models_are_loaded_by_name_where_they_are_replaced() -> None:
    for kind in ("absorption", "scr", "autointerp"):
        assert "HookedTransformer.from_pretrained_no_processing(" in inspect.getsource(
            MODULES[kind].run_eval
        )
    assert not hasattr(meta_structure_main, "HookedTransformer")
    source = inspect.getsource(ravel_main.run_eval)
    assert "config.model_name = LLM_NAME_MAP[config.model_name]" in source
    assert "AutoModelForCausalLM.from_pretrained(" in source
    assert "torch_dtype=llm_dtype" in source
    assert "AutoTokenizer.from_pretrained(config.model_name)" in inspect.getsource(ravel_main)


def test_data_are_loaded_where_they_are_replaced() -> None:
    assert callable(dataset_creation.load_dataset)
    assert callable(dataset_utils.load_dataset)
    assert "load_dataset(dataset_name)" in inspect.getsource(dataset_creation.get_train_test_data)
    source = inspect.getsource(ravel_instance.RAVELInstance.load_files)
    assert "snapshot_download(" in source
    assert f'repo_id="{RAVEL_DATASET}"' in source
    for part in RAVEL_FILES:
        assert f"ravel_{{entity_type}}_{part}.json" in source
    layers = inspect.getsource(ravel_main.activation_collection.get_module)
    for architecture in RAVEL_ARCHITECTURES:
        assert architecture in layers


def test_absorption_keeps_its_files_where_it_is_told() -> None:
    k_sparse = inspect.signature(absorption_main.run_k_sparse_probing_experiment).parameters
    absorption = inspect.signature(absorption_main.run_feature_absortion_experiment).parameters
    # The defaults are inside the package: hence the replacement.
    package = Path(sae_bench.__file__).parent
    for parameters, names in (
        (k_sparse, ("probes_dir", "experiment_dir")),
        (absorption, ("probes_dir", "experiment_dir", "sparse_probing_experiment_dir")),
    ):
        for name in names:
            assert package in Path(parameters[name].default).parents
    train = inspect.signature(absorption_common.train_and_save_probes).parameters
    assert list(train)[:5] == ["model", "layers", "base_template", "pos_idx", "probes_dir"]
    assert "device" in train
    load = inspect.getsource(absorption_common.load_or_train_probe)
    assert "if not probe_path.exists():" in load
    # Too few letters: the loop ends without a result.
    assert "config.min_feats_for_eval" in inspect.getsource(absorption_main.run_eval)


def test_results_are_named_and_shaped_as_expected() -> None:
    assert general_utils.get_results_filepath("folder", "name", "custom_sae") == str(
        Path("folder") / "name_custom_sae_eval_results.json"
    )
    for evaluation in reliability():
        fields = result_fields(evaluation)
        assert fields
        assert all(isinstance(item.default.description, str) for item in fields.values())
    assert "train_time_seconds" in result_fields("meta_structure")


@pytest.mark.parametrize("evaluation", SCHEMAS)
def test_settings_that_are_fixed_or_chosen_exist(evaluation: str) -> None:
    schema, cls = SCHEMAS[evaluation], config_class(evaluation)
    assert cls is not None
    names = {item.name for item in dataclasses.fields(cls)}
    assert schema.fixed.keys() <= names
    assert schema.choices.keys() <= names
    assert not schema.own.keys() & names
    if schema.counted is not None:
        assert schema.counted[0] in names
        assert reported_counts(evaluation)
    assert hasattr(
        importlib.import_module(f"sae_bench.evals.{schema.package}.eval_output"), schema.results
    )


def test_baseline_methods_are_sae_probes_own() -> None:
    assert tuple(SCHEMAS["sparse_probing_sae_probes"].choices["baseline_method"]) == tuple(METHODS)


def test_ravel_reads_two_of_its_settings_nowhere() -> None:
    folder = Path(ravel_main.__file__).parent
    sources = [p.read_text() for p in folder.glob("*.py") if p.name != "eval_config.py"]
    for name in ("force_dataset_recompute", "top_n_templates"):
        assert not any(f"config.{name}" in source for source in sources)
