"""The stream of mini-batches is SAELens' own to the bit, and goes on from any position."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from datasets import Dataset

from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.data.text import TextData
from msae_plugin.models.loading import LanguageModel
from msae_plugin.training.inputs import ModelAndText
from msae_plugin.training.passes import ActivationStream, reading_runner
from msae_plugin.training.recipe import RunConfig

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture
def store(
    recipe: dict[str, Any], tiny_language_model: LanguageModel, tiny_text: TextData
) -> Callable[..., Any]:
    """SAELens' store before anything was read."""

    def made(**training: Any) -> Any:
        recipe["training"] |= training
        text = replace(tiny_text, train=Dataset.from_list(list(tiny_text.train.take(DOCUMENTS))))
        runner = reading_runner(
            RunConfig.from_dict({**recipe, "hooks": HOOKS}),
            ModelAndText(tiny_language_model, text, autocast=False),
            "cpu",
            InterruptionGuard(),
        )
        return runner.activations_store

    return made


def same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> bool:
    assert [list(batch) for batch in ours] == [list(batch) for batch in theirs]
    return all(
        torch.equal(mine[hook], other[hook])
        for mine, other in zip(ours, theirs, strict=True)
        for hook in mine
    )


# More batches than the text has: it is read again.
COUNT, DOCUMENTS = 120, 40


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"activations_mixing_fraction": 0.0},
        {"activations_mixing_fraction": 1.0},
        {"store_batch_size_prompts": 7, "batch_size_tokens": 100, "n_batches_in_buffer": 5},
    ],
    ids=["mixed", "not mixed", "all kept", "uneven"],
)
def test_the_batches_are_those_of_saelens(
    store: Callable[..., Any], training: dict[str, Any]
) -> None:
    theirs = store(**training)
    torch.manual_seed(3)
    expected = list(islice(theirs.get_multi_hook_data_loader(), COUNT))
    ours = store(**training)
    torch.manual_seed(3)
    stream = ActivationStream(ours, HOOKS)
    found = list(islice(stream, COUNT // 2))
    assert ours.n_dataset_processed > DOCUMENTS
    position, generator = stream.state_dict(), torch.get_rng_state()
    assert same(found, expected[: COUNT // 2])
    # Nothing that is read afterwards changes a position.
    assert same(list(islice(stream, COUNT // 2)), expected[COUNT // 2 :])
    torch.manual_seed(4)
    again = ActivationStream(store(**training), HOOKS)
    again.load_state_dict(position)
    torch.set_rng_state(generator)
    assert same(list(islice(again, COUNT // 2)), expected[COUNT // 2 :])
