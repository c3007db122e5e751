"""What a comparison refuses, before anything is trained, and how methods become SAEs."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from msae_plugin import InputError
from msae_plugin.architecture.peers import PEERS
from msae_plugin.common.recipes import SHIPPED, shipped_recipes
from msae_plugin.comparison.ladder import ladder_variants
from msae_plugin.comparison.methods import entry_training, expand, plan_entry
from msae_plugin.comparison.recipe import SYNTHETIC_HOOK, CompareConfig
from msae_plugin.training.plans import SAEPlan

NAMES = list(shipped_recipes("compare"))


@pytest.fixture
def plans(ground_truth_recipe: dict[str, Any]) -> Callable[..., dict[str, SAEPlan]]:
    """SAELens' configurations of a recipe with these methods, by the SAE's name."""

    def make(**changes: Any) -> dict[str, SAEPlan]:
        config = CompareConfig.from_dict(ground_truth_recipe | changes)
        return expand(config, {SYNTHETIC_HOOK: 16}).plans

    return make


def test_the_shipped_recipes_are_known() -> None:
    assert NAMES == [
        "compare_between_presets",
        "compare_gemma-3-270m_1m",
        "compare_ground_truth",
        "compare_ladder_ground_truth",
        "compare_ladder_language_model",
        "compare_lista_ablation",
        "compare_peers_1m",
        "compare_smollm2",
        "compare_smollm2_1m",
        "compare_synthsaebench16k",
        "demo",
    ]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_sae_of_a_shipped_recipe_can_be_built(name: str, quick: bool) -> None:
    config = CompareConfig.load(name, quick=quick)
    widths = dict.fromkeys(config.hooks or [SYNTHETIC_HOOK], 576)
    expansion = expand(config, widths)
    assert len(expansion.entries) == (
        len(expansion.methods) * len(config.l0) * len(config.seeds) * len(widths)
    )
    assert len({entry.name for entry in expansion.entries}) == len(expansion.entries)
    assert CompareConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_quick_is_shorter(name: str) -> None:
    whole, quick = (CompareConfig.load(name, quick=q) for q in (False, True))
    assert quick.training.tokens <= whole.training.tokens / 5
    assert len(quick.seeds) == 1
    assert (quick.model, quick.data, quick.saes) == (whole.model, whole.data, whole.saes)


def test_synthsaebench_is_the_published_one() -> None:
    values = yaml.safe_load((SHIPPED / "compare_synthsaebench16k.yaml").read_text())
    model, training = values["synthetic"]["model"], values["training"]
    assert (model["num_features"], model["hidden_dim"], model["seed"]) == (16384, 768, 42)
    assert model["hierarchy"]["total_root_nodes"] == 128
    assert training["tokens"] == 200_000_000
    assert (training["lr"], training["batch_size_tokens"]) == ("3e-4", 1024)
    assert values["common"] == {"d_sae": 4096, "input_normalization": "first_batch"}


def test_each_architecture_is_told_its_l0(plans: Callable[..., dict[str, SAEPlan]]) -> None:
    found = plans(
        saes={
            "ours": {"preset": "default"},
            "topk": {"architecture": "topk"},
            "jumprelu": {"architecture": "jumprelu"},
            "pursuit": {"architecture": "matching_pursuit", "decoder_init_norm": 1.0},
            "matryoshka": {"architecture": "matryoshka_batchtopk"},
            "standard": {"architecture": "standard", "l1_coefficient": 0.7},
        },
        l0=[4],
    )
    configs = {name.removesuffix("_l0-4_seed0"): plan.config for name, plan in found.items()}
    assert configs["ours"].k == 4
    assert configs["topk"].k == 4
    assert configs["jumprelu"].target_l0 == 4
    assert configs["jumprelu"].jumprelu_sparsity_loss_mode == "quadratic"
    assert configs["pursuit"].max_iterations == 4
    assert configs["matryoshka"].matryoshka_widths == [1, 3, 6, 12, 24]
    assert configs["standard"].l1_coefficient == 0.7  # where its search begins


def test_schedules_are_those_of_the_run_in_small(ground_truth_recipe: dict[str, Any]) -> None:
    recipe = copy.deepcopy(ground_truth_recipe)
    recipe["training"] |= {"lr_warm_up_steps": 8, "lr_decay_steps": 16}
    recipe["saes"] = {
        "a": {"architecture": "standard", "l1_warm_up_steps": "1.2e1"},
        "b": {"preset": "source-run-10", "zscore_z_lr": 0.02},
        "c": {"peer": "lista_matryoshka"},
    }
    config = CompareConfig.from_dict(recipe)
    a, b, c = expand(config, {SYNTHETIC_HOOK: 16}).entries
    whole, trial = (entry_training(a, config, tokens) for tokens in (40 * 128, 10 * 128))
    assert (whole.lr_warm_up_steps, whole.lr_decay_steps, whole.dead_feature_window) == (8, 16, 10)
    assert (trial.lr_warm_up_steps, trial.lr_decay_steps, trial.dead_feature_window) == (2, 4, 2)
    short = plan_entry(a, config, 16, coefficient=0.3, tokens=10 * 128).config
    assert (short.l1_warm_up_steps, short.l1_coefficient) == (3, 0.3)
    # Four mini-batches per step: a quarter of the steps, the same schedule in tokens.
    accumulating = entry_training(b, config, 40 * 128)
    assert accumulating.accumulation_steps == 4
    assert (accumulating.lr_warm_up_steps, accumulating.lr_decay_steps) == (2, 4)
    assert plan_entry(c, config, 16, coefficient=None).config.k_anneal_steps == 40


def test_what_methods_have_in_common_yields_to_their_own(
    plans: Callable[..., dict[str, SAEPlan]],
) -> None:
    found = plans(
        common={"d_sae": 24, "normalize_activations": "expected_average_only_in"},
        saes={
            "a": {"architecture": "batchtopk"},
            "b": {"architecture": "batchtopk", "d_sae": 12, "lr": 1e-3},
            "white": {"peer": "whitened_batchtopk"},
        },
    )
    a, b, white = found.values()
    assert (a.config.d_sae, b.config.d_sae) == (24, 12)
    assert (a.lr, b.lr) == (None, 1e-3)
    assert a.config.normalize_activations == "expected_average_only_in"
    assert white.config.normalize_activations == "covariance_whitening"


def test_several_hooks_are_told_apart(language_model_recipe: dict[str, Any]) -> None:
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    recipe = language_model_recipe | {
        "hooks": hooks,
        "saes": {"a": {"architecture": "topk"}, "rs": {"control": "residual_stream"}},
    }
    expansion = expand(CompareConfig.from_dict(recipe), dict.fromkeys(hooks, 64))
    assert [e.name for e in expansion.entries] == ["a_layer0_l0-6_seed0", "a_layer1_l0-6_seed0"]
    assert [c.name for c in expansion.controls] == ["rs_layer0", "rs_layer1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l0": []}, "'l0' is empty"),
        ({"l0": [4, 4]}, "'l0' has 4.0 twice"),
        ({"l0": [-1]}, "must be positive"),
        ({"seeds": [1, 1]}, "'seeds' has 1 twice"),
        ({"saes": {}}, "nothing to compare"),
        ({"saes": {"a b": {}}}, "cannot name a folder"),
        ({"saes": {"a": {"architecture": "topp"}}}, "did you mean 'topk'"),
        ({"saes": {"a": {"architecture": "topk", "k": 3}}}, "'l0' of the comparison sets it"),
        ({"saes": {"a": {"architecture": "topk", "kk": 3}}}, "unknown key 'kk'"),
        ({"saes": {"a": {"architecture": "topk", "d_sae": 2}}}, "only 2 latents"),
        (
            {"saes": {"a": {"architecture": "standard", "l1_coefficient": "much"}}},
            "'saes.a.l1_coefficient' must be a number, not 'much'",
        ),
        ({"saes": {"a": {"peer": "ortsea"}}}, "did you mean 'ortsae'"),
        ({"saes": {"a": {"peer": "c2r", "preset": "default"}}}, "decides the architecture"),
        ({"saes": {"a": {"control": "permuted"}}}, "permuted_decoder of"),
        ({"saes": {"a": {"control": "permuted_decoder of b"}}}, "no method 'b'"),
        ({"saes": {"a": {"control": "residual_stream", "d_sae": 3}}}, "no further keys"),
        ({"saes": {"a": {"control": "residual_stream"}}}, "true features are the reference"),
        ({"saes": {"a": {"preset": "defualt"}}}, "defualt"),
        ({"common": {}, "saes": {"a": {"preset": "default"}}}, "d_sae' is missing"),
        ({"reference": "b", "saes": {"a": {"preset": "default"}}}, "'reference' 'b' is no method"),
        ({"search": {"tolerance": 2}}, "between 0 and 1"),
        ({"hooks": ["blocks.1.hook_resid_post"]}, "'hooks' belongs to a language model"),
        ({"ladder": {"groups": ["alone"], "leave_out": ["nothing"]}}, "no variant"),
        ({"ladder": {"groups": ["alone"], "leave_out": ["off"]}}, "is compared with"),
        (
            {"ladder": {"groups": ["alone"]}, "saes": {"off": {"architecture": "topk"}}},
            "name of a variant",
        ),
        ({"training": {"tokens": 100, "batch_size_tokens": 128}}, "less than one step"),
        ({"trainnig": {}}, "did you mean 'training'"),
    ],
)
def test_refusals_are_one_line_that_names_the_field(
    ground_truth_recipe: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    recipe = {"saes": {"a": {"architecture": "topk"}}} | ground_truth_recipe | changes
    with pytest.raises(InputError) as caught:
        expand(CompareConfig.from_dict(recipe), {SYNTHETIC_HOOK: 16})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quick_is_what_the_recipe_says(ground_truth_recipe: dict[str, Any]) -> None:
    recipe = ground_truth_recipe | {"saes": {"a": {"preset": "default"}}, "seeds": [1, 2]}
    with pytest.raises(InputError, match="has no 'quick'"):
        CompareConfig.from_dict(recipe, quick=True)
    recipe["quick"] = {"seeds": [5], "training.tokens": 1280}
    quick = CompareConfig.from_dict(recipe, ["training.lr=2e-3"], quick=True)
    assert (quick.seeds, quick.training.tokens, quick.training.lr) == ([5], 1280, 2e-3)
    assert CompareConfig.from_dict(recipe).seeds == [1, 2]
    for bad in ("training", "l0.x=3"):
        with pytest.raises(InputError, match=r"--set|has no keys"):
            CompareConfig.from_dict(recipe, [bad])


def test_the_ladder_has_the_sources_runs_and_compares_within_itself() -> None:
    variants = {variant.name: variant for variant in ladder_variants()}
    assert len(variants) == len(ladder_variants())
    runs = [f"source-run-{number}" for number in range(1, 11)]
    cumulative = [v.name for v in variants.values() if v.group == "cumulative"]
    assert cumulative == ["baseline", *runs]
    for before, after in itertools.pairwise(cumulative):
        assert variants[after].against == before
    for variant in variants.values():
        assert variant.mechanism
        if variant.against is not None:
            assert variants[variant.against].group == variant.group
    assert not set(PEERS) & variants.keys()


def test_a_variant_differs_from_its_reference_in_its_mechanism_alone(
    plans: Callable[..., dict[str, SAEPlan]],
) -> None:
    found = plans(ladder={"groups": ["alone", "default"]})
    configs = {name.split("_l0")[0]: vars(plan.config) for name, plan in found.items()}
    expected = {
        "only-budgets": {"sparsity_scales"},
        "only-annealing": {"k_anneal_steps", "k_initial_multiplier"},
        "only-skip": {"skip_scale"},
        "only-importance": {"importance_power"},
        "only-no-auxk": {"aux_loss_coefficient"},
        "default-plus-prefixes": {"prefix_fractions", "prefix_weight"},
        "default-no-dense-limit": {"dense_share_limit"},
        "default-plus-orthogonality": {"orthogonality_coefficient"},
        "default-no-auxk": {"aux_loss_coefficient"},
        "default-plus-attention": {
            "norm_scales", "norm_eps", "norm_eps_mode", "norm_attention",
        },
    }  # fmt: skip
    variants = {variant.name: variant for variant in ladder_variants()}
    for name, variant in variants.items():
        if variant.group != "cumulative" and variant.against is not None:
            own = [key for key in variant.section if key not in ("preset", "architecture")]
            reference = configs[variant.against]
            trainer = {"accumulation_steps", "gradient_lr", "lr_floor"} & set(own)
            differs = any(
                value != reference[key] for key, value in configs[name].items() if key != "metadata"
            )
            assert differs or trainer, name
    for name, fields in expected.items():
        reference = configs[str(variants[name].against)]
        different = {key for key, value in configs[name].items() if value != reference[key]}
        assert different - {"metadata"} == fields, name


def test_methods_are_left_out_by_null_and_by_only(ground_truth_recipe: dict[str, Any]) -> None:
    recipe = ground_truth_recipe | {"saes": {"a": {}, "b": {}}, "reference": "b"}
    assert list(CompareConfig.from_dict(recipe, ["saes.b=null", "reference=null"]).saes) == ["a"]
    only = CompareConfig.from_dict(recipe, only=["a"])
    assert list(only.saes) == ["a"]
    assert only.reference is None
    with pytest.raises(InputError, match="--only 'c' is no SAE of the recipe"):
        CompareConfig.from_dict(recipe, only=["c"])
    laddered = recipe | {"ladder": {}}
    name = ladder_variants()[0].name
    config = CompareConfig.from_dict(laddered, only=["a", name])
    methods = expand(config, {SYNTHETIC_HOOK: 16}).entries
    assert {entry.method.name for entry in methods} == {"a", name}
    assert CompareConfig.from_dict(laddered, only=["a"]).ladder is None
