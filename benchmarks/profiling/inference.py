"""Encoding and decoding of an export, beside SAELens' JumpReLU with the same weights."""

from __future__ import annotations

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

from msae_plugin import MultiScaleSAE, MultiScaleSAEConfig
from profiling.machine import Peak, timed
from profiling.parts import Part, print_parts
from profiling.training import Setting, batch_of


def pair_of_saes(
    d_in: int, d_sae: int, batch: torch.Tensor, l0: float
) -> tuple[JumpReLUSAE, MultiScaleSAE]:
    """SAELens' JumpReLU and our export with the same weights and about this L0 on the batch."""
    torch.manual_seed(0)
    device = str(batch.device)
    plain = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, device=device))
    with torch.no_grad():
        some = batch[:256]
        hidden_pre = (plain.process_sae_in(some) @ plain.W_enc).flatten()
        n_active = int(l0 * some.shape[0])
        plain.threshold.fill_(float(hidden_pre.topk(n_active).values[-1]))
    ours = MultiScaleSAE(MultiScaleSAEConfig(d_in=d_in, d_sae=d_sae, device=device))
    ours.load_state_dict(plain.state_dict(), strict=False)
    return plain, ours


@torch.no_grad()
def profile_inference(setting: Setting, peak: Peak) -> None:
    """Print encode and decode, ours and theirs."""
    batch = batch_of(setting)
    n, d, width = setting.n_tokens, setting.d_in, setting.d_sae
    plain, ours = pair_of_saes(d, width, batch, setting.k)
    autocast = torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.autocast)
    half = 2 if setting.autocast else 4
    flops, traffic = 2.0 * n * d * width, float(half * (n * d + d * width + n * width))
    with autocast:
        for name, sae in (("SAELens' jumprelu", plain), ("multiscale", ours)):
            acts = sae.encode(batch)
            encode = timed(lambda s=sae: s.encode(batch), setting.device, setting.repeats)
            decode = timed(lambda s=sae, a=acts: s.decode(a), setting.device, setting.repeats)
            both = timed(lambda s=sae: s.decode(s.encode(batch)), setting.device, setting.repeats)
            parts = [
                Part("encode", encode, flops, traffic),
                Part("decode, as if dense", decode, flops, traffic),
            ]
            print_parts(f"Inference, {name}: {setting.title}", parts, both, peak)
