"""Packages that the evaluations need, found without importing them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

from msae_plugin.common.cache import versions
from msae_plugin.common.missing import Missing

EXTRA = 'pip install "msae-plugin[eval]"'


@dataclass(frozen=True)
class Requirement:
    """A package that some evaluations need.

    Attributes:
        module: What is imported.
        distribution: What is installed.
        at_least: Oldest version that works, as numbers; none for any.
        below: First version that no longer works; none for any.
        why: Who needs it.
        evaluations: The evaluations that need it; none for all.
    """

    module: str
    distribution: str
    at_least: tuple[int, ...] = ()
    below: tuple[int, ...] = ()
    why: str = "SAEBench"
    evaluations: tuple[str, ...] = ()


REQUIREMENTS = (
    Requirement("sae_bench", "sae-bench", (0, 6), (0, 7), "every evaluation"),
    # SAEBench's own limits: its metadata and what it imports at the top.
    Requirement("numpy", "numpy", below=(2,)),
    Requirement("datasets", "datasets", below=(4,)),
    Requirement("torchvision", "torchvision"),
    Requirement(
        "sae_probes",
        "sae-probes",
        (0, 4),
        (0, 5),
        "sparse_probing_sae_probes",
        ("sparse_probing_sae_probes",),
    ),
    Requirement("openai", "openai", why="autointerp's judge", evaluations=("autointerp",)),
    Requirement("accelerate", "accelerate", why="RAVEL's model", evaluations=("ravel",)),
)


def missing_packages(evaluation: str | None) -> list[Missing]:
    """What is not installed, or in a version that does not work.

    Args:
        evaluation: Packages of this evaluation alone; None for those that all of them need.
    """
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


def _missing(wanted: Iterable[Requirement]) -> Iterable[Missing]:
    for requirement in wanted:
        name = requirement.distribution
        if importlib.util.find_spec(requirement.module) is None:
            own = EXTRA if not requirement.evaluations or name == "sae-probes" else None
            yield Missing(
                f"package {name}, which {requirement.why} needs", own or f"pip install {name}"
            )
            continue
        version = versions(name)[name]
        numbers = _numbers(version)
        if not numbers:
            continue  # a copy without metadata: nothing is known against it
        if numbers < requirement.at_least or (requirement.below and numbers >= requirement.below):
            limits = ",".join(
                f"{sign}{'.'.join(map(str, limit))}"
                for sign, limit in ((">=", requirement.at_least), ("<", requirement.below))
                if limit
            )
            yield Missing(
                f"package {name} {version}, where {requirement.why} needs {limits}",
                f'pip install "{name}{limits}"',
            )


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with; enough to compare major and minor."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)
