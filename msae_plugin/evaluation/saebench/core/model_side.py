"""What the core evaluation needs of the language model alone: computed once, kept on disk.

Per batch of tokens: the activations at the hook; for the batches of the reconstruction metrics also
the residual stream before the last norm (from which the clean logits follow by the unembedding
alone; stored logits of SAEBench's protocol would take hundreds of GB) and the losses of the clean
model and of the one with zeros at the hook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from msae_plugin.common.cache import is_complete, keyed_folder, mark_complete, versions
from msae_plugin.evaluation.outcomes import ModelContext, Reporter
from msae_plugin.evaluation.saebench.core.predictions import CleanPredictions, Predictions
from msae_plugin.evaluation.saebench.core.text import tokens_sha256
from msae_plugin.models.forward_pass import TAIL_TOLERANCE, tail_start

KIND = "core"
# Raised when what is stored changes.
FORMAT = 2
# Tokens that run through the layers behind the hook at a time, on a CPU in float32: activations and
# logits stay small. In other dtypes other shapes round otherwise, and a GPU wants all at once.
TOKENS_AT_A_TIME = 512
# A file that says that this model cannot be started in the middle.
WHOLE_PASSES = "whole-passes"


class CoreModelSide:
    """The model's side of the core evaluation for one hook and one list of token batches.

    Args:
        context: The model.
        hook_name: Where the SAEs read.
        tokens: (n_batches, prompts, context) long.
        n_reconstruction: The first so many batches also serve the reconstruction metrics.
    """

    def __init__(
        self, context: ModelContext, hook_name: str, tokens: torch.Tensor, n_reconstruction: int
    ) -> None:
        self.context = context
        self.hook_name = hook_name
        self.tokens = tokens
        self.n_reconstruction = n_reconstruction
        self._model = context.language_model.model
        self._start = tail_start(hook_name)
        self._ablated_logits: torch.Tensor | None = None
        self.key: Mapping[str, Any] = {
            "format": FORMAT,
            "model": context.weights_sha256,
            "model_config": str(sorted(self._model.cfg.to_dict().items(), key=str)),
            "dtype": context.dtype,
            "device": context.device.split(":")[0],
            "hook": hook_name,
            "tokens": tokens_sha256(tokens),
            "n_reconstruction": n_reconstruction,
            "versions": versions("torch", "transformer-lens", "sae-lens", "sae-bench"),
        }
        self.folder: Path = keyed_folder(context.cache, KIND, self.key)

    def prepare(self, report: Reporter) -> bool:
        """Compute what is not on disk yet.

        Returns:
            Whether anything had to be computed.
        """
        if is_complete(self.folder):
            if (self.folder / WHOLE_PASSES).exists():
                self._start = None
            return False
        for index in range(len(self.tokens)):
            report("core: language model", index, len(self.tokens))
            if index < self.n_reconstruction:
                stored = self._reconstruction_batch(index)
            else:
                stored = {"activations": self._activations(self.batch(index))}
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in stored.items()},
                self._file(index),
            )
        mark_complete(self.folder, self.key)
        return True

    def activations(self, index: int) -> torch.Tensor:
        """(prompts, context, ...) what the hook gives for a batch, in the model's dtype."""
        return self._load(index)["activations"]

    def clean(self, index: int) -> tuple[CleanPredictions, torch.Tensor, Predictions]:
        """For a batch of the reconstruction metrics: the clean model, its loss, and the ablation.

        Returns:
            The clean predictions, their loss (prompts, context - 1), and what zeros at the hook do.
        """
        stored = self._load(index)
        n_layers = int(self._model.cfg.n_layers)
        logits = self._model(stored["final_residual"], start_at_layer=n_layers)
        clean = CleanPredictions(self._model, logits, self.batch(index))
        zeros = Predictions(stored["ce_zero"], stored["kl_zero"], stored["kl_zero_float32"])
        return clean, stored["ce_clean"], zeros

    def predictions_with(
        self, index: int, clean: CleanPredictions, values: torch.Tensor
    ) -> Predictions:
        """What a batch's predictions become when the hook gives these values.

        Args:
            index: The batch.
            clean: Its clean predictions.
            values: (prompts, context, ...) in place of what the hook gives.
        """
        return self._predictions(self.batch(index), clean, values)

    def batch(self, index: int) -> torch.Tensor:
        """(prompts, context) tokens, on the model's device."""
        return self.tokens[index].to(self.context.device)

    def _file(self, index: int) -> Path:
        return self.folder / f"batch-{index:05d}.safetensors"

    def _load(self, index: int) -> dict[str, torch.Tensor]:
        return load_file(self._file(index), device=self.context.device)

    def _activations(self, tokens: torch.Tensor) -> torch.Tensor:
        """As SAEBench reads them: stopping after the hook's layer."""
        layer = int(self.hook_name.split(".")[1])
        cache = self._model.run_with_cache(
            tokens, prepend_bos=False, names_filter=[self.hook_name], stop_at_layer=layer + 1
        )[1]
        return cache[self.hook_name]

    @torch.no_grad()
    def _reconstruction_batch(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.batch(index)
        final = f"blocks.{int(self._model.cfg.n_layers) - 1}.hook_resid_post"
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook_fn(value: torch.Tensor, hook: Any) -> None:
                del hook  # TransformerLens passes it by keyword
                # A copy: a later block may write in place.
                seen[name] = value.clone()

            return hook_fn

        logits, loss = self._model.run_with_hooks(
            tokens,
            return_type="both",
            loss_per_token=True,
            fwd_hooks=[(name, keep(name)) for name in dict.fromkeys((self.hook_name, final))],
        )
        activations = seen[self.hook_name]
        if index == 0:
            self._require_same_tail(tokens, activations, logits)
        clean = CleanPredictions(self._model, logits, tokens)
        del logits
        zeros = self._ablated(tokens, clean, torch.zeros_like(activations))
        return {
            "activations": activations,
            "final_residual": seen[final],
            "ce_clean": loss,
            "ce_zero": zeros.ce,
            "kl_zero": zeros.kl,
            "kl_zero_float32": zeros.kl_float32,
        }

    def _require_same_tail(
        self, tokens: torch.Tensor, activations: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Start in the middle only if it gives what the whole model gives."""
        if self._start is None:
            return
        part = self._parts(tokens)[0]
        tail = self._logits(tokens[part], activations[part])
        error = (tail - logits[part]).abs().max() / logits[part].abs().max()
        if not float(error) <= TAIL_TOLERANCE:
            self._start = None
            (self.folder / WHOLE_PASSES).touch()

    def _parts(self, tokens: torch.Tensor) -> list[slice]:
        """The prompts that run at a time."""
        n_prompts, context = tokens.shape
        small = self.context.dtype == "float32" and tokens.device.type == "cpu"
        size = max(1, TOKENS_AT_A_TIME // context) if small else n_prompts
        return [slice(i, min(i + size, n_prompts)) for i in range(0, n_prompts, size)]

    def _predictions(
        self, tokens: torch.Tensor, clean: CleanPredictions, values: torch.Tensor
    ) -> Predictions:
        return Predictions.joined(
            [
                clean.compare(self._logits(tokens[part], values[part]), part)
                for part in self._parts(tokens)
            ]
        )

    def _ablated(
        self, tokens: torch.Tensor, clean: CleanPredictions, zeros: torch.Tensor
    ) -> Predictions:
        """What zeros at the hook do.

        Where the residual stream is zero everywhere, the prompt is forgotten: one prompt's logits
        are those of every prompt of every batch. (In other dtypes than float32 other shapes round
        otherwise, and SAEBench's are those of a whole batch.)
        """
        if self._start is None or self.context.dtype != "float32":
            return self._predictions(tokens, clean, zeros)
        if self._ablated_logits is None:
            self._ablated_logits = self._logits(tokens[:1], zeros[:1])
        logits = self._ablated_logits
        return Predictions.joined(
            [clean.compare(logits, slice(i, i + 1)) for i in range(len(tokens))]
        )

    @torch.no_grad()
    def _logits(self, tokens: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if self._start is not None:
            return self._model(values, start_at_layer=self._start)

        def replace(value: torch.Tensor, hook: Any) -> torch.Tensor:
            del value, hook  # TransformerLens passes both
            return values

        return self._model.run_with_hooks(
            tokens, return_type="logits", fwd_hooks=[(self.hook_name, replace)]
        )
