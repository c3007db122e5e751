"""A comparison on a language model: its one pass, held-out text and evaluations.

OUTPUT/heldout/<name>.json holds each SAE's numbers under a key of everything they depend on: what
has been measured is not measured again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

from sae_lens.saes.sae import SAEMetadata

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import key_digest, tensors_sha256, write_json_atomic
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.seeding import derive_seed
from msae_plugin.comparison.activations import (
    StoredActivations,
    activations_key,
    open_activations,
    recipe,
    store_activations,
)
from msae_plugin.comparison.methods import (
    Control,
    Entry,
    Expansion,
    ResidualStreamSAE,
    sae_folder,
    with_permuted_decoder,
)
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.comparison.results import Measured, store_metrics, stored_metrics
from msae_plugin.data.text import TextData, Window, iterate_windows
from msae_plugin.evaluation.contexts import ContextCollector, contexts_as_json
from msae_plugin.evaluation.evaluate import evaluate
from msae_plugin.evaluation.heldout import HeldoutMetrics, LatentBatch, evaluate_many
from msae_plugin.evaluation.outcomes import Reporter
from msae_plugin.evaluation.preflight import preflight, refuse_missing
from msae_plugin.models.loading import LanguageModel, ModelShape, describe_model
from msae_plugin.models.transformer_lens import transformer_lens_loader
from msae_plugin.saes.load import EvaluatedSAE, load_saes, transformer_lens_hook
from msae_plugin.training.inputs import load_data, load_model
from msae_plugin.training.plans import default_device

FOLDER = "heldout"
CONTEXTS_FILE = "contexts.json"
# Every group costs one run of the model over the held-out text, half a minute of a slow core for
# 20,000 tokens; a kill costs what was measured of a group.
_AT_ONCE = 32
_CONTEXTS_PER_LATENT = 5


@dataclass(frozen=True)
class HeldoutText:
    """Held-out text, and the model that reads it.

    Args:
        language_model: The model.
        texts: Held-out documents.
        autocast: Whether the model runs in bfloat16, as it did for the training activations.
        hooks: Hook of each SAE, as the model knows it.
    """

    language_model: LanguageModel
    texts: Sequence[str]
    autocast: bool
    hooks: Mapping[str, str]


def heldout_keys(
    config: CompareConfig, activations_key: str, subjects: Sequence[EvaluatedSAE]
) -> dict[str, str]:
    """A digest of everything that an SAE's held-out metrics depend on, by name."""
    heldout = config.heldout
    shared = [activations_key, heldout.tokens, heldout.loss_tokens]
    return {s.name: key_digest({"shared": shared, "sae": s.weights_sha256}) for s in subjects}


def stored_heldout(output: Path, keys: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Metrics by name, of the SAEs that were measured with these keys."""
    found = {
        name: stored_metrics(output / FOLDER / f"{name}.json", key) for name, key in keys.items()
    }
    return {name: metrics for name, metrics in found.items() if metrics is not None}


def measure_heldout(
    config: CompareConfig,
    output: Path,
    subjects: Sequence[EvaluatedSAE],
    keys: Mapping[str, str],
    text: HeldoutText,
    with_contexts: Sequence[str],
    report: Reporter,
) -> None:
    """Measure SAEs and store what was found, a few at a time.

    Raises:
        InputError: There is too little held-out text.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(subjects), _AT_ONCE):
        group = subjects[start : start + _AT_ONCE]
        message = f"held-out text: SAEs {start + 1} to {start + len(group)} of {len(subjects)}"
        collectors = {
            subject.name: ContextCollector(
                subject.sae.cfg.d_sae, config.data.context_size, _CONTEXTS_PER_LATENT
            )
            for subject in group
            if subject.name in with_contexts
        }
        report(message, 0, config.heldout.tokens)
        found = _evaluate(config, group, text, collectors, report, message)
        _write_contexts(config, output, group, collectors, text)
        for name, metrics in found.items():
            store_metrics(folder / f"{name}.json", keys[name], as_metrics(metrics))


def as_metrics(found: HeldoutMetrics) -> dict[str, float]:
    """`heldout/...` by name; what could not be measured is left out."""
    values: dict[str, Any] = found.to_dict()
    for count in ("d_sae", "n_tokens", "n_loss_tokens"):
        values.pop(count)
    values["dead_share"] = found.dead_latents / found.d_sae
    return {f"heldout/{key}": float(value) for key, value in values.items() if value is not None}


