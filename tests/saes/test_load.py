"""References of every kind, against SAELens called directly and files written by hand."""

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAEConfig, TrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.standard_sae import StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig
from tolerance import rounding_tolerance

import msae_plugin
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.saes.export import export_sae
from msae_plugin.saes.find import find_saes
from msae_plugin.saes.load import BrokenSAEError, load_saes, sae_record

D_IN, D_SAE = 6, 10
HOOK = "blocks.2.hook_resid_post"
Save = Callable[..., Path]


def build(config: Any, seed: int = 0) -> SAE[Any]:
    """An SAE with random weights, decoder norms of all sizes, on the layer and model of HOOK."""
    config = copy.deepcopy(config)  # `sae.to(dtype)` changes it, and the metadata are its own
    sae = SAE.get_sae_class_for_architecture(config.architecture())(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    sae.W_dec.data *= torch.linspace(0.1, 4, D_SAE)[:, None]
    if isinstance(config, JumpReLUSAEConfig):
        sae.threshold.data = sae.threshold.data.abs()
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.hook_name, metadata.training_steps = "some-lab/tiny", HOOK, 7
    return sae


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(name: str = "mine", config: Any = None, seed: int = 0, **metadata: Any) -> Path:
        sae = build(config or JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE), seed)
        for key, value in metadata.items():
            sae.cfg.metadata[key] = value
        sae.save_model(tmp_path / name)
        return tmp_path / name

    return write


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    config.update(changes)
    (folder / "cfg.json").write_text(json.dumps(config))


def refusal(*references: Any, **options: Any) -> str:
    with pytest.raises((InputError, BrokenSAEError)) as caught:
        load_saes([str(reference) for reference in references], **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def inputs() -> torch.Tensor:
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))


def rounding(sae: SAE[Any]) -> tuple[float, float]:
    """How far latents (in units of the decoder's norms) and reconstructions of `inputs` may differ.

    A latent is a sum over the input and its bias, times a norm; a reconstruction is a sum over
    latents and the bias.
    """
    W_dec = sae.W_dec.abs()
    latents = (inputs().abs() + sae.b_dec.abs()) @ sae.W_enc.abs() + sae.b_enc.abs()
    n_encode, n_decode = 2 * D_IN + 4, D_SAE + 2
    return (
        rounding_tolerance(n_encode, latents * W_dec.norm(dim=1)),
        rounding_tolerance(n_encode + n_decode, latents @ W_dec + sae.b_dec.abs()),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE),
        StandardSAEConfig(d_in=D_IN, d_sae=D_SAE),
        TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3, rescale_acts_by_decoder_norm=True),
    ],
    ids=lambda config: config if isinstance(config, str) else config.architecture(),
)
def test_decoder_norms_are_folded_in_float32(config: Any, dtype: str, tmp_path: Path) -> None:
    stored = build(config)
    stored.to(dtype=getattr(torch, dtype)).save_model(tmp_path / "sae_of_mine")
    (subject,) = load_saes([str(tmp_path / "sae_of_mine")])
    assert not subject.sae.training
    assert {t.dtype for t in subject.sae.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(subject.sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    # The stored weights, folded by hand: every latent is larger by its decoder row's norm.
    plain = SAE.load_from_disk(tmp_path / "sae_of_mine", dtype="float32")
    with torch.no_grad():
        latents = plain.encode(inputs())
        if not isinstance(config, TopKSAEConfig):  # whose latents are in these units already
            latents = latents * plain.W_dec.norm(dim=1)
        assert (latents > 0).any()
        of_latents, of_output = rounding(plain)
        torch.testing.assert_close(subject.sae.encode(inputs()), latents, rtol=0, atol=of_latents)
        torch.testing.assert_close(subject.sae(inputs()), plain(inputs()), rtol=0, atol=of_output)


def test_a_row_of_zeros_gives_no_nan(tmp_path: Path) -> None:
    sae = build(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE))
    sae.W_dec.data[3] = 0
    with torch.no_grad():
        expected, (_, atol) = sae(inputs()), rounding(sae)
    sae.save_model(tmp_path / "x1")
    (subject,) = load_saes([str(tmp_path / "x1")])
    assert subject.sae.W_dec[3].norm() == 0
    with torch.no_grad():
        torch.testing.assert_close(subject.sae(inputs()), expected, rtol=0, atol=atol)


def test_architectures_that_cannot_be_folded(tmp_path: Path) -> None:
    sae = build(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3, rescale_acts_by_decoder_norm=False))
    sae.save_model(tmp_path / "crooked")
    message = refusal(tmp_path / "crooked")
    assert "decoder norms of architecture topk cannot be folded" in message
    norms = sae.W_dec.norm(dim=1)
    assert f"are {norms.min():.3g} to {norms.max():.3g}" in message
    sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    sae.save_model(tmp_path / "straight")
    (subject,) = load_saes([str(tmp_path / "straight")])
    assert torch.equal(subject.sae.W_dec, sae.W_dec)


