"""Coefficients of architectures that are not told an L0: found once per method and L0, and kept.

OUTPUT/search/<method>_l0-<k>.json holds every trial, so that a killed search goes on and the tokens
it cost are known. Short trials find the coefficient; L0 goes on falling with training, so the first
seed's whole run is a trial as well: where it misses the target it is thrown away, paid for, and
repeated with a corrected coefficient.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import write_json_atomic
from msae_plugin.comparison.coefficient_search import (
    Trial,
    best_trial,
    corrected_coefficient,
    is_matched,
    next_coefficient,
)
from msae_plugin.comparison.finished_saes import set_cut
from msae_plugin.comparison.group_training import Group, Workplace, train_group
from msae_plugin.comparison.methods import Entry

FOLDER = "search"


@dataclass
class Search:
    """The search of one method at one L0.

    Attributes:
        key: What it depends on.
        target: The L0.
        trials: All of them.
        coefficient: What further runs use; None until the short trials are over.
        settled: Whether a whole run was accepted with it.
    """

    key: str
    target: float
    trials: list[Trial] = field(default_factory=list[Trial])
    coefficient: float | None = None
    settled: bool = False

    @property
    def short(self) -> list[Trial]:
        """Trials that were shorter than a whole run."""
        return [trial for trial in self.trials if not trial.whole]

    @property
    def tokens(self) -> int:
        """What the search cost beside the runs that are reported."""
        return sum(trial.tokens for trial in self.trials)


class Tuner:
    """Finds and remembers coefficients.

    Args:
        place: The comparison.
    """

    def __init__(self, place: Workplace) -> None:
        self._place = place
        self._folder = place.output / FOLDER

    def load(self, entry: Entry, key: str) -> Search:
        """The search of an entry's method and L0 as far as it is.

        Args:
            entry: Any of its seeds.
            key: What the first seed's SAE depends on.

        Raises:
            InputError: The folder holds a search with other settings.
        """
        path = self._path(entry)
        if not path.is_file():
            return Search(key, entry.l0)
        try:
            stored = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error}): delete it") from error
        if stored["key"] != key:
            raise InputError(
                f"{path} is a search with other settings: give another --output, or delete it"
            )
        trials = [Trial(**trial) for trial in stored["trials"]]
        return Search(key, stored["target"], trials, stored["coefficient"], bool(stored["settled"]))

    def short_trials(self, entry: Entry, search: Search) -> float:
        """Run short trials until one matches or there may be no more; the best coefficient."""
        config = self._place.config
        settings, tokens = config.search, config.search_tokens
        knob = entry.method.knob
        while search.coefficient is None:
            best = best_trial(search.short, entry.l0) if search.short else None
            found = best is not None and is_matched(best.l0, entry.l0, settings.tolerance)
            if best is not None and (found or len(search.short) >= settings.max_trials):
                search.coefficient = best.coefficient
                break
            coefficient = next_coefficient(search.short, entry.l0, knob.start)
            group = Group([entry], {entry.name: coefficient}, tokens)
            title = f"{entry.bundle}: trying {knob.name} {coefficient:.4g}"
            trained = train_group(self._place, group, title=title)
            l0 = set_cut(self._place, trained, entry).l0
            search.trials.append(Trial(coefficient, l0, trained.tokens))
            self.save(entry, search)
        self.save(entry, search)
        return search.coefficient

    def judge_whole_run(self, entry: Entry, search: Search, l0: float, tokens: int) -> bool:
        """Whether the first seed's whole run is kept; if not, `search.coefficient` is corrected.

        Args:
            entry: The first seed's.
            search: The search.
            l0: What the whole run gave.
            tokens: What it cost.
        """
        settings = self._place.config.search
        whole = [trial for trial in search.trials if trial.whole]
        assert search.coefficient is not None, "the short trials come first"
        if is_matched(l0, entry.l0, settings.tolerance) or len(whole) >= settings.corrections:
            search.settled = True
            self.save(entry, search)
            return True
        tried = search.coefficient
        search.trials.append(Trial(tried, l0, tokens, whole=True))
        search.coefficient = corrected_coefficient(tried, l0, entry.l0, search.short)
        self.save(entry, search)
        return False

    def save(self, entry: Entry, search: Search) -> None:
        """Write the search down."""
        path = self._path(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, dataclasses.asdict(search))

    def _path(self, entry: Entry) -> Path:
        return self._folder / f"{entry.bundle}.json"
