"""Our trainer against SAELens' own and against arithmetic done by hand."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.training.schedules import GradientRateConfig
from msae_plugin.training.step_trainer import StepOptions
from msae_plugin.training.trainer import LockstepTrainer

D_IN, D_SAE, BATCH = 12, 24, 32
HOOK = "h"
EXTRA = {
    "standard": {"l1_coefficient": 0.3, "l1_warm_up_steps": 4},
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [8, 24]},
    "jumprelu": {"l0_coefficient": 0.01},
    "gated": {"l1_coefficient": 0.1},
}


def make_sae(architecture: str = "standard", seed: int = 0, **fields: Any) -> TrainingSAE[Any]:
    sae_class, config_class = get_sae_training_class(architecture)
    torch.manual_seed(seed)
    return sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **{**EXTRA[architecture], **fields}))


def activations(n_batches: int, batch: int = BATCH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(D_IN, D_IN, generator=generator)
    tokens = torch.randn(n_batches * batch, D_IN, generator=generator) @ mixing + 1.0
    return list(tokens.split(batch))


def provider(batches: list[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    return iter([{HOOK: batch} for batch in batches])


def trainer_config(steps: int, batch: int = BATCH, **fields: Any) -> SAETrainerConfig:
    values: dict[str, Any] = {
        "lr": 3e-3,
        "lr_end": 3e-4,
        "dead_feature_window": 3,
        "feature_sampling_window": 5,
        "logger": LoggingConfig(log_to_wandb=False),
        **fields,
    }
    return SAETrainerConfig(
        total_training_samples=steps * batch, train_batch_size_samples=batch, **values
    )


def lockstep(
    config: SAETrainerConfig,
    sae: TrainingSAE[Any],
    batches: list[torch.Tensor],
    options: StepOptions | None = None,
    **more: Any,
) -> LockstepTrainer:
    """Our trainer of one SAE."""
    options = options or StepOptions()
    return LockstepTrainer(
        config, {"a": sae}, {"a": HOOK}, provider(batches), options=options, **more
    )


def weights(sae: TrainingSAE[Any]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in sae.state_dict().items()}


def assert_identical(ours: TrainingSAE[Any], theirs: TrainingSAE[Any]) -> None:
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), [
        name for name in a if not torch.equal(a[name], b[name])
    ]


@pytest.mark.parametrize("architecture", sorted(EXTRA))
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 3, "lr_decay_steps": 3},
        {"autocast": True},
    ],
    ids=["plain", "schedule", "autocast"],
)
def test_without_extras_we_are_saelens_bit_for_bit(
    architecture: str, fields: dict[str, Any]
) -> None:
    batches = activations(12)
    ours, theirs = make_sae(architecture), make_sae(architecture)
    config = trainer_config(12, **fields)
    losses: list[float] = []
    lockstep(
        config,
        ours,
        batches,
        log_every=1,
        on_log=lambda _, row: losses.append(row["loss"]),
    ).fit()

    their_losses: list[float] = []
    plain = MultiSAETrainer(config, {"a": theirs}, {"a": HOOK}, provider(batches))
    step = plain.trainers["a"].step

    def recorded(batch: torch.Tensor) -> Any:
        output = step(batch)
        their_losses.append(output.loss.item())
        return output

    plain.trainers["a"].step = recorded  # type: ignore[method-assign]
    plain.fit()
    assert_identical(ours, theirs)
    assert losses == pytest.approx(their_losses, rel=1e-6)


def test_scaling_of_activations_is_saelens_own() -> None:
    batches = activations(8)
    ours, theirs = (
        make_sae("batchtopk", normalize_activations="expected_average_only_in") for _ in range(2)
    )
    config = trainer_config(4, n_batches_for_norm_estimate=3)
    trainer = lockstep(config, ours, batches)
    trainer.fit()
    trainer.fold_scaling()
    MultiSAETrainer(config, {"a": theirs}, {"a": HOOK}, provider(batches)).fit()
    assert_identical(ours, theirs)
    assert ours.cfg.normalize_activations == "none"
    assert ours.cfg.metadata.l0 == theirs.cfg.metadata.l0


@pytest.mark.parametrize("n", [2, 4])
def test_accumulating_n_small_batches_is_one_large_batch(n: int) -> None:
    # The loss of `standard` is a mean over tokens, so the mean gradient is that of the union.
    steps, large = 6, activations(6)
    small = [part for batch in large for part in batch.split(BATCH // n)]
    together, accumulated = make_sae(), make_sae()
    schedule = {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 2}
    lockstep(trainer_config(steps, **schedule), together, large).fit()
    trainer = lockstep(
        trainer_config(steps * n, BATCH // n, **schedule),
        accumulated,
        small,
        options=StepOptions(accumulation_steps=n),
    )
    trainer.fit()
    assert trainer.n_training_steps == steps
    assert trainer.n_training_samples == steps * BATCH
    for name, value in weights(together).items():
        torch.testing.assert_close(weights(accumulated)[name], value, rtol=2e-4, atol=2e-6)
    before = weights(make_sae())["W_enc"]
    assert not torch.allclose(weights(together)["W_enc"], before, atol=1e-3)


def test_weight_decay_is_adamw_on_the_dictionaries_only() -> None:
    batches = activations(3)
    sae = make_sae()
    by_hand = {name: value.detach().clone() for name, value in sae.named_parameters()}
    reference = copy.deepcopy(sae)
    lr, decay, betas, eps = 1e-2, 0.1, (0.9, 0.999), 1e-8
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in by_hand.items()}
    lockstep(trainer_config(3, lr=lr), sae, batches, options=StepOptions(weight_decay=decay)).fit()

    # AdamW as in Algorithm 2 of arXiv 1711.05101, gradients from a plain forward pass.
    from sae_lens.saes.sae import TrainStepInput

    for step, batch in enumerate(batches, 1):
        reference.load_state_dict(by_hand)
        warm_up = min((step - 1) / 4, 1.0)
        output = reference.training_forward_pass(
            TrainStepInput(
                sae_in=batch,
                coefficients={"l1": 0.3 * warm_up},
                dead_neuron_mask=None,
                n_training_steps=step - 1,
                is_logging_step=False,
            )
        )
        reference.zero_grad()
        output.loss.backward()
        norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in reference.parameters()))
        for name, p in reference.named_parameters():
            gradient = p.grad / max(norm, 1.0)
            m, v = moments[name]
            m.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
            v.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
            update = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
            shrink = 1 - lr * decay if name in ("W_enc", "W_dec") else 1.0
            by_hand[name] = by_hand[name] * shrink - lr * update
    for name, value in by_hand.items():
        torch.testing.assert_close(weights(sae)[name], value, rtol=1e-4, atol=1e-5)


def test_the_floor_holds_in_a_decaying_run() -> None:
    rates: list[float] = []
    lockstep(
        trainer_config(10, lr=1e-3, lr_decay_steps=8),
        make_sae(),
        activations(10),
        options=StepOptions(lr_floor=4e-4),
        log_every=1,
        on_log=lambda _, row: rates.append(row["lr"]),
    ).fit()
    # Linear decay from 1e-3 over 8 steps, cut at the floor.
    expected = [1e-3, 1e-3, 1e-3, 8.75e-4, 7.5e-4, 6.25e-4, 5e-4, 4e-4, 4e-4, 4e-4]
    assert rates == pytest.approx(expected)


def test_a_burst_of_large_gradients_lowers_the_rate_for_that_step() -> None:
    batches = activations(8)
    batches[5] = batches[5] * 10
    rates: list[float] = []
    lockstep(
        trainer_config(8, lr=1e-3),
        make_sae(),
        batches,
        options=StepOptions(gradient_lr=GradientRateConfig(enabled=True)),
        log_every=1,
        on_log=lambda _, row: rates.append(row["lr"]),
    ).fit()
    assert rates[:5] == pytest.approx([1e-3] * 5)
    assert rates[5:] == pytest.approx([5e-4, 5.05e-4, 5.1005e-4])


def test_each_sae_can_have_its_own_rate_and_rules() -> None:
    rates: dict[str, float] = {}
    LockstepTrainer(
        trainer_config(2, lr=1e-3),
        {"a": make_sae(), "b": make_sae(), "c": make_sae()},
        {"a": HOOK, "b": HOOK, "c": HOOK},
        provider(activations(2)),
        options={"a": StepOptions(), "b": StepOptions(lr=2e-4), "c": StepOptions(lr_floor=5e-3)},
        log_every=2,
        on_log=lambda name, row: rates.__setitem__(name, row["lr"]),
    ).fit()
    assert rates == pytest.approx({"a": 1e-3, "b": 2e-4, "c": 5e-3})


def test_clipping_can_be_changed_and_switched_off() -> None:
    def trained(max_norm: float | None) -> torch.Tensor:
        sae = make_sae()
        # SGD would show clipping directly; Adam hides a constant factor, so batches differ in size.
        batches = [batch * scale for batch, scale in zip(activations(4), (1, 9, 1, 5), strict=True)]
        lockstep(
            trainer_config(4), sae, batches, options=StepOptions(clip_grad_norm=max_norm)
        ).fit()
        return weights(sae)["W_enc"]

    assert torch.equal(trained(None), trained(1e9))
    assert not torch.equal(trained(None), trained(1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_activations_stop_the_run_before_any_weight_changes(value: float) -> None:
    batches = activations(6)
    batches[3][5, 2] = value
    sae = make_sae()
    trainer = lockstep(trainer_config(6), sae, batches)
    good = make_sae()
    lockstep(trainer_config(3), good, batches).fit()
    with pytest.raises(RunFailure, match=r"step 4: the language model's activations for SAE 'a'"):
        trainer.fit()
    assert trainer.n_training_steps == 3
    assert_identical(sae, good)


def test_adding_an_sae_that_draws_random_numbers_changes_nothing_else() -> None:
    class Noisy(type(make_sae())):  # type: ignore[misc]
        def training_forward_pass(self, step_input: Any) -> Any:
            torch.rand(1000)
            return super().training_forward_pass(step_input)

    def shuffled() -> Iterator[dict[str, torch.Tensor]]:
        for batch in activations(6):
            yield {HOOK: batch[torch.randperm(len(batch))][: BATCH // 2]}

    def trained(names: list[str]) -> TrainingSAE[Any]:
        saes: dict[str, Any] = {name: make_sae() for name in names}
        if "noisy" in saes:
            saes["noisy"] = Noisy(saes["noisy"].cfg)
        saes["a"] = make_sae()
        LockstepTrainer(
            trainer_config(6, BATCH // 2),
            saes,
            dict.fromkeys(saes, HOOK),
            shuffled(),
            options=StepOptions(),
            seed=3,
        ).fit()
        return saes["a"]

    assert_identical(trained([]), trained(["noisy", "other"]))


def test_too_little_text_is_an_input_error() -> None:
    def nothing() -> Iterator[dict[str, torch.Tensor]]:
        raise ValueError(
            "Unable to fill buffer after starting new epoch. Dataset may be too small."
        )
        yield {}

    trainer = LockstepTrainer(
        trainer_config(2), {"a": make_sae()}, {"a": HOOK}, nothing(), options=StepOptions()
    )
    with pytest.raises(InputError, match="too short"):
        trainer.fit()
