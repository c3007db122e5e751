"""The language model's share of the core evaluation: tokens, losses and divergences, kept on disk.

Per batch of tokens: the activations at the hook; for the batches of the reconstruction metrics also
the residual stream before the last norm (from which the clean logits follow by the unembedding
alone; stored logits of SAEBench's protocol would take hundreds of GB; a bridge runs as a whole
again) and the losses of the clean model and of the one with zeros at the hook.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file, save_file

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import disk_errors_told, is_complete, keyed_folder, mark_complete
from msae_plugin.common.progress import Report
from msae_plugin.data.labelled_texts import DEFAULT_HELDOUT_DOCUMENTS
from msae_plugin.data.text import load_text, open_corpus
from msae_plugin.evaluation.outcomes import ModelContext
from msae_plugin.evaluation.saebench.patching import quiet
from msae_plugin.models.forward_pass import Tail, starts_in_the_middle
from msae_plugin.models.packaged import PACKAGED_PREFIX
from msae_plugin.saes.load import EvaluatedSAE

# Tokens whose logits are worked on at a time: rows stay in the processor's cache. 2048 tokens of a
# 49k vocabulary: 1.9 s whole, 1.1 s in parts (one thread).
PREDICTIONS_AT_A_TIME = 16
# exp of it is still a normal float32. Above it the logarithm of a softmax and a log-softmax are the
# same but for rounding; below, SAEBench's formula loses digits and ends in infinity and NaN.
LOWEST_LOG_PROBABILITY = -87.0
ALL_PROMPTS = slice(None)


@dataclass(frozen=True)
class Predictions:
    """Losses and divergences of a batch's logits, per position."""

    # (batch, seq - 1) loss of predicting the next token, in the model's dtype as in
    # TransformerLens.
    ce: torch.Tensor
    # (batch, seq) KL from the clean predictions, SAEBench's formula: logarithms of a softmax in the
    # model's dtype, infinite or NaN where that softmax is 0.
    kl: torch.Tensor
    kl_float32: torch.Tensor  # (batch, seq) the same from float32 log-probabilities

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """The predictions of a batch from those of its parts, in their order."""
        return cls(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))


