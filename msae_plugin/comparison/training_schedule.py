"""The order of training in a comparison, and the search for coefficients.

OUTPUT/search/<method>_l0-<k>.json holds every trial, so that a killed search goes on and the tokens
it cost are known. Short trials find the coefficient; L0 goes on falling with training, so the first
seed's whole run is a trial as well: where it misses the target it is thrown away, paid for, and
repeated with a corrected coefficient.

L0 falls as the coefficient rises. Steps are taken in log coefficient and log L0, where sparsity
penalties are close to straight lines; once one trial was too dense and another too sparse, every
further one lies between them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import json_safe, key_digest, write_json_atomic
from msae_plugin.common.stored import StoredSearch, read_json_object
from msae_plugin.comparison.group_training import (
    ComparisonRun,
    Group,
    is_matched,
    log_error,
    train_group,
)
from msae_plugin.comparison.methods import Entry, Expansion, sae_folder
from msae_plugin.comparison.recipe import CompareConfig, SearchSettings
from msae_plugin.saes.export import SAE_FOLDER
from msae_plugin.saes.find import read_checkpoint
from msae_plugin.saes.run_record import read_run_record
from msae_plugin.training.checkpoints import Checkpoint, CheckpointStore
from msae_plugin.training.plans import as_begun, changed_settings

logger = logging.getLogger(__name__)

FOLDER = "search"
CHECKPOINTS = "checkpoints"
# No step changes the coefficient by more than this factor; the first one has no slope to go by.
_LARGEST_STEP = math.log(8.0)
_FIRST_SLOPE = -1.0
# Share of a bracket that a trial keeps away from its ends.
_MARGIN = 0.1


@dataclass(frozen=True)
class Trial:
    """One run of a search."""

    coefficient: float
    l0: float  # What it gave, active latents per token
    tokens: int  # What the run cost
    whole: bool = False  # Whether it was as long as the runs that are reported


def best_trial(trials: Sequence[Trial], target: float) -> Trial:
    """The one of at least one trial whose L0 is closest to the target, in ratio."""
    if not trials:
        raise ValueError("a search needs at least one trial")
    return min(trials, key=lambda trial: abs(log_error(trial.l0, target)))


def next_coefficient(trials: Sequence[Trial], target: float, start: float) -> float:
    """The next coefficient to try, after trials of one length in their order."""
    if not trials:
        return start
    points = [(math.log(t.coefficient), log_error(t.l0, target)) for t in trials]
    low = max((p for p in points if p[1] > 0), default=None)  # too dense: a larger one is needed
    high = min((p for p in points if p[1] <= 0), default=None)
    if low is not None and high is not None and low[0] < high[0]:
        # Two trials on one side: the other end of the bracket is too far off to be trusted.
        same_side = len(points) > 1 and (points[-1][1] > 0) == (points[-2][1] > 0)
        return math.exp((low[0] + high[0]) / 2 if same_side else _between(low, high))
    x, y = points[-1]
    step = -y / slope(trials, target)
    return math.exp(x + max(-_LARGEST_STEP, min(_LARGEST_STEP, step)))


def corrected_coefficient(
    coefficient: float, l0: float, target: float, trials: Sequence[Trial]
) -> float:
    """A coefficient corrected by what a whole run gave, along the slope of the short trials."""
    step = -log_error(l0, target) / slope(trials, target)
    return coefficient * math.exp(max(-_LARGEST_STEP, min(_LARGEST_STEP, step)))


def slope(trials: Sequence[Trial], target: float) -> float:
    """Slope d log L0 / d log coefficient between the two trials closest to the target; negative."""
    ordered = sorted(trials, key=lambda trial: abs(log_error(trial.l0, target)))
    for second in ordered[1:]:
        run = math.log(second.coefficient) - math.log(ordered[0].coefficient)
        rise = log_error(second.l0, target) - log_error(ordered[0].l0, target)
        if run and rise / run < -0.05:
            return rise / run
    return _FIRST_SLOPE


def _between(low: tuple[float, float], high: tuple[float, float]) -> float:
    width = high[0] - low[0]
    share = low[1] / (low[1] - high[1])
    return low[0] + width * max(_MARGIN, min(1 - _MARGIN, share))


# Changing these trains the same SAE.
_NOT_OF_AN_SAE = (
    "l0", "seeds", "saes", "ladder", "heldout", "evaluation", "reference", "quick",
    "log_every_steps", "keep_activations", "common",
)  # fmt: skip
# Raised when the same settings train another SAE.
_FORMAT = 2
_NOT_OF_TRAINING = (
    "n_checkpoints", "checkpoint_minutes", "keep_checkpoints", "store_batch_size_prompts",
    "decode_kernel", "cuda_graphs",
)  # fmt: skip


# Settings that are younger than the first folders, oldest first, with what SAEs were trained with
# before; a new one that changes SAEs belongs here.
_YOUNGER = (("model", "loader", "auto"),)


def entry_keys(entry: Entry, config: CompareConfig) -> list[str]:
    """Digests of everything that an SAE depends on: today's, then those of earlier versions."""
    shared, own = _settings(entry, config)
    found = [key_digest({"format": _FORMAT, "shared": shared, "own": own})]
    for section, name, before in reversed(_YOUNGER):
        if shared.get(section, {}).pop(name, before) != before:
            break
        found.append(key_digest({"format": _FORMAT, "shared": shared, "own": own}))
    return list(dict.fromkeys(found))


