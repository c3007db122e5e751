from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, StandardTrainingSAEConfig, TrainingSAE
from sae_lens.training.mixing_buffer import mixing_buffer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import msae_plugin
from msae_plugin import MultiScaleTrainingSAEConfig
from msae_plugin.models.loading import ModelShape, describe_model
from msae_plugin.reporting.info import model_parameters, run_cost, sae_cost
from msae_plugin.training.plans import buffer_bytes
from msae_plugin.training.recipe import RunConfig


def configs() -> list[Any]:
    sizes = {"d_in": 24, "d_sae": 100}
    return [
        StandardTrainingSAEConfig(**sizes),
        BatchTopKTrainingSAEConfig(**sizes, k=5),
        msae_plugin.preset("default", **sizes, k=5, training_steps=10),
        msae_plugin.preset("source-run-9", **sizes, k=5, training_steps=10),
    ]


def tensor_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("cfg", configs(), ids=["standard", "batchtopk", "default", "run 9"])
def test_an_sae_costs_what_its_real_tensors_take(cfg):
    cost = sae_cost(cfg, batch_size_tokens=64)
    assert cfg.device == "cpu"
    sae = TrainingSAE.get_sae_class_for_architecture(cfg.architecture())(cfg)
    optimizer = torch.optim.Adam(sae.parameters())
    for parameter in sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert cost.parameters == sum(p.numel() for p in sae.parameters())
    assert cost.weight_bytes == tensor_bytes([*sae.parameters(), *sae.buffers()])
    assert cost.gradient_bytes == tensor_bytes(p.grad for p in sae.parameters())
    moments = [
        tensor
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    ]
    assert cost.optimizer_bytes == tensor_bytes(moments)
    assert cost.step_bytes == 10 * 64 * 100 * 4


@pytest.mark.parametrize(
    ("fields", "cuda_graphs", "recorded"),
    [
        ({"device": "cuda:1"}, True, True),
        ({"device": "cpu"}, True, False),
        ({"device": "cuda"}, False, False),
        ({"device": "cuda", "norm_scales": [1.0]}, True, False),
    ],
)
def test_a_recorded_step_is_held(fields: dict[str, Any], cuda_graphs: bool, recorded: bool) -> None:
    cfg = MultiScaleTrainingSAEConfig(d_in=8, d_sae=100, k=3, **fields)
    cost = sae_cost(cfg, 64, cuda_graphs=cuda_graphs)
    assert cost.recorded_bytes == recorded * (cost.step_bytes + cost.gradient_bytes)


def test_the_buffer_costs_what_saelens_holds_at_its_peak(monkeypatch):
    d_in, llm_rows, rows = 6, 40, 128
    held: list[int] = []
    shuffle = torch.randperm

    def recorded(n: int) -> torch.Tensor:
        held.append(n)
        return shuffle(n)

    monkeypatch.setattr(torch, "randperm", recorded)
    batches = mixing_buffer(rows, 16, (torch.zeros(llm_rows, d_in) for _ in range(40)), 0.5)
    assert sum(len(batch) for batch in batches) > 1000
    # Where the shuffled copy is made, the rows exist twice.
    measured = 2 * max(held) * d_in * 4
    assert measured <= buffer_bytes(rows, llm_rows, [d_in]) <= 1.3 * measured


SHAPES = {
    "SmolLM2-135M": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
        ),
    ),
    "Gemma-3-270M": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            vocab_size=262144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
        ),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_estimate_is_within_a_tenth(name):
    model_class, config = SHAPES[name]
    with torch.device("meta"):
        model = model_class(config)
    unembedding = config.vocab_size * config.hidden_size  # a copy in TransformerLens, tied here
    exact = sum(p.numel() for p in model.parameters()) + unembedding
    shape = ModelShape(config.hidden_size, config.num_hidden_layers, config.vocab_size)
    assert model_parameters(shape) == pytest.approx(exact, rel=0.1)


def recipe(model: str) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {"name": model},
            "data": {"context_size": 32},
            "hooks": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"],
            "saes": {
                "multiscale": {"d_sae": 128, "k": 8},
                "batchtopk": {"architecture": "batchtopk", "d_sae": 256, "k": 8},
            },
            "training": {
                "tokens": 10_100,
                "batch_size_tokens": 500,
                "n_batches_in_buffer": 20,
                "store_batch_size_prompts": 4,
                "n_checkpoints": 3,
                "keep_checkpoints": 2,
            },
        }
    )


def test_a_run_adds_up(tiny_model_dir):
    config = recipe(str(tiny_model_dir))
    shape = describe_model(str(tiny_model_dir))
    cost = run_cost(config, config.validate(shape), shape)
    assert len(cost.saes) == 4
    assert (cost.tokens, cost.steps) == (10_000, 20)
    assert cost.forward_passes == 79  # 10,000 / (4 * 32), rounded up
    assert cost.buffer_bytes == 2 * 4 * (20 * 32 + 4 * 32) * (64 + 64)
    per_checkpoint = sum(c.weight_bytes + c.optimizer_bytes for c in cost.saes.values())
    assert cost.checkpoints_bytes == 2 * per_checkpoint
    assert cost.peak_bytes > cost.model_bytes + cost.buffer_bytes + 4 * sum(
        c.parameters * 4 for c in cost.saes.values()
    )
