"""Latents and their contexts for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from msae_plugin.evaluation.contexts import LatentProfile, TokenContext


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


class ContextsForTerminal:
    """One block per latent; the tokens under one another, values in front.

    The token is in reverse video, or between «» where the output has no styles (a file, a pipe).

    Args:
        profiles: The latents.
    """

    def __init__(self, profiles: Sequence[LatentProfile]) -> None:
        self._profiles = profiles

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line per heading and context; what does not fit the terminal is cut at its end."""
        styled = console.is_terminal and console.color_system is not None
        for rank, profile in enumerate(self._profiles, 1):
            yield Text(_headline(rank, profile), style="bold")
            for context in profile.contexts:
                before, after = one_line(context.before), one_line(context.after)
                token = one_line(context.token)
                line = Text(no_wrap=True, overflow="ellipsis")
                line.append(f"{context.activation:8.3g}  ", style="dim")
                line.append(before[-BEFORE_WIDTH:].rjust(BEFORE_WIDTH))
                line.append(token if styled else f"«{token}»", style="reverse bold")
                line.append(after[:AFTER_WIDTH])
                yield line


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
