"""Multi-scale orthogonal sparse autoencoders for SAELens.

Importing the package registers the architecture `multiscale` with SAELens: its runners, its command
line and its loaders then know it.
"""

from msae_plugin.architecture import (
    MultiScaleSAE,
    MultiScaleSAEConfig,
    MultiScaleTrainingSAE,
    MultiScaleTrainingSAEConfig,
    preset,
    preset_names,
    preset_summary,
)
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.registration import register

register()

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "MultiScaleSAE",
    "MultiScaleSAEConfig",
    "MultiScaleTrainingSAE",
    "MultiScaleTrainingSAEConfig",
    "RunFailure",
    "__version__",
    "preset",
    "preset_names",
    "preset_summary",
    "register",
]