def _evaluate(
    config: CompareConfig,
    group: Sequence[EvaluatedSAE],
    text: HeldoutText,
    collectors: Mapping[str, ContextCollector],
    report: Reporter,
    message: str,
) -> dict[str, HeldoutMetrics]:
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        report(message, min(done, config.heldout.tokens), config.heldout.tokens)

    def observe(batch: LatentBatch) -> None:
        if batch.name in collectors:
            collectors[batch.name].update(batch)

    return evaluate_many(
        {subject.name: subject.sae for subject in group},
        text.language_model,
        {subject.name: text.hooks[subject.name] for subject in group},
        text.texts,
        context_size=config.data.context_size,
        max_tokens=config.heldout.tokens,
        max_loss_tokens=config.heldout.loss_tokens,
        prepend_bos=config.data.prepend_bos,
        autocast=text.autocast,
        observer=observe if collectors else None,
        progress=advance,
    )


def _write_contexts(
    config: CompareConfig,
    output: Path,
    group: Sequence[EvaluatedSAE],
    collectors: Mapping[str, ContextCollector],
    text: HeldoutText,
) -> None:
    if not collectors:
        return
    windows = _windows(config, text)
    for subject in group:
        collector = collectors.get(subject.name)
        if collector is None:
            continue
        decoder = subject.sae.W_dec
        latents = collector.strongest(decoder, config.heldout.contexts)
        profiles = collector.profiles(latents, decoder, windows, text.language_model.tokenizer)
        write_json_atomic(
            sae_folder(output, subject.name) / CONTEXTS_FILE,
            {"latents": contexts_as_json(profiles)},
        )


