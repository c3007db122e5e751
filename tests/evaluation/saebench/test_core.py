"""Our core evaluation against SAEBench's own function on the same SAE, model and text."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from datasets import Dataset
from evaluation_builders import loads, make_subject, random_standard, run
from sae_bench.evals.core import main as core_main
from sae_lens import StandardSAE
from sae_lens.training.activations_store import ActivationsStore
from tolerance import rounding_tolerance

from msae_plugin.common.errors import InputError
from msae_plugin.common.progress import warnings_alone
from msae_plugin.evaluation.outcomes import ModelContext, ScoreResult
from msae_plugin.evaluation.recipe import check_settings
from msae_plugin.evaluation.saebench import model_side
from msae_plugin.evaluation.saebench.model_side import CoreModelSide, core_tokens
from msae_plugin.evaluation.saebench.patching import replaced
from msae_plugin.saes.load import EvaluatedSAE

# Of metrics of size one, which average over tokens what is summed over the 512 tokens of the
# vocabulary or over the model's width, which is less.
ROUNDING = rounding_tolerance(512, 1.0)
Core = Callable[..., dict[str, ScoreResult]]
SETTINGS: dict[str, Any] = {
    "context_size": 32,
    "batch_size_prompts": 4,
    "n_eval_reconstruction_batches": 2,
    "n_eval_sparsity_variance_batches": 5,
    "exclude_special_tokens_from_reconstruction": True,
    "compute_featurewise_density_statistics": True,
    "compute_featurewise_weight_based_metrics": True,
}


@pytest.fixture
def settings(text_file: Path) -> dict[str, Any]:
    return {**SETTINGS, "dataset": str(text_file)}


@pytest.fixture
def core(
    context: ModelContext, settings: dict[str, Any], subjects: list[EvaluatedSAE], tmp_path: Path
) -> Core:
    """Our evaluation, of both SAEs unless others are given."""

    def measured(saes: Any = subjects, seed: int = 42, place: str = "ours", **changes: Any) -> Any:
        given = {**settings, **changes}
        return run("core", context, given, saes, seed, tmp_path / place, warnings_alone)

    return measured


def rows_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def direct(
    context: ModelContext,
    subject: EvaluatedSAE,
    rows: list[str],
    output: Path,
    settings: dict[str, Any],
) -> dict[str, float]:
    """SAEBench's `multiple_evals`, which loads models and text by name only: both are handed in."""

    class StoreOfOurs:
        @staticmethod
        def from_sae(model: Any, sae: Any, **options: Any) -> ActivationsStore:
            return ActivationsStore.from_sae(
                model, sae, **{**options, "dataset": Dataset.from_dict({"text": rows})}
            )

    with (
        replaced(core_main, "HookedTransformer", loads(context)),
        replaced(core_main, "ActivationsStore", StoreOfOurs),
    ):
        results = core_main.multiple_evals(
            [(subject.name, subject.for_saebench(context.torch_dtype, "cpu"))],
            n_eval_reconstruction_batches=settings["n_eval_reconstruction_batches"],
            n_eval_sparsity_variance_batches=settings["n_eval_sparsity_variance_batches"],
            eval_batch_size_prompts=settings["batch_size_prompts"],
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=settings[
                "exclude_special_tokens_from_reconstruction"
            ],
            context_size=settings["context_size"],
            output_folder=str(output),
            dtype=context.dtype,
            device="cpu",
        )
    return {k: v for part in results[0]["metrics"].values() for k, v in part.items()}


@pytest.mark.parametrize("exclude_special", [True, False])
def test_the_numbers_are_saebenchs_own(
    core: Core,
    settings: dict[str, Any],
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    text_file: Path,
    tmp_path: Path,
    exclude_special: bool,
) -> None:
    settings["exclude_special_tokens_from_reconstruction"] = exclude_special
    outcomes = core()
    rows = rows_of(text_file)
    for subject in subjects:
        outcome = outcomes[subject.name]
        assert outcome.reason is None
        expected = direct(context, subject, rows, tmp_path / "theirs", settings)
        assert set(expected) <= set(outcome.metrics)
        for name, value in expected.items():
            assert outcome.metrics[name] == pytest.approx(value, rel=ROUNDING, abs=ROUNDING), name
        # The JSON has SAEBench's schema and, but for times and ids, its contents.
        assert outcome.file is not None
        ours = json.loads(outcome.file.read_text())
        theirs = json.loads((tmp_path / "theirs" / outcome.file.name).read_text())
        assert list(ours) == list(theirs)
        config, their_config = ours["eval_config"], theirs["eval_config"]
        assert {k for k in config if config[k] != their_config[k]} <= {"model_name", "dataset"}
        assert ours["eval_result_details"][3].keys() == theirs["eval_result_details"][3].keys()


