"""`metrics.yaml`: every number that is reported is explained, once."""

import pytest

from msae_plugin.evaluation.outcomes import definitions, described, reliability

OURS = ("core", "sparse_probing", "sparse_probing_sae_probes", "unlearning", "comparison")


@pytest.mark.parametrize("evaluation", OURS)
def test_every_definition_is_complete(evaluation: str) -> None:
    found = definitions(evaluation, (1, 50))
    assert found
    for name, metric in found.items():
        assert "{" not in name + metric.definition
        assert metric.definition.strip() == metric.definition != ""
        assert metric.unit
        assert metric.tokens
        assert metric.source in ("saebench", "msae")
        assert metric.higher_is_better in (True, False, None)


def test_a_name_with_k_stands_for_each_number_of_latents() -> None:
    found = definitions("sparse_probing", (1, 50))
    assert [name for name in found if name.startswith("sae_top_")] == [
        "sae_top_1_test_accuracy",
        "sae_top_50_test_accuracy",
    ]
    assert "on the 50 SAE latents" in found["sae_top_50_test_accuracy"].definition
    assert not any("top_" in name for name in definitions("sparse_probing"))


def test_saebenchs_own_descriptions_get_what_is_known_of_them() -> None:
    found = described("tpp", "tpp_threshold_2_unintended_diff_only", "Their words.")
    assert found.definition == f"Their words. Reliability: {reliability()['tpp']}"
    assert (found.source, found.higher_is_better) == ("saebench", False)
    assert described("tpp", "tpp_threshold_2_total_metric", "x").higher_is_better is True
