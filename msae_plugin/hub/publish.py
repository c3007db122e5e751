"""`msae publish`: a run becomes a repository on the Hugging Face Hub, in one commit, checked.

    local SAEs and evaluation -> plan (files, card) -> confirmations -> one commit -> check -> tag

Nothing is written on the Hub before everything that can be refused here has been.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants

from msae_plugin.common.errors import InputError, RunFailure, in_one_line
from msae_plugin.common.files import folder_written_atomically, human_bytes, require_empty
from msae_plugin.hub.card_data import CardEntry, hub_model
from msae_plugin.hub.plan import (
    PublishOptions,
    PublishPlan,
    build_folders,
    make_plan,
    private_content,
    write_files,
)
from msae_plugin.hub.verification import (
    Verification,
    check_build,
    check_files,
    check_latents,
    describe,
)
from msae_plugin.models.hub_access import explained, hub_errors, require_token, status_of
from msae_plugin.saes.download import RepositoryState, read_state, require_repo_name
from msae_plugin.saes.export import JUMPRELU_FOLDER

MAIN = "main"


def plain_path(entry: CardEntry) -> str | None:
    """Folder that SAELens loads without this package; None where there is none."""
    if not entry.needs_plugin:
        return entry.folder
    return f"{entry.folder}/{JUMPRELU_FOLDER}" if entry.has_jumprelu else None


def pretrained_saes_stanza(repo: str, entries: Sequence[CardEntry]) -> str:
    """Entry for SAELens' `pretrained_saes.yaml`: JumpReLU copies where SAEs need this package."""
    releases: dict[str, dict[str, Any]] = {}
    for entry in entries:
        path = plain_path(entry)
        if path is None:
            continue
        recorded = entry.recorded("model_name")
        model = hub_model(recorded) or recorded
        release = releases.setdefault(
            model, {"conversion_func": None, "model": model, "repo_id": repo, "saes": []}
        )
        listed: dict[str, Any] = {"id": entry.folder, "path": path}
        if entry.l0 is not None:
            listed["l0"] = round(entry.l0, 1)
        scores = {score.metric: score.mean for score in entry.scores("core")}
        for name in ("explained_variance_streaming", "explained_variance_legacy"):
            if name in scores:
                listed.setdefault("variance_explained", round(scores[name], 4))
        release["saes"].append(listed)
    name = repo.replace("/", "-")
    named = {
        name if len(releases) == 1 else f"{name}-{model.rsplit('/', 1)[-1]}": release
        for model, release in releases.items()
    }
    return yaml.safe_dump(named, sort_keys=False) if named else ""


Confirm = Callable[[str], bool]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PublishResult:
    """Outcome of `publish`, or of its dry run."""

    repo: str
    folders: tuple[str, ...]  # the SAEs' folders in it
    files: dict[str, int]  # every file that was (would be) written, with its size in bytes
    removed: tuple[str, ...]  # every file that was (would be) removed
    notes: tuple[str, ...]  # what the user should know
    output: Path | None = None  # where a dry run rendered the files; None for a real one
    commit: str | None = None  # hash of the commit; None for a dry run
    url: str | None = None  # page of the commit
    pull_request: str | None = None  # page of the pull request; None without one
    revision: str | None  # branch of the commit; None for main
    tag: str | None = None  # the tag that it got
    verifications: tuple[Verification, ...] = ()  # what the check after the upload found
    stanza: str  # entry for SAELens' `pretrained_saes.yaml`; empty where SAELens cannot load any


