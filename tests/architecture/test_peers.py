"""Each peer against its paper's equation, written out in float64 with loops and dense matrices."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler

from msae_plugin import InputError, MultiScaleTrainingSAE, preset
from msae_plugin.architecture.calibration import calibrate
from msae_plugin.architecture.peers import PEERS, peer_section, register_peers
from msae_plugin.architecture.peers.bottleneck import (
    BottleneckTrainingSAE,
    BottleneckTrainingSAEConfig,
)
from msae_plugin.architecture.peers.c2r import C2RTrainingSAE, C2RTrainingSAEConfig, c2r_penalty
from msae_plugin.architecture.peers.lista import (
    ListaSAE,
    ListaTrainingSAE,
    ListaTrainingSAEConfig,
    tilted_mean,
)
from msae_plugin.saes.export import trained_latents, trained_reconstruction

D_IN, D_SAE, TOKENS = 6, 16, 32


def activations(seed: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, D_IN, generator=generator) * 2 + 1


def randomised(sae: TrainingSAE) -> TrainingSAE:
    """Generic weights: decoder rows of different norms, biases that are not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "threshold":
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


def step(sae: TrainingSAE, x: torch.Tensor, number: int = 0) -> TrainStepOutput:
    sae.train()
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=number,
            is_logging_step=True,
        )
    )


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


def test_every_peer_is_a_section_that_trains() -> None:
    register_peers()  # a second time
    for name, peer in PEERS.items():
        section = peer_section(name, 10)
        assert get_sae_training_class(section["architecture"])
        assert peer.summary
        assert peer.source
    with pytest.raises(InputError, match="did you mean 'ortsae'"):
        peer_section("ortsea", 10)


def test_ortsae_is_the_mean_squared_maximum_cosine_of_chunks() -> None:
    section = peer_section("ortsae", 10)
    del section["architecture"]
    name = section.pop("preset")
    section["orthogonality_chunk_size"] = 5  # four random chunks of four
    section["input_normalization"] = "none"  # the penalty is in units of the raw variance then
    cfg = preset(name, d_in=D_IN, d_sae=D_SAE, k=3, training_steps=10, **section)
    sae = randomised(MultiScaleTrainingSAE(cfg))
    x = activations()
    torch.manual_seed(3)
    output = step(sae, x)
    assert set(output.losses) == {
        "mse_loss",
        "auxiliary_reconstruction_loss",
        "orthogonality_loss",
    }

    torch.manual_seed(3)
    chunks = torch.randperm(D_SAE).chunk(math.ceil(D_SAE / 5))
    rows = sae.W_dec.detach().double()
    literal = 0.0
    for chunk in chunks:
        of_chunk = [max(cosine(rows[i], rows[j]) for j in chunk if i != j) ** 2 for i in chunk]
        literal += sum(of_chunk) / len(of_chunk) / len(chunks)
    variance = float(x.double().var(dim=0, correction=0).sum())
    expected = 0.25 * variance * literal
    assert float(output.losses["orthogonality_loss"].detach()) == pytest.approx(expected, rel=1e-4)


def from_peer(name: str, k: float, **sizes: Any) -> MultiScaleTrainingSAE:
    """A peer that is a set of settings, with generic weights, in the raw unit."""
    section = peer_section(name, 10) | {"d_in": D_IN, "d_sae": D_SAE} | sizes
    del section["architecture"]
    recipe = section.pop("preset")
    section["input_normalization"] = "none"
    cfg = preset(recipe, k=k, training_steps=10, **section)
    sae = MultiScaleTrainingSAE(cfg)
    randomised(sae)
    return sae