def test_metadata_and_hash(save: Save) -> None:
    folder = save(hook_name="model.layers.5", hook_head_index=3)
    (subject,) = load_saes([str(folder)])
    assert (subject.name, subject.folder) == ("mine", folder)
    assert (subject.hook_name, subject.layer) == ("blocks.5.hook_resid_post", 5)
    assert subject.sae.cfg.metadata.hook_head_index == 3
    digest = hashlib.sha256((folder / "sae_weights.safetensors").read_bytes()).hexdigest()
    assert sae_record(subject) == {
        "reference": str(folder),
        "weights_sha256": digest,
        "architecture": "jumprelu",
        "hook_name": "blocks.5.hook_resid_post",
        "model_name": "some-lab/tiny",
        "d_in": D_IN,
        "d_sae": D_SAE,
    }


def test_hook_and_model_can_be_given(save: Save) -> None:
    folder = save(hook_name=None, model_name=None)
    message = refusal(folder)
    assert "does not say where in the model it reads" in message
    assert "--hook" in message
    assert "with --model" in refusal(folder, hook=HOOK)
    (subject,) = load_saes([str(folder)], hook="model.layers.1", model_name="gpt2")
    assert (subject.hook_name, subject.model_name) == ("blocks.1.hook_resid_post", "gpt2")
    # The metadata say what an SAE was made on; where it reads is the user's choice.
    other = save("other")
    (subject,) = load_saes([str(other)], hook="blocks.0.hook_mlp_out", model_name="gpt2")
    assert (subject.hook_name, subject.model_name) == ("blocks.0.hook_mlp_out", "some-lab/tiny")
    assert "model.layers.3.mlp' is none" in refusal(save("third", hook_name="model.layers.3.mlp"))


@pytest.mark.parametrize("hook", ["transformer.h.4", "gpt_neox.layers.4", "model.layers.4"])
def test_layers_under_the_names_of_transformers(hook: str, save: Save) -> None:
    (subject,) = load_saes([str(save(hook_name=hook))])
    assert subject.hook_name == "blocks.4.hook_resid_post"


def test_weights_that_cannot_be_evaluated(save: Save, tmp_path: Path) -> None:
    sae = build(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE))
    sae.W_enc.data[0, 0] = torch.nan
    sae.save_model(tmp_path / "nan")
    assert "W_enc holds NaN" in refusal(tmp_path / "nan")
    # Some SAEs switch latents off with an infinite threshold.
    sae = build(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE))
    sae.threshold.data[0] = torch.inf
    sae.save_model(tmp_path / "off")
    assert len(load_saes([str(tmp_path / "off")])) == 1
    assert "zero training steps" in refusal(save("untrained", training_steps=0))
    truncated = save("truncated") / "sae_weights.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-40])
    assert "is no complete safetensors file" in refusal(tmp_path / "truncated")
    edit(save("strange"), architecture="hologram")
    message = refusal(tmp_path / "strange")
    assert "SAELens knows no architecture 'hologram'" in message
    assert "multiscale" in message
    edit(save("misfit"), d_sae=D_SAE + 1)
    assert "cannot be loaded as jumprelu" in refusal(tmp_path / "misfit")
    edit(save("across"), architecture="jumprelu_transcoder", d_out=D_IN)
    assert "transcoder" in refusal(tmp_path / "across")


def test_a_broken_sae_is_told_and_the_others_are_loaded(save: Save, tmp_path: Path) -> None:
    sae = build(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE))
    sae.W_dec.data[0, 0] = torch.nan
    sae.save_model(tmp_path / "nan")
    good, untrained = save("good"), save("untrained", training_steps=0)
    told: dict[str, str] = {}
    references = [str(untrained), str(good), str(tmp_path / "nan")]
    subjects = load_saes(references, on_broken=told.__setitem__)
    assert [subject.name for subject in subjects] == ["good"]
    assert list(told) == ["untrained", "nan"]
    assert "has zero training steps" in told["untrained"]
    assert "W_dec holds NaN" in told["nan"]
    # Status 1, not 2: the input was fine, the SAE is not.
    with pytest.raises(RunFailure, match="zero training steps"):
        load_saes(references)


def test_zero_steps_are_read_from_the_runner_config_too(save: Save, tmp_path: Path) -> None:
    folder = save(training_steps=None)
    assert len(load_saes([str(folder)])) == 1
    runner = {"training_tokens": 100, "train_batch_size_tokens": 4096}
    (folder / "runner_cfg.json").write_text(json.dumps(runner))
    assert "zero training steps" in refusal(folder)


