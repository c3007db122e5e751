"""The tiny language model, its text and the recipes that `freeze.py` runs.

A copy of what `tests/conftest.py` makes, on purpose: frozen outputs must not move with the tests.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HOOK = "blocks.1.hook_resid_post"


def texts() -> list[str]:
    """400 generated documents of 40 to 160 words, with topics, hence structure."""
    generator = random.Random(0)
    topics = {
        "garden": "rose soil rain seed leaf root spade bloom hedge worm",
        "kitchen": "flour oven sugar knife butter dough plate salt spoon yeast",
        "harbour": "ship rope sail tide anchor crane gull cargo wave pier",
        "library": "book shelf page ink reader quiet index poem margin spine",
    }
    glue = "the a of and with under near from into was were old new small bright"
    documents: list[str] = []
    for number in range(400):
        topic = generator.choice(list(topics))
        words = [
            generator.choice((topics[topic] if generator.random() < 0.6 else glue).split())
            for _ in range(generator.randrange(40, 160))
        ]
        documents.append(f"Note {number} from the {topic}: {' '.join(words)}.")
    return documents


def write_model(folder: Path) -> None:
    """A random Llama of 3 layers, width 64 and 512 tokens, as `save_pretrained` writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=256,
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
        initializer_range=0.1,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


def training_recipe(**changes: Any) -> dict[str, Any]:
    """30 steps on the tiny model; paths are relative to the folder of the inputs."""
    recipe: dict[str, Any] = {
        "model": {"name": "tiny-model", "device": "cpu"},
        "data": {"source": "notes.jsonl", "context_size": 32, "heldout_documents": 20},
        "hooks": [HOOK],
        "sae": {"d_sae": 96, "k": 8},
        "training": {
            "tokens": 30 * 128,
            "batch_size_tokens": 128,
            # High enough to explain something in 30 steps: what explains nothing is not published.
            "lr": 1e-2,
            "n_batches_in_buffer": 16,
            "store_batch_size_prompts": 8,
            "calibrate_batches": 4,
            "dead_feature_window": 10,
            "seed": 7,
        },
        "logging": {"every_steps": 5, "tensorboard": "off"},
    }
    recipe.update(changes)
    return {key: value for key, value in recipe.items() if value is not None}


# One SAE per mechanism that no preset below uses, trained side by side.
MECHANISMS: dict[str, dict[str, Any]] = {
    "plain": {
        "sparsity_scales": [],
        "prefix_fractions": [],
        "orthogonality_coefficient": 0.0,
        "firing_floor": 0.0,
    },
    "prefixes": {
        "prefix_fractions": [0.25, 0.5],
        "detach_inner_prefixes": True,
        "prefix_sort_every": 5,
    },
    "zscore": {
        "selection": "zscore",
        "zscore_z": 1.5,
        "zscore_z_lr": 0.1,
        "l1_coefficient": 0.01,
        "firing_floor": 0.0,
        "sparsity_scales": [],
    },
    "floor": {"firing_floor": 0.3},
    "neighbours": {
        "orthogonality_pairs": "neighbours",
        "orthogonality_weighting": "coactivation",
    },
    "sketch": {"orthogonality_weighting": "coactivation", "sketch_rank": 8},
    "revival": {"revival_every": 6, "revival_dead_steps": 4, "k": 2},
    "folded": {"norm_scales": [0.5, 2.0], "skip_scale": 0.1},
    "attention": {
        "norm_scales": [0.5, 1.0],
        "norm_eps": 0.1,
        "norm_eps_mode": "relative",
        "norm_attention": True,
        "norm_gate": True,
        "importance_power": 0.5,
    },
    "initial": {
        "weight_init": "inverse_sqrt_d",
        "unit_norm_decoder": True,
        "decoder_init_norm": 1.0,
    },
    "scaled": {"normalize_activations": "expected_average_only_in", "aux_loss_coefficient": 0.0},
    "rates": {"lr": 2e-3, "lr_floor": 1e-4, "gradient_lr": {"enabled": True}},
}

# Settings that no recipe uses and that may be dropped: each in a run of its own, so that a key that
# is refused hides no other.
RARE_SETTINGS: dict[str, dict[str, Any]] = {
    "topk_threshold_lr": {"topk_threshold_lr": 0.05},
    "rescale": {"rescale_acts_by_decoder_norm": False},
    "b_dec_init": {"b_dec_init": "mean"},
    "standardise": {"firing_floor": 0.0, "standardise": 0.5},
    "firing_floor_rate": {"firing_floor_rate": 0.3},
    "orthogonality_every": {"orthogonality_every": 2},
    "norm_parts": {"norm_scales": [1.0], "norm_centre": False, "norm_affine": False},
    "attention_d_key": {
        "norm_scales": [0.5, 1.0],
        "norm_eps_mode": "relative",
        "norm_attention": True,
        "attention_d_key": 8,
    },
    "decode_kernel": {"decode_kernel": "embedding_bag"},
    "cuda_graphs": {"cuda_graphs": False},
}