def test_explained_variance_is_the_streaming_one(
    core: Core, settings: dict[str, Any], context: ModelContext, subjects: list[EvaluatedSAE]
) -> None:
    outcomes = core()
    side = CoreModelSide(
        context, subjects[0].hook_name, *_tokens_of(context, settings, subjects[0])
    )
    read = torch.cat([side.activations(i).flatten(0, 1) for i in range(2, 7)]).double()
    tokens = side.tokens[2:].flatten()
    tokenizer = context.language_model.tokenizer
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    keep = torch.tensor([int(token) not in special for token in tokens])
    assert 0 < int(keep.sum()) < len(keep)
    for subject in subjects:
        with torch.no_grad():
            rebuilt = subject.sae(read.float()).double()
        for name, rows in (
            ("explained_variance_streaming", keep),
            ("explained_variance_streaming_with_special", torch.ones_like(keep)),
        ):
            residual = (read[rows] - rebuilt[rows]).square().sum(-1).mean()
            total = (read[rows] - read[rows].mean(0)).square().sum(-1).mean()
            expected = float(1 - residual / total)
            assert outcomes[subject.name].metrics[name] == pytest.approx(expected, abs=1e-5)


def _tokens_of(
    context: ModelContext, settings: dict[str, Any], subject: EvaluatedSAE
) -> tuple[torch.Tensor, int]:
    return core_tokens(context, settings, subject, 42, 7), 2


def test_kl_from_float32_log_probabilities(
    core: Core, settings: dict[str, Any], context: ModelContext, subjects: list[EvaluatedSAE]
) -> None:
    outcomes = core(subjects[:1])
    tokens, _ = _tokens_of(context, settings, subjects[0])
    model, tokenizer = context.language_model.model, context.language_model.tokenizer
    special = torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id])
    values = []
    for batch in tokens[:2]:
        keep = ~torch.isin(batch, special)

        def put(value: torch.Tensor, hook: Any, keep: torch.Tensor = keep) -> torch.Tensor:
            return torch.where(keep[..., None], subjects[0].sae(value), value)

        with torch.no_grad():
            clean = model(batch).double().log_softmax(-1)
            changed = model.run_with_hooks(
                batch, fwd_hooks=[(subjects[0].hook_name, put)]
            ).double().log_softmax(-1)  # fmt: skip
        values.append((clean.exp() * (clean - changed)).sum(-1)[keep])
    expected = float(torch.cat(values).mean())
    assert outcomes["standard"].metrics["kl_div_with_sae_float32"] == pytest.approx(
        expected, rel=1e-4
    )


def test_the_model_runs_once_for_all_saes_and_not_at_all_from_the_cache(
    core: Core, context: ModelContext, subjects: list[EvaluatedSAE]
) -> None:
    first = core(subjects[:1])
    blocks = context.language_model.model.blocks
    layers: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, n=number: layers.append(n))
        for number, block in enumerate(blocks)
    ]
    try:
        again = core(place="b")
    finally:
        for handle in handles:
            handle.remove()
    # Two SAEs, two batches: only the layer behind the hook, once for each.
    assert layers == [2, 2, 2, 2]
    assert again["standard"].metrics == first["standard"].metrics


def test_other_text_model_or_dtype_is_another_cache(
    settings: dict[str, Any], context: ModelContext, subjects: list[EvaluatedSAE]
) -> None:
    tokens, n = _tokens_of(context, settings, subjects[0])
    folders = {
        CoreModelSide(context, "blocks.1.hook_resid_post", tokens, n).folder,
        CoreModelSide(context, "blocks.0.hook_resid_post", tokens, n).folder,
        CoreModelSide(context, "blocks.1.hook_resid_post", tokens.flip(0), n).folder,
        CoreModelSide(context, "blocks.1.hook_resid_post", tokens, n + 1).folder,
        CoreModelSide(
            dataclasses.replace(context, weights_sha256="x"), "blocks.1.hook_resid_post", tokens, n
        ).folder,
        CoreModelSide(
            dataclasses.replace(context, dtype="bfloat16"), "blocks.1.hook_resid_post", tokens, n
        ).folder,
    }
    assert len(folders) == 6


def test_an_interrupted_model_side_is_computed_again(
    core: Core, settings: dict[str, Any], context: ModelContext, subjects: list[EvaluatedSAE]
) -> None:
    expected = core(subjects[:1])
    side = CoreModelSide(
        context, subjects[0].hook_name, *_tokens_of(context, settings, subjects[0])
    )
    (side.folder / "complete.json").unlink()
    (side.folder / "batch-00003.safetensors").write_bytes(b"half")
    again = core(subjects[:1], place="b")
    assert again["standard"].metrics == expected["standard"].metrics


@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]
)
def test_hooks_inside_a_layer_and_at_the_last_beside_others(
    core: Core,
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    settings: dict[str, Any],
    tmp_path: Path,
    hook: str,
) -> None:
    assert context.language_model.model.cfg.n_layers == 3
    subject = dataclasses.replace(make_subject(random_standard(3), "inner"), hook_name=hook)
    outcomes = core([subject, *subjects])
    assert {outcome.status for outcome in outcomes.values()} == {"measured"}
    rows = rows_of(Path(settings["dataset"]))
    expected = direct(context, subject, rows, tmp_path / "theirs", settings)
    for name, value in expected.items():
        found = outcomes["inner"].metrics[name]
        assert found == pytest.approx(value, rel=ROUNDING, abs=ROUNDING), name


