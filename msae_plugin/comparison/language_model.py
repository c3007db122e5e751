"""A comparison on a language model: its one pass, held-out text and evaluations.

OUTPUT/heldout/<name>.json holds each SAE's numbers under a key of everything they depend on: what
has been measured is not measured again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from sae_lens.saes.sae import SAEMetadata

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import key_digest, tensors_sha256, write_json_atomic
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.progress import Report
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
from msae_plugin.data.text import first_windows
from msae_plugin.evaluation.contexts import ContextCollector, contexts_as_json
from msae_plugin.evaluation.evaluate import evaluate
from msae_plugin.evaluation.heldout import HeldoutMetrics, LatentBatch, evaluate_many
from msae_plugin.evaluation.preflight import preflight, refuse_missing
from msae_plugin.evaluation.recipe import EvalConfig
from msae_plugin.models.loading import LanguageModel, ModelShape, describe_model
from msae_plugin.models.transformer_lens import transformer_lens_loader
from msae_plugin.saes.load import EvaluatedSAE, load_saes, transformer_lens_hook
from msae_plugin.training.inputs import ModelAndText, load_model_and_text
from msae_plugin.training.plans import default_device

FOLDER = "heldout"
CONTEXTS_FILE = "contexts.json"
# Every group costs one run of the model over the held-out text, half a minute of a slow core for
# 20,000 tokens; a kill costs what was measured of a group.
_AT_ONCE = 32
_CONTEXTS_PER_LATENT = 5


def as_metrics(found: HeldoutMetrics) -> dict[str, float]:
    """`heldout/...` by name; what could not be measured is left out."""
    values: dict[str, Any] = found.to_dict()
    for count in ("d_sae", "n_tokens", "n_loss_tokens"):
        values.pop(count)
    values["dead_share"] = found.dead_latents / found.d_sae
    return {f"heldout/{key}": float(value) for key, value in values.items() if value is not None}


EVALUATION_FOLDER = "evaluation"


class LanguageModelTestbed:
    """Activations, metrics and controls of a comparison on a language model."""

    def __init__(
        self,
        config: CompareConfig,
        output: Path,
        report: Report,
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
        self._inputs: ModelAndText | None = None

    def check(self) -> None:
        """Refuse what can be refused before the model is loaded."""
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
        """The activations, after the model's pass if it was not made yet."""
        stored = open_activations(self.output)
        if stored is not None:
            if stored.manifest["key"] != activations_key(self.config):
                raise InputError(
                    f"{stored.folder} holds activations of another model, text, hook or length: "
                    "give another --output"
                )
            return stored
        inputs = self._loaded(self.config.model.autocast)
        return store_activations(self.config, self.output, inputs, self.device, guard, self._report)

    def measure(
        self,
        expansion: Expansion,
        trained: Sequence[Entry],
        source: Mapping[str, Any],
        *,
        evaluations: bool = True,
    ) -> Measured:
        """Held-out metrics and evaluations of the trained SAEs and the controls.

        Of several processes on one folder none makes `evaluations`: SAEBench's keep what they know
        in one file for all SAEs.
        """
        saes = self._load_saes(expansion, trained)
        measured = Measured()
        self._measure_heldout(expansion, saes, source, measured)
        evaluation = self.config.eval_config()
        if evaluation is not None and evaluations:
            self._evaluate(evaluation, saes, measured)
        return measured

    def _load_saes(self, expansion: Expansion, trained: Sequence[Entry]) -> list[EvaluatedSAE]:
        folders = [str(sae_folder(self.output, entry.name)) for entry in trained]
        loaded = {s.name: s for s in load_saes(folders, device=self.device)}
        controls = [self._control(control, loaded) for control in expansion.controls]
        return [*loaded.values(), *(one for one in controls if one is not None)]

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
        saes: Sequence[EvaluatedSAE],
        source: Mapping[str, Any],
        measured: Measured,
    ) -> None:
        """Measure what is not stored, a few SAEs at a time."""
        heldout = self.config.heldout
        shared = [activations_key(self.config), heldout.tokens, heldout.loss_tokens]
        # Of everything that they depend on.
        keys = {s.name: key_digest({"shared": shared, "sae": s.weights_sha256}) for s in saes}
        todo = [s for s in saes if s.name not in self._stored_heldout(keys)]
        if todo:
            folder = self.output / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            hooks = {item.name: item.hook for item in (*expansion.entries, *expansion.controls)}
            contexts = self._with_contexts(expansion)
            for start in range(0, len(todo), _AT_ONCE):
                group = todo[start : start + _AT_ONCE]
                message = f"held-out text: SAEs {start + 1} to {start + len(group)} of {len(todo)}"
                found = self.read_heldout(group, hooks, contexts, source, message)
                for name, metrics in found.items():
                    store_metrics(folder / f"{name}.json", keys[name], as_metrics(metrics))
        for name, metrics in self._stored_heldout(keys).items():
            measured.add(name, metrics)
            if "heldout/loss_recovered" not in metrics:
                reason = "zeroing the activations does not change the model's loss"
                measured.miss(f"heldout/loss_recovered of {name}", "not_measurable", reason)

    def _stored_heldout(self, keys: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Metrics by name, of the SAEs that were measured with these keys."""
        folder = self.output / FOLDER
        found = {name: stored_metrics(folder / f"{name}.json", key) for name, key in keys.items()}
        return {name: metrics for name, metrics in found.items() if metrics is not None}

    def read_heldout(
        self,
        group: Sequence[EvaluatedSAE],
        hooks: Mapping[str, str],
        with_contexts: Sequence[str],
        source: Mapping[str, Any],
        message: str,
    ) -> dict[str, HeldoutMetrics]:
        """Run the model over the held-out text once for a group of SAEs."""
        config = self.config
        # The model runs as it did for the training activations.
        inputs = self._loaded(bool(source["model"]["autocast"]))
        model, texts = inputs.language_model, inputs.heldout_texts()
        total, done = config.heldout.tokens, 0
        collectors = {
            one.name: ContextCollector(
                one.sae.cfg.d_sae, config.data.context_size, _CONTEXTS_PER_LATENT
            )
            for one in group
            if one.name in with_contexts
        }

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            self._report(message, min(done, total), total)

        def observe(batch: LatentBatch) -> None:
            if batch.name in collectors:
                collectors[batch.name].update(batch)

        self._report(message, 0, total)
        found = evaluate_many(
            {one.name: one.sae for one in group},
            model,
            {one.name: hooks[one.name] for one in group},
            texts,
            context_size=config.data.context_size,
            max_tokens=total,
            max_loss_tokens=config.heldout.loss_tokens,
            prepend_bos=config.data.prepend_bos,
            autocast=inputs.autocast,
            observer=observe if collectors else None,
            progress=advance,
        )
        if collectors:
            self._write_contexts(group, collectors, model, texts)
        return found

    def _write_contexts(
        self,
        group: Sequence[EvaluatedSAE],
        collectors: Mapping[str, ContextCollector],
        model: LanguageModel,
        texts: Sequence[str],
    ) -> None:
        data, heldout = self.config.data, self.config.heldout
        read = first_windows(
            model, texts, data.context_size, heldout.tokens, prepend_bos=data.prepend_bos
        )
        for one in group:
            if one.name not in collectors:
                continue
            collector, decoder = collectors[one.name], one.sae.W_dec
            latents = collector.strongest(decoder, heldout.contexts)
            profiles = collector.profiles(latents, decoder, read, model.tokenizer)
            write_json_atomic(
                sae_folder(self.output, one.name) / CONTEXTS_FILE,
                {"latents": contexts_as_json(profiles)},
            )

    def _with_contexts(self, expansion: Expansion) -> list[str]:
        """The first seed of each method at the first L0, less the variants of the ladder."""
        if self.config.heldout.contexts == 0:
            return []
        first = self.config.seeds[0], self.config.l0[0]
        return [
            entry.name
            for entry in expansion.entries
            if (entry.seed, entry.l0) == first
            # Fifty variants would fill a page that nobody reads.
            and (entry.method.variant is None or entry.method.variant.against is None)
        ]

    def _evaluate(
        self, evaluation: EvalConfig, saes: Sequence[EvaluatedSAE], measured: Measured
    ) -> None:
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
            saes,
            self.output / EVALUATION_FOLDER,
            language_model=model if fits else None,
            skip_missing=self._skip_missing,
            report=self._report,
        )
        for entry in cast("list[Mapping[str, Any]]", result.summary["results"]):
            name = str(entry["evaluation"])
            if entry["status"] != "measured":
                what = f"{name} of {entry['sae']}"
                measured.miss(what, str(entry["status"]), str(entry["reason"]))
            values = cast("Mapping[str, Mapping[str, Any]]", entry["metrics"])
            measured.add(
                str(entry["sae"]),
                {f"{name}/{metric}": float(value["mean"]) for metric, value in values.items()},
            )
        measured.definitions.update(result.summary["metrics"])

    def _shape(self) -> ModelShape:
        model = self._language_model
        return describe_model(self.config.model.name) if model is None else model.shape

    def _loaded(self, autocast: bool | Literal["auto"]) -> ModelAndText:
        if self._inputs is None:
            run = recipe(self.config)
            self._inputs = load_model_and_text(
                replace(run, model=replace(run.model, autocast=autocast)),
                self.device,
                self._report,
                language_model=self._language_model,
            )
            self._language_model = self._inputs.language_model
        return self._inputs
