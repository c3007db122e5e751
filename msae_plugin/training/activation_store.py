"""Activations made once and kept on disk, for runs that repeat.

DIR/cache.json    what it holds, written last: its presence says "complete"
DIR/<hook>.bin    (rows, d_in) in the model's own precision, in the order in which a run reads them
DIR/progress.json, position-<rows>.pt while the pass goes on: from where a killed one continues

cache.json keeps a hash of each block of rows and one of itself: a run that comes to damaged rows
ends. The rows are the mini-batches that `msae train` would have made, mixed and with special tokens
left out, so a run from the cache trains on what the live run trains on, bit for bit.

SAELens' CacheActivationsRunner is not underneath: it keeps one hook, loads the model by a name that
a packaged or local one does not have, keeps float32 at best (Arrow has no bfloat16), begins again
when killed, and its multi-SAE trainer reads no caches. Its activation store is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from typing_extensions import Self

from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import (
    file_sha256,
    file_written_atomically,
    held_in,
    human_bytes,
    is_as_written,
    json_safe,
    with_digest,
    write_json_atomic,
)
from msae_plugin.common.stored import StoredCache, StoredProgress, checked, read_json_object
from msae_plugin.models.loading import ModelShape, saelens_class_name
from msae_plugin.models.transformer_lens import BRIDGE
from msae_plugin.training.data_parallel import own_batch_size, states_of_all
from msae_plugin.training.plans import SAEPlan
from msae_plugin.training.recipe import RunConfig

# Free space that is left alone.
_SPARE_BYTES = 200 << 20
PLACEHOLDER = {"architecture": "standard", "d_sae": 1}
"""The `sae` of a recipe whose activations are kept: a runner wants one, it is never trained."""


ROWS_PER_HASH = 4096


def mapped(
    path: Path, rows: int, width: int, dtype: torch.dtype, *, writable: bool
) -> torch.Tensor:
    """(rows, width) tensor over a file, which is made when missing and writable."""
    flat = torch.from_file(str(path), shared=writable, size=rows * width, dtype=dtype)
    return flat.view(rows, width)


def row_hashes(rows: torch.Tensor, known: Sequence[str] = ()) -> list[str]:
    """The hash of each block of (n, width) rows, the last of which may be shorter.

    `known` are those of the first blocks, which are not read again.
    """
    further = rows[len(known) * ROWS_PER_HASH :]
    blocks = further.split(ROWS_PER_HASH) if len(further) else ()
    return [*known, *(_sha256(block) for block in blocks)]


def _sha256(block: torch.Tensor) -> str:
    # numpy has no bfloat16: hash the bytes.
    return hashlib.sha256(block.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


class HashedRows:
    """Rows mapped from a file, checked block by block as they are read.

    A block is checked when one of its rows is first asked for: the disk reads it then in any case.
    Hashes are what `row_hashes` gave when the rows were written; None for a file of version 0.1,
    which cannot be checked. `damaged` is the refusal.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        width: int,
        dtype: torch.dtype,
        hashes: Sequence[str] | None,
        damaged: str,
    ) -> None:
        size = path.stat().st_size if path.is_file() else 0
        blocks = -(-rows // ROWS_PER_HASH)
        if size != rows * width * dtype.itemsize or len(hashes or range(blocks)) != blocks:
            raise InputError(damaged)
        self._rows = mapped(path, rows, width, dtype, writable=False)
        self._unread = {} if hashes is None else dict(enumerate(hashes))
        self._damaged = damaged

    @property
    def shape(self) -> torch.Size:
        """(rows, width)."""
        return self._rows.shape

    @property
    def nbytes(self) -> int:
        """Their size."""
        return self._rows.nbytes

    def __getitem__(self, chosen: slice | torch.Tensor) -> torch.Tensor:
        """Rows by a slice or by their numbers, (n, width), if they are what was written."""
        if self._unread:
            self._check(chosen)
        return self._rows[chosen]

    def _check(self, chosen: slice | torch.Tensor) -> None:
        if isinstance(chosen, slice):
            start, stop, _ = chosen.indices(len(self._rows))
            wanted = list(range(start // ROWS_PER_HASH, -(-stop // ROWS_PER_HASH)))
        else:
            wanted = (chosen // ROWS_PER_HASH).unique().tolist()
        for block in filter(self._unread.__contains__, wanted):
            start = block * ROWS_PER_HASH
            if _sha256(self._rows[start : start + ROWS_PER_HASH]) != self._unread[block]:
                raise InputError(self._damaged)
            del self._unread[block]


def read_activations(
    folder: Path, manifest: Mapping[str, Any], damaged: str
) -> dict[str, HashedRows]:
    """Activations by hook, (rows, d_in), mapped from their files.

    The manifest has `rows`, `dtype`, `hooks` with the width of each and `sha256` with their hashes;
    `damaged` is the refusal of a file that is missing, changed or of another size, with {} for its
    path.
    """
    hashes = manifest.get("sha256", {})
    if hashes and not is_as_written(manifest):
        raise InputError(damaged.format(repr(str(folder))))
    dtype, rows = getattr(torch, str(manifest["dtype"])), int(manifest["rows"])
    tensors: dict[str, HashedRows] = {}
    for hook, stored in manifest["hooks"].items():
        # Comparisons of version 0.1 name the file as well.
        d_in = int(stored["d_in"] if isinstance(stored, dict) else stored)
        path = folder / f"{hook}.bin"
        told = damaged.format(repr(str(path)))
        tensors[hook] = HashedRows(path, rows, d_in, dtype, hashes.get(hook), told)
    return tensors


def require_space(folder: Path, needed: int) -> None:
    """Refuse a disk on which activations of this many bytes do not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise InputError(
            f"the activations need {human_bytes(needed)} in {folder} and {human_bytes(free)} "
            "are free: lower training.tokens, or give --output on a larger disk"
        )


MANIFEST, PROGRESS = "cache.json", "progress.json"
FORMAT = 1
ACTIVATION_SAMPLES = 4096
"""Real activations kept per hook for the export check: a few megabytes."""


def activations_key(config: RunConfig) -> dict[str, Any]:
    """Everything that the activations depend on but the hooks, by its place in the recipe.

    The text's size stands for its contents where it is a file or a folder.
    """
    data = config.data
    source = Path(data.source)
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    key = {
        "model.name": config.model.name,
        "model.dtype": config.model.dtype,
        "data.source": data.source,
        "size of data.source": sum(path.stat().st_size for path in files if path.is_file()),
        "data.split": data.split,
        "data.text_column": data.text_column,
        "data.heldout_documents": data.heldout_documents,
        "data.context_size": data.context_size,
        "data.prepend_bos": data.prepend_bos,
        "data.exclude_special_tokens": data.exclude_special_tokens,
    }
    if config.model.loader == BRIDGE:  # caches made before there was a choice have no such key
        key["model.loader"] = BRIDGE
    return cast("dict[str, Any]", json_safe(key))


def rows_needed(config: RunConfig, plans: list[SAEPlan]) -> int:
    """Rows per hook that a run reads: scaling, training, calibration, the export check."""
    training = config.training
    batches = training.steps * training.accumulation_steps + training.calibrate_batches
    batches += norm_batches(config, plans)
    batches += -(-ACTIVATION_SAMPLES // training.batch_size_tokens)
    return batches * training.batch_size_tokens


def norm_batches(config: RunConfig, plans: Sequence[SAEPlan]) -> int:
    """Mini-batches that are read before the first step, for the scaling of activations."""
    wanted = any(plan.config.normalize_activations != "none" for plan in plans)
    return config.training.norm_estimate_batches if wanted else 0


@dataclass(frozen=True)
class CachedActivations:
    """A complete cache, which stands in the place of a model and a text."""

    folder: Path
    manifest: Mapping[str, Any]
    tensors: Mapping[str, HashedRows]  # (rows, d_in) by hook, mapped from the files

    language_model: None = None

    @property
    def rows(self) -> int:
        """Rows per hook."""
        return int(self.manifest["rows"])

    @property
    def model_name(self) -> str:
        """As it is recorded in SAEs' metadata."""
        return str(self.manifest["model"]["name"])

    @property
    def model_class_name(self) -> str:
        """SAELens' name of a loader that gives these activations."""
        return saelens_class_name(str(self.manifest["model"]["loader"]))

    @property
    def autocast(self) -> bool:
        """Whether the model ran in bfloat16."""
        return bool(self.manifest["model"]["autocast"])

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model that the cache was made with."""
        model = self.manifest["model"]
        return ModelShape(int(model["d_model"]), int(model["n_layers"]), int(model["vocabulary"]))

    def fitted(self, plans: Sequence[SAEPlan]) -> list[SAEPlan]:
        """As `ModelAndText.fitted`."""
        return [plan.fitted(self.tensors[plan.hook].shape[1]) for plan in plans]

    def record(self) -> dict[str, Any]:
        """`model` and `data` of a `run.json`."""
        recorded = self.manifest["model"].items()
        model = {key: value for key, value in recorded if key != "vocabulary"}
        return {"model": model, "data": self.manifest["data"]}

    def heldout_texts(self) -> list[str]:
        """A cache has none."""
        return []


def open_cache(folder: Path) -> CachedActivations:
    """Map the cache that `msae cache` wrote into memory."""
    try:
        manifest = read_json_object(folder / MANIFEST)
    except InputError as error:
        what = "an unfinished cache" if (folder / PROGRESS).exists() else "no cache"
        raise InputError(
            f"{str(folder)!r} holds {what} of activations: run msae cache with this recipe and "
            f"--output {folder}"
        ) from error
    if manifest.get("format") != FORMAT:
        raise InputError(f"the cache {str(folder)!r} is of another version: make it again")
    checked(manifest, f"the cache {str(folder)!r}", StoredCache)
    tensors = read_activations(
        folder, manifest, "the cache file {} is damaged: make the cache again"
    )
    return CachedActivations(folder, manifest, tensors)


def check_cache(cache: CachedActivations, config: RunConfig, plans: list[SAEPlan]) -> None:
    """Refuse a cache that does not hold what the recipe describes."""
    where = f"the cache {str(cache.folder)!r}"
    differing_key(cache.manifest["key"], config, where)
    if config.model.autocast not in ("auto", cache.autocast):
        raise InputError(
            f"{where} was made with model.autocast {cache.autocast} and the recipe has "
            f"{config.model.autocast}: change the recipe, or make another cache"
        )
    for plan in plans:
        if plan.hook not in cache.tensors:
            raise InputError(
                f"{where} has no hook {plan.hook!r}, only {', '.join(cache.tensors)}: change the "
                "recipe, or make another cache"
            )
    needed = rows_needed(config, plans)
    if needed > cache.rows:
        raise InputError(
            f"{where} holds {cache.rows} activations and the recipe needs {needed}: lower "
            "training.tokens, or make a longer cache"
        )


def differing_key(key: Mapping[str, Any], config: RunConfig, where: str) -> None:
    """Raise InputError when what activations depend on is not what the recipe says."""
    now = activations_key(config)
    for name in sorted(now.keys() | key.keys()):
        if now.get(name) != key.get(name):
            raise InputError(
                f"{where} is of other activations: {name} was {key.get(name)!r} and the recipe has "
                f"{now.get(name)!r}; change the recipe, or give another folder"
            )


class CachedBatches:
    """The mini-batches of a cache in their order, or one rank's share of each."""

    def __init__(
        self,
        cache: CachedActivations,
        hooks: list[str],
        batch_size: int,
        device: str,
        ranks: Ranks = ALONE,
    ) -> None:
        self._cache = cache
        self._hooks = list(dict.fromkeys(hooks))
        self._batch_size = batch_size
        self._own = own_batch_size(batch_size, ranks)
        self._rank = ranks.rank
        self._device = device
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position."""
        self.position = int(state["position"])

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """(batch_size / ranks, d_in) by hook; ends with the cache."""
        start = self.position * self._batch_size
        if start + self._batch_size > self._cache.rows:
            raise StopIteration
        self.position += 1
        start += self._rank * self._own
        return {
            hook: self._cache.tensors[hook][start : start + self._own].to(self._device)
            for hook in self._hooks
        }


class ActivationWriter:
    """Writes rows into the files of a store, and goes on where a killed pass stopped.

    The facts are what the manifest says, `rows` per hook among them; without a dtype rows keep the
    model's. Refuses a folder with anything but an unfinished store of the same activations.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        hooks: Sequence[str],
        *,
        manifest: str = MANIFEST,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._folder = folder
        self._facts = dict(facts)
        self._manifest = manifest
        self._dtype = dtype
        self.rows, self.done = int(facts["rows"]), 0
        self.position: dict[str, Any] | None = None
        # Made with the first batch, which shows their width.
        self._tensors: dict[str, torch.Tensor] = {}
        self._hashes: dict[str, list[str]] = {}
        self._continue(hooks)

    def _continue(self, hooks: Sequence[str]) -> None:
        path = self._folder / PROGRESS
        if not path.exists():
            return
        stored = read_json_object(path, StoredProgress)
        facts = stored["facts"]
        same = all(facts.get(key) == value for key, value in self._facts.items())
        if not same or list(facts["hooks"]) != list(dict.fromkeys(hooks)):
            raise InputError(
                f"--output {str(self._folder)!r} holds an unfinished cache of other activations: "
                "give another --output, or delete it"
            )
        # None where nothing was saved yet, and of version 0.1: begun again.
        position = self._position_file(stored["done"])
        if position.is_file():
            if not is_as_written(stored) or file_sha256(position) != stored["position_sha256"]:
                raise self._damaged()
            self.position = torch.load(position, map_location="cpu", weights_only=True)
            self.done, self._hashes = stored["done"], stored["sha256"]

    def _damaged(self) -> InputError:
        return InputError(
            f"--output {str(self._folder)!r} holds an unfinished cache that is damaged: delete it, "
            "or give another --output"
        )

    def _open(self, batch: Mapping[str, torch.Tensor]) -> None:
        dtype = self._dtype or next(iter(batch.values())).dtype
        self._facts["dtype"] = str(dtype).removeprefix("torch.")
        self._facts["hooks"] = {hook: rows.shape[1] for hook, rows in batch.items()}
        self._folder.mkdir(parents=True, exist_ok=True)
        files = {hook: self._folder / f"{hook}.bin" for hook in batch}
        missing = [rows.shape[1] for hook, rows in batch.items() if not files[hook].exists()]
        require_space(self._folder, self.rows * sum(missing) * dtype.itemsize)
        if not self.done:
            # Before the first file, so that a killed pass is known for one whenever it is killed.
            self._write_progress()
        for hook, rows in batch.items():
            self._tensors[hook] = mapped(
                files[hook], self.rows, rows.shape[1], dtype, writable=True
            )
            written = self._tensors[hook][: self.done]
            whole = self._hashes.get(hook, [])[: self.done // ROWS_PER_HASH]
            # The last block alone: the others are checked when they are read.
            if row_hashes(written, whole) != self._hashes.get(hook, []):
                raise self._damaged()
            self._hashes[hook] = whole

    def append(self, batch: Mapping[str, torch.Tensor], position: dict[str, Any]) -> None:
        """Take as many rows of a batch as are missing; the next batch is read at `position`."""
        if not self._tensors:
            self._open(batch)
        count = min(self.rows - self.done, len(next(iter(batch.values()))))
        for hook, tensor in self._tensors.items():
            tensor[self.done : self.done + count] = batch[hook][:count].to("cpu", tensor.dtype)
        self.done += count
        self.position = position
        whole = self.done // ROWS_PER_HASH * ROWS_PER_HASH
        for hook, tensor in self._tensors.items():
            self._hashes[hook] = row_hashes(tensor[:whole], self._hashes[hook])

    def save_progress(self) -> None:
        """Put everything so far onto the disk."""
        if not self._tensors:  # nothing since an earlier pass saved
            return
        self._sync()
        (state,) = states_of_all(self.position or {}, ALONE)
        with file_written_atomically(self._position_file(self.done)) as temporary:
            temporary.write_bytes(state)
        self._write_progress()
        self._remove_positions(self._position_file(self.done))

    def _position_file(self, done: int) -> Path:
        return self._folder / f"position-{done}.pt"

    def _remove_positions(self, kept: Path | None = None) -> None:
        for path in self._folder.glob("position-*.pt"):
            if path != kept:
                path.unlink()

    def _write_progress(self) -> None:
        stored: dict[str, Any] = {"facts": self._facts, "done": self.done}
        if self.done:
            position = file_sha256(self._position_file(self.done))
            stored |= {"sha256": self._all_hashes(), "position_sha256": position}
        write_json_atomic(self._folder / PROGRESS, with_digest(stored))

    def _all_hashes(self) -> dict[str, list[str]]:
        return {
            hook: row_hashes(tensor[: self.done], self._hashes.get(hook, []))
            for hook, tensor in self._tensors.items()
        }

    def finish(self, seconds: float) -> None:
        """Declare the store complete."""
        self._sync()
        stored = {**self._facts, "sha256": self._all_hashes(), "seconds": seconds}
        write_json_atomic(self._folder / self._manifest, with_digest(stored))
        self._remove_positions()
        (self._folder / PROGRESS).unlink(missing_ok=True)

    def _sync(self) -> None:
        for hook in self._tensors:
            with (self._folder / f"{hook}.bin").open("rb") as handle:
                os.fsync(handle.fileno())


def check_new_cache(folder: Path) -> None:
    """Refuse a folder that holds anything but an unfinished cache."""
    names = held_in(folder)
    if MANIFEST in names:
        raise InputError(
            f"--output {str(folder)!r} holds a complete cache: train from it with --set "
            f"cached_activations={folder}, or give another --output"
        )
    if names and PROGRESS not in names:
        raise InputError(
            f"--output {str(folder)!r} is not empty and holds no cache: give another --output"
        )
