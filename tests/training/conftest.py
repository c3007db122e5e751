"""A recipe on the tiny model that trains in about a second, and its text."""

import copy
import json
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.data.text import TextData, load_text
from msae_plugin.models.loading import LanguageModel
from msae_plugin.training import passes
from msae_plugin.training.activation_store import CachedActivations
from msae_plugin.training.passes import make_cache
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.runner import MultiScaleRunner, RunResult

TINY_HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def tiny_text(tiny_corpus: Path) -> TextData:
    return load_text(str(tiny_corpus), heldout_documents=20)


@pytest.fixture
def recipe(tiny_model_dir: Path, tiny_corpus: Path) -> dict[str, Any]:
    """30 steps of one `standard` SAE; tests change what they are about."""
    return {
        "model": {"name": str(tiny_model_dir), "device": "cpu"},
        "data": {"source": str(tiny_corpus), "context_size": 32, "heldout_documents": 20},
        "hooks": [TINY_HOOK],
        "sae": {"architecture": "standard", "d_sae": 96, "l1_coefficient": 0.1},
        "training": {
            "tokens": 30 * 128,
            "batch_size_tokens": 128,
            "lr": 1e-3,
            "n_batches_in_buffer": 16,
            "store_batch_size_prompts": 8,
            "calibrate_batches": 4,
            "dead_feature_window": 10,
            "seed": 7,
        },
        "logging": {"every_steps": 5, "tensorboard": "off"},
    }


@pytest.fixture
def train(
    recipe: dict[str, Any], tiny_language_model: LanguageModel, tiny_text: TextData
) -> Callable[..., RunResult]:
    """Run the recipe, with changes `key.path=value`, in this process."""

    def run(
        output: Path, *overrides: str, resume: str | None = None, ranks: Ranks = ALONE
    ) -> RunResult:
        return MultiScaleRunner(
            RunConfig.from_dict(copy.deepcopy(recipe), overrides),
            output,
            resume=resume,
            language_model=tiny_language_model,
            text=tiny_text,
            ranks=ranks,
        ).run()

    return run


@pytest.fixture
def cache(
    recipe: dict[str, Any], tiny_language_model: LanguageModel, tiny_text: TextData
) -> Callable[..., CachedActivations]:
    def made(output: Path, *overrides: str) -> CachedActivations:
        config = RunConfig.from_dict(copy.deepcopy(recipe), overrides)
        return make_cache(config, output, language_model=tiny_language_model, text=tiny_text)

    return made


@pytest.fixture
def train_from(recipe: dict[str, Any]) -> Callable[..., RunResult]:
    """Train without any model or text: there is none that could be read."""

    def run(output: Path, folder: Path, *overrides: str, resume: str | None = None) -> RunResult:
        changes = (*overrides, f"cached_activations={folder}")
        config = RunConfig.from_dict(copy.deepcopy(recipe), changes)
        return MultiScaleRunner(config, output, resume=resume).run()

    return run


def rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl, less what depends on the clock."""
    parsed = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in parsed]


@pytest.fixture
def read_rows() -> Callable[[Path], list[dict[str, Any]]]:
    return rows


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """Kill the pass over the text that the block makes, after so many batches, each saved."""

    @contextmanager
    def killed(batches: int) -> Generator[None]:
        appended, append = 0, passes.ActivationWriter.append

        def counting(writer: Any, *batch: Any) -> None:
            nonlocal appended
            append(writer, *batch)
            appended += 1
            if appended == batches:
                raise SystemExit("killed")

        monkeypatch.setattr(passes, "SECONDS_BETWEEN_SAVES", 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(passes.ActivationWriter, "append", counting)
            with pytest.raises(SystemExit):
                yield

    return killed