def publish(
    run: Path,
    repo: str,
    options: PublishOptions,
    *,
    confirm: Confirm | None = None,
    say: Say = lambda _message: None,
) -> PublishResult:
    """Publish the SAEs of a run, the folder of one of its SAEs, or an export.

    Without `confirm` everything that would be asked is refused. A RunFailure says whether anything
    was published and names the commit; after an InputError nothing was.
    """
    require_repo_name(repo)
    folders = build_folders(run, repo, options)
    for folder in folders:
        check_build(folder)
    notes: list[str] = []
    if options.dry_run:
        state = _state_if_reachable(repo, options.revision, notes)
    else:
        token = require_token()
        with hub_errors("logging in"):
            HfApi().whoami(token)
        state = read_state(repo, options.revision)
    _require_possible(state, options)
    plan = make_plan(run, folders, state, options)
    if not options.allow_negative_variance:
        _require_positive_variance(plan)
    traces = [line for sae in plan.folders for line in private_content(sae)]
    notes += plan.notes
    notes += [f"local path in a file that is published unmodified: {line}" for line in traces]
    result = PublishResult(
        repo=repo,
        folders=tuple(sae.path for sae in plan.folders),
        files=plan.sizes(),
        removed=plan.deletions,
        notes=tuple(notes),
        revision=options.revision,
        stanza=pretrained_saes_stanza(repo, plan.entries),
    )
    if options.dry_run:
        return replace(result, output=_render(plan, options.output))
    if not options.overwrite:
        _ask_before_replacing(plan, confirm)
    if traces and not (state.private if state.exists else options.private):
        _ask(
            confirm,
            f"These files name local paths: {'; '.join(traces)}. Publish them all the same?",
            f"{'; '.join(traces)}: a public repository would show it; evaluate with a model and "
            "data under hub names, or publish with --private",
        )
    say(f"uploading {len(plan.additions)} files to {repo}")
    committed = _commit(plan, options)
    say(f"checking commit {committed.oid[:12]}")
    on_main = options.revision in (None, MAIN) and not options.pr
    verifications = _verify(plan, committed, on_main)
    if options.tag is not None:
        try:
            with hub_errors(f"tagging {repo}"):
                HfApi().create_tag(repo, tag=options.tag, revision=committed.oid)
        except (InputError, RunFailure) as error:
            raise RunFailure(
                f"published as commit {committed.oid} and checked, but without the tag: {error}; "
                f"{_how_to_take_back(repo, committed)}"
            ) from error
    return replace(
        result,
        commit=committed.oid,
        url=committed.commit_url,
        pull_request=committed.pr_url,
        tag=options.tag,
        verifications=verifications,
    )


def _state_if_reachable(repo: str, revision: str | None, notes: list[str]) -> RepositoryState:
    try:
        state = read_state(repo, revision)
    except (InputError, RunFailure) as error:
        notes.append(f"rendered as for a new repository, because the Hub was not reached: {error}")
        return RepositoryState(repo, exists=False)
    if not state.exists:
        notes.append(f"{repo} does not exist (or is not visible to you): it would be made")
    return state


def _require_possible(state: RepositoryState, options: PublishOptions) -> None:
    if not state.exists:
        return
    if options.private and state.private is False:
        raise InputError(
            f"{state.repo} exists and is public: --private makes new repositories only; change it "
            "in its settings on the Hub"
        )
    if options.tag is not None:
        with hub_errors(f"reading the tags of {state.repo}"):
            tags = {ref.name for ref in HfApi().list_repo_refs(state.repo).tags}
        if options.tag in tags:
            raise InputError(f"{state.repo} has a tag {options.tag!r} already: choose another")


def _require_positive_variance(plan: PublishPlan) -> None:
    for folder in plan.folders:
        value = folder.sae.explained_variance
        if value is not None and value < 0:
            raise InputError(
                f"SAE {folder.sae.name!r} has an explained variance of {value:.3g}, worse than the "
                "mean activation alone: train it again (msae info says what to change), or publish "
                "it with --allow-negative-variance"
            )


def _ask(confirm: Confirm | None, question: str, refusal: str) -> None:
    if confirm is None or not confirm(question):
        raise InputError(f"{refusal}; nothing was published")


def _ask_before_replacing(plan: PublishPlan, confirm: Confirm | None) -> None:
    for sae in plan.folders:
        if present := plan.state.files_in(sae.path):
            already = f"{plan.state.repo} has {sae.path} already"
            _ask(
                confirm,
                f"{already} ({len(present)} files). Replace it?",
                f"{already}: choose another --folder, or replace it with --overwrite",
            )


def _render(plan: PublishPlan, output: Path | None) -> Path:
    where = output or Path(tempfile.mkdtemp(prefix="msae-publish-")) / "repository"
    require_empty(where)
    with hub_errors(f"writing {where}"), folder_written_atomically(where) as folder:
        write_files(plan.additions.items(), folder, link=False)
    return where


