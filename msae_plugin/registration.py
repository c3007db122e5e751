"""Registration of the architecture with SAELens, which reads no entry points.

Importing this module registers. `msae_plugin` imports it as soon as SAELens is there.
"""

from __future__ import annotations

from typing import Any

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

from msae_plugin.architecture.config import (
    ARCHITECTURE,
    MultiScaleSAEConfig,
    MultiScaleTrainingSAEConfig,
)
from msae_plugin.architecture.inference_sae import MultiScaleSAE
from msae_plugin.architecture.training_sae import MultiScaleTrainingSAE
from msae_plugin.common.errors import InputError


def register() -> None:
    """Make SAELens know `multiscale`; twice is harmless, another package's class is refused."""
    _register(
        SAE_CLASS_REGISTRY, register_sae_class, (MultiScaleSAE, MultiScaleSAEConfig), "inference"
    )
    _register(
        SAE_TRAINING_CLASS_REGISTRY,
        register_sae_training_class,
        (MultiScaleTrainingSAE, MultiScaleTrainingSAEConfig),
        "training",
    )


def _register(
    registry: dict[str, tuple[Any, Any]], add: Any, ours: tuple[type, type], kind: str
) -> None:
    present = registry.get(ARCHITECTURE)
    if present is None:
        add(ARCHITECTURE, *ours)
    elif present[0] is not ours[0]:
        raise InputError(
            f"SAELens already has a {kind} class named {ARCHITECTURE!r}: "
            f"{present[0].__module__}.{present[0].__qualname__}; "
            "import only one of the two packages"
        )


register()