def _settings(entry: Entry, config: CompareConfig) -> tuple[dict[str, Any], list[Any]]:
    """What an SAE depends on of the recipe that all share, and of its own."""
    values = config.to_dict()
    shared = {key: value for key, value in values.items() if key not in _NOT_OF_AN_SAE}
    training = cast("dict[str, Any]", dict(shared["training"]))
    for key in _NOT_OF_TRAINING:
        training.pop(key)
    shared["training"] = training
    shared.get("model", {}).pop("device", None)
    if "synthetic" in shared and shared["synthetic"] is not None:
        for key in ("eval_samples", "eval_batch_size", "saes_at_once", "device"):
            shared["synthetic"].pop(key)
    if not entry.method.sparsity.searched:
        shared.pop("search")
    method = entry.method
    own = [
        json_safe(dict(method.section)), method.accumulation_steps, method.frozen_decoder,
        entry.hook, entry.l0, entry.seed,
    ]  # fmt: skip
    return json_safe(shared), own


def finished_record(folder: Path, keys: Sequence[str]) -> Mapping[str, Any] | None:
    """The `run.json` of an SAE that is complete; None for one to train.

    Refuses an SAE of this name that was trained otherwise.
    """
    record = read_run_record(folder)
    if record is None or record.get("status") != "complete":
        return None
    stored = cast("Mapping[str, Any]", record.get("comparison") or {})
    if stored.get("key") not in keys:
        raise InputError(
            f"{folder} holds an SAE that was trained with other settings, or by an earlier "
            "version: give another --output, rename the method, or delete the folder to train it "
            "again"
        )
    return record


def missing_entries(entries: Sequence[Entry], config: CompareConfig, output: Path) -> list[Entry]:
    """The entries that are still to be trained."""
    return [
        entry
        for entry in entries
        if finished_record(sae_folder(output, entry.name), entry_keys(entry, config)) is None
    ]


def interrupted(
    missing: Sequence[Entry], config: CompareConfig, output: Path
) -> list[tuple[list[Entry], Checkpoint]]:
    """Groups that a killed run left a checkpoint of, in their members that are still missing.

    Nothing is changed: what is not complete there may be another process' work.
    """
    root = output / CHECKPOINTS
    open_ = {entry.name: entry for entry in missing}
    keys = {entry.name: entry_keys(entry, config) for entry in missing}
    found: list[tuple[list[Entry], Checkpoint]] = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        newest = CheckpointStore(folder, 0, writes=False).newest()
        if newest is None:
            continue
        stored = cast("dict[str, str]", newest.config["entries"])
        names = [name for name in stored if stored[name] in keys.get(name, ())]
        members = [open_.pop(name) for name in names if name in open_]
        if members:
            found.append((members, newest))
    return found


