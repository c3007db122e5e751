"""Latents and their contexts for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from msae_plugin.reporting.contexts import LatentProfile, TokenContext


def one_line(text: str) -> str:
    """Line breaks and tabs made visible, so that a context stays on its line."""
    return text.replace("\r", "").replace("\n", "⏎").replace("\t", " ")


def _headline(rank: int, profile: LatentProfile) -> str:
    return (
        f"{rank}. latent {profile.latent}: fires on {profile.frequency:.2%} of the tokens, "
        f"mean {profile.mean_activation:.3g} when it does"
    )


# Characters in front of and behind the token: with the value they fill 80 columns.
BEFORE_WIDTH, AFTER_WIDTH = 38, 22


def contexts_for_terminal(profiles: Sequence[LatentProfile]) -> RenderableType:
    """One block per latent; the tokens under one another in reverse video, values in front."""
    parts: list[RenderableType] = []
    for rank, profile in enumerate(profiles, 1):
        parts.append(Text(_headline(rank, profile), style="bold"))
        for context in profile.contexts:
            before, after = one_line(context.before), one_line(context.after)
            # One line per context: what does not fit the terminal is cut at its end.
            line = Text(no_wrap=True, overflow="ellipsis")
            line.append(f"{context.activation:8.3g}  ", style="dim")
            line.append(before[-BEFORE_WIDTH:].rjust(BEFORE_WIDTH))
            line.append(one_line(context.token), style="reverse bold")
            line.append(after[:AFTER_WIDTH])
            parts.append(line)
    return Group(*parts)


def _escaped(text: str) -> str:
    escaped = one_line(text)
    for character in "\\`*_[]<>|#":
        escaped = escaped.replace(character, "\\" + character)
    return escaped


def _markdown_line(context: TokenContext) -> str:
    token = one_line(context.token)
    # Bold needs a non-space character right inside its asterisks.
    space = token[: len(token) - len(token.lstrip())]
    core = _escaped(token.strip()) or "␣"
    trailing = token[len(token.rstrip()) :] if token.strip() else ""
    return (
        f"- {context.activation:.3g}: {_escaped(context.before).lstrip()}{space}**{core}**"
        f"{trailing}{_escaped(context.after)}"
    )


def contexts_as_markdown(profiles: Sequence[LatentProfile]) -> str:
    """A list per latent, the activating token in bold."""
    blocks: list[str] = []
    for rank, profile in enumerate(profiles, 1):
        lines = [f"**{_headline(rank, profile)}**", ""]
        lines.extend(_markdown_line(context) for context in profile.contexts)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def contexts_as_json(profiles: Sequence[LatentProfile]) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [asdict(profile) for profile in profiles]
