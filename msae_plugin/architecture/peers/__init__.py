"""Peers that SAELens does not have, by name, as sections of a comparison.

Each is a configuration of `multiscale`, an option of SAELens, or a small training class of this
package; tests/architecture/test_peers.py checks each against its paper's equation in float64.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

from msae_plugin.architecture.config import mechanisms_off
from msae_plugin.architecture.peers import c2r, lista
from msae_plugin.common.errors import InputError

Section = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A method to compare with."""

    summary: str  # What it is, and what follows its paper
    source: str
    section: Callable[[int], Section]  # Section of a recipe for a run of so many steps


def batchtopk_section() -> Section:
    """`multiscale` with every mechanism off: SAELens' BatchTopK, at a fraction of its cost."""
    off = mechanisms_off()
    # A comparison's `common` section decides it, for all methods alike.
    del off["input_normalization"]
    return {"architecture": "multiscale", "preset": "reconstruction", **off}


def _ortsae(_steps: int) -> Section:
    return {
        **batchtopk_section(),
        "orthogonality_coefficient": 0.25,
        "orthogonality_pairs": "chunks",
        "orthogonality_weighting": "none",
        "orthogonality_chunk_size": 8192,
    }


def _c2r(_steps: int) -> Section:
    return {"architecture": c2r.ARCHITECTURE}


def _aligned(_steps: int) -> Section:
    # With rows of norm .1, SAELens' start, an encoder of norm 10 would meet a decoder of norm .1.
    return {**batchtopk_section(), "aligned_encoder": True, "decoder_init_norm": 1.0}


def _multi_topk(_steps: int) -> Section:
    return {**batchtopk_section(), "sparsity_scales": [4.0], "sparsity_scale_weight": 1 / 8}


def _hierarchical_topk(_steps: int) -> Section:
    budgets = [n / 8 for n in range(1, 8)]
    return {**batchtopk_section(), "sparsity_scales": budgets, "sparsity_scale_weight": 1.0}


def _whitened(_steps: int) -> Section:
    whitening = {"normalize_activations": "covariance_whitening", "input_normalization": "none"}
    return {"architecture": "batchtopk", **whitening}


def _lista(steps: int) -> Section:
    return {"architecture": lista.ARCHITECTURE, "k_anneal_steps": steps}


PEERS: Mapping[str, Peer] = {
    "ortsae": Peer(
        "BatchTopK with 0.25 times the mean over latents of the largest squared cosine within "
        "random chunks of 8192; the coefficient is in units of the activations' variance where the "
        "paper scales activations to mean squared norm 1",
        "arXiv 2509.22033",
        _ortsae,
    ),
    "c2r": Peer(
        "BatchTopK with 5 times the co-activation of nearest decoder neighbours, every fifth step",
        "arXiv 2606.30609",
        _c2r,
    ),
    "aligned": Peer(
        "BatchTopK whose encoder is moved before every step so that <e_i, d_i> = 1",
        "arXiv 2605.18629",
        _aligned,
    ),
    "multi_topk": Peer(
        "BatchTopK with an eighth of the loss at 4 k; the paper ranks each token by itself",
        "arXiv 2406.04093",
        _multi_topk,
    ),
    "hierarchical_topk": Peer(
        "BatchTopK with the loss at eight budgets up to k, equally; the paper takes every budget "
        "of each token",
        "arXiv 2505.24473",
        _hierarchical_topk,
    ),
    "whitened_batchtopk": Peer(
        "SAELens' BatchTopK on activations whitened by their covariance, folded after training",
        "arXiv 2511.13981",
        _whitened,
    ),
    "lista_matryoshka": Peer(
        "one LISTA refinement step, prefixes d/32, d/8, d/2 ordered by frequency and detached, "
        "k falling from 2.4 k over the whole run, tilted losses",
        "github.com/chanind/claude-auto-research-synthsaebench",
        _lista,
    ),
}


def peer_section(name: str, training_steps: int) -> Section:
    """The section of a peer, schedules fitted to the length of the run."""
    if name not in PEERS:
        near = difflib.get_close_matches(name, PEERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PEERS)}"
        raise InputError(f"peer {name!r} is unknown: {hint}")
    return PEERS[name].section(training_steps)


def register_peers() -> None:
    """Make SAELens know the training classes of this package's peers; twice is harmless."""
    for architecture, classes in {
        c2r.ARCHITECTURE: (c2r.C2RTrainingSAE, c2r.C2RTrainingSAEConfig),
        lista.ARCHITECTURE: (lista.ListaTrainingSAE, lista.ListaTrainingSAEConfig),
    }.items():
        if architecture not in SAE_TRAINING_CLASS_REGISTRY:
            register_sae_training_class(architecture, *classes)
    if lista.INFERENCE_ARCHITECTURE not in SAE_CLASS_REGISTRY:
        register_sae_class(lista.INFERENCE_ARCHITECTURE, lista.ListaSAE, lista.ListaSAEConfig)


register_peers()
