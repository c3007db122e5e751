from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from msae_plugin.models.packaged import parse_gguf

TOKENS = ["<s>", "a", "▁日本", "", "🙂"]
ALIGNMENT = 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small file written by the format's own library."""
    writer = GGUFWriter(tmp_path / "model.gguf", "tiny")
    writer.add_custom_alignment(ALIGNMENT)
    writer.add_uint32("tiny.block_count", 3)
    writer.add_float32("tiny.epsilon", 0.5)
    writer.add_int8("tiny.small", -7)
    writer.add_uint64("tiny.large", 2**40)
    writer.add_bool("tiny.flag", True)
    writer.add_array("tiny.pattern", [1, 2, 3])
    writer.add_key_value(
        "tiny.nested", [[1, 2], [3]], GGUFValueType.ARRAY, sub_type=GGUFValueType.ARRAY
    )
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-1.0] * len(TOKENS))
    writer.add_bos_token_id(0)
    writer.add_tensor("first", np.arange(15, dtype=np.float32).reshape(3, 5))
    writer.add_tensor("second", np.arange(7, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def test_metadata_are_those_that_were_written(path: Path) -> None:
    metadata = parse_gguf(path.read_bytes()).metadata
    assert metadata == {
        "general.architecture": "tiny",
        "general.alignment": ALIGNMENT,
        "tiny.block_count": 3,
        "tiny.epsilon": 0.5,
        "tiny.small": -7,
        "tiny.large": 2**40,
        "tiny.flag": True,
        "tiny.pattern": [1, 2, 3],
        "tiny.nested": [[1, 2], [3]],
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.scores": [-1.0] * len(TOKENS),
        "tokenizer.ggml.bos_token_id": 0,
    }


def test_without_vocabulary_only_its_length_is_left(path: Path, tmp_path: Path) -> None:
    stripped = tmp_path / "stripped.gguf"
    stripped.write_bytes(parse_gguf(path.read_bytes()).without_vocabulary())
    expected, actual = GGUFReader(path), GGUFReader(stripped)
    arrays = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores"}
    assert arrays < set(expected.fields)
    counts = {"GGUF.kv_count"}
    assert set(actual.fields) == set(expected.fields) - arrays | {"tiny.vocab_size"}
    for key in set(actual.fields) - counts - {"tiny.vocab_size"}:
        assert actual.fields[key].contents() == expected.fields[key].contents()
    assert actual.fields["tiny.vocab_size"].contents() == len(TOKENS)
    assert [tensor.name for tensor in actual.tensors] == ["first", "second"]
    for tensor, original in zip(actual.tensors, expected.tensors, strict=True):
        np.testing.assert_array_equal(tensor.data, original.data)
        assert tensor.data.dtype == original.data.dtype


def test_a_length_that_the_file_states_stays(path: Path) -> None:
    file = parse_gguf(path.read_bytes())
    once = parse_gguf(file.without_vocabulary())
    assert parse_gguf(once.without_vocabulary()).metadata == once.metadata


def test_a_file_that_ends_early_is_refused(path: Path) -> None:
    contents = path.read_bytes()
    end = parse_gguf(contents).tensor_table_end
    for length in range(end):
        with pytest.raises(ValueError, match="GGUF"):
            parse_gguf(contents[:length])


@pytest.mark.parametrize(
    ("offset", "value"), [(0, b"GGML"), (4, b"\x01"), (4, b"\x09")], ids=["magic", "old", "new"]
)
def test_another_format_is_refused(path: Path, offset: int, value: bytes) -> None:
    contents = bytearray(path.read_bytes())
    contents[offset : offset + len(value)] = value
    with pytest.raises(ValueError, match="not a GGUF file of version 2 or 3"):
        parse_gguf(bytes(contents))


def test_an_unknown_type_is_refused(path: Path) -> None:
    contents = path.read_bytes()
    position = contents.index(b"tiny.flag") + len(b"tiny.flag")
    broken = contents[:position] + b"\x2a" + contents[position + 1 :]
    with pytest.raises(ValueError, match="unknown type 42"):
        parse_gguf(broken)
