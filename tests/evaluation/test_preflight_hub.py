"""The preflight and a hub that does not answer, or answers about one repository only."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError
from preflight_builders import find

ANY: dict[str, Any] = {"meta_structure": {}}


def test_models_on_the_hub(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (finding,) = find(ANY, "google/gemma-2-2b")
    assert "model 'google/gemma-2-2b' is not in the local cache and offline mode" in finding.what
    assert finding.how == "give a local folder or a packaged: model"
    repository = tmp_path / "models--some-lab--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_model_dir, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert find(ANY, "some-lab/tiny") == []
    # The config is cached, the weights are not; they are behind terms that were not accepted.
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr(HfApi, "repo_info", lambda self, name, **options: None)

    def auth_check(self: Any, name: str) -> None:
        response = SimpleNamespace(headers={}, request=None, status_code=403)
        raise GatedRepoError("403 Client Error", response=response)  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "auth_check", auth_check)
    (finding,) = find(ANY, "some-lab/tiny")
    assert finding.what == "model 'some-lab/tiny' is gated on the Hugging Face Hub"
    assert finding.how.startswith("accept its terms on https://huggingface.co/some-lab/tiny and")
    monkeypatch.setattr(HfApi, "auth_check", lambda self, name: None)
    assert find(ANY, "some-lab/tiny") == []


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten data sets, each tried for five seconds and retried by `datasets`, take minutes."""
    asked: list[str] = []

    def no_network(self: Any, name: str, **options: Any) -> None:
        assert options["timeout"] <= 5
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", no_network)
    monkeypatch.setattr(
        "sae_bench.evals.unlearning.utils.metrics.load_dataset",
        lambda *_, **__: pytest.fail("datasets retries for 20 seconds"),
    )
    evaluations = {
        "core": {"dataset": "Skylion007/openwebtext"},
        "sparse_probing": {},
        "unlearning": {"dataset_names": ["wmdp-bio", "human_aging"], "model": "lab/instruct"},
    }
    found = find(evaluations, "google/gemma-2-2b")
    assert len(asked) == 1
    assert {finding.evaluation for finding in found} == {"all", *evaluations}
    on_the_hub = [f for f in found if "forget_corpus" not in f.what]
    assert len(on_the_hub) >= 8
    for finding in on_the_hub:
        assert finding.what.endswith("the hub cannot be reached (Name or service not known)")
    # Remembered within one preflight only.
    assert find({"core": evaluations["core"]}, None)
    assert len(asked) == 2


def test_cached_questions_are_read_without_the_hub_when_it_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    offline: list[bool] = []

    def load_dataset(*_: Any, **__: Any) -> list[dict[str, Any]]:
        offline.append(datasets.config.HF_HUB_OFFLINE)
        return [{"question": "which?", "choices": ["a", "b", "c", "d"], "answer": 0}]

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", no_network)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    for name in ("cais___wmdp", "cais___mmlu"):
        (tmp_path / name / "some-config").mkdir(parents=True)
        (tmp_path / name / "some-config" / "test.arrow").touch()
    metrics = "sae_bench.evals.unlearning.utils.metrics"
    monkeypatch.setattr(f"{metrics}.load_dataset", load_dataset)
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n')
    corpus = str(tmp_path / "text.jsonl")
    settings = {
        "dataset_names": ["wmdp-bio", "human_aging"],
        "forget_corpus": corpus,
        "retain_corpus": corpus,
    }
    found = find({"unlearning": settings}, None)
    assert found == []
    assert offline == [True, True]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_what_the_hub_says_of_one_repository_says_nothing_on_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def forbidden(self: Any, name: str, **options: Any) -> None:
        asked.append(name)
        response = SimpleNamespace(headers={}, request=None, status_code=403)
        raise GatedRepoError("403 Client Error", response=response)  # type: ignore[arg-type]

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", forbidden)
    found = find({"sparse_probing": {}}, None)
    assert len(asked) == len(found) > 3
    assert all(f.how.startswith("accept its terms on") or "local copy" in f.how for f in found)
