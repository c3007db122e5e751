"""Peers by name, as sections of a comparison: what SAELens lacks, or has in dense steps alone.

Each is a configuration of `multiscale`, an option of SAELens, or a small training class of this
package; tests/architecture/test_peers.py checks each against its paper's equation in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

from msae_plugin.architecture.config import mechanisms_off
from msae_plugin.architecture.peers import bottleneck, c2r, lista
from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import did_you_mean


@dataclass(frozen=True)
class Peer:
    """A method to compare with."""

    summary: str  # What it is, and what follows its paper
    source: str
    section: Mapping[str, Any]
    batchtopk: bool = False  # The section comes on top of BatchTopK
    anneals_k: bool = False  # k falls over the whole run


PEERS: Mapping[str, Peer] = {
    name: Peer(**entry)
    for name, entry in yaml.safe_load(
        Path(__file__).with_name("peers.yaml").read_text(encoding="utf-8")
    ).items()
}


def batchtopk_section() -> dict[str, Any]:
    """`multiscale` with every mechanism off: SAELens' BatchTopK, at a fraction of its cost."""
    off = mechanisms_off()
    # A comparison's `common` section decides it, for all methods alike.
    del off["input_normalization"]
    return {"architecture": "multiscale", "preset": "default", **off}


def peer_section(name: str, training_steps: int) -> dict[str, Any]:
    """The section of a peer, schedules fitted to the length of the run."""
    if name not in PEERS:
        raise InputError(f"peer {name!r} is unknown: {did_you_mean(name, PEERS, 'known: ')}")
    peer = PEERS[name]
    section = {**(batchtopk_section() if peer.batchtopk else {}), **peer.section}
    return section | ({"k_anneal_steps": training_steps} if peer.anneals_k else {})


def register_peers() -> None:
    """Make SAELens know the training classes of this package's peers; twice is harmless."""
    for architecture, classes in {
        bottleneck.ARCHITECTURE: (
            bottleneck.BottleneckTrainingSAE,
            bottleneck.BottleneckTrainingSAEConfig,
        ),
        c2r.ARCHITECTURE: (c2r.C2RTrainingSAE, c2r.C2RTrainingSAEConfig),
        lista.ARCHITECTURE: (lista.ListaTrainingSAE, lista.ListaTrainingSAEConfig),
    }.items():
        if architecture not in SAE_TRAINING_CLASS_REGISTRY:
            register_sae_training_class(architecture, *classes)
    if lista.INFERENCE_ARCHITECTURE not in SAE_CLASS_REGISTRY:
        register_sae_class(lista.INFERENCE_ARCHITECTURE, lista.ListaSAE, lista.ListaSAEConfig)


register_peers()