def test_the_peers_that_saelens_has_train_as_they_do_there() -> None:
    sizes = {"d_in": D_IN, "d_sae": 64, "dtype": "float64"}
    plain = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=4, **sizes))
    widths = [2, 4, 8, 16, 32, 64]
    nested = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(k=4, matryoshka_widths=widths, **sizes)
    )
    for name, theirs in (("batchtopk", plain), ("matryoshka", nested)):
        ours = from_peer(name, k=4, **sizes)
        randomised(theirs)
        for sae in (ours, theirs):
            trained_by_adam(sae, 20)
        assert len(ours.cfg.prefix_widths) == (1 if name == "batchtopk" else len(widths))
        for parameter, value in theirs.named_parameters():
            # Twenty steps of .01: any other loss or gradient would end a thousandth away.
            torch.testing.assert_close(ours.get_parameter(parameter), value, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("multi_topk", {1.0: 1.0, 4.0: 1 / 8}),
        ("hierarchical_topk", {n / 8: 1.0 for n in range(1, 9)}),
    ],
)
def test_a_loss_at_several_budgets_is_the_weighted_sum_of_their_errors(
    name: str, weights: dict[float, float]
) -> None:
    sae, x = from_peer(name, k=2), activations()
    output = step(sae, x)
    W_enc, b_enc, W_dec, b_dec = (
        p.detach().double() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    )
    pre = ((x.double() - b_dec) @ W_enc + b_enc) * W_dec.norm(dim=1)
    expected = 0.0
    for budget, weight in weights.items():
        f = literal_batchtopk(pre, 2 * budget)
        errors = (x - (f / W_dec.norm(dim=1)) @ W_dec - b_dec).pow(2).sum(dim=-1)
        expected += weight * float(errors.mean())
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_aligned_training_makes_every_product_one_by_the_smallest_change() -> None:
    sae, x = from_peer("aligned", k=2), activations()
    before = sae.W_enc.detach().double().clone()
    step(sae, x)
    W_enc, W_dec = sae.W_enc.detach().double(), sae.W_dec.detach().double()
    for i in range(D_SAE):
        assert float(W_enc[:, i] @ W_dec[i]) == pytest.approx(1, abs=1e-5)
        change = W_enc[:, i] - before[:, i]
        assert abs(cosine(change, W_dec[i])) == pytest.approx(1, abs=1e-5)
        assert float(W_dec[i].norm()) == pytest.approx(1, abs=1e-5)


def test_aligned_training_learns_at_a_high_rate() -> None:
    errors = trained_by_adam(from_peer("aligned", k=3), 400, lr=0.03)
    # The variance is 2 squared in each dimension. With decoder rows free to shrink, encoders grew
    # without bound, and the error was nine times the variance.
    assert sum(errors[-50:]) / 50 < 4 * D_IN / 4


def literal_c2r(f: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
    """The equation with loops; differentiable, all pairs."""
    d_sae = W_dec.shape[0]
    total = W_dec.new_zeros(())
    for i in range(d_sae):
        cosines = [
            (W_dec[i] @ W_dec[j]) / (W_dec[i].norm() * W_dec[j].norm())
            if i != j
            else W_dec.new_tensor(-2.0)
            for j in range(d_sae)
        ]
        nearest = max(range(d_sae), key=lambda j: float(cosines[j]))
        pair = f[:, i].norm() + f[:, nearest].norm()
        total = total + pair * cosines[nearest].clamp(min=0) ** 2
    return total / d_sae


def test_c2r_is_its_equation_and_so_are_its_gradients() -> None:
    generator = torch.Generator().manual_seed(2)
    f = torch.rand(TOKENS, D_SAE, generator=generator, dtype=torch.float64).requires_grad_()
    W_dec = torch.randn(D_SAE, D_IN, generator=generator, dtype=torch.float64).requires_grad_()
    ours = c2r_penalty(f, W_dec, [torch.arange(D_SAE)])
    literal = literal_c2r(f, W_dec)
    assert float(ours.detach()) == pytest.approx(float(literal.detach()), rel=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours, [f, W_dec]),
        torch.autograd.grad(literal, [f, W_dec]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    halves = [torch.arange(0, D_SAE, 2), torch.arange(1, D_SAE, 2)]
    by_hand = sum(float(literal_c2r(f[:, c], W_dec[c]).detach()) for c in halves) / 2
    assert float(c2r_penalty(f, W_dec, halves).detach()) == pytest.approx(by_hand, rel=1e-12)
    assert float(c2r_penalty(f, W_dec, [torch.tensor([0])])) == 0


def test_c2r_is_added_at_every_fifth_step_in_the_units_of_the_paper() -> None:
    cfg = C2RTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3)
    assert (cfg.c2r_coefficient, cfg.c2r_every, cfg.c2r_chunk_size) == (5.0, 5, 8192)
    sae = randomised(C2RTrainingSAE(cfg))
    x = activations()
    with_penalty, without = step(sae, x, 0), step(sae, x, 1)
    assert "c2r_loss" not in without.losses
    # The paper's loss on x / rms, times rms^2 to be in our units.
    rms = float(x.double().pow(2).sum(1).mean().sqrt())
    f = with_penalty.feature_acts.detach().double() / rms
    literal = 5 * 5 * float(literal_c2r(f, sae.W_dec.detach().double())) * rms**2
    added = float((with_penalty.loss - without.loss).detach())
    assert added == pytest.approx(literal, rel=1e-4)
    assert float(with_penalty.losses["c2r_loss"].detach()) == pytest.approx(literal, rel=1e-5)


def test_c2r_without_its_penalty_is_batchtopk_and_exports_as_jumprelu(tmp_path: Path) -> None:
    common = {"d_in": D_IN, "d_sae": D_SAE, "k": 3}
    plain = randomised(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common)))
    peer = randomised(C2RTrainingSAE(C2RTrainingSAEConfig(c2r_coefficient=0.0, **common)))
    x = activations()
    assert torch.equal(step(plain, x).loss, step(peer, x).loss)
    peer.save_inference_model(tmp_path)
    assert SAE.load_from_disk(tmp_path).cfg.architecture() == "jumprelu"


