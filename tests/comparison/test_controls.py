"""The controls do what their names say, and survive what SAEBench does to an SAE."""

import copy

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from msae_plugin.comparison.methods import ResidualStreamSAE, with_permuted_decoder


def test_the_residual_stream_is_itself_in_any_shape_and_dtype() -> None:
    sae = ResidualStreamSAE(6, SAEMetadata(model_name="m", hook_name="blocks.0.hook_resid_post"))
    for shape in ((4, 6), (2, 3, 6)):
        x = torch.randn(shape)
        assert torch.equal(sae.encode(x), x)
        assert torch.equal(sae(x), x)
        edited = sae.encode(x) * -2
        assert torch.equal(sae.decode(edited), edited)
    sae.fold_W_dec_norm()
    again = copy.deepcopy(sae).to(torch.bfloat16)
    assert again.encode(torch.randn(3, 6)).dtype == torch.bfloat16
    assert again.cfg.metadata.hook_name == "blocks.0.hook_resid_post"


def test_a_permuted_decoder_keeps_the_latents_and_the_rows() -> None:
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=6, d_sae=20))
    sae.W_enc.data, sae.W_dec.data = torch.randn(6, 20), torch.randn(20, 6)
    before = sae.W_dec.clone()
    permuted = with_permuted_decoder(sae, seed=1)
    x = torch.randn(5, 6)
    assert torch.equal(permuted.encode(x), sae.encode(x))
    assert not torch.allclose(permuted(x), sae(x))
    assert torch.equal(sae.W_dec, before)
    rows = {tuple(row.tolist()) for row in permuted.W_dec}
    assert rows == {tuple(row.tolist()) for row in before}
    assert torch.equal(with_permuted_decoder(sae, 1).W_dec, permuted.W_dec)
    assert not torch.equal(with_permuted_decoder(sae, 2).W_dec, permuted.W_dec)
