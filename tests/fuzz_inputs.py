"""Ways to damage a file, all drawn from one generator: the same seed gives the same damage."""

import bz2
import copy
import gzip
import json
import lzma
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

MARKUP = (
    '<img src=x onerror="FUZZ()">',
    "<script>FUZZ()</script>",
    "[FUZZ](javascript:FUZZ)",
    "x\n# FUZZ heading",
    "</td></table><b>FUZZ",
    "[bold red]FUZZ[/bold red]",
    "[/FUZZ]",
    "<!-- END msae -->FUZZ",
    "=FUZZ(1)",
    "\x1b[31mFUZZ\x07",
    "../../FUZZ",
    "/FUZZ",
    "..",
    ".",
    "a/b\\c",
    "nul\x00FUZZ",
    "FUZZ" * 80,
    "\u202eFUZZ",
    "\ud800FUZZ",
    "`FUZZ` | $FUZZ$ | **FUZZ**",
)
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 10**9, 10**30, 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "1e3", [], [[]], {}, [1], ["x"], [None], {"x": 1}, {"x": {"x": []}},
    *MARKUP[:4],
)  # fmt: skip


def damage_bytes(path: Path, chance: random.Random) -> str:
    """Truncate, garble or replace a file's bytes."""
    whole = path.read_bytes()
    start = chance.randrange(len(whole) + 1)
    end = min(len(whole), start + chance.choice((1, 4, 64, 4096)))
    how = chance.choice(("truncated", "empty", "noise", "zeroed", "doubled", "random", "cut out"))
    noise = chance.randbytes(end - start)
    changed = {
        "truncated": whole[:start],
        "empty": b"",
        "noise": whole[:start] + noise + whole[end:],
        "zeroed": whole[:start] + bytes(end - start) + whole[end:],
        "doubled": whole[:end] + whole[start:],
        "random": chance.randbytes(chance.choice((1, 8, 300))),
        "cut out": whole[:start] + whole[end:],
    }[how]
    path.write_bytes(changed)
    return f"{how} at {start} to {end} of {len(whole)}"


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in inner:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += _places(item, (*path, key))
    return found


def _holder(value: Any, place: tuple[Any, ...]) -> Any:
    """The dictionary or list that a place's last key is looked up in."""
    for step in place[:-1]:
        value = value[step]
    return value


def damage_value(value: Any, chance: random.Random, texts: tuple[Any, ...] = VALUES) -> str:
    """Replace, remove, add or rename something in nested dictionaries and lists, in place."""
    # Shallow places are as likely as the many deep ones.
    places = _places(value)
    if not places:  # all of it was removed
        return "is empty"
    depth = chance.choice(sorted({len(place) for place in places}))
    place = chance.choice([place for place in places if len(place) == depth])
    holder, key = _holder(value, place), place[-1]
    where = ".".join(map(str, place))
    how = chance.choice(("replaced", "replaced", "replaced", "removed", "renamed"))
    if how == "replaced":
        holder[key] = copy.deepcopy(chance.choice(texts))
        return f"{where} = {str(holder[key])[:40]!r}"
    removed = holder.pop(key)
    if how == "renamed" and isinstance(holder, dict):
        holder[str(chance.choice(MARKUP))] = removed
    return f"{where} {how}"


def damage_json(path: Path, chance: random.Random) -> str:
    """Damage JSON as bytes, as a whole, or one value of it."""
    kind = chance.randrange(6)
    if kind == 0:
        return damage_bytes(path, chance)
    if kind == 1:
        text = chance.choice(("[]", "null", "5", '"x"', "{}", "[" * 100_000, "\ufeff{}", "[{}]"))
        path.write_text(text, encoding="utf-8")
        return f"is {text[:6]}"
    value = json.loads(path.read_text())
    told = [damage_value(value, chance) for _ in range(chance.choice((1, 1, 3)))] if value else []
    path.write_text(json.dumps(value))
    return "; ".join(told)


def hostile_texts(path: Path, chance: random.Random) -> str:
    """Markup, paths and control characters in the place of texts and names."""
    value = json.loads(path.read_text())
    told = []
    for _ in range(chance.choice((1, 4, 12))):
        texts = []
        for place in _places(value):
            holder = _holder(value, place)
            if isinstance(holder[place[-1]], str) or isinstance(holder, dict):
                texts.append((holder, place[-1]))
        holder, key = chance.choice(texts)
        text = chance.choice(MARKUP)
        if isinstance(holder[key], str):
            told.append(f"{key} = {text[:30]!r}")
            holder[key] = text
        else:
            told.append(f"{key} is called {text[:30]!r}")
            holder[text] = holder.pop(key)
    path.write_text(json.dumps(value))
    return "; ".join(told)