def bottleneck_sae(rank: int, **settings: Any) -> BottleneckTrainingSAE:
    cfg = BottleneckTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=5, bottleneck_rank=rank, **settings)
    return BottleneckTrainingSAE(cfg)


def trained_by_adam(sae: TrainingSAE, steps: int, lr: float = 0.01) -> list[float]:
    """The squared error of each step."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    errors: list[float] = []
    for number in range(steps):
        optimizer.zero_grad()
        output = step(sae, activations(number).to(sae.dtype), number)
        output.loss.backward()
        optimizer.step()
        errors.append(output.losses["mse_loss"].item())
    return errors


def test_a_bottleneck_of_rank_zero_is_batchtopk() -> None:
    torch.manual_seed(0)
    peer = bottleneck_sae(0)
    plain = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=5))
    plain.load_state_dict(peer.state_dict())
    for sae in (peer, plain):
        trained_by_adam(sae, 20)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(peer.state_dict()[name], tensor), name


@pytest.mark.parametrize("rescale", [True, False])
def test_the_bottleneck_is_a_linear_map_beside_batchtopk(rescale: bool) -> None:
    """Against the equation in float64, its gradients too, with W_down and W_up as they are."""
    rank, pairs = 2, 4
    sae = bottleneck_sae(rank, rescale_acts_by_decoder_norm=rescale)
    trained_by_adam(sae, 30)
    W_down = sae.W_enc.detach().double()[:, :rank].requires_grad_()
    W_up = sae.W_dec.detach().double()[:rank].requires_grad_()
    W_enc = sae.W_enc.detach().double()[:, pairs:].requires_grad_()
    W_dec = sae.W_dec.detach().double()[pairs:].requires_grad_()
    b_enc, b_dec = sae.b_enc.detach().double()[pairs:], sae.b_dec.detach().double()
    x = activations(100)
    x_c = x.double() - b_dec
    pre = x_c @ W_enc + b_enc
    scores = pre * W_dec.norm(dim=1) if rescale else pre
    latents = literal_batchtopk(scores, 5 - rank)
    if rescale:
        latents = latents / W_dec.norm(dim=1)
    literal = b_dec + x_c @ W_down @ W_up + latents @ W_dec
    loss = (literal - x.double()).pow(2).sum(1).mean()
    loss.backward()

    output = step(sae, x)
    sae.zero_grad()
    output.loss.backward()
    torch.testing.assert_close(
        output.sae_out.detach().double(), literal.detach(), rtol=1e-4, atol=1e-4
    )
    assert ((output.feature_acts[:, :pairs] > 0).sum(1) == rank).all()
    assert int((output.feature_acts > 0).sum()) == 5 * TOKENS
    assert sae.W_enc.grad is not None
    assert sae.W_dec.grad is not None
    for mine, literal_gradient in (
        (sae.W_enc.grad[:, :rank], W_down.grad),
        (-sae.W_enc.grad[:, rank:pairs], W_down.grad),
        (sae.W_enc.grad[:, pairs:], W_enc.grad),
        (sae.W_dec.grad[:rank], W_up.grad),
        (-sae.W_dec.grad[rank:pairs], W_up.grad),
        (sae.W_dec.grad[pairs:], W_dec.grad),
    ):
        assert literal_gradient is not None
        scale = float(literal_gradient.abs().max())
        torch.testing.assert_close(mine.double(), literal_gradient, rtol=1e-3, atol=1e-4 * scale)
    # The pairs have no biases, and stay opposite to the bit.
    assert not sae.b_enc.detach()[:pairs].any()
    assert torch.equal(sae.W_enc[:, :rank], -sae.W_enc[:, rank:pairs])
    assert torch.equal(sae.W_dec[:rank], -sae.W_dec[rank:pairs])


def test_the_exported_bottleneck_is_a_jumprelu_sae_at_k(tmp_path: Path) -> None:
    sae = bottleneck_sae(2)
    trained_by_adam(sae, 30)
    batches = [activations(seed) for seed in range(100, 110)]
    found = calibrate(sae, batches)
    assert found["l0_after"] == pytest.approx(5, abs=1 / TOKENS)
    sae.fold_activation_norm_scaling_factor(2.0)
    x = activations(200) / 2
    latents = trained_latents(sae.eval(), x)
    sae.save_inference_model(tmp_path)
    exported = SAE.load_from_disk(tmp_path)
    assert exported.cfg.architecture() == "jumprelu"
    torch.testing.assert_close(exported.encode(x), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        exported.decode(latents), trained_reconstruction(sae, latents), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("rank", "d_sae"), [(5, 16), (-1, 16), (4, 8)])
def test_a_bottleneck_that_leaves_no_sparse_latents_is_refused(rank: int, d_sae: int) -> None:
    with pytest.raises(InputError, match="bottleneck_rank must be below k"):
        BottleneckTrainingSAEConfig(d_in=D_IN, d_sae=d_sae, k=5, bottleneck_rank=rank)


def test_whitening_is_that_of_its_paper_and_folds_exactly(tmp_path: Path) -> None:
    section = peer_section("whitened_batchtopk", 10)
    assert section == {
        "architecture": "batchtopk",
        "normalize_activations": "covariance_whitening",
        "input_normalization": "none",
    }
    x = activations(tokens=400) @ torch.randn(
        D_IN, D_IN, generator=torch.Generator().manual_seed(5)
    )
    scaler = ActivationScaler()
    scaler.estimate_whitening(D_IN, iter(x.split(100)), n_batches_for_norm_estimate=4)
    double = x.double()
    mean, covariance = double.mean(0), double.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    literal = (double - mean) @ vectors @ torch.diag((values + 1e-3) ** -0.5)
    white = scaler(x)
    torch.testing.assert_close(white.double(), literal, rtol=0, atol=1e-4)
    torch.testing.assert_close(white.double().T.cov(), torch.eye(D_IN).double(), atol=2e-2, rtol=0)

    cfg = BatchTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=3, normalize_activations="covariance_whitening"
    )
    sae = randomised(BatchTopKTrainingSAE(cfg))
    sae.topk_threshold.fill_(1.5)
    pre = sae.encode_with_hidden_pre(white)[1]
    latents = (pre.relu() * (pre > 1.5)).detach()
    assert scaler.whitening is not None
    expected = scaler.unscale(sae.decode(latents)).detach()
    sae.fold_activation_whitening(
        scaler.whitening.mean, scaler.whitening.matrix, scaler.whitening.inverse_matrix
    )
    sae.save_inference_model(tmp_path)
    exported = SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(exported.encode(x), latents, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(exported(x), expected, rtol=1e-3, atol=1e-3)


def literal_batchtopk(pre: torch.Tensor, k: float) -> torch.Tensor:
    flat = pre.clamp(min=0).flatten()
    kept = flat.topk(int(k * pre.shape[0])).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).reshape(pre.shape)


def literal_lista(sae: ListaTrainingSAE, x: torch.Tensor, k: float) -> torch.Tensor:
    """Latents in unit-decoder units, float64."""
    norms = sae.W_dec.detach().double().norm(dim=1)
    W_dec = sae.W_dec.detach().double() / norms[:, None]
    W_enc = sae.W_enc.detach().double() * norms
    b_enc = sae.b_enc.detach().double() * norms
    x_c = x.double() - sae.b_dec.detach().double()
    first_pre = x_c @ W_enc + b_enc
    first = literal_batchtopk(first_pre, k)
    return literal_batchtopk(first_pre + 0.3 * ((x_c - first @ W_dec) @ W_enc), k)


def test_lista_takes_one_refinement_step_and_nested_detached_tilted_losses() -> None:
    section = peer_section("lista_matryoshka", 100)
    assert section["k_anneal_steps"] == 100
    cfg = ListaTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=2, k_anneal_steps=100, tilt=0.5, prefix_fractions=[1 / 8, 1 / 2]
    )
    assert cfg.prefix_widths == [2, 8]
    assert [cfg.k_at(s) for s in (0, 50, 100, 200)] == pytest.approx([4.8, 3.4, 2.0, 2.0])
    sae = randomised(ListaTrainingSAE(cfg))
    sae.firing_rate.copy_(torch.rand(D_SAE, generator=torch.Generator().manual_seed(8)))
    order = sorted(range(D_SAE), key=lambda i: -float(sae.firing_rate[i]))
    x = activations()
    output = step(sae, x, 50)
    f = literal_lista(sae, x, 3.4)
    torch.testing.assert_close(output.feature_acts.detach().double(), f, rtol=1e-4, atol=1e-4)

    W_dec = torch.nn.functional.normalize(sae.W_dec.detach().double(), dim=1)
    b_dec = sae.b_dec.detach().double()

    def tilted(reconstruction: torch.Tensor) -> float:
        errors = (x.double() - reconstruction).pow(2).sum(1)
        weights = torch.exp(0.5 * errors / errors.mean())
        return float((weights / weights.sum() * errors).sum())

    literal = {"mse_loss": tilted(f @ W_dec + b_dec)}
    for width in (2, 8):
        kept = order[:width]
        literal[f"prefix_{width}_loss"] = tilted(f[:, kept] @ W_dec[kept] + b_dec)
    for name, value in literal.items():
        assert float(output.losses[name].detach()) == pytest.approx(value, rel=1e-4)
    assert float(output.loss.detach()) == pytest.approx(sum(literal.values()), rel=1e-4)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("detached", [True, False])
def test_inner_prefixes_of_lista_learn_from_the_losses_that_they_should(
    detached: bool, ordered: bool
) -> None:
    # Without the refinement step, which reaches every decoder row.
    cfg = ListaTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=6,
        refinement_step=0.0,
        prefix_fractions=[1 / 4, 1 / 2],
        detach_inner_prefixes=detached,
        order_by_frequency=ordered,
    )
    sae = randomised(ListaTrainingSAE(cfg))
    sae.firing_rate.copy_(torch.linspace(0, 1, D_SAE))
    (gradient,) = torch.autograd.grad(step(sae, activations()).losses["prefix_8_loss"], sae.W_dec)
    by_rank = gradient.flip(0) if ordered else gradient  # the last latent fires most
    assert bool(by_rank[:4].abs().sum() == 0) == detached
    assert by_rank[4:8].abs().sum() > 0
    assert by_rank[8:].abs().sum() == 0


def test_a_tilt_of_zero_is_the_mean() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert float(tilted_mean(losses, 0.0)) == 3
    assert float(tilted_mean(losses, 0.5)) > 3


def test_the_exported_lista_gives_the_trained_latents(tmp_path: Path) -> None:
    sae = randomised(ListaTrainingSAE(ListaTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3)))
    x = activations(tokens=256)
    sae.eval()
    found = sae.calibrate_threshold(x.split(64))
    assert found["l0_after"] == pytest.approx(3, abs=0.02)
    latents = sae.encode(x).detach()
    assert float((latents != 0).sum() / 256) == pytest.approx(3, abs=0.02)
    sae.save_inference_model(tmp_path)
    exported = SAE.load_from_disk(tmp_path)
    assert isinstance(exported, ListaSAE)
    torch.testing.assert_close(exported.encode(x), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exported(x), sae.decode(latents).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exported.encode(x.reshape(4, 64, D_IN)).flatten(0, 1), latents)
    # One token alone is encoded as in the batch.
    torch.testing.assert_close(exported.encode(x[7]), latents[7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rescale", [True, False])
def test_lista_folds_norms_and_scalings(rescale: bool, tmp_path: Path) -> None:
    cfg = ListaTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3, rescale_acts_by_decoder_norm=rescale)
    sae = randomised(ListaTrainingSAE(cfg))
    x = activations(tokens=128)
    sae.eval()
    sae.calibrate_threshold([x])
    expected = sae.decode(sae.encode(x)).detach()
    sae.fold_activation_norm_scaling_factor(0.25)
    torch.testing.assert_close(sae(4 * x).detach(), 4 * expected, rtol=1e-3, atol=1e-3)
    sae.save_inference_model(tmp_path)
    exported = SAE.load_from_disk(tmp_path)
    exported.fold_W_dec_norm()
    torch.testing.assert_close(exported.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(exported(4 * x), 4 * expected, rtol=1e-3, atol=1e-3)