def refuse_mixtures(
    expansion: Expansion, missing: Sequence[Entry], config: CompareConfig, output: Path
) -> None:
    """Refuse to train the rest of a method whose preset stood for other settings before.

    A recipe names presets; the averages of a method must not be over two meanings of one name,
    whether its other SAEs are finished or were interrupted.
    """
    waiting = {entry.name for entry in missing}
    begun = {
        entry.name: sae_folder(output, entry.name) / SAE_FOLDER
        for entry in expansion.entries
        if entry.name not in waiting
    }
    for members, checkpoint in interrupted(missing, config, output):
        begun |= {entry.name: checkpoint.path / entry.name for entry in members}
    for method in {entry.method.name: entry.method for entry in missing}.values():
        of_method = [e.name for e in expansion.entries if e.method.name == method.name]
        changes = {name: dict[str, str]() for name in of_method}
        for name in begun.keys() & changes:
            stored = read_checkpoint(begun[name])
            # The width of an MLP's inside is known once the model has run.
            plan = expansion.plans[name].fitted(stored.config["d_in"])
            changes[name] = changed_settings(as_begun(plan, stored), plan)
            changes[name].pop(method.sparsity.name, None)
        name = max(of_method, key=lambda name: len(changes[name]))
        if any(changes[other] != changes[name] for other in of_method):
            raise InputError(
                f"'saes.{method.name}' would be trained with other settings than {name}, which an "
                f"earlier version began: {', '.join(changes[name].values())}; rename the method, "
                f"delete {begun[name]}, or give another --output"
            )


@dataclass
class Search:
    """The search of one method at one L0, written down at every change."""

    path: Path
    key: str
    target: float
    trials: list[Trial] = field(default_factory=list[Trial])
    coefficient: float | None = None  # What further runs use; None until the short trials are over
    settled: bool = False  # Whether a whole run was accepted with it

    @classmethod
    def load(cls, path: Path, target: float, keys: Sequence[str]) -> Search:
        """A search as far as it is; refused where it is under none of these keys."""
        if not path.is_file():
            return cls(path, keys[0], target)
        try:
            stored = read_json_object(path, StoredSearch)
        except InputError as error:
            raise InputError(f"{path} is damaged ({error}): delete it") from error
        if stored["key"] not in keys:
            raise InputError(
                f"{path} is a search with other settings, or of an earlier version: give another "
                "--output, or delete it"
            )
        trials = [Trial(**trial) for trial in stored["trials"]]
        coefficient, settled = stored["coefficient"], stored["settled"]
        return cls(path, stored["key"], stored["target"], trials, coefficient, settled)

    def save(self) -> None:
        """Write the search down."""
        stored = dataclasses.asdict(self)
        del stored["path"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.path, stored)

    @property
    def short(self) -> list[Trial]:
        """Trials that were shorter than a whole run."""
        return [trial for trial in self.trials if not trial.whole]

    @property
    def tokens(self) -> int:
        """Tokens of all trials, beside the runs that are reported."""
        return sum(trial.tokens for trial in self.trials)

    def accepts(self, l0: float, tokens: int, settings: SearchSettings) -> bool:
        """Whether the first seed's whole run is kept; if not, the coefficient is corrected."""
        tried, corrections = self.coefficient, len(self.trials) - len(self.short)
        assert tried is not None, "the short trials come first"
        self.settled = (
            is_matched(l0, self.target, settings.tolerance) or corrections >= settings.corrections
        )
        if not self.settled:
            self.trials.append(Trial(tried, l0, tokens, whole=True))
            self.coefficient = corrected_coefficient(tried, l0, self.target, self.short)
        self.save()
        return self.settled