def _commit(plan: PublishPlan, options: PublishOptions) -> CommitInfo:
    """Change the repository in one commit, or not at all."""
    repo, before = plan.state.repo, plan.state
    state = _prepare(before, options.private, options.revision)
    made = "" if before.exists else f"; the repository {repo} was made and is empty"
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(path, is_folder=False) for path in sorted(plan.deletions)
    ]
    operations += [CommitOperationAdd(path, content) for path, content in plan.additions.items()]
    try:
        return HfApi().create_commit(
            repo,
            operations,
            commit_message=f"Publish {', '.join(sae.path for sae in plan.folders)}",
            revision=options.revision,
            create_pr=options.pr,
            # Had somebody else committed meanwhile, the Hub refuses it.
            parent_commit=state.head,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"unless the very last request got through, nothing was published: look at "
            f"{constants.ENDPOINT}/{repo}{made}"
        ) from None
    # Errors of the HTTP library share no base class (see hub_errors).
    except Exception as error:
        reason = explained(error, f"uploading to {repo}")
        status = status_of(error)
        if status is None or status >= 500:
            # The Hub may have committed before the connection broke.
            landed = _commit_that_landed(plan, state, options, reason)
            if landed is not None:
                return landed
        raise type(reason)(f"{reason}; nothing was published{made}") from error


def _prepare(state: RepositoryState, private: bool, revision: str | None) -> RepositoryState:
    """Make the repository and the branch where they are missing."""
    api = HfApi()
    if not state.exists:
        with hub_errors(f"creating {state.repo}"):
            # None leaves it to the organisation's default; False would make it public.
            api.create_repo(state.repo, private=True if private else None)
        state = read_state(state.repo, revision)
    if not state.has_revision and revision is not None:
        with hub_errors(f"creating the branch {revision} of {state.repo}"):
            api.create_branch(state.repo, branch=revision, revision=state.head)
        state = read_state(state.repo, revision)
    return state


def _commit_that_landed(
    plan: PublishPlan, state: RepositoryState, options: PublishOptions, reason: Exception
) -> CommitInfo | None:
    """The commit, if the Hub has it although the upload seemed to fail."""
    repo = state.repo
    page = f"{constants.ENDPOINT}/{repo}"
    if options.pr:
        raise RunFailure(
            f"{reason}; whether a pull request was opened is to be seen on {page}/discussions"
        )
    try:
        head = read_state(repo, options.revision).head
    except (InputError, RunFailure):
        raise RunFailure(
            f"{reason}; whether anything was published is to be seen on {page}: the Hub cannot be "
            "asked now"
        ) from reason
    if head is None or head == state.head:
        return None
    try:
        check_files(repo, head, plan.additions)
    except (InputError, RunFailure):
        return None  # somebody else's commit
    return CommitInfo(f"{page}/commit/{head}", "", "", head)


def _verify(plan: PublishPlan, committed: CommitInfo, on_main: bool) -> tuple[Verification, ...]:
    repo = plan.state.repo
    try:
        check_files(repo, committed.oid, plan.additions)
        return tuple(check_latents(repo, committed.oid, on_main, folder) for folder in plan.folders)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{repo} has the new commit {committed.oid}, which was not checked; "
            f"{_how_to_take_back(repo, committed)}"
        ) from None
    # Whatever it is, the commit is there and must be named.
    except Exception as error:
        raise RunFailure(
            f"{repo} has the new commit {committed.oid}, but the check of it failed: "
            f"{in_one_line(error)}; "
            f"look at {committed.commit_url}; {_how_to_take_back(repo, committed)}"
        ) from error


def _how_to_take_back(repo: str, committed: CommitInfo) -> str:
    if committed.pr_url is not None:
        return f"to take it back, close {committed.pr_url}"
    return (
        f"to take it back, run `git revert {committed.oid}` in a clone of "
        f"{constants.ENDPOINT}/{repo} and push"
    )


def report_lines(result: PublishResult) -> list[str]:
    """A publication, or a dry run, line by line."""
    lines = [f"note: {note}" for note in result.notes]
    would = "would " if result.commit is None else ""
    total = human_bytes(sum(result.files.values()))
    verb = "upload" if would else "uploaded"
    lines.append(f"{would}{verb} {len(result.files)} files, {total}, to {result.repo}:")
    lines += [f"  {human_bytes(size):>10}  {path}" for path, size in sorted(result.files.items())]
    if result.removed:
        lines.append("would remove:" if would else "removed:")
        lines += [f"  {path}" for path in result.removed]
    if would:
        return [*lines, f"rendered in {result.output}; nothing was uploaded", *_release(result)]
    where = result.revision or MAIN
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
        lines += ["", "for Neuronpedia: msae export, --to neuronpedia and --to sae-dashboard"]
    else:
        lines += [
            "",
            "no JumpReLU copy, so SAELens alone cannot load it: no entry for pretrained_saes.yaml",
        ]
    return lines
