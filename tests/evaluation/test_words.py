"""Word purity, dense share and alignment against numbers worked out by hand."""

import pytest
import torch

from msae_plugin.evaluation import words as words_module
from msae_plugin.evaluation.words import ActivationByWord, Words
from msae_plugin.saes.latents import dense_share, encoder_decoder_alignment


class _Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return {5: " Film", 6: "film", 7: " good", 8: "FILM"}[ids[0]]


def test_tokens_that_differ_in_case_or_space_are_one_word() -> None:
    words = Words(_Tokenizer())
    first = words.of(torch.tensor([5, 7, 6]))
    assert first[0] == first[2] != first[1]
    assert words.of(torch.tensor([8]))[0] == first[0]


@pytest.mark.parametrize("buffered", [2**20, 3])
def test_a_latent_with_half_of_its_activation_on_one_word_counts(
    buffered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words_module, "_BUFFERED_PAIRS", buffered)
    n_tokens = 40
    latents = torch.zeros(n_tokens, 4)
    word = torch.arange(n_tokens) % 10
    latents[:20, 0] = 1.0  # two firings on each of ten words
    latents[:, 1] = torch.where(word == 3, 9.0, 1.0)  # 36 of 72 on word 3
    latents[:, 2] = torch.where(word == 3, 8.9, 1.0)  # 35.6 of 71.6
    latents[:19, 3] = torch.where(word[:19] == 3, 1.0, 0.0)  # too rare to be judged
    sums = ActivationByWord()
    for rows in torch.arange(n_tokens).split(7):
        sums.add(latents[rows], word[rows])
    share = sums.single_word_share((latents != 0).sum(0))
    assert share == pytest.approx(1 / 3)


def test_nothing_to_judge_gives_none() -> None:
    assert ActivationByWord().single_word_share(torch.tensor([100])) is None


def test_dense_share_counts_firings_on_more_than_a_tenth_of_the_tokens() -> None:
    # 50 and 11 of 100 tokens are dense, 10 and 4 are not: 61 of 75 firings.
    assert float(dense_share(torch.tensor([50, 11, 10, 4]), 100)) == pytest.approx(61 / 75)
    assert float(dense_share(torch.zeros(3), 100)) == 0


def test_alignment_is_the_mean_cosine_of_the_live_latents() -> None:
    sae = torch.nn.Module()
    sae.W_enc = torch.nn.Parameter(torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    sae.W_dec = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
    # Cosines 1, 0 and 1; the last latent is dead.
    assert encoder_decoder_alignment(sae, torch.tensor([True, True, False])) == pytest.approx(0.5)
    assert encoder_decoder_alignment(sae, torch.zeros(3, dtype=torch.bool)) is None
    assert encoder_decoder_alignment(torch.nn.Module(), torch.ones(3, dtype=torch.bool)) is None