@dataclass(frozen=True)
class Shard:
    """A share of the training for one of several processes."""

    number: int = 1  # From 1
    of: int = 1  # How many there are

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `2/3`."""
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise InputError(f"--part {text!r} is not of the form NUMBER/OF, such as 1/2")
        return cls(int(number), int(of))


def train_all(run: ComparisonRun, entries: Sequence[Entry], shard: Shard) -> dict[str, str]:
    """Train what is missing; the reason by name, of the SAEs that could not be trained.

    A signal raises; everything finished so far is kept.
    """
    schedule = _Schedule(run, entries)
    schedule.run(share_of(entries, shard))
    checkpoints = run.output / CHECKPOINTS
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        # Another process may put a checkpoint into it meanwhile.
        with contextlib.suppress(OSError):
            checkpoints.rmdir()
    return schedule.failures


def share_of(entries: Sequence[Entry], shard: Shard) -> list[Entry]:
    """The entries of one process: seeds that share a coefficient stay together."""
    seed_groups = list(dict.fromkeys(entry.seed_group for entry in entries))
    ours = set(seed_groups[shard.number - 1 :: shard.of])
    return [entry for entry in entries if entry.seed_group in ours]


class _Schedule:
    def __init__(self, run: ComparisonRun, entries: Sequence[Entry]) -> None:
        self._run = run
        self._entries = entries
        self._keys = {entry.name: entry_keys(entry, run.config) for entry in entries}
        self._first = {entry.seed_group: entry for entry in reversed(entries)}
        self.failures: dict[str, str] = {}
        self._done = 0
        self._total = 0

    def run(self, entries: Sequence[Entry]) -> None:
        missing = [entry for entry in entries if self._record(entry) is None]
        self._done, self._total = len(entries) - len(missing), len(entries)
        for group, checkpoint in self._interrupted(missing):
            self._train_or_fail(group, checkpoint)
        for entry in {e.seed_group: self._first[e.seed_group] for e in missing}.values():
            if entry.method.sparsity.searched:
                self._tune(entry)
        rest = [e for e in missing if self._record(e) is None and e.name not in self.failures]
        for group in self._groups(rest):
            self._train_or_fail(group)

    def _record(self, entry: Entry) -> Mapping[str, Any] | None:
        return finished_record(self._run.folder(entry.name), self._keys[entry.name])

    def _failed(self, entry: Entry, failure: RunFailure) -> None:
        logger.warning("%s is left out: %s", entry.name, failure)
        self.failures[entry.name] = str(failure)

    def _groups(self, entries: Sequence[Entry]) -> list[Group]:
        together: dict[tuple[int, int], list[Entry]] = {}
        for entry in entries:
            key = entry.seed, entry.method.accumulation_steps
            together.setdefault(key, []).append(entry)
        at_once = self._run.source.side_by_side
        return [
            self._group(members[start : start + (at_once or len(members))])
            for members in together.values()
            for start in range(0, len(members), at_once or len(members))
        ]

    def _group(self, entries: Sequence[Entry]) -> Group:
        coefficients: dict[str, float] = {}
        search_tokens: dict[str, int] = {}
        for entry in entries:
            if entry.method.sparsity.searched:
                search = self._search(entry)
                assert search.coefficient is not None, "the search comes first"
                coefficients[entry.name] = search.coefficient
                search_tokens[entry.name] = search.tokens
        return Group(entries, coefficients, self._run.config.training.tokens, search_tokens)

    def _search(self, entry: Entry) -> Search:
        # All seeds of a method at an L0 share it.
        keys = entry_keys(replace(entry, seed=0), self._run.config)
        path = self._run.output / FOLDER / f"{entry.seed_group}.json"
        return Search.load(path, entry.l0, keys)

    def _short_trials(self, entry: Entry, search: Search) -> None:
        """Run short trials until one matches or there may be no more."""
        settings, tokens = self._run.config.search, self._run.config.search_tokens
        sparsity = entry.method.sparsity
        while search.coefficient is None:
            best = best_trial(search.short, entry.l0) if search.short else None
            found = best is not None and is_matched(best.l0, entry.l0, settings.tolerance)
            if best is not None and (found or len(search.short) >= settings.max_trials):
                search.coefficient = best.coefficient
            else:
                coefficient = next_coefficient(search.short, entry.l0, sparsity.start)
                group = Group([entry], {entry.name: coefficient}, tokens, {})
                title = f"{entry.seed_group}: trying {sparsity.name} {coefficient:.4g}"
                trained = train_group(self._run, group, title=title)
                l0 = trained.match_l0(entry).l0
                search.trials.append(Trial(coefficient, l0, trained.tokens))
            search.save()

    def _tune(self, entry: Entry) -> None:
        """Search the coefficient, and train the first seed with it."""
        search = self._search(entry)
        try:
            self._short_trials(entry, search)
            while not search.settled and self._record(entry) is None:
                self._train(self._group([entry]), judge=True)
                search = self._search(entry)
        except RunFailure as failure:
            for other in self._entries:
                if other.seed_group == entry.seed_group and self._record(other) is None:
                    self._failed(other, failure)

    def _train_or_fail(self, group: Group, checkpoint: Checkpoint | None = None) -> None:
        """Train a group; where one of its SAEs fails, train the others without it."""
        try:
            self._train(group, checkpoint)
        except RunFailure as failure:
            if len(group.entries) == 1:
                self._failed(group.entries[0], failure)
                return
            middle = len(group.entries) // 2
            for half in (group.entries[:middle], group.entries[middle:]):
                self._train_or_fail(replace(group, entries=half), checkpoint)

    def _train(
        self, group: Group, checkpoint: Checkpoint | None = None, *, judge: bool = False
    ) -> None:
        # Of a group in which one export failed, the others are finished.
        group = replace(group, entries=[e for e in group.entries if self._record(e) is None])
        if not group.entries:
            return
        keys = {entry.name: self._keys[entry.name][0] for entry in group.entries}
        if checkpoint is not None:
            store = self._store(checkpoint.path.parent.name)
        else:
            store = self._store(key_digest({"keys": sorted(keys.values())}))
            # Of a run that is not continued; a later step of it would be taken for the newest.
            shutil.rmtree(store.folder, ignore_errors=True)
        names = group.entries[0].name
        if len(group.entries) > 1:
            names = f"{len(group.entries)} SAEs of seed {group.seed}"
        title = f"training {names} ({self._done} of {self._total} done)"
        trained = train_group(
            self._run, group, keys=keys, store=store, checkpoint=checkpoint, title=title
        )
        matches = {entry.name: trained.match_l0(entry) for entry in group.entries}
        if judge:
            (entry,) = group.entries
            l0, search = matches[entry.name].l0, self._search(entry)
            if not search.accepts(l0, trained.tokens, self._run.config.search):
                shutil.rmtree(store.folder, ignore_errors=True)
                return
        trained.finish(matches)
        self._done += len(group.entries)
        store.finish()

    def _store(self, name: str) -> CheckpointStore:
        folder = self._run.output / CHECKPOINTS / name
        return CheckpointStore(folder, self._run.config.training.keep_checkpoints)

    def _interrupted(self, missing: list[Entry]) -> list[tuple[Group, Checkpoint]]:
        """Groups to go on with; other checkpoints may be of another process at work."""
        # A whole run of a search is judged when it ends: `_tune` begins it again.
        open_ = [entry for entry in missing if self._may_resume(entry)]
        found = interrupted(open_, self._run.config, self._run.output)
        for _, newest in found:
            self._store(newest.path.parent.name).remove_after(newest.step)
        return [(self._group(members), newest) for members, newest in found]

    def _may_resume(self, entry: Entry) -> bool:
        return not entry.method.sparsity.searched or self._search(entry).settled
