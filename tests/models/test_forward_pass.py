from __future__ import annotations

import time

import pytest
import torch

from msae_plugin.models import forward_pass
from msae_plugin.models.forward_pass import (
    Tail,
    activations_at,
    faster_in_bfloat16,
    logits_and_activations,
    logits_with_replacement,
    stop_layer,
    tail_start,
)

HOOK = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("slow", [True, False])
def test_the_faster_precision_is_chosen(tiny_language_model, monkeypatch, slow):
    def pretended(model, tokens, hook_names, *, autocast):
        time.sleep(0.02 if autocast == slow else 0.001)
        return {HOOK: torch.zeros(1)}

    monkeypatch.setattr(forward_pass, "activations_at", pretended)
    assert faster_in_bfloat16(tiny_language_model.model, [HOOK]) == (not slow)


def test_stopping_early_reads_the_same_activations(tiny_language_model):
    tokens = torch.arange(24).reshape(2, 12)
    model = tiny_language_model.model
    hooks = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]
    early = activations_at(model, tokens, hooks)
    _, whole = logits_and_activations(model, tokens, hooks)
    for hook in hooks:
        assert early[hook].shape == (2, 12, 64)  # heads are flattened
        torch.testing.assert_close(early[hook], whole[hook])
    assert stop_layer(hooks) == 2
    assert stop_layer([*hooks, "hook_embed"]) is None


def test_only_the_chosen_positions_are_replaced(tiny_language_model):
    model = tiny_language_model.model
    tokens = torch.arange(24).reshape(2, 12)
    clean, activations = logits_and_activations(model, tokens, [HOOK])
    where = torch.zeros(2, 12, dtype=torch.bool)
    values = torch.randn_like(activations[HOOK])
    nothing = logits_with_replacement(model, tokens, HOOK, values, where)
    torch.testing.assert_close(nothing, clean)
    where[1, 5] = True
    changed = logits_with_replacement(model, tokens, HOOK, values, where) - clean
    assert changed[0].abs().max() < 1e-5
    assert changed[1, :5].abs().max() < 1e-5  # attention looks back only
    assert changed[1, 5].abs().max() > 1e-2


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"])
def test_the_layers_after_the_hook_give_what_the_whole_model_gives(
    tiny_language_model, monkeypatch, hook
):
    model = tiny_language_model.model
    tokens = torch.arange(24).reshape(2, 12)
    clean, activations = logits_and_activations(model, tokens, [hook])
    own = activations[hook]
    where = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    values = torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    expected = logits_with_replacement(model, tokens, hook, values, where)
    tail = Tail(model, hook)
    tail.check(own, clean)
    runs: list[str] = []
    block = model.blocks[0]
    monkeypatch.setattr(block, "forward", counted(block.forward, runs))
    torch.testing.assert_close(tail.logits(tokens, values, where, own), expected)
    assert bool(runs) == (tail_start(hook) is None)
    # A model that is not what its tail gives runs as a whole.
    doubtful = Tail(model, hook)
    doubtful.check(own, clean + 1)
    runs.clear()
    torch.testing.assert_close(doubtful.logits(tokens, values, where, own), expected)
    assert runs


def counted(forward, runs):
    def forward_and_count(*args, **kwargs):
        runs.append("layer 0")
        return forward(*args, **kwargs)

    return forward_and_count
