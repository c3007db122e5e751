"""What `msae publish` prints about what it did."""

from __future__ import annotations

from msae_plugin.hub.publish import PublishResult
from msae_plugin.hub.release import dashboard_hint
from msae_plugin.hub.remote import MAIN
from msae_plugin.hub.verification import describe
from msae_plugin.reporting.info import human_bytes


def report_lines(result: PublishResult) -> list[str]:
    """A publication, or a dry run, line by line.

    Args:
        result: From `publish`.
    """
    lines = [f"note: {note}" for note in result.notes]
    verb = "would upload" if result.commit is None else "uploaded"
    total = sum(result.files.values())
    lines.append(f"{verb} {len(result.files)} files, {human_bytes(total)}, to {result.repo}:")
    lines += [f"  {human_bytes(size):>10}  {path}" for path, size in sorted(result.files.items())]
    if result.removed:
        lines.append("would remove:" if result.commit is None else "removed:")
        lines += [f"  {path}" for path in result.removed]
    if result.commit is None:
        lines.append(f"rendered in {result.output}; nothing was uploaded")
        return lines + _release(result)
    where = MAIN if result.revision is None else result.revision
    if result.pull_request is not None:
        where = f"the pull request {result.pull_request}"
    lines.append(f"commit {result.commit} on {where}: {result.url}")
    if result.tag is not None:
        lines.append(f"tag {result.tag}")
    if where != MAIN:
        lines.append(
            "SAE.from_pretrained loads main alone: until this is merged into it, use "
            f"msae download {result.repo}@{result.commit}:FOLDER --output DIR"
        )
    return lines + describe(result.verifications) + _release(result)


def _release(result: PublishResult) -> list[str]:
    lines: list[str] = []
    if result.stanza:
        lines += ["", "for SAELens' pretrained_saes.yaml:", "", *result.stanza.splitlines()]
    else:
        lines += ["", "no twin, so SAELens alone cannot load it: no entry for pretrained_saes.yaml"]
    if result.dashboard:
        lines += ["", f"for Neuronpedia ({dashboard_hint()}):", "", *result.dashboard]
    return lines
