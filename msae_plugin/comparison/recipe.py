"""The recipe of a comparison: a training recipe's sections, many SAEs, sparsities and seeds.

`examples/compare_*.yaml` show every key. Whatever can be refused is refused before a language model
is loaded; the SAEs themselves are checked by `entries.expand`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from typing_extensions import Self

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import as_mapping, build
from msae_plugin.evaluation.recipe import EvalConfig
from msae_plugin.models.hook_names import common_style, parse_hook_name
from msae_plugin.training.settings import (
    DataSection,
    LoggingSection,
    ModelSection,
    TrainingSection,
    check_numbers,
)


@dataclass
class SyntheticSection:
    """Ground truth in place of a language model and text (`sae_lens.synthetic`).

    Attributes:
        model: Fields of SAELens' `SyntheticModelConfig`. Its `seed` is that of the ground truth.
        new_model_per_seed: Each seed has a ground truth of its own (the model's seed plus the
            seed); false keeps one, as SynthSAEBench does.
        eval_samples: Samples that the exported SAEs are judged on.
        eval_batch_size: Samples at a time.
        autocast: Generate the samples in bfloat16.
        saes_at_once: SAEs that are trained side by side on the same samples; null is all of a seed.
        device: auto, cpu, cuda or mps; auto is cuda when there is one.
    """

    model: dict[str, Any] = field(default_factory=dict[str, Any])
    new_model_per_seed: bool = False
    eval_samples: int = 50_000
    eval_batch_size: int = 4096
    autocast: bool = False
    saes_at_once: int | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


@dataclass
class SearchSection:
    """How coefficients are tuned of architectures that are not told an L0.

    Attributes:
        tokens: Length of a trial; null is a quarter of training.tokens.
        tolerance: Relative distance of L0 from its target at which the search ends.
        max_trials: Short trials at most.
        corrections: Whole runs at most that are thrown away because their L0 missed the target.
    """

    tokens: int | None = None
    tolerance: float = 0.05
    max_trials: int = 8
    corrections: int = 2


@dataclass
class HeldoutSection:
    """What every SAE of a language model is measured on.

    Attributes:
        tokens: Held-out tokens for explained variance, L0 and dead latents.
        loss_tokens: How many of them the losses are measured on; they need whole passes.
        contexts: Latents whose top activating contexts are stored, for the first seed of each
            method at the first L0, less the ladder's variants that are compared with another;
            0 for none.
    """

    tokens: int = 40_000
    loss_tokens: int = 5_000
    contexts: int = 8


@dataclass
class LadderSection:
    """The source's runs and mechanisms as methods (see `comparison.ladder`).

    Attributes:
        groups: `cumulative` (baseline and runs 1 to 10), `alone` (each mechanism on BatchTopK),
            `default` (the default preset with each of its mechanisms removed, or one more).
        leave_out: Names of variants that are not trained.
    """

    groups: list[Literal["cumulative", "alone", "default"]] = field(
        default_factory=lambda: ["cumulative", "alone", "default"]
    )
    leave_out: list[str] = field(default_factory=list[str])


# An evaluation cuts names that are longer than its file names may be.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
_LANGUAGE_MODEL_ONLY = ("model", "data", "hooks", "heldout", "evaluation", "keep_activations")
SYNTHETIC_HOOK = "synthetic"
"""What stands for a hook where there is no language model."""


@dataclass
class CompareConfig:
    """A whole comparison: `saes` x `hooks` x `l0` x `seeds`.

    Attributes:
        model: The language model.
        data: The text.
        synthetic: Ground truth in place of `model`, `data` and `hooks`.
        hooks: Where activations are read; every method is trained at each.
        training: As in a recipe. `tokens` is the length of each SAE's training, `seed` orders the
            text; warm-up and decay are counted in mini-batches, so that an SAE that accumulates
            has the same schedule in tokens.
        common: Keys of an SAE that every method has which does not set them itself: `d_sae`,
            `normalize_activations` and the like.
        l0: Target L0s.
        seeds: Of initialisation, of the order of the activations, and of what an SAE draws.
        saes: Methods by name: the keys of an SAE in a recipe, less what sets its L0; `peer` (see
            `comparison.peers`); `control` (residual_stream, permuted_decoder of NAME,
            frozen_decoder); `accumulation_steps` of its own.
        ladder: The source's ladder as further methods.
        search: How coefficients are tuned.
        heldout: What is measured on held-out text.
        evaluation: An evaluation config, its path or its name; null measures held-out text alone.
        reference: Method that reports compare the others with; null lets them choose.
        quick: What `--quick` changes, as `--set` would: dotted key to value.
        log_every_steps: Steps between two rows of metrics.jsonl.
        keep_activations: Keep the stored activations at the end, for SAEs that are added later.
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    synthetic: SyntheticSection | None = None
    hooks: list[str] = field(default_factory=list[str])
    training: TrainingSection = field(default_factory=TrainingSection)
    common: dict[str, Any] = field(default_factory=dict[str, Any])
    l0: list[float] = field(default_factory=list[float])
    seeds: list[int] = field(default_factory=lambda: [0])
    saes: dict[str, Any] = field(default_factory=dict[str, Any])
    ladder: LadderSection | None = None
    search: SearchSection = field(default_factory=SearchSection)
    heldout: HeldoutSection = field(default_factory=HeldoutSection)
    evaluation: dict[str, Any] | None = None
    reference: str | None = None
    quick: dict[str, Any] = field(default_factory=dict[str, Any])
    log_every_steps: int = 20
    keep_activations: bool = True

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = (), *, quick: bool = False) -> Self:
        """Read the recipe of a comparison.

        Args:
            path: A YAML file.
            overrides: `key.path=value` with the value in YAML, applied last.
            quick: Apply what the recipe's `quick` says.

        Raises:
            InputError: The file cannot be read, or a value cannot work.
        """
        try:
            read: object = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the config {str(path)!r}: {error.strerror}") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            problem = " ".join(str(error).split())
            raise InputError(f"{str(path)!r} is not valid YAML: {problem}") from error
        if read is None:
            raise InputError(f"{str(path)!r} is empty")
        values = as_mapping(read, str(path))
        return cls.from_dict(values, overrides, quick=quick, folder=path.resolve().parent)

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        overrides: Sequence[str] = (),
        *,
        quick: bool = False,
        folder: Path | None = None,
    ) -> Self:
        """Build a comparison from plain dictionaries, as `to_dict` gives them.

        Args:
            values: The dictionaries; they are not changed.
            overrides: As in `load`.
            quick: As in `load`.
            folder: What paths in the values are relative to.

        Raises:
            InputError: As `load`.
        """
        merged = copy.deepcopy(dict(values))
        if quick:
            _apply_quick(merged)
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator:
                raise InputError(f"--set {override!r} is not of the form key.path=value")
            try:
                value: object = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise InputError(f"--set {override!r}: the value is not valid YAML") from error
            set_value(merged, key, value, f"--set {override!r}")
        merged = {key: value for key, value in merged.items() if value is not None}
        if "synthetic" in merged:
            for key in _LANGUAGE_MODEL_ONLY:
                if key in merged:
                    raise InputError(
                        f"{key!r} belongs to a language model and 'synthetic' has none: remove one"
                    )
        training = as_mapping(merged.get("training") or {}, "training")
        # A finished SAE is in saes/: its checkpoints are of no more use.
        merged["training"] = {"keep_checkpoints": 0, **training}
        if "evaluation" in merged:
            merged["evaluation"] = _evaluation(merged["evaluation"], folder)
        config = build(cls, merged, "")
        config.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries; `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        if self.synthetic is not None:
            for key in _LANGUAGE_MODEL_ONLY:
                values.pop(key)
        return values

    @property
    def kind(self) -> str:
        """`language_model` or `ground_truth`."""
        return "language_model" if self.synthetic is None else "ground_truth"

    @property
    def search_tokens(self) -> int:
        """Length of a short trial of the search."""
        tokens = self.search.tokens
        return self.training.tokens // 4 if tokens is None else tokens

    def eval_config(self) -> EvalConfig | None:
        """The evaluation config, None without one."""
        return None if self.evaluation is None else EvalConfig.from_dict(self.evaluation)

    def check(self) -> None:
        """Refuse numbers and names that cannot work.

        Raises:
            InputError: Naming the field.
        """
        self._check_sizes()
        training = self.training
        if self.synthetic is not None:
            # Samples are made as they are needed: there is no buffer to be large enough.
            training = dataclasses.replace(
                training, n_batches_in_buffer=max(1, training.batch_size_tokens)
            )
        check_numbers(training, self.data, LoggingSection(every_steps=self.log_every_steps))
        if self.training.calibrate_batches < 1:
            raise InputError("'training.calibrate_batches' must be at least 1 to match L0s")
        if self.synthetic is None:
            if not self.hooks:
                raise InputError("'hooks' is empty: name at least one, or give 'synthetic'")
            common_style(self.hooks)
            for hook in self.hooks:
                parse_hook_name(hook)
        if not self.saes and self.ladder is None:
            raise InputError("there is nothing to compare: give 'saes' or 'ladder'")
        for name in self.saes:
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"method name {name!r} cannot name a folder: use at most 80 letters, digits, "
                    "'_', '-' and '.'"
                )

    def _check_sizes(self) -> None:
        if not self.l0:
            raise InputError("'l0' is empty: give at least one target L0")
        for index, value in enumerate(self.l0):
            if not value > 0:
                raise InputError(f"'l0[{index}]' must be positive, not {value}")
        for name, listed in (("l0", self.l0), ("seeds", self.seeds), ("hooks", self.hooks)):
            repeated = [item for index, item in enumerate(listed) if item in listed[:index]]
            if repeated:
                raise InputError(f"{name!r} has {repeated[0]} twice")
        if not self.seeds:
            raise InputError("'seeds' is empty: give at least one")
        if min(self.seeds) < 0:
            raise InputError(f"'seeds' must be 0 or more, not {min(self.seeds)}")
        positive: dict[str, int | None] = {
            "search.tokens": self.search.tokens,
            "search.max_trials": self.search.max_trials,
            "heldout.tokens": self.heldout.tokens,
            "heldout.loss_tokens": self.heldout.loss_tokens,
        }
        if self.synthetic is not None:
            positive |= {
                "synthetic.eval_samples": self.synthetic.eval_samples,
                "synthetic.eval_batch_size": self.synthetic.eval_batch_size,
                "synthetic.saes_at_once": self.synthetic.saes_at_once,
            }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise InputError(f"{name!r} must be at least 1, not {value}")
        if not 0 < self.search.tolerance < 1:
            raise InputError(
                f"'search.tolerance' must be between 0 and 1, not {self.search.tolerance}"
            )
        for name, value in (
            ("search.corrections", self.search.corrections),
            ("heldout.contexts", self.heldout.contexts),
        ):
            if value < 0:
                raise InputError(f"{name!r} must be 0 or more, not {value}")


def set_value(values: dict[str, Any], path: str, value: object, where: str) -> None:
    """Set a dotted key in nested dictionaries, making those that are missing.

    Raises:
        InputError: A part of the path is not a mapping.
    """
    keys = path.strip().split(".")
    if not all(keys):
        raise InputError(f"{where}: {path!r} is not of the form key.path")
    section = values
    for depth, key in enumerate(keys[:-1]):
        if section.get(key) is None:
            section[key] = {}
        nested = section[key]
        if not isinstance(nested, dict):
            raise InputError(f"{where}: {'.'.join(keys[: depth + 1])!r} has no keys")
        section = cast("dict[str, Any]", nested)
    section[keys[-1]] = value


def _apply_quick(values: dict[str, Any]) -> None:
    quick = as_mapping(values.get("quick") or {}, "quick")
    if not quick:
        raise InputError("--quick: the recipe has no 'quick' that says what it changes")
    for key, value in quick.items():
        set_value(values, key, value, f"quick {key!r}")


def _evaluation(value: Any, folder: Path | None) -> dict[str, Any]:
    """The evaluation config as plain dictionaries, from a path, a name or as it is."""
    if isinstance(value, Mapping):
        return EvalConfig.from_dict(as_mapping(cast("object", value), "evaluation")).to_dict()
    if not isinstance(value, str):
        raise InputError(f"'evaluation' must be a path, a name or a mapping, not {value!r}")
    beside = None if folder is None else folder / value
    return EvalConfig.load(beside if beside is not None and beside.is_file() else value).to_dict()
