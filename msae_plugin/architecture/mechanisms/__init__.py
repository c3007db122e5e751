"""All mechanisms, and those that one SAE has switched on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.mechanisms.alignment import AlignedEncoder
from msae_plugin.architecture.mechanisms.base import Mechanism
from msae_plugin.architecture.mechanisms.firing_floor import FiringFloor
from msae_plugin.architecture.mechanisms.importance import FeatureImportance
from msae_plugin.architecture.mechanisms.normalisation import MultiScaleNormalisation
from msae_plugin.architecture.mechanisms.orthogonality import NeighbourCoactivation, Orthogonality
from msae_plugin.architecture.mechanisms.revival import RevivalRecord
from msae_plugin.architecture.mechanisms.sketch import CoactivationSketch
from msae_plugin.architecture.mechanisms.zscore import PreActivationStatistics

# By name in the state dict, in the order in which they act at each moment of a step: latents are
# revived before the normalisation follows the batch that they are judged by.
MECHANISMS: dict[str, type[Mechanism]] = {
    "revivals": RevivalRecord,
    "alignment": AlignedEncoder,
    "normalisation": MultiScaleNormalisation,
    "statistics": PreActivationStatistics,
    "firing_floor": FiringFloor,
    "neighbours": NeighbourCoactivation,
    "sketch": CoactivationSketch,
    "importance": FeatureImportance,
    "orthogonality": Orthogonality,
}


class Mechanisms(nn.Module):
    """The mechanisms of one SAE; those that are off are None."""

    revivals: RevivalRecord | None
    normalisation: MultiScaleNormalisation | None
    statistics: PreActivationStatistics | None
    firing_floor: FiringFloor | None
    neighbours: NeighbourCoactivation | None
    importance: FeatureImportance | None
    orthogonality: Orthogonality | None

    def __init__(self, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> None:
        super().__init__()
        for name, kind in MECHANISMS.items():
            setattr(self, name, kind.of(cfg, device))

    def __iter__(self) -> Iterator[Mechanism]:
        """Those that are on, in their order."""
        return (child for child in self.children() if isinstance(child, Mechanism))
