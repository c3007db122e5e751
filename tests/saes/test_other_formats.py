"""SAEs of other libraries: their latents are those of their own equations, in plain torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sae_lens import SAE
from safetensors.torch import save_file

from msae_plugin.common.errors import InputError
from msae_plugin.reporting.info import describe_folder
from msae_plugin.saes.load import load_saes
from msae_plugin.saes.other_formats import import_sae

D_IN, D_SAE, K = 6, 10, 3
HOOK = "blocks.3.hook_resid_post"
Latents = Callable[[torch.Tensor], torch.Tensor]


def weights() -> dict[str, torch.Tensor]:
    """A dictionary in the layout of most libraries, W_enc (d_in, d_sae); no two biases alike."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    made = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return made | {"threshold": torch.rand(D_SAE, generator=generator)}


def top_k(values: torch.Tensor) -> torch.Tensor:
    kept = values.topk(K, dim=-1)
    return torch.zeros_like(values).scatter(-1, kept.indices, kept.values)


def active(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()


def jumped(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    z = x @ w["W_enc"] + w["b_enc"]
    return z * (z > w["threshold"])


def sparsify(folder: Path) -> tuple[Path, Latents]:
    w, place = weights(), folder / "layers.3"
    place.mkdir(parents=True)
    config = {"d_in": D_IN, "num_latents": D_SAE, "k": K, "normalize_decoder": True}
    (place / "cfg.json").write_text(json.dumps(config | {"activation": "topk", "transcode": False}))
    (folder / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    named = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    named |= {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    save_file({name: t.contiguous() for name, t in named.items()}, place / "sae.safetensors")
    return place, lambda x: top_k(active(w, x))


def dictionary(folder: Path, name: str, stored: dict[str, Any], **trainer: Any) -> Path:
    folder.mkdir(parents=True)
    fields = {"dict_class": name, "layer": 3, "activation_dim": D_IN, "dict_size": D_SAE}
    fields |= {"lm_name": "google/gemma-2-2b", "submodule_name": "resid_post_layer_3", **trainer}
    config = {"trainer": fields, "buffer": {"ctx_len": 64}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(stored, folder / "ae.pt")
    return folder


def linear(w: dict[str, torch.Tensor], bias: str = "b_dec") -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        bias: w["b_dec"],
    }


def standard_dictionary(folder: Path) -> tuple[Path, Latents]:
    w = weights()
    place = dictionary(folder, "AutoEncoder", linear(w, "bias"))
    return place, lambda x: active(w, x)


def topk_dictionary(folder: Path) -> tuple[Path, Latents]:
    w = weights()
    more = {"k": torch.tensor(K), "threshold": torch.tensor(0.7)}
    place = dictionary(folder, "AutoEncoderTopK", linear(w) | more, k=K)
    return place, lambda x: top_k(active(w, x))


def batchtopk_dictionary(folder: Path) -> tuple[Path, Latents]:
    w = weights()
    more = {"k": torch.tensor(K), "threshold": torch.tensor(0.7)}
    place = dictionary(folder, "BatchTopKSAE", linear(w) | more, k=K)
    return place, lambda x: active(w, x) * (active(w, x) > 0.7)


def gated_dictionary(folder: Path) -> tuple[Path, Latents]:
    w = weights()
    gates = {"r_mag": w["threshold"], "gate_bias": w["b_enc"], "mag_bias": w["b_enc"].flip(0)}
    stored = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    stored |= {"decoder_bias": w["b_dec"], **gates}

    def latents(x: torch.Tensor) -> torch.Tensor:
        z = (x - w["b_dec"]) @ w["W_enc"]
        return (z + gates["gate_bias"] > 0) * (z * w["threshold"].exp() + gates["mag_bias"]).relu()

    return dictionary(folder, "GatedAutoEncoder", stored), latents


def jumprelu_dictionary(folder: Path) -> tuple[Path, Latents]:
    w = weights()
    return dictionary(folder, "JumpReluAutoEncoder", dict(w)), lambda x: jumped(w, x).relu()


def gemma_scope(folder: Path) -> tuple[Path, Latents]:
    w = weights()
    place = folder / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_3"
    place.mkdir(parents=True)
    np.savez(place / "params.npz", **{name: t.numpy() for name, t in w.items()})
    return place, lambda x: jumped(w, x).relu()


def old_pt(folder: Path) -> tuple[Path, Latents]:
    w = weights()
    folder.mkdir(parents=True)
    del w["threshold"]
    config = {"hook_point": HOOK, "model_name": "gpt2-small", "d_in": D_IN, "d_sae": D_SAE}
    torch.save({"cfg": config, "state_dict": w}, folder / "final.pt")
    return folder / "final.pt", lambda x: active(w, x)


FORMATS = {
    made.__name__: made
    for made in (
        sparsify,
        standard_dictionary,
        topk_dictionary,
        batchtopk_dictionary,
        gated_dictionary,
        jumprelu_dictionary,
        gemma_scope,
        old_pt,
    )
}


@pytest.mark.parametrize("name", FORMATS)
def test_latents_are_those_of_the_formats_own_equation(name: str, tmp_path: Path) -> None:
    place, latents = FORMATS[name](tmp_path / "theirs")
    found = import_sae(place, tmp_path / "ours")
    sae = SAE.load_from_disk(tmp_path / "ours")
    x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))
    wanted = latents(x)
    assert 0 < (wanted != 0).float().mean() < 1
    torch.testing.assert_close(sae.encode(x), wanted)
    w = weights()
    torch.testing.assert_close(sae.decode(wanted), wanted @ w["W_dec"] + w["b_dec"])
    assert sae.cfg.metadata.hook_name == HOOK
    assert sae.cfg.metadata.model_name in (
        "EleutherAI/pythia-70m", "gemma-2-2b", "gpt2-small",
    )  # fmt: skip
    assert sae.cfg.metadata.imported_from == found.name


def test_other_commands_name_the_format_and_what_to_do(tmp_path: Path) -> None:
    place, _ = sparsify(tmp_path / "theirs")
    npz = gemma_scope(tmp_path / "gemma")[0] / "params.npz"
    for given, name in ((place, "sparsify"), (place.parent, "sparsify"), (npz, "Gemma Scope")):
        with pytest.raises(InputError, match=rf"{name}: msae import .* --output DIR"):
            load_saes([str(given)])
    with pytest.raises(InputError, match="sparsify: msae import"):
        describe_folder(place)


def test_what_was_imported_is_an_sae_like_any_other(tmp_path: Path) -> None:
    place, latents = standard_dictionary(tmp_path / "theirs")
    import_sae(place, tmp_path / "ours")
    [evaluated] = load_saes([str(tmp_path / "ours")])
    assert (evaluated.model_name, evaluated.hook_name) == ("gemma-2-2b", HOOK)
    x = torch.randn(20, D_IN)
    norms = weights()["W_dec"].norm(dim=1)
    torch.testing.assert_close(evaluated.sae.encode(x), latents(x) * norms)
    with Console(width=200).capture() as _:
        describe_folder(tmp_path / "ours")


def refused(place: Path, output: Path, **given: str) -> str:
    with pytest.raises(InputError) as error:
        import_sae(place, output, **given)
    assert "\n" not in str(error.value)
    assert not output.exists()
    return str(error.value)


def test_what_cannot_be_imported_is_refused_with_a_reason(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "is not there" in refused(tmp_path / "nothing.npz", out)
    (tmp_path / "empty").mkdir()
    assert "no SAE in a format known here" in refused(tmp_path / "empty", out)
    unknown = dictionary(tmp_path / "new", "AutoEncoderNew", linear(weights()))
    assert "its class is AutoEncoderNew" in refused(unknown, out)
    mlp = dictionary(
        tmp_path / "mlp", "AutoEncoder", linear(weights(), "bias"), submodule_name="mlp"
    )
    assert "give --hook" in refused(mlp, out)
    short = dictionary(tmp_path / "short", "AutoEncoder", {"bias": torch.zeros(D_IN)})
    assert "cannot be read as dictionary_learning (there is no" in refused(short, out)
    place, _ = sparsify(tmp_path / "skip")
    config = json.loads((place / "cfg.json").read_text())
    (place / "cfg.json").write_text(json.dumps(config | {"transcode": True}))
    assert "transcoder" in refused(place, out)
    plain = tmp_path / "params.npz"
    np.savez(plain, **{name: t.numpy() for name, t in weights().items()})
    assert "give --model" in refused(plain, out)
    import_sae(plain, out, model="google/gemma-2-2b", hook=HOOK)
    assert SAE.load_from_disk(out).cfg.metadata.model_name == "google/gemma-2-2b"
    with pytest.raises(InputError, match="not empty"):
        import_sae(plain, out)


class Runs:
    """Pickled, it runs a function wherever it is read."""

    ran = False

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return Runs.run, ()

    @staticmethod
    def run() -> dict[str, Any]:
        Runs.ran = True
        return {}


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"cfg": Runs(), "state_dict": weights()}, tmp_path / "old.pt")
    assert "would run code" in refused(tmp_path / "old.pt", tmp_path / "out")
    place = dictionary(tmp_path / "theirs", "AutoEncoder", {"encoder.weight": Runs()})
    assert "would run code" in refused(place, tmp_path / "out")
    assert not Runs.ran


def test_formats_with_another_way_are_named(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "hyperparams.json").write_text("{}")
    assert "Llama Scope: SAELens reads it" in refused(tmp_path / "llama", tmp_path / "out")
    torch.save({"pre_bias": torch.zeros(2), "latent_bias": torch.zeros(3)}, tmp_path / "openai.pt")
    assert "OpenAI's sparse_autoencoder" in refused(tmp_path / "openai.pt", tmp_path / "out")
