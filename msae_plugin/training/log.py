"""Metrics logs of a training: JSON lines, TensorBoard, trackio, Weights & Biases.

One line of JSON per SAE and logging window. SAELens logs explained variance per batch, which
depends on the batch; here it is the streaming definition over the whole window.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.saes.sae import TrainStepOutput
from typing_extensions import override

from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import json_safe, write_text_atomic
from msae_plugin.saes.health import SILENT_LOG10_RATE, dense_share, encoder_decoder_alignment
from msae_plugin.saes.run_record import METRICS_FILE, read_rows

logger = logging.getLogger(__name__)

REVIVALS_FILE = "revivals.jsonl"

MetricValue = torch.Tensor | float | int | Callable[[], torch.Tensor | float | int]


def scalar(value: MetricValue) -> float:
    """One number from what SAELens allows as a metric: a number, a tensor or a callable giving one.

    A tensor with several elements gives their mean.
    """
    if callable(value):
        value = value()
    if isinstance(value, torch.Tensor):
        return float(value.detach().float().mean().item())
    return float(value)


class TrainingWindow:
    """Statistics of one SAE over the training batches since the last log line.

    All values are means over tokens of the window: `loss` and `losses/*` the training losses,
    `l0` active latents per token, `explained_variance` SAELens' streaming R^2 of the
    reconstruction. Sums stay on the device until `read`.
    """

    def __init__(self) -> None:
        self._explained_variance = ExplainedVarianceCalculator()
        self._sums: dict[str, torch.Tensor] = {}
        self.tokens = 0
        self.batches = 0

    @torch.no_grad()
    def add(self, output: TrainStepOutput, active: torch.Tensor) -> None:
        """Add one batch; `active` counts the active latents in all of it."""
        tokens = output.sae_in.shape[0]
        self._explained_variance.add_batch(
            output.sae_out.detach().reshape(tokens, -1), output.sae_in.reshape(tokens, -1)
        )
        self._add("l0", active)
        self._add("loss", output.loss * tokens)
        for name, value in output.losses.items():
            self._add(f"losses/{name}", value * tokens)
        self.tokens += tokens
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {**vars(self), "_explained_variance": vars(self._explained_variance)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from sums."""
        vars(self).update(state)
        self._explained_variance = ExplainedVarianceCalculator()
        vars(self._explained_variance).update(state["_explained_variance"])
        self._sums = {name: total.to(device) for name, total in self._sums.items()}

    def _add(self, name: str, value: torch.Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """The window's means, over the tokens of all ranks; empty before the first batch."""
        if self.tokens == 0:
            return {}
        means = {
            name: float(ranks.mean(total).item()) / self.tokens
            for name, total in self._sums.items()
        }
        if ranks.count > 1:
            _pool(self._explained_variance, ranks)
        return {**means, "explained_variance": self._explained_variance.compute()}


def _pool(calculator: ExplainedVarianceCalculator, ranks: Ranks) -> None:
    """Let a calculator know the sums of all ranks; SAELens' has no method for it."""
    assert calculator.sum_x is not None, "there was a batch"
    squares = torch.tensor(
        [calculator.sum_squared_norm, calculator.sum_squared_residual], dtype=torch.float64
    )
    calculator.sum_x = ranks.sum(calculator.sum_x)
    calculator.sum_squared_norm, calculator.sum_squared_residual = ranks.sum(squares).tolist()
    calculator.num_samples *= ranks.count


@torch.no_grad()
def latent_statistics(
    firings: torch.Tensor, n_tokens: int, dead: torch.Tensor, sae: torch.nn.Module
) -> dict[str, float]:
    """How a window's L0 is spread over the latents, and how encoder and decoder agree.

    From firing counts (d_sae,) over the window's tokens and which latents are dead: `dead_share` of
    the latents; `dense_share` of the L0, on latents that fire on more than a tenth of the tokens;
    quantiles of log10 firing rates, -10 for a latent that never fired; and, for an SAE with W_enc
    and W_dec, `encoder_decoder_alignment`, the mean cosine of a latent's encoder and decoder
    direction over those that are not dead, evenly sampled where they are many.
    """
    rates = firings / max(n_tokens, 1)
    quantiles = torch.quantile(rates.float(), rates.new_tensor([0.05, 0.5, 0.95]).float())
    logs = torch.log10(quantiles).clamp(min=SILENT_LOG10_RATE)
    # One transfer from the device.
    values = torch.stack([dead.float().mean(), dense_share(firings, n_tokens), *logs]).tolist()
    names = ("dead_share", "dense_share", *(f"log10_firing_rate_p{q}" for q in ("05", "50", "95")))
    found = dict(zip(names, values, strict=True))
    alignment = encoder_decoder_alignment(sae, ~dead)
    if alignment is not None:
        found["encoder_decoder_alignment"] = alignment
    return found


class MetricSink:
    """A destination of one run's rows, made of files or clients that are flushed and closed."""

    parts: Sequence[Any] = ()

    def write(self, sae_name: str, row: Mapping[str, float]) -> None:
        """Take one row of one SAE."""
        raise NotImplementedError

    def flush(self) -> None:
        """Make everything written so far survive a kill."""
        for part in self.parts:
            part.flush()

    def close(self) -> None:
        """The run has ended."""
        for part in self.parts:
            part.close()


class JsonLines:
    """Appends JSON objects to a file, one per line; the file is created with its first line."""

    def __init__(self, path: Path, step_key: str = "step") -> None:
        self.path = path
        self._step_key = step_key
        self._handle: Any = None

    def truncate_after(self, step: int) -> int:
        """Drop rows of later steps, a last line cut short by a kill, and damaged ones by name.

        Returns how many lines were dropped.
        """
        if not self.path.exists():
            return 0
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        steps = [self._step_of(line) for line in lines]
        damaged = [str(number) for number, at in enumerate(steps[:-1], 1) if at == math.inf]
        if damaged:
            logger.warning("%s is damaged: line %s is left out", str(self.path), ", ".join(damaged))
        kept = [line for line, at in zip(lines, steps, strict=True) if at <= step]
        if len(kept) < len(lines):
            write_text_atomic(self.path, "".join(f"{line}\n" for line in kept))
        return len(lines) - len(kept)

    def _step_of(self, line: str) -> float:
        try:
            return float(json.loads(line)[self._step_key])
        except (ValueError, KeyError, TypeError, RecursionError):
            return math.inf

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; it reaches the operating system before this returns."""
        if self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = self.path.open("a", encoding="utf-8")
        self._handle.write(json.dumps(json_safe(dict(row))) + "\n")
        self._handle.flush()

    def flush(self) -> None:
        """Force the rows onto the disk."""
        if self._handle is not None:
            os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


class JsonLinesSink(MetricSink):
    """`metrics.jsonl` in each SAE's folder, less rows after the step that a run resumes at.

    Rows come every `every_steps`; a log that lost some of them to the disk is named.
    """

    def __init__(
        self, folders: Mapping[str, Path], resume_step: int = 0, every_steps: int | None = None
    ) -> None:
        self._files = {name: JsonLines(path / METRICS_FILE) for name, path in folders.items()}
        self.parts = list(self._files.values())
        for file in self.parts:
            file.truncate_after(resume_step)
            steps = [0.0, *(row["step"] or 0.0 for row in read_rows(file.path))]
            apart = max(b - a for a, b in pairwise([*steps, resume_step]))
            if every_steps is not None and apart > every_steps:
                logger.warning("%s has lost rows before step %d", str(file.path), resume_step)

    @override
    def write(self, sae_name: str, row: Mapping[str, float]) -> None:
        self._files[sae_name].append(row)


class TensorBoardSink(MetricSink):
    """Event files for TensorBoard, one run per SAE below `folder`, later events hidden."""

    def __init__(self, folder: Path, names: list[str], resume_step: int = 0) -> None:
        # TensorBoard is optional, and importing it takes seconds.
        from torch.utils.tensorboard import SummaryWriter

        purge = resume_step + 1 if resume_step else None
        self._writers = {
            name: SummaryWriter(log_dir=str(folder / name), purge_step=purge) for name in names
        }
        self.parts = list(self._writers.values())

    @override
    def write(self, sae_name: str, row: Mapping[str, float]) -> None:
        step = int(row["step"])
        for key, value in row.items():
            if key != "step":
                self._writers[sae_name].add_scalar(key, value, global_step=step)


class WandbSink(MetricSink):
    """Weights & Biases, or trackio, which has the same functions and needs no account.

    One run for all SAEs; keys are `<sae>/<metric>` as in SAELens. Options go to the client's
    `init`.
    """

    def __init__(
        self, options: Mapping[str, Any], config: Mapping[str, Any], client: str = "wandb"
    ) -> None:
        if importlib.util.find_spec(client) is None:
            raise InputError(
                f"logging.{client} is set but {client} is not installed", f"pip install {client}"
            )
        # Only runs that ask for it pay for starting the client.
        self._wandb = importlib.import_module(client)
        arguments: dict[str, Any] = {"resume": "allow", **options, "config": dict(config)}
        self._wandb.init(**arguments)

    @override
    def write(self, sae_name: str, row: Mapping[str, float]) -> None:
        self._wandb.log(
            {f"{sae_name}/{key}": value for key, value in row.items() if key != "step"},
            step=int(row["step"]),
        )

    @override
    def close(self) -> None:
        self._wandb.finish()


def tensorboard_wanted(setting: Literal["auto", "on", "off"]) -> bool:
    """Whether to write TensorBoard files; refused where asked for and not installed."""
    installed = importlib.util.find_spec("tensorboard") is not None
    if setting == "on" and not installed:
        raise InputError(
            "logging.tensorboard is 'on' but tensorboard is not installed: "
            "pip install tensorboard, or set logging.tensorboard to auto"
        )
    return installed and setting != "off"


class MetricsLog(MetricSink):
    """All sinks of a run."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self.parts = sinks

    @override
    def write(self, sae_name: str, row: Mapping[str, float]) -> None:
        for sink in self.parts:
            sink.write(sae_name, row)