def damage_lines(path: Path, chance: random.Random) -> str:
    """The same for one line of a JSON-lines file."""
    lines = path.read_text().splitlines()
    if chance.randrange(3) == 0 or not lines:
        return damage_bytes(path, chance)
    number = chance.randrange(len(lines))
    if chance.randrange(3) == 0:
        lines[number] = chance.choice(("[]", "null", "{", "{}", "NaN", '{"step": "x"}', "\x00"))
        told = lines[number]
    else:
        row = json.loads(lines[number])
        told = damage_value(row, chance)
        lines[number] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n")
    return f"line {number}: {told}"


def damage_yaml(path: Path, chance: random.Random) -> str:
    """The same for YAML."""
    kind = chance.randrange(6)
    if kind == 0:
        return damage_bytes(path, chance)
    if kind == 1:
        text = chance.choice(
            ("[]", "x", "a: [", "a: &a [*a]", "!!python/object/apply:os.getcwd []", "? {a: b}\n: c",
             "\t", "- " * 3000, "1: 2", "a: *b", "%YAML 9", "--- a\n--- b", "2026-99-99: 1")
        )  # fmt: skip
        path.write_text(text)
        return text[:20]
    value = yaml.safe_load(path.read_text())
    told = [damage_value(value, chance) for _ in range(chance.choice((1, 1, 3)))]
    path.write_text(yaml.safe_dump(value))
    return "; ".join(told)


def damage_safetensors(path: Path, chance: random.Random) -> str:
    """Damage a file of weights as bytes, in its header, or one of its tensors."""
    kind = chance.randrange(3)
    if kind == 0:
        return damage_bytes(path, chance)
    # Imported here: torch, which the other kinds do without.
    import torch
    from safetensors.torch import load_file, save_file

    if kind == 1:
        whole = path.read_bytes()
        length = struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8 : 8 + length])
        told = damage_value(header, chance)
        text = json.dumps(header).encode()
        size = chance.choice((len(text), len(text), 2**62))
        path.write_bytes(struct.pack("<Q", size) + text + whole[8 + length :])
        return f"header: {told}"
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    how = chance.choice(("removed", "flat", "longer", "integers", "NaN", "half", "renamed", "none"))
    tensor = tensors.pop(name)
    changed = {
        "flat": lambda: tensor.reshape(-1)[:-1],
        "longer": lambda: torch.cat([tensor, tensor]),
        "integers": lambda: tensor.to(torch.int64),
        "NaN": lambda: tensor * float("nan"),
        "half": tensor.half,
        "none": lambda: tensor.new_zeros(0),
    }
    if how in changed:
        tensors[name] = changed[how]().contiguous()
    elif how == "renamed":
        tensors[str(chance.choice(MARKUP[:5]))] = tensor
    save_file(tensors, path)
    return f"{name} {how}"


def damage_any(path: Path, chance: random.Random) -> str:
    """Damage a file as what it is."""
    kinds = {".json": damage_json, ".jsonl": damage_lines, ".safetensors": damage_safetensors}
    return kinds.get(path.suffix, damage_bytes)(path, chance)


def write_texts(folder: Path, texts: list[str]) -> None:
    """The same documents in every format that is read."""
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "notes.jsonl").write_text(lines)
    (folder / "notes.txt").write_text("\n\n".join(texts))
    for suffix, packed in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        (folder / f"notes.jsonl{suffix}").write_bytes(packed.compress(lines.encode()))
    table = pd.DataFrame({"text": texts})
    table.to_csv(folder / "notes.csv", index=False)
    table.to_parquet(folder / "notes.parquet")


def write_foreign_saes(folder: Path) -> None:
    """An SAE in each format of another library that is read."""
    # Imported here: torch, which the other kinds do without.
    import torch
    from safetensors.torch import save_file

    def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}

    d, n = 8, 24
    places = ("sparsify/layers.1", "dictionary", "gemma-scope-2b-pt-res/layer_1/l0_5", "pickled")
    sparsify, dictionary, scope, pickled = (folder / place for place in places)
    for place in (sparsify, dictionary, scope, pickled):
        place.mkdir(parents=True)
    encoder = tensors(encoder__weight=(n, d), encoder__bias=(n,))
    save_file(encoder | tensors(W_dec=(n, d), b_dec=(d,)), sparsify / "sae.safetensors")
    (sparsify / "cfg.json").write_text(json.dumps({"activation": "topk", "k": 4, "d_in": d}))
    torch.save(encoder | tensors(decoder__weight=(d, n), bias=(d,)), dictionary / "ae.pt")
    trainer = {
        "dict_class": "AutoEncoder", "activation_dim": d, "dict_size": n, "layer": 1,
        "lm_name": "m", "submodule_name": "resid_post_layer_1",
    }  # fmt: skip
    config = {"trainer": trainer, "buffer": {"d_submodule": d, "ctx_len": 32}}
    (dictionary / "config.json").write_text(json.dumps(config))
    weights = tensors(W_enc=(d, n), W_dec=(n, d), b_enc=(n,), b_dec=(d,))
    arrays = {name: tensor.numpy() for name, tensor in (weights | tensors(threshold=(n,))).items()}
    np.savez(scope / "params.npz", **arrays)
    torch.save({"state_dict": weights}, pickled / "old.pt")