def _windows(config: CompareConfig, text: HeldoutText) -> list[Window]:
    model, size = text.language_model, config.data.context_size
    windows = iterate_windows(
        model.model, model.tokenizer, text.texts, size, prepend_bos=config.data.prepend_bos
    )
    return list(islice(windows, max(1, config.heldout.tokens // size)))


EVALUATION_FOLDER = "evaluation"


class LanguageModelTestbed:
    """Activations, metrics and controls of a comparison on a language model.

    Args:
        config: The recipe.
        output: The comparison's folder.
        report: Shows progress.
        language_model: A model that is loaded already.
        skip_missing: Leave evaluations out whose data or packages are missing.
    """

    def __init__(
        self,
        config: CompareConfig,
        output: Path,
        report: Reporter,
        language_model: LanguageModel | None,
        *,
        skip_missing: bool,
    ) -> None:
        self.config = config
        self.output = output
        self.device = default_device(config.model.device)
        self._report = report
        self._language_model = language_model
        self._skip_missing = skip_missing
        self._text: TextData | None = None

    def check(self) -> None:
        """Refuse what can be refused before the model is loaded.

        Raises:
            InputError: Model, hooks or data cannot work, or an evaluation lacks something.
        """
        recipe(self.config).validate(self._shape())
        evaluation = self.config.eval_config()
        if evaluation is None or self._skip_missing:
            return
        name = evaluation.model.name or self.config.model.name
        loaded = self._language_model is not None
        refuse_missing(preflight(evaluation, [], model_name=None if loaded else name))

    def widths(self) -> dict[str, int]:
        """Width of the activations by hook: as stored, else the model's."""
        stored = open_activations(self.output)
        if stored is not None and set(stored.tensors) == set(self.config.hooks):
            return {hook: stored.d_in(hook) for hook in self.config.hooks}
        return dict.fromkeys(self.config.hooks, self._shape().d_model)

    def source(self, guard: InterruptionGuard) -> StoredActivations:
        """The activations, after the model's pass if it was not made yet.

        Raises:
            InputError: The folder holds those of another model, text or length.
        """
        stored = open_activations(self.output)
        if stored is not None:
            if stored.manifest["key"] != activations_key(self.config):
                raise InputError(
                    f"{stored.folder} holds activations of another model, text, hook or length: "
                    "give another --output"
                )
            return stored
        return store_activations(
            self.config,
            self.output,
            self._model(),
            self._loaded_text(),
            self.device,
            guard=guard,
            report=self._report,
        )

    def measure(
        self, expansion: Expansion, trained: Sequence[Entry], source: Mapping[str, Any]
    ) -> Measured:
        """Held-out metrics and evaluations of the trained SAEs and the controls."""
        subjects = self._subjects(expansion, trained)
        measured = Measured()
        self._measure_heldout(expansion, subjects, source, measured)
        evaluation = self.config.eval_config()
        if evaluation is not None:
            self._evaluate(subjects, measured)
        return measured

    def measure_share(
        self, expansion: Expansion, trained: Sequence[Entry], source: Mapping[str, Any]
    ) -> None:
        """Held-out metrics of SAEs, kept for `measure`; one of several processes on one folder.

        SAEBench's evaluations keep what they know in one file for all SAEs, and are left to
        `measure`.
        """
        without_controls = replace(expansion, controls=[])
        subjects = self._subjects(without_controls, trained)
        self._measure_heldout(without_controls, subjects, source, Measured())

    def _subjects(self, expansion: Expansion, trained: Sequence[Entry]) -> list[EvaluatedSAE]:
        folders = [str(sae_folder(self.output, entry.name)) for entry in trained]
        loaded = {s.name: s for s in load_saes(folders, device=self.device)}
        controls = [self._control(control, loaded) for control in expansion.controls]
        return [*loaded.values(), *(subject for subject in controls if subject is not None)]

    def _control(self, control: Control, loaded: Mapping[str, EvaluatedSAE]) -> EvaluatedSAE | None:
        if control.of is None:
            near = [s for s in loaded.values() if s.sae.cfg.metadata.hook_name == control.hook]
            template = near[0].sae.cfg.metadata if near else SAEMetadata(hook_name=control.hook)
            d_in = near[0].sae.cfg.d_in if near else self._shape().d_model
            sae: Any = ResidualStreamSAE(d_in, copy.deepcopy(template))
            sae = sae.to(self.device)
        elif control.of.name in loaded:
            of = control.of
            sae = with_permuted_decoder(
                loaded[of.name].sae, derive_seed(of.seed, "permuted decoder")
            )
        else:  # what it would be made of failed to train
            return None
        sae.eval()
        return EvaluatedSAE(
            name=control.name,
            reference=f"control: {control.method}",
            sae=sae,
            weights_sha256=tensors_sha256(sae.state_dict()),
            model_name=sae.cfg.metadata.model_name or self.config.model.name,
            hook_name=transformer_lens_hook(control.hook),
        )

    def _measure_heldout(
        self,
        expansion: Expansion,
        subjects: Sequence[EvaluatedSAE],
        source: Mapping[str, Any],
        measured: Measured,
    ) -> None:
        keys = heldout_keys(self.config, activations_key(self.config), subjects)
        todo = [s for s in subjects if s.name not in stored_heldout(self.output, keys)]
        if todo:
            hooks = {item.name: item.hook for item in (*expansion.entries, *expansion.controls)}
            text = HeldoutText(
                self._model(),
                self._loaded_text().heldout_texts(self._model().tokenizer),
                bool(source["model"]["autocast"]),
                hooks,
            )
            contexts = self._with_contexts(expansion)
            measure_heldout(self.config, self.output, todo, keys, text, contexts, self._report)
        for name, metrics in stored_heldout(self.output, keys).items():
            measured.add(name, metrics)
            if "heldout/loss_recovered" not in metrics:
                measured.missing.append(
                    {
                        "what": f"heldout/loss_recovered of {name}",
                        "status": "not_measurable",
                        "reason": "zeroing the activations does not change the model's loss",
                    }
                )

    def _with_contexts(self, expansion: Expansion) -> list[str]:
        """The first seed of each method at the first L0, less the variants of the ladder.

        Fifty of them would fill a page that nobody reads.
        """
        if self.config.heldout.contexts == 0:
            return []
        first = self.config.seeds[0], self.config.l0[0]
        return [
            entry.name
            for entry in expansion.entries
            if (entry.seed, entry.l0) == first
            and (entry.method.variant is None or entry.method.variant.against is None)
        ]

    def _evaluate(self, subjects: Sequence[EvaluatedSAE], measured: Measured) -> None:
        evaluation = self.config.eval_config()
        assert evaluation is not None, "the caller has looked"
        # Loaded already, and as the evaluation wants it.
        model = self._language_model
        fits = (
            model is not None
            and model.loader == transformer_lens_loader(evaluation.model.loader)
            and evaluation.model.dtype == self.config.model.dtype
            and evaluation.model.name in (None, self.config.model.name)
            and default_device(evaluation.model.device) == self.device
        )
        result = evaluate(
            evaluation,
            subjects,
            self.output / EVALUATION_FOLDER,
            language_model=model if fits else None,
            skip_missing=self._skip_missing,
            report=self._report,
        )
        for entry in cast("list[Mapping[str, Any]]", result.summary["results"]):
            name = str(entry["evaluation"])
            if entry["status"] != "measured":
                measured.missing.append(
                    {
                        "what": f"{name} of {entry['sae']}",
                        "status": str(entry["status"]),
                        "reason": str(entry["reason"]),
                    }
                )
            values = cast("Mapping[str, Mapping[str, Any]]", entry["metrics"])
            measured.add(
                str(entry["sae"]),
                {f"{name}/{metric}": float(value["mean"]) for metric, value in values.items()},
            )
        measured.definitions.update(result.summary["metrics"])

    def _shape(self) -> ModelShape:
        model = self._language_model
        return describe_model(self.config.model.name) if model is None else model.shape

    def _model(self) -> LanguageModel:
        if self._language_model is None:
            self._language_model = load_model(
                self.config.model, self.config.hooks, self.device, self._report
            )
        return self._language_model

    def _loaded_text(self) -> TextData:
        if self._text is None:
            self._text = load_data(
                self.config.data,
                self.config.training.seed,
                self._report,
                vocabulary=self._shape().vocabulary,
            )
        return self._text