def test_wrong_paths_name_the_nearest(save: Save, tmp_path: Path, monkeypatch: Any) -> None:
    save("gemma-layer-12")
    near = tmp_path / "gemma-layer-12"
    assert f"did you mean {near}?" in refusal(tmp_path / "gemma-leyer-12")
    assert "holds gemma-layer-12" in refusal(tmp_path / "zzz" / "sae")
    assert "is a file: give the folder" in refusal(near / "cfg.json")
    (near / "sae_weights.safetensors").unlink()
    assert "has cfg.json but no sae_weights.safetensors" in refusal(near)
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refusal(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    assert "did you mean" in refusal("gemma-layer-11")
    assert "given as some/one:FOLDER" in refusal("some/one")
    assert "no SAE is given" in refusal()


def test_names_are_unique_whatever_the_order(save: Save, tmp_path: Path) -> None:
    folders = [save("a/k 32"), save("b/k 32", seed=1), save("c/K 32", seed=1), save("d/final")]
    subjects = load_saes([str(folder) for folder in folders])
    hashes = [subject.weights_sha256[:8] for subject in subjects]
    names = [subject.name for subject in subjects]
    assert names == [f"k-32-{hashes[0]}", f"k-32-{hashes[1]}", f"K-32-{hashes[2]}-2", "d-final"]
    backwards = load_saes([str(folder) for folder in (folders[1], folders[0])])
    assert [subject.name for subject in backwards] == [names[1], names[0]]
    assert "are the same SAE" in refusal(folders[0], folders[0])
    # A folder of several stands for all of them.
    assert [s.name for s in load_saes([str(tmp_path / "a")])] == ["k-32"]


def run_folder(folder: Path, names: tuple[str, ...], status: str = "complete") -> Path:
    """A run as `msae train` leaves it, its SAEs exported from trained ones."""
    record: dict[str, Any] = {"status": status, "steps": 30, "saes": {}}
    for number, name in enumerate(names):
        config = msae_plugin.preset(
            "default", d_in=D_IN, d_sae=D_SAE, k=2, training_steps=30, device="cpu"
        )
        torch.manual_seed(number)
        sae = TrainingSAE.get_sae_class_for_architecture("multiscale")(config)
        sae.cfg.metadata.training_steps = 30
        sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "some-lab/tiny", HOOK
        export_sae(sae, folder / name, inputs(), None, {})
        record["saes"][name or "sae"] = {"folder": name or "."}
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_a_run_its_saes_and_their_jumprelu_copies(tmp_path: Path) -> None:
    single = run_folder(tmp_path / "single", ("",))
    several = run_folder(tmp_path / "several", ("wide", "narrow"))
    expected = {
        single: ["single"],
        single / "sae": ["single"],
        single / "jumprelu": ["single-jumprelu"],
        several: ["several-wide", "several-narrow"],
        several / "wide": ["several-wide"],
        several / "wide" / "sae": ["several-wide"],
        several / "wide" / "jumprelu": ["several-wide-jumprelu"],
    }
    for reference, names in expected.items():
        assert [subject.name for subject in load_saes([str(reference)])] == names
    both = load_saes([str(single / "sae"), str(single / "jumprelu")])
    assert [subject.sae.cfg.architecture() for subject in both] == ["multiscale", "jumprelu"]
    with torch.no_grad():
        torch.testing.assert_close(both[0].sae(inputs()), both[1].sae(inputs()))
    assert "are the same SAE" in refusal(single, single / "sae")


@pytest.mark.promise("No damaged byte of an export is evaluated, published or exported.")
@pytest.mark.parametrize("name", ["sae", "jumprelu"])
def test_one_flipped_bit_of_an_export_is_refused(tmp_path: Path, name: str) -> None:
    run = run_folder(tmp_path / "run", ("",))
    weights = run / name / "sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-20] ^= 1
    weights.write_bytes(content)
    assert f"{str(weights)!r} was damaged or changed" in refusal(run / name)
    with pytest.raises(InputError, match="was damaged or changed"):
        find_saes(run)
    # Exports of version 0.1 have no hash, and a user's own weights no record.
    record = json.loads((run / "export.json").read_text())
    del record["weights_sha256"]
    (run / "export.json").write_text(json.dumps(record))
    assert find_saes(run)
    assert load_saes([str(run / name)])


@pytest.mark.parametrize(
    ("status", "said"),
    [("running", "or killed"), ("interrupted", "was interrupted"), ("failed", "failed (loss")],
)
def test_an_unfinished_run_says_how_to_go_on(status: str, said: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", ("one", "two"), status)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "failure": "loss is NaN"}))
    message = refusal(run)
    assert said in message
    assert f"--output {run} --resume auto" in message
    # Its SAEs that were exported and checked already are whole.
    assert len(load_saes([str(run / "one")])) == 1
    (run / "two" / "export.json").unlink()
    assert said in refusal(run / "two")
    assert said in refusal(run / "two" / "sae")
    shutil.rmtree(run / "two" / "sae")
    assert said in refusal(run / "two")


def test_a_run_that_lost_an_sae(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", ("one", "two"))
    shutil.rmtree(run / "two")
    assert "is not whole" in refusal(run)


def training_checkpoint(folder: Path, config: Any) -> Path:
    sae = TrainingSAE.get_sae_class_for_architecture(config.architecture())(config)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "some-lab/tiny", HOOK
    sae.save_model(folder)
    return folder


def test_training_checkpoints(tmp_path: Path) -> None:
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "device": "cpu"}
    ours = msae_plugin.preset("default", d_in=D_IN, d_sae=D_SAE, k=2, training_steps=30)
    folder = training_checkpoint(tmp_path / "run" / "checkpoints" / "100", ours)
    message = refusal(folder)
    assert "is a training checkpoint and multiscale is another SAE in training" in message
    assert "save_inference_model" in message
    (tmp_path / "run" / "run.json").write_text(json.dumps({"status": "interrupted", "saes": {}}))
    assert "--resume auto" in refusal(folder)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"status": "complete", "saes": {}}))
    assert f"give the finished run, {tmp_path / 'run'}" in refusal(folder)
    # SAELens' topk is the same in training and inference...
    same = training_checkpoint(tmp_path / "topk", TopKTrainingSAEConfig(**sizes, k=2))
    (subject,) = load_saes([str(same)])
    assert type(subject.sae).__name__ == "TopKSAE"
    # ... unless activations were scaled by a factor that is not in the checkpoint.
    config = TopKTrainingSAEConfig(**sizes, k=2, normalize_activations="expected_average_only_in")
    assert "scaling is not folded" in refusal(training_checkpoint(tmp_path / "scaled", config))


