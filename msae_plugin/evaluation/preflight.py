"""Everything that an evaluation needs, checked before any model is loaded.

Packages, the model and its files, the device, datasets, keys, corpora, prompt formats, disk: what
is missing is listed together, each with how to get it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from msae_plugin.common.errors import InputError, MissingInputError, Problem
from msae_plugin.common.files import default_cache, versions
from msae_plugin.evaluation.preflight_checks import (
    BYTES_OF,
    core_bytes,
    misfits,
    missing_device,
    missing_disk,
    missing_for_autointerp,
    missing_for_core,
    missing_for_probing,
    missing_for_ravel,
    missing_model,
    tokenizer_folder,
    too_long,
)
from msae_plugin.evaluation.recipe import EvalConfig
from msae_plugin.models.hub_access import hub_asked_once
from msae_plugin.models.loading import describe_model
from msae_plugin.saes.load import EvaluatedSAE

EXTRA = 'pip install "msae-plugin[eval]"'


@dataclass(frozen=True)
class Requirement:
    """A package that some evaluations need.

    Attributes:
        module: What is imported.
        distribution: What is installed.
        versions: Those that work, as `pip install` takes them; empty for any.
        why: Who needs it.
        evaluations: The evaluations that need it; none for all.
    """

    module: str
    distribution: str
    versions: str = ""
    why: str = "SAEBench"
    evaluations: tuple[str, ...] = ()


_SAE_PROBES = "sparse_probing_sae_probes"
REQUIREMENTS = (
    Requirement("sae_bench", "sae-bench", ">=0.6,<0.7", "every evaluation"),
    # SAEBench's own limits: its metadata and what it imports at the top.
    Requirement("numpy", "numpy", "<2"),
    Requirement("datasets", "datasets", "<4"),
    Requirement("torchvision", "torchvision"),
    Requirement("sae_probes", "sae-probes", ">=0.4,<0.5", _SAE_PROBES, (_SAE_PROBES,)),
    Requirement("openai", "openai", why="autointerp's judge", evaluations=("autointerp",)),
    Requirement("accelerate", "accelerate", why="RAVEL's model", evaluations=("ravel",)),
)


def missing_packages(evaluation: str | None) -> list[Problem]:
    """Packages that are not installed, or in a version that does not work."""
    wanted = [
        requirement
        for requirement in REQUIREMENTS
        if (evaluation in requirement.evaluations)
        or (evaluation is None and not requirement.evaluations)
    ]
    return list(_missing(wanted))


def saebench_is_installed() -> bool:
    """Whether sae_bench can be imported at all."""
    return importlib.util.find_spec("sae_bench") is not None


def _missing(wanted: Iterable[Requirement]) -> Iterable[Problem]:
    for requirement in wanted:
        name = requirement.distribution
        if importlib.util.find_spec(requirement.module) is None:
            own = EXTRA if not requirement.evaluations or name == "sae-probes" else None
            yield Problem(
                f"package {name}, which {requirement.why} needs", own or f"pip install {name}"
            )
            continue
        version = versions(name)[name]
        try:
            works = SpecifierSet(requirement.versions).contains(Version(version), prereleases=True)
        except InvalidVersion:
            continue  # a copy without metadata: nothing is known against it
        if not works:
            yield Problem(
                f"package {name} {version}, where {requirement.why} needs {requirement.versions}",
                f'pip install "{name}{requirement.versions}"',
            )


def refuse_missing(problems: Sequence[Problem]) -> None:
    """Refuse to go on without what was found missing.

    What several evaluations lack is named once.

    Raises:
        MissingInputError: There is a problem.
    """
    lacking: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        lacking.setdefault((problem.what, problem.how), []).append(problem.evaluation)
    if lacking:
        items = [str(Problem(*lack, ", ".join(names))) for lack, names in lacking.items()]
        raise MissingInputError(items, "--skip-missing runs the rest")


def preflight(
    config: EvalConfig, saes: Sequence[EvaluatedSAE], *, model_name: str | None
) -> list[Problem]:
    """List what is missing.

    Args:
        config: What is to be evaluated.
        saes: The SAEs.
        model_name: The language model; None where it is loaded already.

    Returns:
        Problems, those of all evaluations first; none where everything is there.
    """
    with hub_asked_once():
        return _problems(config, saes, model_name)


def _problems(
    config: EvalConfig, saes: Sequence[EvaluatedSAE], model_name: str | None
) -> list[Problem]:
    found = missing_packages(None) + missing_device(config.model.device)
    d_model: int | None = None
    if model_name is not None:
        lacking = missing_model(model_name)
        if not lacking:
            lacking = misfits(model_name, saes)
            d_model = describe_model(model_name).d_model
        found += lacking
    check = _Checks(config, saes, model_name, d_model)
    for evaluation, settings in config.evaluations.items():
        found += [
            # Some of the messages begin with the evaluation's name themselves.
            Problem(problem.what.removeprefix(f"{evaluation}: "), problem.how, evaluation)
            for problem in [
                *missing_packages(evaluation),
                *check.run(evaluation, settings),
                *too_long(evaluation, settings, model_name if d_model is not None else None),
            ]
        ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class _Checks:
    """The checks of each evaluation."""

    config: EvalConfig
    saes: Sequence[EvaluatedSAE]
    model_name: str | None
    d_model: int | None

    def run(self, evaluation: str, settings: Mapping[str, Any]) -> list[Problem]:
        """Everything that one evaluation lacks."""
        checks: dict[str, Callable[[Mapping[str, Any]], list[Problem]]] = {
            "core": self._core,
            "sparse_probing": self._sparse_probing,
            "sparse_probing_sae_probes": self._sae_probes,
            "unlearning": self._unlearning,
            "scr": missing_for_probing,
            "tpp": missing_for_probing,
            "ravel": lambda settings: missing_for_ravel(settings, self.model_name),
            "autointerp": missing_for_autointerp,
        }
        check = checks.get(evaluation)
        return [] if check is None else check(settings)

    @property
    def _cache(self) -> Path:
        return Path(self.config.cache) if self.config.cache else default_cache()

    @property
    def _widths(self) -> list[int]:
        """Width of the activations at each hook."""
        return list({s.hook_name: s.sae.cfg.d_in for s in self.saes}.values())

    def _core(self, settings: Mapping[str, Any]) -> list[Problem]:
        found = missing_for_core(settings)
        needed = sum(
            core_bytes(settings, width, self.d_model or width, self.config.model.dtype)
            for width in self._widths
        )
        needed *= len(self.config.seeds)
        return found + missing_disk(self._cache, needed, "or smaller sizes", "core")

    def _sparse_probing(self, settings: Mapping[str, Any]) -> list[Problem]:
        return missing_for_probing(
            settings,
            cache=self._cache,
            bytes_per_token=sum(self._widths) * BYTES_OF[self.config.model.dtype],
            runs=len(self.config.seeds),
        )

    def _sae_probes(self, settings: Mapping[str, Any]) -> list[Problem]:
        if not saebench_is_installed() or missing_packages("sparse_probing_sae_probes"):
            return []  # named already
        # Imported here: it imports sae_bench and sae_probes, which takes seconds.
        module = importlib.import_module("msae_plugin.evaluation.saebench.sae_probes")
        return module.missing_for_sae_probes(
            settings, cache=self._cache, d_model=sum(self._widths), runs=1
        )

    def _unlearning(self, settings: Mapping[str, Any]) -> list[Problem]:
        found: list[Problem] = []
        own_model: str | None = settings.get("model")
        if own_model is not None:
            found += missing_model(own_model)
        instruct = own_model or self.model_name
        folder = None if instruct is None or found else tokenizer_folder(instruct)
        if not saebench_is_installed():
            return found  # named already
        # As in `_sae_probes`.
        module = importlib.import_module("msae_plugin.evaluation.saebench.unlearning.adapter")
        try:
            return found + module.missing_for_unlearning(settings, folder)
        except InputError as error:
            return [*found, Problem.of(error, "mend evaluations.unlearning in the config")]