class CleanPredictions:
    """The unchanged model's predictions on a batch, computed once for all SAEs.

    Logits are (batch, seq, vocabulary), tokens (batch, seq).
    """

    def __init__(self, model: Any, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        self._model = model
        self._tokens = tokens
        self._vocabulary = logits.shape[-1]
        rows = logits.reshape(-1, self._vocabulary)
        self._probabilities = torch.empty_like(rows)
        self._exact = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        lowest = 0.0
        for part in _parts(len(rows)):
            self._probabilities[part] = rows[part].softmax(-1)
            self._exact[part] = rows[part].float().log_softmax(-1)
            lowest = min(lowest, float(self._exact[part].amin()))
        # SAEBench's own log-probabilities where they are not the exact ones: the logarithms of a
        # rounded softmax.
        self._rounded: torch.Tensor | None = None
        if rows.dtype != torch.float32 or lowest <= LOWEST_LOG_PROBABILITY:
            self._rounded = self._probabilities.log()

    def compare(self, logits: torch.Tensor, prompts: slice = ALL_PROMPTS) -> Predictions:
        """Losses and divergences of other logits on the same batch.

        `prompts` says which of the batch the logits, (prompts, seq, vocabulary), are of.
        """
        tokens = self._tokens[prompts]
        first = (prompts.start or 0) * tokens.shape[1]
        rows = logits.reshape(-1, self._vocabulary)
        kl = torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
        exact = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        following = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        targets = torch.cat([tokens[:, 1:], tokens[:, :1]], 1).reshape(-1, 1)
        for part in _parts(len(rows)):
            of_batch = slice(first + part.start, first + part.stop)
            new = rows[part].float().log_softmax(-1)
            following[part] = -new.gather(-1, targets[part])[:, 0]
            same = self._rounded is None and float(new.amin()) > LOWEST_LOG_PROBABILITY
            if not same:
                kl[part] = self._rounded_kl(rows[part], of_batch)
            clean, weights = self._exact[of_batch], self._probabilities[of_batch]
            if rows.dtype != torch.float32:
                weights = clean.exp()
            exact[part] = torch.sub(clean, new, out=new).mul_(weights).sum(-1)
            if same:
                kl[part] = exact[part]
        if rows.dtype == torch.float32:
            # TransformerLens' own loss is the same log-softmax and gather.
            ce = following.reshape(tokens.shape)[:, :-1]
        else:
            ce = self._model.loss_fn(logits, tokens, per_token=True)
        return Predictions(ce, kl.reshape(tokens.shape), exact.reshape(tokens.shape))

    def _rounded_kl(self, rows: torch.Tensor, of_batch: slice) -> torch.Tensor:
        """(tokens,) by SAEBench's formula to the letter."""
        probabilities = self._probabilities[of_batch]
        clean = probabilities.log() if self._rounded is None else self._rounded[of_batch]
        new = rows.softmax(-1).log_()
        return torch.sub(clean, new, out=new).mul_(probabilities).sum(-1)


def _parts(total: int) -> list[slice]:
    starts = range(0, total, PREDICTIONS_AT_A_TIME)
    return [slice(start, min(start + PREDICTIONS_AT_A_TIME, total)) for start in starts]


def is_local(dataset: str) -> bool:
    """Whether a data set is read by us (packaged, a file, a folder) rather than from the hub."""
    return dataset.startswith(PACKAGED_PREFIX) or Path(dataset).expanduser().exists()


def core_dataset(settings: Mapping[str, Any]) -> Dataset | str:
    """The data set for SAELens' ActivationsStore: a hub name as it is, local text as a table.

    Packaged text is what training never sees (`heldout_documents`, as in a recipe). A table is
    shuffled by rows; a streamed hub data set, as in SAEBench, by shards only, so seeds of a
    one-shard data set give the same tokens (the summary says so).
    """
    dataset = str(settings["dataset"])
    if not is_local(dataset):
        return dataset
    default = DEFAULT_HELDOUT_DOCUMENTS if dataset.startswith(PACKAGED_PREFIX) else 0
    heldout = int(settings.get("heldout_documents") or default)
    if heldout:
        documents = load_text(dataset, heldout_documents=heldout).heldout
    else:
        documents = list(open_corpus(dataset, "train", None).documents())
    return Dataset.from_dict({"text": documents})


def core_tokens(
    context: ModelContext,
    settings: Mapping[str, Any],
    evaluated: EvaluatedSAE,
    seed: int,
    n_batches: int,
) -> torch.Tensor:
    """The first batches of tokens that SAEBench would evaluate this SAE on.

    (n_batches, batch_size_prompts, context_size) long.
    """
    sae = evaluated.for_saebench(context.torch_dtype, "cpu")
    # SAELens warns of a text that is shorter than 10^9 tokens and not tokenized: neither matters.
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            store = ActivationsStore.from_sae(
                context.language_model.model,
                sae,
                context_size=int(settings["context_size"]),
                dataset=core_dataset(settings),
                dataset_trust_remote_code=bool(settings.get("trust_remote_code")),
            )
        except ValueError as error:  # from `datasets`, which has no class of its own for it
            if "trust_remote_code" not in str(error):
                raise
            name = settings["dataset"]
            raise InputError(
                f"core: data set {name} comes with a loading script, a program that would run on "
                "this machine",
                f"read it on https://huggingface.co/datasets/{name}/tree/main and, where you trust "
                "it, set evaluations.core.trust_remote_code: true, or choose another data set",
            ) from error
        store.shuffle_input_dataset(seed=seed)
        batches: list[torch.Tensor] = []
        while len(batches) < n_batches:
            try:
                batch = store.get_batch_tokens(
                    int(settings["batch_size_prompts"]), raise_at_epoch_end=True
                )
            except StopIteration:
                raise InputError(
                    f"core: {settings['dataset']} holds only {len(batches)} batches of "
                    f"{settings['batch_size_prompts']} x {settings['context_size']} tokens and "
                    f"{n_batches} are asked for",
                    "lower n_eval_reconstruction_batches and "
                    "n_eval_sparsity_variance_batches, or raise heldout_documents",
                ) from None
            batches.append(batch.cpu())
    return torch.stack(batches)


def tokens_sha256(tokens: torch.Tensor) -> str:
    """Hash of tokens: covers the text, its order, the tokenizer, the context and the seed."""
    return hashlib.sha256(
        str(tuple(tokens.shape)).encode() + tokens.contiguous().numpy().tobytes()
    ).hexdigest()


def ignored_tokens(tokenizer: Any) -> set[int]:
    """PAD, EOS and BOS, which SAEBench leaves out of every mean."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return {int(token) for token in ids if token is not None}


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

    Tokens are (n_batches, prompts, context); the first `n_reconstruction` batches also serve the
    reconstruction metrics.
    """

    def __init__(
        self, context: ModelContext, hook_name: str, tokens: torch.Tensor, n_reconstruction: int
    ) -> None:
        self.context, self.hook_name = context, hook_name
        self.tokens, self.n_reconstruction = tokens, n_reconstruction
        self._model: Any = context.language_model.model
        self._tail = Tail(self._model, hook_name)
        self._ablated_logits: torch.Tensor | None = None
        self.key: Mapping[str, Any] = {
            **context.key("torch", "transformer-lens", "sae-lens", "sae-bench"),
            "format": FORMAT,
            "hook": hook_name,
            "tokens": tokens_sha256(tokens),
            "n_reconstruction": n_reconstruction,
        }
        self.folder: Path = keyed_folder(context.cache, KIND, self.key)

    def prepare(self, report: Report) -> bool:
        """Compute what is not on disk yet."""
        if is_complete(self.folder):
            if (self.folder / WHOLE_PASSES).exists():
                self._tail.start = None
            return False
        for index in range(len(self.tokens)):
            report("core: language model", index, len(self.tokens))
            if index < self.n_reconstruction:
                stored = self._reconstruction_batch(index)
            else:
                stored = {"activations": self._activations(self.batch(index))}
            on_cpu = {name: tensor.cpu().contiguous() for name, tensor in stored.items()}
            with disk_errors_told(self.folder):
                save_file(on_cpu, self._file(index))
        mark_complete(self.folder, self.key)
        return True

    def activations(self, index: int) -> torch.Tensor:
        """(prompts, context, ...) what the hook gives for a batch, in the model's dtype."""
        return self._load(index)["activations"]

    def clean(self, index: int) -> tuple[CleanPredictions, torch.Tensor, Predictions]:
        """For a batch of the reconstruction metrics: the clean model, its loss, and the ablation.

        The clean predictions, their loss (prompts, context - 1), and what zeros at the hook do.
        """
        stored = self._load(index)
        if starts_in_the_middle(self._model):
            n_layers = int(self._model.cfg.n_layers)
            logits = self._model(stored["final_residual"], start_at_layer=n_layers)
        else:
            logits = self._model(self.batch(index))
        clean = CleanPredictions(self._model, logits, self.batch(index))
        zeros = Predictions(stored["ce_zero"], stored["kl_zero"], stored["kl_zero_float32"])
        return clean, stored["ce_clean"], zeros

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
        if index == 0 and self._tail.start is not None:
            part = self._parts(tokens)[0]
            if not self._tail.check(activations[part], logits[part]):
                (self.folder / WHOLE_PASSES).touch()
        clean = CleanPredictions(self._model, logits, tokens)
        del logits
        zeros = self._ablated(tokens, clean, torch.zeros_like(activations))
        return {
            "activations": activations,
            # One tensor where the SAEs read the last layer: a file holds no tensor under two names.
            "final_residual": seen[final].clone(),
            "ce_clean": loss,
            "ce_zero": zeros.ce,
            "kl_zero": zeros.kl,
            "kl_zero_float32": zeros.kl_float32,
        }

    def _parts(self, tokens: torch.Tensor) -> list[slice]:
        """The prompts that run at a time."""
        n_prompts, context = tokens.shape
        small = self.context.dtype == "float32" and tokens.device.type == "cpu"
        size = max(1, TOKENS_AT_A_TIME // context) if small else n_prompts
        return [slice(i, min(i + size, n_prompts)) for i in range(0, n_prompts, size)]

    def predictions_with(
        self, tokens: torch.Tensor, clean: CleanPredictions, values: torch.Tensor
    ) -> Predictions:
        """Predictions of a batch of tokens when the hook gives these values."""
        after = self._tail.everywhere
        parts = self._parts(tokens)
        return Predictions.joined(
            [clean.compare(after(tokens[part], values[part]), part) for part in parts]
        )

    def _ablated(
        self, tokens: torch.Tensor, clean: CleanPredictions, zeros: torch.Tensor
    ) -> Predictions:
        """Predictions with zeros at the hook.

        Where the residual stream is zero everywhere, the prompt is forgotten: one prompt's logits
        are those of every prompt of every batch. (In other dtypes than float32 other shapes round
        otherwise, and SAEBench's are those of a whole batch.)
        """
        if self._tail.start is None or self.context.dtype != "float32":
            return self.predictions_with(tokens, clean, zeros)
        if self._ablated_logits is None:
            self._ablated_logits = self._tail.everywhere(tokens[:1], zeros[:1])
        logits = self._ablated_logits
        return Predictions.joined(
            [clean.compare(logits, slice(i, i + 1)) for i in range(len(tokens))]
        )