def test_what_cannot_be_undone_is_said(save: Save, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(model_from_pretrained_kwargs={"center_writing_weights": True, "dtype": "x"})
    edit(folder, normalize_activations="expected_average_only_in")
    with caplog.at_level(logging.WARNING):
        load_saes([str(folder)])
    texts = [record.getMessage() for record in caplog.records]
    assert any("results are those of unscaled activations" in text for text in texts)
    assert any("loaded with center_writing_weights=True; here" in text for text in texts)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of `some-lab/saes` in an otherwise empty hub cache."""
    root = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    repository = root / "models--some-lab--saes"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    return repository / "snapshots" / ("a" * 40)


def test_repositories(hub_cache: Path, save: Save) -> None:
    local = save()
    shutil.copytree(local, hub_cache / "layer_2" / "k_32")
    (subject,) = load_saes(["some-lab/saes:layer_2/k_32"])
    assert (subject.name, subject.folder) == ("saes-layer_2-k_32", None)
    # The same weights as in the folder that was uploaded.
    assert subject.weights_sha256 == load_saes([str(local)])[0].weights_sha256
    assert "not in the local cache" in refusal("some-lab/saes:layer_3")
    message = refusal("some-lab/other:layer_3")
    assert "offline mode is on" in message
    assert message.endswith("give a local copy of its folder")
    shutil.copytree(hub_cache / "layer_2" / "k_32", hub_cache / "raw")
    edit(hub_cache / "raw", decoder_init_norm=0.1, architecture="batchtopk")
    assert "is a training checkpoint" in refusal("some-lab/saes:raw")


def test_releases(hub_cache: Path, monkeypatch: pytest.MonkeyPatch, save: Save) -> None:
    release = "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109"
    sae_id = "blocks.12.hook_resid_post__trainer_0"
    message = refusal(f"{release}:blocks.12.hook_resid_post__trainer_zero")
    assert "has no SAE 'blocks.12.hook_resid_post__trainer_zero'" in message
    assert "among its 144 are blocks.12" in message
    assert f"for example {release}:{sae_id}" in refusal(release)
    assert "did you mean gemma-scope-2b-pt-res" in refusal("gemma-scope-2b-pt-re:layer_0")
    assert "not in the local cache" in refusal(f"{release}:{sae_id}")
    seen: list[Any] = []

    def from_pretrained(name: str, identity: str, **options: Any) -> SAE[Any]:
        seen.append((name, identity, options))
        return SAE.load_from_disk(save())

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    monkeypatch.setattr("msae_plugin.saes.load.require_repository", lambda name, kind: None)
    (subject,) = load_saes([f"{release}:{sae_id}"])
    assert seen == [(release, sae_id, {"device": "cpu", "dtype": "float32"})]
    assert subject.name == f"{release}-{sae_id}"
    assert len(subject.weights_sha256) == 64
