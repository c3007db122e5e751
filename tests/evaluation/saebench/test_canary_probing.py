"""What the probing evaluations rely on in SAEBench and sae-probes. A failure here means that
upstream changed: read its new source before adapting the code, and then these tests.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import beartype.roar
import pytest
import sae_probes
import torch
from sae_bench.evals.sparse_probing import main as probing_main
from sae_bench.evals.sparse_probing import probe_training
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.evals.sparse_probing.eval_output import SparseProbingLlmMetrics
from sae_bench.evals.sparse_probing_sae_probes import main as sae_probes_main
from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
from sae_bench.sae_bench_utils import (
    activation_collection,
    dataset_info,
    dataset_utils,
    general_utils,
)
from sae_probes import generate_model_activations, run_baselines
from sae_probes.run_sae_evals import get_save_metrics_path

from msae_plugin.data.labelled_texts import HUB_DATASETS, SAEBENCH_PROBING_SETS
from msae_plugin.evaluation.outcomes import SAEBENCH_ID
from msae_plugin.evaluation.recipe import reported_counts
from msae_plugin.evaluation.saebench.patching import without_jaxtyping
from msae_plugin.evaluation.saebench.sae_probes import LARGEST_BATCH, MAX_TOKENS


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            probing_main.run_eval_single_sae,
            ["config", "sae", "model", "device", "artifacts_folder", "save_activations"],
        ),
        (
            dataset_utils.get_multi_label_train_test_data,
            ["dataset_name", "train_set_size", "test_set_size", "random_seed"],
        ),
        (
            dataset_utils.tokenize_data_dictionary,
            ["data", "tokenizer", "max_length", "device"],
        ),
        (activation_collection.get_bos_pad_eos_mask, ["tokens", "tokenizer"]),
        (general_utils.average_results_dictionaries, ["results_dict", "dataset_names"]),
        (
            general_utils.load_and_format_sae,
            ["sae_release_or_unique_id", "sae_object_or_sae_lens_id", "device"],
        ),
        (
            sae_probes_main.run_eval,
            ["config", "selected_saes", "device", "output_path", "force_rerun"],
        ),
        (
            generate_model_activations.ensure_dataset_activations,
            [
                "model_name", "dataset_short_names", "hook_names", "model_cache_path", "device",
                "max_seq_len", "batch_size", "OOD", "model",
            ],
        ),
        (
            sae_probes.run_baseline_evals,
            [
                "model_name", "hook_name", "setting", "method", "results_path",
                "model_cache_path", "datasets", "device", "seed",
            ],
        ),
    ],
)  # fmt: skip
def test_signatures(function: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_datasets_are_loaded_through_the_name_that_is_replaced() -> None:
    loaders = [
        dataset_utils.get_ag_news_dataset,
        dataset_utils.get_europarl_dataset,
        dataset_utils.get_github_code_dataset,
        dataset_utils.get_bias_in_bios_or_amazon_product_dataset,
        dataset_utils.get_amazon_sentiment_dataset,
    ]
    for loader in loaders:
        assert "load_dataset" in loader.__code__.co_names
    read = {
        name
        for name in vars(dataset_utils)
        if inspect.isfunction(function := getattr(dataset_utils, name))
        and "load_dataset" in function.__code__.co_names
    }
    assert read == {loader.__name__ for loader in loaders} | {"get_dataset_list_of_strs"}


def test_the_probing_sets_are_those_that_we_know() -> None:
    config = SparseProbingEvalConfig()
    assert config.dataset_names == list(SAEBENCH_PROBING_SETS)
    for name, hub_name in SAEBENCH_PROBING_SETS.items():
        classes = dataset_info.chosen_classes_per_dataset[name]
        expected = 2 if name.endswith("_sentiment") else HUB_DATASETS[hub_name].classes
        assert len(classes) == expected, name
    assert set(dataset_info.chosen_classes_per_dataset) == set(SAEBENCH_PROBING_SETS)
    # Defaults that the preflight's estimate of the disk repeats.
    defaults = (config.probe_train_set_size, config.probe_test_set_size, config.context_length)
    assert defaults == (4000, 1000, 128)


def test_the_models_side_is_stored_before_the_sae_is_asked() -> None:
    source = inspect.getsource(probing_main.run_eval_single_dataset)
    assert source.index("torch.save(acts") < source.index("get_sae_meaned_activations(")
    assert "sae." not in source[: source.index("get_sae_meaned_activations(")]
    names = activation_collection.get_sae_meaned_activations.__wrapped__
    assert "sae.encode" in inspect.getsource(names)
    # Its results are read from the file, which is named after the dataset alone.
    assert 'f"{dataset_name}_activations.pt"' in source


def test_the_results_have_fields_for_the_same_k_on_both_sides() -> None:
    fields = {field.name for field in dataclasses.fields(SparseProbingLlmMetrics)}
    assert fields == {f"llm_top_{k}_test_accuracy" for k in reported_counts("sparse_probing")} | {
        "llm_test_accuracy"
    }


def test_probes_fail_under_jaxtypings_checks_and_run_without_them() -> None:
    def activations(n: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(n)
        return {c: torch.randn(n, 4, generator=generator) + i for i, c in enumerate("ab")}

    with pytest.raises(beartype.roar.BeartypeCallHintViolation, match="train_dataset_size"):
        probe_training.train_probe_on_activations(activations(20), activations(10))
    # The decorators looked at the switch when SAEBench was imported; they look again when called.
    with without_jaxtyping():
        _, accuracies = probe_training.train_probe_on_activations(activations(20), activations(10))
    assert set(accuracies) == {"a", "b"}


def test_sae_probes_sizes_and_names_are_those_that_we_use() -> None:
    defaults = inspect.signature(generate_model_activations.ensure_dataset_activations).parameters
    assert defaults["max_seq_len"].default == MAX_TOKENS
    assert defaults["batch_size"].default == LARGEST_BATCH
    config = SparseProbingSaeProbesEvalConfig()
    assert config.results_path == "artifacts/sparse_probing_sae_probes"
    assert config.model_cache_path == "artifacts/sparse_probing_sae_probes--model_acts_cache"
    assert config.dataset_names == sae_probes.DATASETS
    baseline = run_baselines.get_baseline_save_path("d", "h", "logreg", "model", "r")
    assert str(baseline) == "r/baseline_results_model/normal_setting/d_h_logreg.json"
    assert general_utils.get_results_filepath("out", "name", SAEBENCH_ID) == (
        f"out/name_{SAEBENCH_ID}_eval_results.json"
    )


def test_binarized_results_are_still_looked_for_under_another_name() -> None:
    # While this holds, `binarize: true` is refused.
    written = get_save_metrics_path("d", "h", "l1", "m", "r", binarize=True)
    source = inspect.getsource(sae_probes_main.run_eval)
    assert 'expected_suffix = f"_{sae.cfg.hook_name}_{config.reg_type}.json"' in source
    assert not written.name.endswith("_h_l1.json")
