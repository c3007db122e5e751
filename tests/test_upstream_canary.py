"""What `msae_plugin.upstream` relies on in SAELens and TransformerLens still exists."""

import inspect

from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from transformer_lens import loading_from_pretrained, supported_models

from msae_plugin import upstream


def test_transformer_lens_reads_its_list_of_names_at_every_call() -> None:
    name = "some-lab/canary"
    assert upstream.official_transformer_lens_name(name) is None
    with upstream.transformer_lens_name_registered(name):
        assert loading_from_pretrained.get_official_model_name(name) == name
        assert name in upstream.known_transformer_lens_names()
    assert name not in supported_models.OFFICIAL_MODEL_NAMES
    known = supported_models.OFFICIAL_MODEL_NAMES[0]
    with upstream.transformer_lens_name_registered(known):
        pass
    assert supported_models.OFFICIAL_MODEL_NAMES.count(known) == 1


def test_a_given_config_replaces_that_of_the_name() -> None:
    own = loading_from_pretrained.convert_hf_model_config
    listed = dict(own("google/gemma-2-2b"))
    with upstream.transformer_lens_config_given({**listed, "eps": 0.5}):
        assert loading_from_pretrained.get_pretrained_model_config("google/gemma-2-2b").eps == 0.5
    assert loading_from_pretrained.convert_hf_model_config is own


def test_aliases_of_transformer_lens() -> None:
    assert upstream.official_transformer_lens_name("gpt2-small") == "gpt2"


def test_the_wrapped_private_methods_of_saelens_are_still_what_its_own_loop_calls() -> None:
    # Our trainer and runner replace `fit` and `run`; these are the steps of theirs that they keep.
    assert "_estimate_scaling_factors" in MultiSAETrainer.fit.__code__.co_names
    assert "_set_sae_metadata" in MultiSAETrainingRunner.run.__code__.co_names
    # Our stream replaces the buffer around the one, and counts what the other yields.
    loader = ActivationsStore.get_multi_hook_data_loader.__code__.co_names
    assert "_iterate_filtered_multi_hook_activations" in loader
    assert "_iterate_tokenized_sequences" in ActivationsStore.get_batch_tokens.__code__.co_names
    for method in (
        MultiSAETrainer._estimate_scaling_factors,
        MultiSAETrainingRunner._set_sae_metadata,
        ActivationsStore._iterate_filtered_multi_hook_activations,
        ActivationsStore._iterate_tokenized_sequences,
    ):
        assert list(inspect.signature(method).parameters) == ["self"]
