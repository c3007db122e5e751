"""Load what is to be published and what was published, and compare both with the local SAE."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from safetensors.torch import load_file

from msae_plugin.common.errors import InputError, RunFailure, in_one_line
from msae_plugin.common.files import file_sha256
from msae_plugin.hub.plan import SAEFolder, content_sha256, write_files
from msae_plugin.models.hub_access import hub_errors
from msae_plugin.saes.export import ACTIVATIONS_FILENAME, JUMPRELU_FOLDER, Agreement, compare, dense
from msae_plugin.saes.find import LocatedSAE, StoredSAE
from msae_plugin.saes.load import load_sae

_RANDOM_TOKENS = 256


@dataclass(frozen=True)
class Verification:
    """Result of checking one published SAE."""

    folder: str  # its folder in the repository
    files: int  # number of files whose bytes are those that were sent
    agreement: Agreement  # the downloaded SAE against the local one
    # The downloaded copy against the local SAE; None without one.
    jumprelu_agreement: Agreement | None
    activations: str  # what they were compared on


def check_build(folder: SAEFolder) -> None:
    """Load the files that would be uploaded, and compare their latents with the source's."""

    def load(path: str) -> SAE[Any]:
        return load_sae(LocatedSAE(path, folder.sae.name, root / path), "cpu")[0]

    with tempfile.TemporaryDirectory(prefix="msae-publish-") as temporary:
        root = Path(temporary)
        write_files(folder.uploads(), root, link=True)
        try:
            source = LocatedSAE(str(folder.sae.folder), folder.sae.name, folder.sae.folder)
            _compare(folder, load_sae(source, "cpu")[0], load, "as it would be uploaded")
        # What a loader raises on files that are wrong shares no base class but Exception.
        except Exception as error:
            raise InputError(
                f"SAE {str(folder.sae.folder)!r} must not be published, because nobody could use "
                f"it ({in_one_line(error)}): export it again; nothing was published"
            ) from error


def check_files(repo: str, oid: str, files: dict[str, bytes | Path]) -> None:
    """Download every file of a commit that was sent, and compare the bytes."""
    for path, content in files.items():
        with hub_errors(f"downloading {path}"):
            # Forced: a copy in the local cache proves nothing about the Hub.
            downloaded = Path(hf_hub_download(repo, path, revision=oid, force_download=True))
            same = file_sha256(downloaded) == content_sha256(content)
        if not same:
            raise RunFailure(f"{path} on the Hub differs from what was sent")


def check_latents(repo: str, oid: str, on_main: bool, folder: SAEFolder) -> Verification:
    """Load what was published as a user would, and compare its latents with the local SAE's.

    SAELens loads the main branch alone; the files of `oid` are in the cache (`check_files`).
    """

    def load(path: str) -> SAE[Any]:
        with hub_errors(f"loading {repo}:{path}"):
            return _load(repo, oid, path, on_main)

    return _compare(folder, SAE.load_from_disk(folder.sae.folder), load, "on the Hub")


def _compare(
    folder: SAEFolder, local: SAE[Any], load: Callable[[str], SAE[Any]], where: str
) -> Verification:
    """Compare what `load` gives for a path in the repository with the local SAE."""
    activations, source = check_activations(folder.sae, local)
    with torch.no_grad():
        latents = dense(local.encode(activations))
        reconstruction = local.decode(latents)
    if not (latents != 0).any():
        raise RunFailure(f"{folder.path}: no latent is on for {source}: nothing can be compared")

    def compared(path: str) -> Agreement:
        agreement = compare(latents, reconstruction, load(path), activations)
        failure = agreement.failure()
        if failure is not None:
            raise RunFailure(f"{path} {where} computes something else: {failure}")
        return agreement

    return Verification(
        folder=folder.path,
        files=len(folder.files),
        agreement=compared(folder.path),
        jumprelu_agreement=(
            None
            if folder.sae.jumprelu_export is None
            else compared(f"{folder.path}/{JUMPRELU_FOLDER}")
        ),
        activations=source,
    )


def _load(repo: str, oid: str, path: str, on_main: bool) -> SAE[Any]:
    """SAELens' loader knows the main branch alone; elsewhere it is given one for the commit."""

    def at_commit(
        repo_id: str, folder_name: str, device: str, force_download: bool,
        cfg_overrides: dict[str, Any] | None,
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]:  # fmt: skip
        del force_download  # `check_files` has just downloaded them
        files = [
            hf_hub_download(repo_id, f"{folder_name}/{name}", revision=oid)
            for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
        ]
        return *sae_lens_disk_loader(Path(files[0]).parent, device, cfg_overrides), None

    return SAE.from_pretrained(repo, path, converter=None if on_main else at_commit)


def check_activations(sae: StoredSAE, loaded: SAE[Any]) -> tuple[torch.Tensor, str]:
    """Activations to compare two copies of an SAE on."""
    kept = sae.root / ACTIVATIONS_FILENAME
    if kept.is_file():
        activations = load_file(kept)["activations"]
        if activations.shape[1] == loaded.cfg.d_in:
            return activations.to(loaded.dtype), f"{len(activations)} real activations of the run"
    # None were kept: decoder directions and noise around b_dec, at sizes from far below to far
    # above what the encoder was trained on, so that latents of any threshold fire.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(loaded.cfg.d_sae, (_RANDOM_TOKENS,), generator=generator)
    noise = torch.randn(_RANDOM_TOKENS, loaded.cfg.d_in, generator=generator)
    sizes = torch.logspace(-1, 3, _RANDOM_TOKENS)[:, None]
    decoder, centre = cast(torch.Tensor, loaded.W_dec), cast(torch.Tensor, loaded.b_dec)
    unit = torch.nn.functional.normalize(decoder.detach()[rows].float(), dim=1)
    noise = torch.nn.functional.normalize(noise, dim=1)
    activations = centre.detach().float() + sizes * (unit + 0.5 * noise)
    return activations.to(loaded.dtype), (
        f"{_RANDOM_TOKENS} made-up activations (the run kept no real ones)"
    )


def describe(verifications: Sequence[Verification]) -> list[str]:
    """One line per SAE for a terminal."""
    lines: list[str] = []
    for check in verifications:
        worst = check.agreement.max_latent_difference
        agree = "are equal" if worst == 0 else f"agree to {worst:.0e}"
        copied = "" if check.jumprelu_agreement is None else ", the JumpReLU copy too"
        lines.append(
            f"{check.folder}: {check.files} files downloaded again and equal; loaded with "
            f"SAE.from_pretrained, latents {agree} on {check.activations}{copied}"
        )
    return lines