GROUND_TRUTH: dict[str, Any] = {
    "synthetic": {
        "model": {
            "num_features": 48,
            "hidden_dim": 16,
            "seed": 3,
            "bias": 0.5,
            "firing_probability": {
                "generator_name": "zipfian",
                "exponent": 0.5,
                "max_prob": 0.3,
                "min_prob": 0.01,
            },
            "mean_firing_magnitudes": 4.0,
            "std_firing_magnitudes": 0.5,
        },
        "eval_samples": 2000,
        "eval_batch_size": 500,
        "device": "cpu",
    },
    "training": {
        "tokens": 80 * 128,
        "batch_size_tokens": 128,
        "lr": 4e-3,
        "calibrate_batches": 4,
        "dead_feature_window": 10,
        "norm_estimate_batches": 4,
    },
    "common": {"d_sae": 24},
    "l0": [3, 4],
    "seeds": [0, 1],
    "saes": {
        "default": {"preset": "default"},
        "batchtopk": {"architecture": "batchtopk"},
        "topk": {"architecture": "topk"},
        "standard": {
            "architecture": "standard",
            "normalize_activations": "expected_average_only_in",
        },
        "ortsae": {"peer": "ortsae"},
        "c2r": {"peer": "c2r"},
        "whitened": {"peer": "whitened_batchtopk"},
        "lista": {"peer": "lista_matryoshka"},
        "frozen": {"control": "frozen_decoder"},
        "permuted": {"control": "permuted_decoder of batchtopk"},
    },
    "reference": "batchtopk",
    "search": {"max_trials": 4, "corrections": 1, "tolerance": 0.1},
    "quick": {"training.tokens": 40 * 128, "l0": [3]},
    "log_every_steps": 10,
}

CORE: dict[str, Any] = {
    "dataset": "notes.jsonl",
    "context_size": 32,
    "batch_size_prompts": 4,
    "n_eval_reconstruction_batches": 1,
    "n_eval_sparsity_variance_batches": 2,
    "exclude_special_tokens_from_reconstruction": True,
    "compute_featurewise_density_statistics": True,
    "compute_featurewise_weight_based_metrics": True,
}

PROTOCOL: dict[str, Any] = {
    "model": {"device": "cpu"},
    "seeds": [1, 3],
    "evaluations": {
        "core": CORE,
        "sparse_probing": {
            "dataset_names": ["packaged:programming-languages"],
            "probe_train_set_size": 16,
            "probe_test_set_size": 8,
            "context_length": 16,
            "sae_batch_size": 8,
            "llm_batch_size": 8,
            "k_values": [1, 2],
        },
    },
    "cache": "evaluation-cache",
}

LANGUAGE_MODEL: dict[str, Any] = {
    "model": {"name": "tiny-model", "device": "cpu"},
    "data": {"source": "notes.jsonl", "context_size": 32, "heldout_documents": 20},
    "hooks": [HOOK],
    "training": {
        "tokens": 20 * 128,
        "batch_size_tokens": 128,
        "lr": 4e-3,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        "calibrate_batches": 4,
        "dead_feature_window": 10,
        "norm_estimate_batches": 4,
    },
    "common": {"d_sae": 96},
    "l0": [6],
    "saes": {
        "default": {"preset": "default"},
        "reviving": {"preset": "default", "revival_every": 4, "revival_dead_steps": 4},
        "batchtopk": {"architecture": "batchtopk"},
        "residual": {"control": "residual_stream"},
    },
    "heldout": {"tokens": 1024, "loss_tokens": 512, "contexts": 2},
    "evaluation": {
        "model": {"device": "cpu"},
        "seeds": [1],
        "evaluations": {"core": CORE},
        "cache": "evaluation-cache",
    },
    "log_every_steps": 5,
}


def write_inputs(folder: Path) -> None:
    """Model, text, recipes and protocols that the commands of `freeze.py` read."""
    write_model(folder / "tiny-model")
    lines = [json.dumps({"text": text}) + "\n" for text in texts()]
    (folder / "notes.jsonl").write_text("".join(lines))
    (folder / "notes.txt").write_text("\n\n".join(texts()))
    beside = {
        "ours": {"d_sae": 96, "k": 8},
        "batchtopk": {"architecture": "batchtopk", "d_sae": 96, "k": 8},
        "topk": {"architecture": "topk", "d_sae": 96, "k": 8},
        "standard": {"architecture": "standard", "d_sae": 96, "l1_coefficient": 0.1},
        "jump": {"architecture": "jumprelu", "d_sae": 96, "l0_coefficient": 0.1},
    }
    mechanisms = {name: {"d_sae": 96, "k": 8, **own} for name, own in MECHANISMS.items()}
    files: dict[str, Any] = {
        "train.yaml": training_recipe(),
        "beside.yaml": training_recipe(sae=None, saes=beside),
        "mechanisms.yaml": training_recipe(sae=None, saes=mechanisms),
        "ground-truth.yaml": GROUND_TRUTH,
        "language-model.yaml": LANGUAGE_MODEL,
        "protocol.yaml": PROTOCOL,
        "empty.yaml": None,
        "list.yaml": [1, 2],
    }
    for name, contents in files.items():
        (folder / name).write_text("" if contents is None else yaml.safe_dump(contents))
    (folder / "broken.yaml").write_text("sae: {d_sae: 96\nhooks: [")
    (folder / "empty-folder").mkdir()
    (folder / "full-folder").mkdir()
    (folder / "full-folder" / "somebody.txt").write_text("mine\n")
