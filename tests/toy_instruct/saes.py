"""SAEs of the toy model: trained in seconds, and untrained ones at the same L0.

A latent of the trained SAE is active on one or two words; clamping those of the animals takes the
animals' questions away and leaves most of the guilds'. A latent of the untrained SAE is active on a
random few per cent of all words, everyday ones among them: 3 to 6 pass the retain thresholds, where
65 of the trained one do. docs/evaluation.md has what both do to the answers.

That comparison needs many words. An untrained latent that is active on a share p of all words, p
being L0 / d_sae, misses all n words of the retain corpus with probability (1 - p)^n: a corpus of
100 words and an L0 of 4 in 256 lets a fifth of all untrained latents pass, and they score. Real
corpora have tens of thousands of words.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from transformers import PreTrainedTokenizerBase

from msae_plugin.architecture.calibration import calibrate
from msae_plugin.architecture.presets import preset
from msae_plugin.architecture.training_sae import MultiScaleTrainingSAE
from msae_plugin.data.text_files import read_column
from msae_plugin.models.loading import LanguageModel
from msae_plugin.registration import register
from toy_instruct.invented_facts import lettered
from toy_instruct.prepare import TOY_HOOK, ToyInstruct
from toy_instruct.training import ORDERS, prompt, text_windows

MODEL_NAME = "toy-instruct"
"""What the SAEs' metadata name as their model."""

_WINDOW = 64
_WINDOWS_AT_ONCE = 64
_CALIBRATION_TOKENS = 4096
_DEAD_AFTER_STEPS = 50


@dataclass(frozen=True)
class ToySAERecipe:
    """Sizes of the toy's SAEs."""

    d_sae: int = 384
    k: float = 14
    steps: int = 400  # 250 are too few for latents of single words
    batch: int = 512
    lr: float = 3e-3


@torch.no_grad()
def toy_activations(toy: ToyInstruct, language_model: LanguageModel) -> torch.Tensor:
    """Activations at `TOY_HOOK` on both corpora and on every question in four orders."""
    tokenizer = language_model.tokenizer
    corpora = [
        [str(document) for document in read_column(file, "text")]
        for file in (toy.forget_corpus, toy.retain_corpus)
    ]
    batches = [
        *text_windows(corpora, tokenizer, _WINDOW).split(_WINDOWS_AT_ONCE),
        *_prompts(toy, tokenizer).split(_WINDOWS_AT_ONCE),
    ]
    special = torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id])
    parts: list[torch.Tensor] = []
    for tokens in batches:
        _, cache = language_model.model.run_with_cache(tokens, names_filter=[TOY_HOOK])
        parts.append(cache[TOY_HOOK][~torch.isin(tokens, special)])
    return torch.cat(parts)


def _prompts(toy: ToyInstruct, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    for name, questions in toy.load_questions().items():
        for number, question in enumerate(questions):
            for order in ORDERS[number % 6 :: 6]:
                text = prompt(tokenizer, lettered(name, question, order))
                rows.append(torch.tensor(tokenizer.encode(text, add_special_tokens=False)))
    padding: Any = tokenizer.pad_token_id
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


def train_toy_sae(
    toy: ToyInstruct,
    language_model: LanguageModel,
    seed: int,
    recipe: ToySAERecipe | None = None,
    activations: torch.Tensor | None = None,
) -> SAE[Any]:
    """Train a `multiscale` SAE (preset `features`) for the toy model, in seconds."""
    recipe = recipe or ToySAERecipe()
    if activations is None:
        activations = toy_activations(toy, language_model)
    scale = _scale(activations)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        sae = _initial(activations, seed, recipe)
        _optimise(sae, activations * scale, recipe)
    return _exported(sae, activations, scale)


def untrained_toy_sae(
    toy: ToyInstruct,
    language_model: LanguageModel,
    seed: int,
    recipe: ToySAERecipe | None = None,
    activations: torch.Tensor | None = None,
) -> SAE[Any]:
    """The same SAE before its first step, with the threshold that gives it the same L0.

    Its `b_dec` is the mean of the activations: without it, latents along the mean would be active
    everywhere and all others nowhere.
    """
    recipe = recipe or ToySAERecipe()
    if activations is None:
        activations = toy_activations(toy, language_model)
    scale = _scale(activations)
    with torch.random.fork_rng(devices=[]):
        sae = _initial(activations, seed, recipe)
        sae.b_dec.data = activations.mean(0) * scale
    return _exported(sae, activations, scale)


def _scale(activations: torch.Tensor) -> float:
    """Gives activations a mean norm of the square root of their width, as SAELens trains on."""
    return float(activations.shape[1] ** 0.5 / activations.norm(dim=-1).mean())


def _initial(activations: torch.Tensor, seed: int, recipe: ToySAERecipe) -> MultiScaleTrainingSAE:
    torch.manual_seed(seed)
    return MultiScaleTrainingSAE(
        preset(
            "features",
            d_in=activations.shape[1],
            d_sae=recipe.d_sae,
            k=recipe.k,
            training_steps=recipe.steps,
        )
    )


def _optimise(sae: MultiScaleTrainingSAE, activations: torch.Tensor, recipe: ToySAERecipe) -> None:
    optimiser = torch.optim.Adam(sae.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1.0, (step + 1) / 50, max(0.05, 3 * (1 - step / recipe.steps))),
    )
    silent = torch.zeros(recipe.d_sae)
    sae.train()
    for step in range(recipe.steps):
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=activations[torch.randint(len(activations), (recipe.batch,))],
                coefficients={},
                dead_neuron_mask=silent > _DEAD_AFTER_STEPS,
                n_training_steps=step,
                is_logging_step=False,
            )
        )
        silent += 1
        silent[(output.feature_acts > 0).any(0)] = 0
        optimiser.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        schedule.step()


def _exported(sae: MultiScaleTrainingSAE, activations: torch.Tensor, scale: float) -> SAE[Any]:
    register()  # SAELens must know `multiscale` before it reads a cfg.json
    sae.eval()
    calibrate(sae, [part * scale for part in activations.split(_CALIBRATION_TOKENS)])
    sae.fold_activation_norm_scaling_factor(scale)
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.hook_name = MODEL_NAME, TOY_HOOK
    metadata.prepend_bos, metadata.context_size = True, _WINDOW
    with tempfile.TemporaryDirectory(prefix="msae-toy-sae-") as folder:
        sae.save_inference_model(folder)
        exported = SAE.load_from_disk(folder, device="cpu", dtype="float32")
    exported.eval()
    return exported
