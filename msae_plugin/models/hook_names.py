"""Names of hook points: which layer a hook belongs to and which loader understands it.

Two styles are accepted. TransformerLens names (`blocks.9.hook_resid_post`, see
https://transformerlensorg.github.io/TransformerLens/) address points inside a HookedTransformer;
module names (`model.layers.9`) address a submodule of the Hugging Face model, whose output is the
activation. HookedTransformer is deprecated in transformer-lens 3 and absent from 4, module names
work with every architecture that transformers loads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sae_lens.util import extract_layer_from_tlens_hook_name

from msae_plugin.common.errors import InputError

HookStyle = Literal["transformer_lens", "module"]

_DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


# Points of a HookedTransformer whose activations are not (batch, seq, width), or that it passes
# only when it is told to.
_NO_ACTIVATIONS = (
    "hook_pattern", "hook_attn_scores", "hook_tokens", "hook_result", "hook_q_input",
    "hook_k_input", "hook_v_input", "hook_attn_in", "hook_mlp_in",
)  # fmt: skip


@dataclass(frozen=True)
class HookName:
    """Layer and style of a hook's name."""

    # The layer, the first number between dots; None for a point outside the layers, such as
    # `hook_embed` or `model.norm`.
    layer: int | None
    style: HookStyle  # `transformer_lens` for HookedTransformer's points, `module` for submodules


def parse_hook_name(hook: str) -> HookName:
    """Read layer and style from a hook's name."""
    if not _DOTTED_NAME.fullmatch(hook):
        raise InputError(
            f"hook {hook!r} is not a dotted name",
            "use for example blocks.9.hook_resid_post or model.layers.9",
        )
    ends_in_hook_point = hook.rsplit(".", 1)[-1].startswith("hook_")
    if hook.split(".", 1)[0] == "blocks" and not ends_in_hook_point:
        raise InputError(
            f"hook {hook!r} names a block, not a hook point",
            f"write {hook}.hook_resid_post for its output",
        )
    if hook.endswith(_NO_ACTIVATIONS):
        raise InputError(
            f"hook {hook!r} gives no activations of the shape (batch, seq, width)",
            "use for example the output of a layer",
        )
    return HookName(
        layer=extract_layer_from_tlens_hook_name(hook),
        style="transformer_lens" if ends_in_hook_point else "module",
    )


def validate_hook(hook: str, n_layers: int) -> HookName:
    """Check a hook's name against the depth of the model."""
    parsed = parse_hook_name(hook)
    if parsed.layer is not None and parsed.layer >= n_layers:
        raise InputError(
            f"hook {hook!r} is at layer {parsed.layer}, "
            f"but the model's layers are numbered 0 to {n_layers - 1}"
        )
    return parsed


def common_style(hooks: Sequence[str]) -> HookStyle:
    """The one style that all hooks of a run share: one model is loaded, by one loader."""
    if not hooks:
        raise InputError("no hook is given", "name at least one, such as blocks.9.hook_resid_post")
    duplicates = sorted({hook for hook in hooks if hooks.count(hook) > 1})
    if duplicates:
        raise InputError(f"hook {duplicates[0]!r} is listed twice", "list each hook once")
    by_style: dict[HookStyle, str] = {parse_hook_name(hook).style: hook for hook in hooks}
    if len(by_style) > 1:
        raise InputError(
            f"hooks {by_style['transformer_lens']!r} and {by_style['module']!r} are of two styles, "
            "which need two different models",
            "use one style",
        )
    return next(iter(by_style))
