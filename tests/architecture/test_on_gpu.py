"""What only a GPU can show; skipped without one.

The kernels as machine code rather than interpreted, a step's numbers against the CPU's, and
that the host waits for nothing in an ordinary step.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from steps import activations, step_input

from msae_plugin import MultiScaleSAE, MultiScaleTrainingSAE, preset
from msae_plugin.architecture.kernels.decoding import DecodeKernel, MachineSettings, bag_sum

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GPU = "cuda"
D_IN, D_SAE, N_TOKENS, K = 96, 768, 256, 8
KERNELS: tuple[DecodeKernel, ...] = ("auto", "embedding_bag", "triton")


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """float32 products in float32: TF32 keeps ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def sae_on(
    device: str,
    name: str,
    kernel: DecodeKernel = "auto",
    graphs: bool = True,
    **fields: Any,
) -> MultiScaleTrainingSAE:
    """A preset's SAE, the same weights on every device."""
    torch.manual_seed(0)
    at: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "training_steps": 100}
    # One chunk: several are drawn by the device's own random numbers.
    at["orthogonality_chunk_size"] = D_SAE
    sae = MultiScaleTrainingSAE(preset(name, **at)).train()
    if device == "cpu":
        return sae
    moved = MultiScaleTrainingSAE(preset(name, **{**at, "device": device, **fields})).train()
    moved.load_state_dict(copy.deepcopy(sae.state_dict()))
    moved.machine = MachineSettings(kernel, graphs)
    return moved


def step_of(sae: MultiScaleTrainingSAE, step: int, n_dead: int = 0) -> Any:
    """Forward and backward of one step."""
    sae.zero_grad()
    x = activations(N_TOKENS, D_IN, step).to(sae.device)
    dead = torch.arange(D_SAE, device=sae.device) < n_dead
    output = sae.training_forward_pass(step_input(x, step, dead))
    output.loss.backward()
    return output


@pytest.mark.parametrize("width", [1, 5, 512, 513, 2304])
@pytest.mark.parametrize("n_pairs", [0, 1, 20_000])
def test_triton_against_dense_products_in_float64(width: int, n_pairs: int) -> None:
    generator = torch.Generator().manual_seed(width + n_pairs)
    n_rows, n_bags = 300, 200
    rows = torch.randn(n_rows, width, generator=generator)
    weights = torch.randn(n_pairs, generator=generator)
    row_index = torch.randint(n_rows, (n_pairs,), generator=generator)
    bags = torch.randint(n_bags, (n_pairs,), generator=generator)
    upstream = torch.randn(n_bags, width, generator=generator)

    exact_rows, exact_weights = rows.double().requires_grad_(), weights.double().requires_grad_()
    matrix = torch.zeros(n_bags, n_rows, dtype=torch.float64)
    exact = matrix.index_put((bags, row_index), exact_weights, accumulate=True) @ exact_rows
    exact.backward(upstream.double())

    on_gpu = [t.to(GPU) for t in (rows, row_index, weights, bags)]
    rows_gpu, index_gpu, weights_gpu, bags_gpu = on_gpu
    rows_gpu.requires_grad_()
    weights_gpu.requires_grad_()
    found = bag_sum(rows_gpu, index_gpu, weights_gpu, bags_gpu, n_bags, "triton")
    found.backward(upstream.to(GPU))
    again = bag_sum(rows_gpu, index_gpu, weights_gpu, bags_gpu, n_bags, "triton")
    assert torch.equal(found, again)

    # Sums of about 100 products of order one; dot products over the width.
    def compare(got: torch.Tensor | None, want: torch.Tensor | None, terms: float) -> None:
        assert got is not None
        assert want is not None
        atol = 1e-5 * max(1.0, terms / 12) ** 0.5
        torch.testing.assert_close(got.cpu().double(), want, atol=atol, rtol=1e-5)

    compare(found, exact, n_pairs / n_bags)
    compare(rows_gpu.grad, exact_rows.grad, n_pairs / n_rows)
    compare(weights_gpu.grad, exact_weights.grad, width)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["nested", "default"])
@pytest.mark.parametrize("n_dead", [0, 40])
def test_a_step_is_the_cpus(kernel: DecodeKernel, name: str, n_dead: int) -> None:
    on_cpu, on_gpu = sae_on("cpu", name), sae_on(GPU, name, kernel=kernel)
    for step in range(6):  # the last ones are replayed
        expected, found = step_of(on_cpu, step, n_dead), step_of(on_gpu, step, n_dead)
        assert found.losses.keys() == expected.losses.keys()
        for term, value in expected.losses.items():
            torch.testing.assert_close(found.losses[term].cpu(), value, atol=1e-5, rtol=1e-4)
        for (tensor, p), q in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            torch.testing.assert_close(q.grad.cpu(), p.grad, atol=2e-5, rtol=1e-3, msg=tensor)
    buffers = zip(on_cpu.named_buffers(), on_gpu.buffers(), strict=True)
    for (tensor, b), c in buffers:
        # Where the CPU preselects candidates the GPU ranks everything.
        if not tensor.endswith("candidate_threshold"):
            torch.testing.assert_close(c.cpu(), b, atol=1e-5, rtol=1e-4, msg=tensor)
    assert on_gpu.recorded_steps.count == 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["nested", "default"])
