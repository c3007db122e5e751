"""SAEBench's own command lines, in a process in which SAELens knows `multiscale`.

SAEBench's scripts choose SAEs from SAELens' registry of releases and write relative to the working
directory; nothing of that is changed. For a folder or a repository there is `msae eval`.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import package_folder
from msae_plugin.common.recipes import did_you_mean
from msae_plugin.evaluation.preflight import EXTRA
from msae_plugin.evaluation.saebench.patching import replaced
from msae_plugin.registration import register

_ALIASES = {"scr": "scr_and_tpp", "tpp": "scr_and_tpp"}


def saebench_scripts() -> list[str]:
    """The evaluations that SAEBench has a script for."""
    folder = package_folder("sae_bench")
    if folder is None:
        raise InputError("msae saebench needs sae-bench", EXTRA)
    return sorted(file.parent.name for file in folder.glob("evals/*/main.py"))


def run_saebench_script(evaluation: str, arguments: Sequence[str]) -> None:
    """Run `python -m sae_bench.evals.EVALUATION.main ARGUMENTS` in this process."""
    known = saebench_scripts()
    name = _ALIASES.get(evaluation, evaluation)
    if name not in known:
        hint = did_you_mean(evaluation, known, "choose from ", shown=str)
        raise InputError(f"SAEBench has no evaluation {evaluation!r}", hint)
    register()
    module = f"sae_bench.evals.{name}.main"
    with replaced(sys, "argv", [f"msae saebench {evaluation}", *arguments]):
        try:
            runpy.run_module(module, run_name="__main__")
        except ModuleNotFoundError as error:
            if error.name is None:
                raise
            raise InputError(
                f"SAEBench's {name} needs the package {error.name}: pip install {error.name}"
            ) from error
