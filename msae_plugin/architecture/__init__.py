"""The `multiscale` architecture: configuration, training and inference SAE, mechanisms."""

# First of all: when SAELens is imported, the architecture is registered (`msae_plugin/__init__.py`)
# and with it imported, which must not happen half-way through the imports below.
import sae_lens  # noqa: F401  # pyright: ignore[reportUnusedImport]

from msae_plugin.architecture.config import MultiScaleSAEConfig, MultiScaleTrainingSAEConfig
from msae_plugin.architecture.inference_sae import MultiScaleSAE
from msae_plugin.architecture.presets import preset, preset_names, preset_summary
from msae_plugin.architecture.training_sae import MultiScaleTrainingSAE

__all__ = [
    "MultiScaleSAE",
    "MultiScaleSAEConfig",
    "MultiScaleTrainingSAE",
    "MultiScaleTrainingSAEConfig",
    "preset",
    "preset_names",
    "preset_summary",
]
