"""Multi-scale orthogonal sparse autoencoders for SAELens.

    import msae_plugin as msae

    trained = msae.train("smollm2", "runs/smollm2", changes={"training.tokens": 100_000})
    trained.table()

Importing the package makes SAELens know the architecture `multiscale`: its runners, its command
line and its loaders. It does not import SAELens, which with torch takes eight seconds of processor
time: what needs it is imported when it is first used, and the registration waits until SAELens is
imported, by whomever.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from msae_plugin.common.errors import InputError, RunFailure

if TYPE_CHECKING:
    from msae_plugin.api import (
        Result,
        compare,
        evaluate,
        latents,
        load,
        look,
        publish,
        report,
        train,
    )
    from msae_plugin.architecture import (
        MultiScaleSAE,
        MultiScaleSAEConfig,
        MultiScaleTrainingSAE,
        MultiScaleTrainingSAEConfig,
        preset,
        preset_names,
        preset_summary,
    )
    from msae_plugin.registration import register

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "MultiScaleSAE",
    "MultiScaleSAEConfig",
    "MultiScaleTrainingSAE",
    "MultiScaleTrainingSAEConfig",
    "Result",
    "RunFailure",
    "__version__",
    "compare",
    "evaluate",
    "latents",
    "load",
    "look",
    "preset",
    "preset_names",
    "preset_summary",
    "publish",
    "register",
    "report",
    "train",
]

_API = {
    "Result", "compare", "evaluate", "latents", "load", "look", "publish", "report", "train",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = "api" if name in _API else "registration" if name == "register" else "architecture"
    value = globals()[name] = getattr(import_module(f"{__name__}.{place}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register(_: ModuleType) -> None:
    import_module(f"{__name__}.registration")


# At once where SAELens is imported already.
wrapt.register_post_import_hook(_register, "sae_lens")
