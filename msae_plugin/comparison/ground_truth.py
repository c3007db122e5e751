"""A comparison on ground truth: samples made as they are needed, features that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens import SAE

from msae_plugin.common.errors import InputError
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.seeding import derive_seed
from msae_plugin.comparison.controls import with_permuted_decoder
from msae_plugin.comparison.measured_ground_truth import Candidate, measure_ground_truth
from msae_plugin.comparison.methods import Entry, Expansion, sae_folder
from msae_plugin.comparison.recipe import SYNTHETIC_HOOK, CompareConfig
from msae_plugin.comparison.results import Measured
from msae_plugin.comparison.synthetic_source import SyntheticSource
from msae_plugin.evaluation.outcomes import Reporter
from msae_plugin.saes.export import SAE_FOLDER


class GroundTruthBench:
    """What a comparison on ground truth trains and measures with.

    Args:
        config: The recipe.
        output: The comparison's folder.
        report: Shows progress.

    Raises:
        InputError: The ground truth's configuration cannot work.
    """

    def __init__(self, config: CompareConfig, output: Path, report: Reporter) -> None:
        if config.synthetic is None:
            raise InputError("there is no 'synthetic' in the recipe")
        self.config = config
        self.output = output
        self._report = report
        self._source = SyntheticSource(config.synthetic, config.training.batch_size_tokens)
        self.device = self._source.device

    def check(self) -> None:
        """Nothing is left to refuse: the constructor has read the configuration."""

    def widths(self) -> dict[str, int]:
        """Width of the samples."""
        return {SYNTHETIC_HOOK: self._source.d_in(SYNTHETIC_HOOK)}

    def source(self, guard: InterruptionGuard) -> SyntheticSource:
        """The samples."""
        del guard
        self._report("making the ground truth")
        return self._source

    def measure(
        self, expansion: Expansion, trained: Sequence[Entry], source: Mapping[str, Any]
    ) -> Measured:
        """SAELens' metrics of the trained SAEs and the controls.

        Args:
            expansion: The comparison.
            trained: Its SAEs that are trained.
            source: The record of the samples.
        """
        del source
        candidates = self._candidates(trained)
        names = {entry.name for entry in trained}
        for control in expansion.controls:
            if control.of is not None and control.of.name in names:
                candidates.append(
                    Candidate(control.name, control.of.seed, self._permuted(control.of))
                )
        measured = Measured()
        found = measure_ground_truth(
            self.config, self.output, candidates, self._source, self._report
        )
        for name, metrics in found.items():
            measured.add(name, metrics)
        return measured

    def measure_share(
        self, expansion: Expansion, trained: Sequence[Entry], source: Mapping[str, Any]
    ) -> None:
        """Measure SAEs and keep it for `measure`; one of several processes on one folder.

        Args:
            expansion: The comparison.
            trained: SAEs that are trained.
            source: The record of the samples.
        """
        del expansion, source
        measure_ground_truth(
            self.config, self.output, self._candidates(trained), self._source, self._report
        )

    def _candidates(self, trained: Sequence[Entry]) -> list[Candidate]:
        return [Candidate(entry.name, entry.seed, self._loader(entry)) for entry in trained]

    def _loader(self, entry: Entry) -> Callable[[], SAE[Any]]:
        folder = sae_folder(self.output, entry.name) / SAE_FOLDER

        def load() -> SAE[Any]:
            return SAE.load_from_disk(folder, device=self.device)

        return load

    def _permuted(self, entry: Entry) -> Callable[[], SAE[Any]]:
        load = self._loader(entry)
        return lambda: with_permuted_decoder(load(), derive_seed(entry.seed, "permuted decoder"))