def test_a_run_of_replays_is_the_run(
    kernel: DecodeKernel, autocast: bool, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Chunks are drawn by the device's random numbers, within the recording.
    fields: dict[str, Any] = {"kernel": kernel, "orthogonality_chunk_size": D_SAE // 4}
    fields |= {"k_anneal_steps": 24, "k_initial_multiplier": 2.0, "prefix_sort_every": 10}
    saes = [sae_on(GPU, name, **fields, graphs=graphs) for graphs in (True, False)]
    # Sums of bf16 products in another order may put a pair on the other side of the cut.
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if autocast else {"atol": 1e-4, "rtol": 1e-3}
    for step in range(48):
        n_dead = 40 if 30 <= step < 38 else 0
        x = activations(N_TOKENS, D_IN, step).to(GPU)
        dead = torch.arange(D_SAE, device=GPU) < n_dead
        found: list[Any] = []
        for sae in saes:
            sae.zero_grad()
            torch.manual_seed(step)
            with torch.autocast(GPU, torch.bfloat16, enabled=autocast):
                output = sae.training_forward_pass(step_input(x, step, dead))
            output.loss.backward()
            found.append(output)
        assert list(found[0].losses) == list(found[1].losses)
        for term, value in found[1].losses.items():
            torch.testing.assert_close(found[0].losses[term], value.detach(), **tolerance)
        for (tensor, p), q in zip(saes[0].named_parameters(), saes[1].parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            scale = float(q.grad.abs().max())
            difference = float((p.grad - q.grad).abs().max())
            assert difference <= tolerance["atol"] * scale + 1e-6, (step, tensor)
            with torch.no_grad():  # the same weights in both, so that differences do not grow
                moved = q - 1e-2 * q.grad / (scale + 1e-6)
                p.copy_(moved)
                q.copy_(moved)
    for (tensor, b), c in zip(saes[0].named_buffers(), saes[1].buffers(), strict=True):
        torch.testing.assert_close(b, c, **tolerance, msg=tensor)
    assert saes[0].recorded_steps.count >= 2
    assert saes[1].recorded_steps.count == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_step_that_cannot_be_recorded_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    fields: dict[str, Any] = {"orthogonality_chunk_size": D_SAE // 4}
    hindered, eager = (sae_on(GPU, "nested", **fields, graphs=g) for g in (True, False))
    take_step = hindered.take_step

    def asks_for_a_value(given: Any, schedule: Any) -> Any:
        results = take_step(given, schedule)
        assert float(results.loss) > 0
        return results

    hindered.take_step = asks_for_a_value
    for step in range(1, 8):
        torch.manual_seed(step)
        found = step_of(hindered, step)
        torch.manual_seed(step)
        torch.testing.assert_close(found.loss, step_of(eager, step).loss, atol=1e-5, rtol=1e-4)
    assert hindered.recorded_steps.count == 0
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    (message,) = [record.getMessage() for record in warnings]
    assert message.startswith("the step cannot be recorded as a CUDA graph and runs as it is: ")
    assert "previous error" not in message


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("graphs", [False, True])
def test_the_host_waits_for_nothing(kernel: DecodeKernel, graphs: bool) -> None:
    # AuxK asks which latents are dead, as SAELens' own does.
    sae = sae_on(GPU, "nested", kernel=kernel, graphs=graphs, k_anneal_steps=0)
    sae.cfg.aux_loss_coefficient = 0.0
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    batches = [activations(N_TOKENS, D_IN, step).to(GPU) for step in range(9)]

    def whole_step(step: int) -> None:
        # Not logging, and not the steps on which prefixes are sorted anew.
        output = sae.training_forward_pass(step_input(batches[step - 1], step))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for step in (1, 2, 3, 4, 6):  # recording waits
        whole_step(step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (7, 8, 9):
            whole_step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sae.recorded_steps.count == int(graphs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_autocast_trains(kernel: DecodeKernel) -> None:
    sae = sae_on(GPU, "nested", kernel=kernel)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    losses: list[float] = []
    for step in range(60):
        x = activations(N_TOKENS, D_IN, step).to(GPU)
        with torch.autocast(GPU, torch.bfloat16):
            output = sae.training_forward_pass(step_input(x, step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.losses["mse_loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_the_export_is_the_cpus(tmp_path: Any) -> None:
    sae = sae_on(GPU, "nested")
    for step in range(3):
        step_of(sae, step)
    x = activations(N_TOKENS, D_IN, 99)
    sae.calibrate_threshold([x])
    sae.save_inference_model(str(tmp_path))
    here = MultiScaleSAE.load_from_disk(tmp_path, device="cpu")
    there = MultiScaleSAE.load_from_disk(tmp_path, device=GPU)
    with torch.no_grad():
        expected, found = here.encode(x), there.encode(x.to(GPU))
        torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            there.decode(found).cpu(), here.decode(expected), atol=1e-5, rtol=1e-4
        )
        assert float((expected > 0).sum(1).float().mean()) == pytest.approx(K, abs=0.1)
