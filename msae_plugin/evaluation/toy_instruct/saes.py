"""SAEs of the toy model: trained in seconds, and untrained ones at the same L0."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput

from msae_plugin.architecture.presets import preset
from msae_plugin.architecture.training_sae import MultiScaleTrainingSAE
from msae_plugin.evaluation.toy_instruct.prepare import TOY_HOOK
from msae_plugin.training.calibration import calibrate
from msae_plugin.training.models import load_language_model
from msae_plugin.training.text_files import read_column


def toy_activations(toy, language_model, hook=TOY_HOOK, window=64):
    tokenizer = language_model.tokenizer
    rows = []
    for corpus in (toy.forget_corpus, toy.retain_corpus):
        text = str(tokenizer.eos_token).join(str(d) for d in read_column(corpus, "text"))
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
        body = ids[: len(ids) // (window - 1) * (window - 1)].view(-1, window - 1)
        rows.append(torch.cat([torch.full((len(body), 1), tokenizer.bos_token_id), body], dim=1))
    tokens = torch.cat(rows)
    special = torch.isin(tokens, torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id]))
    with torch.no_grad():
        acts = torch.cat(
            [
                language_model.model.run_with_cache(b, names_filter=hook)[1][hook]
                for b in tokens.split(64)
            ]
        )
    return acts[~special]


def make_toy_sae(
    toy,
    seed,
    steps,
    language_model=None,
    d_sae=128,
    k=8,
    lr=3e-3,
    batch=512,
    hook=TOY_HOOK,
    preset_name="default",
):
    language_model = language_model or load_language_model(str(toy.folder), [hook])
    acts = toy_activations(toy, language_model, hook)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        cfg = preset(
            preset_name, d_in=acts.shape[1], d_sae=d_sae, k=k, training_steps=max(steps, 1)
        )
        sae = MultiScaleTrainingSAE(cfg)
        scale = acts.shape[1] ** 0.5 / acts.norm(dim=-1).mean()
        if steps == 0:
            sae.b_dec.data = acts.mean(0) * scale
        opt = torch.optim.Adam(sae.parameters(), lr=lr)
        sae.train()
        since = torch.zeros(d_sae)
        for step in range(steps):
            x = acts[torch.randint(len(acts), (batch,))] * scale
            for g in opt.param_groups:
                g["lr"] = lr * min(1, (step + 1) / 50) * max(0.05, min(1, 3 * (1 - step / steps)))
            out = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=x,
                    coefficients={},
                    dead_neuron_mask=since > 50,
                    n_training_steps=step,
                    is_logging_step=False,
                )
            )
            since += 1
            since[(out.feature_acts > 0).any(0)] = 0
            opt.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            opt.step()
        sae.eval()
        calibrate(sae, [b * scale for b in acts.split(4096)])
        sae.fold_activation_norm_scaling_factor(float(scale))
        sae.cfg.metadata.hook_name = hook
        sae.cfg.metadata.model_name = "toy-instruct"
        sae.cfg.metadata.prepend_bos = True
        with tempfile.TemporaryDirectory() as f:
            sae.save_inference_model(Path(f))
            out = SAE.load_from_disk(Path(f), device="cpu", dtype="float32")
    out.eval()
    return out, acts
