"""`msae info`: what a checkpoint is, and what a run will cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from msae_plugin.architecture.config import ARCHITECTURE
from msae_plugin.models.loading import describe_model
from msae_plugin.reporting.costs import LOADED_MODEL_FACTOR, RunCost, run_cost
from msae_plugin.saes.find import StoredSAE, mechanisms_on, read_folder
from msae_plugin.saes.health import recorded_messages
from msae_plugin.saes.load import check_evaluable
from msae_plugin.training.plans import SAEPlan
from msae_plugin.training.recipe import RunConfig


def human_bytes(size: float) -> str:
    """A size in B, KiB, MiB, GiB or TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _facts(title: str, rows: Sequence[tuple[str, str | None]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            # Text, not markup: brackets in names and values are not styles.
            grid.add_row(Text(name), Text(value))
    return Group(Text(title, style="bold underline"), grid, Text(""))


def describe_checkpoint(name: str, info: StoredSAE) -> RenderableType:
    """One SAE on disk, as facts."""
    meta = info.metadata
    steps, tokens = meta.get("training_steps"), meta.get("training_tokens")
    trained = None if steps is None else f"{steps:,} steps"
    if trained is not None and tokens is not None:
        trained += f", {tokens:,} tokens"
    if steps == 0:
        trained = "0 steps: THIS SAE WAS NEVER TRAINED"
    architecture = info.architecture
    if info.trained_as not in (None, info.architecture):
        architecture += f" (trained as {info.trained_as})"
    l0 = None
    if info.l0 is not None:
        l0 = f"{info.l0:.1f} active latents per token, measured at export"
    elif info.kind != "training checkpoint":
        l0 = "not recorded"
    return _facts(
        f"{name}: {info.kind}",
        [
            ("folder", str(info.folder)),
            ("architecture", architecture),
            ("sizes", f"d_in {info.d_in:,}, d_sae {info.d_sae:,}, {info.dtype}"),
            ("parameters", f"{info.parameters:,} ({human_bytes(info.weight_bytes)})"),
            ("model", _recorded(meta.get("model_name"))),
            ("hook", _recorded(meta.get("hook_name"))),
            ("context", _recorded(meta.get("context_size"))),
            ("trained", trained or "length not recorded"),
            ("mechanisms", "\n".join(info.mechanisms) or None),
            ("L0", l0),
            ("jumprelu twin", _twin(info.report)),
            ("WARNING", "\n".join(recorded_messages((info.report or {}).get("health"))) or None),
        ],
    )


def _recorded(value: Any) -> str:
    return "not recorded" if value is None else str(value)


def _twin(export: dict[str, Any] | None) -> str | None:
    if export is None:
        return None
    obstacle = cast("str | None", export.get("twin_obstacle"))
    return "yes" if obstacle is None else f"no: {obstacle}"


def describe_folder(folder: Path) -> RenderableType:
    """Everything `msae info DIR` says.

    Raises:
        InputError: There is no SAE in the folder.
    """
    record, saes = read_folder(folder)
    described = [describe_checkpoint(name, info) for name, info in saes.items()]
    if record is None:
        return Group(*described)
    model = record.get("model") or {}
    data = record.get("data") or {}
    planned = record.get("saes") or {}
    missing = [name for name in planned if name not in saes]
    run = _facts(
        f"{folder.resolve().name}: run, {record.get('status', 'status not recorded')}",
        [
            ("model", _recorded(model.get("name"))),
            ("text", _recorded(data.get("description"))),
            ("length", f"{record.get('steps', 0):,} steps, {record.get('tokens', 0):,} tokens"),
            ("time", f"{record.get('wall_seconds', 0):,.0f} s"),
            ("seed", _recorded(record.get("seed"))),
            ("not exported", ", ".join(missing) or None),
        ],
    )
    return Group(run, *described)


def describe_config(path: Path, overrides: Sequence[str] = ()) -> RenderableType:
    """Everything `msae info --config` says: the recipe is checked, nothing is loaded.

    Raises:
        InputError: The recipe cannot work.
    """
    config = RunConfig.load(path, overrides)
    shape = describe_model(config.model.name)
    plans = config.validate(shape)
    check_evaluable(config.model.name, config.hooks, config.model.loader)
    cost = run_cost(config, plans, shape)
    return Group(
        _facts(
            f"{path.name}: {len(plans)} SAE{'s' if len(plans) > 1 else ''}",
            [
                ("model", f"{config.model.name}, {shape.n_layers} layers of {shape.d_model}"),
                ("text", config.data.source),
                ("hooks", ", ".join(config.hooks)),
                ("length", f"{cost.tokens:,} tokens in {cost.steps:,} steps"),
                ("LLM passes", f"{cost.forward_passes:,} of {_llm_batch(config):,} tokens"),
            ],
        ),
        *(_describe_plan(plan, cost) for plan in plans),
        _facts(
            "memory and disk",
            [
                ("SAEs", f"{human_bytes(_held(cost))} weights, gradients and Adam"),
                (
                    "model",
                    f"{human_bytes(cost.model_bytes)} weights, "
                    f"{human_bytes(LOADED_MODEL_FACTOR * cost.model_bytes)} once loaded (estimate)",
                ),
                ("buffer", f"{human_bytes(cost.buffer_bytes)} activations, while they are mixed"),
                ("one pass", f"{human_bytes(cost.model_forward_bytes)} in the model (estimate)"),
                ("peak", f"{human_bytes(cost.peak_bytes)} (estimate), + 0.9 GiB of libraries"),
                ("checkpoints", f"{human_bytes(cost.checkpoints_bytes)} on disk"),
            ],
        ),
    )


def _llm_batch(config: RunConfig) -> int:
    return config.training.store_batch_size_prompts * config.data.context_size


def _held(cost: RunCost) -> int:
    return sum(c.weight_bytes + c.optimizer_bytes + c.gradient_bytes for c in cost.saes.values())


def _describe_plan(plan: SAEPlan, cost: RunCost) -> RenderableType:
    item, config = cost.saes[plan.name], plan.config
    k = getattr(config, "k", None)
    multiscale = config.architecture() == ARCHITECTURE
    return _facts(
        f"{plan.name}: {config.architecture()} at {plan.hook}",
        [
            (
                "sizes",
                f"d_in {config.d_in:,}, d_sae {config.d_sae:,}" + (f", k {k:g}" if k else ""),
            ),
            ("parameters", f"{item.parameters:,} ({human_bytes(item.weight_bytes)} with buffers)"),
            ("Adam", human_bytes(item.optimizer_bytes)),
            ("one step", f"{human_bytes(item.step_bytes)} (estimate)"),
            (
                "recorded step",
                f"{human_bytes(item.recorded_bytes)} held (estimate); "
                "training.cuda_graphs: false holds none"
                if item.recorded_bytes
                else None,
            ),
            ("mechanisms", "\n".join(mechanisms_on(vars(config))) or None if multiscale else None),
        ],
    )