def test_one_sae_that_fails_leaves_the_others(
    core: Core, subjects: list[EvaluatedSAE], tmp_path: Path
) -> None:
    class Broken(StandardSAE):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("shapes do not\nfit")

    broken = random_standard(4)
    broken.__class__ = Broken
    silent = random_standard(5)
    silent.b_enc.data.fill_(-1e6)
    nan = random_standard(6)
    bad = make_subject(nan, "nan")
    bad.sae.b_dec.data[0] = math.nan
    everyone = [make_subject(broken, "broken"), make_subject(silent, "silent"), bad, *subjects]
    outcomes = core(everyone)
    assert {name: o.status for name, o in outcomes.items()} == {
        "broken": "failed",
        "silent": "failed",
        "nan": "failed",
        "standard": "measured",
        "multiscale": "measured",
    }
    assert outcomes["broken"].reason == "shapes do not fit"
    assert "no latent is active" in str(outcomes["silent"].reason)
    assert "nan" in str(outcomes["nan"].reason)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "multiscale_custom_sae_eval_results.json",
        "standard_custom_sae_eval_results.json",
    ]


def test_seeds_shuffle_local_text_and_their_order_does_not_matter(core: Core) -> None:
    runs = {
        (order, seed): core(seed=seed, place=order)
        for order, seeds in (("up", (1, 2)), ("down", (2, 1)))
        for seed in seeds
    }
    for seed in (1, 2):
        for name in ("standard", "multiscale"):
            assert runs["up", seed][name].metrics == runs["down", seed][name].metrics
    one, two = runs["up", 1]["standard"], runs["up", 2]["standard"]
    assert one.facts["text"] != two.facts["text"]
    assert one.metrics["l0"] != two.metrics["l0"]


def test_too_little_text_is_refused_with_what_there_is(core: Core) -> None:
    with pytest.raises(InputError, match=r"holds only \d+ batches of 4 x 32 tokens and 5002"):
        core(n_eval_sparsity_variance_batches=5000)


def test_the_subjects_are_left_as_they_were(core: Core, subjects: list[EvaluatedSAE]) -> None:
    before = [
        ({k: v.clone() for k, v in s.sae.state_dict().items()}, s.sae.cfg.to_dict())
        for s in subjects
    ]
    core()
    for subject, (weights, config) in zip(subjects, before, strict=True):
        assert subject.sae.cfg.to_dict() == config
        for name, tensor in subject.sae.state_dict().items():
            assert torch.equal(tensor, weights[name])
    assert core_main.get_recons_loss.__module__ == core_main.__name__


def test_what_one_hook_raises_leaves_the_other_hooks(
    core: Core, subjects: list[EvaluatedSAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = dataclasses.replace(subjects[0], name="inner", hook_name="blocks.1.hook_mlp_out")
    prepare = CoreModelSide.prepare

    def fail_at_one(self: CoreModelSide, report: Any) -> bool:
        if self.hook_name == inner.hook_name:
            raise RuntimeError("\n  Some tensors share memory.\nTry again.")
        return prepare(self, report)

    monkeypatch.setattr(CoreModelSide, "prepare", fail_at_one)
    outcomes = core([inner, *subjects])
    assert outcomes["inner"].status == "failed"
    assert outcomes["inner"].reason == "Some tensors share memory. Try again."
    assert {outcomes[subject.name].status for subject in subjects} == {"measured"}


SCRIPT = """
import datasets
import pathlib
pathlib.Path({trace!r}).touch()

class Evil(datasets.GeneratorBasedBuilder):
    def _info(self):
        text = datasets.Features({{"text": datasets.Value("string")}})
        return datasets.DatasetInfo(features=text)

    def _split_generators(self, manager):
        return [datasets.SplitGenerator("train")]

    def _generate_examples(self):
        for row in range(400):
            yield row, {{"text": "one two three " * 20}}
"""


def test_a_loading_script_runs_only_where_the_user_says_so(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = tmp_path / "was executed"
    folder = tmp_path / "evil"
    folder.mkdir()
    # `datasets` asks no more about a script that it once was allowed to run, and knows it by its
    # code without comments: a new one every time, also where `tmp_path` is that of an earlier run.
    (folder / "evil.py").write_text(SCRIPT.format(trace=str(trace)) + f'RUN = "{uuid4()}"\n')
    # As a data set of the hub, whose scripts `datasets` treats as those of a folder.
    monkeypatch.setattr(model_side, "is_local", lambda _: False)
    settings = check_settings("core", {"dataset": str(folder)})
    settings |= {"context_size": 32, "batch_size_prompts": 4}
    with pytest.raises(InputError, match="loading script") as refused:
        core_tokens(context, settings, subjects[0], 42, 2)
    assert "evaluations.core.trust_remote_code: true" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not trace.exists()
    settings |= check_settings("core", {"trust_remote_code": True})
    assert core_tokens(context, settings, subjects[0], 42, 2).shape == (2, 4, 32)
    assert trace.exists()
