"""Read a GGUF file's metadata, and take its vocabulary out, in seconds.

The reader of the `gguf` package makes several numpy objects for every element of every array, and
transformers runs it up to three times per load: for Gemma 3's vocabulary of 262,144 tokens (with
their scores and types) that was 85 of 111 s of processor time. Parsing the whole header here takes
.2 s. transformers then gets the same file without the vocabulary, of which the weights need the
length alone.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 counts in 32 bits
_HEADER = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of metadata entries
_LENGTH = struct.Struct("<Q")
_TYPE = struct.Struct("<I")
_UINT32, _STRING, _ARRAY = 4, 8, 9
# Type code -> struct format of the values of fixed size.
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DEFAULT_ALIGNMENT = 32
_CUT_OFF = "the GGUF file ends inside its header"

_VOCABULARY_ARRAYS = "tokenizer."
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class GGUFFile:
    """The contents of a GGUF file, its header parsed.

    Attributes:
        contents: All bytes of the file.
        metadata: Value by key; arrays are lists.
        spans: Where each entry of the metadata lies in the file, by key: start and end.
        tensor_table_end: End of the tensors' names and shapes, which follow the metadata.
    """

    contents: bytes
    metadata: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensor_table_end: int

    def without_vocabulary(self) -> bytes:
        """The same file with the length of the vocabulary in place of the vocabulary itself."""
        kept = [
            self.contents[start:end]
            for key, (start, end) in self.spans.items()
            if not (key.startswith(_VOCABULARY_ARRAYS) and isinstance(self.metadata[key], list))
        ]
        size_key = f"{self.metadata['general.architecture']}.vocab_size"
        if size_key not in self.metadata:
            size = len(self.metadata[_TOKENS])
            kept.append(_packed_string(size_key) + struct.pack("<II", _UINT32, size))
        _, version, n_tensors, _ = _HEADER.unpack_from(self.contents)
        metadata_end = max(end for _, end in self.spans.values())
        header = b"".join(
            (
                _HEADER.pack(_MAGIC, version, n_tensors, len(kept)),
                *kept,
                self.contents[metadata_end : self.tensor_table_end],
            )
        )
        # The tensors' offsets count from the first aligned byte after the header, wherever it is.
        padding = b"\0" * (self._aligned(len(header)) - len(header))
        weights = memoryview(self.contents)[self._aligned(self.tensor_table_end) :]
        return b"".join((header, padding, weights))

    def _aligned(self, position: int) -> int:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        return -(-position // alignment) * alignment


def parse_gguf(contents: bytes) -> GGUFFile:
    """Parse the header of a GGUF file.

    Args:
        contents: All bytes of the file.

    Raises:
        ValueError: If it is not a GGUF file of version 2 or 3, or is cut off inside the header.
    """
    try:
        return _parse(contents)
    except struct.error as error:
        raise ValueError(_CUT_OFF) from error


def _parse(contents: bytes) -> GGUFFile:
    magic, version, n_tensors, n_entries = _HEADER.unpack_from(contents)
    if magic != _MAGIC or version not in _VERSIONS:
        raise ValueError(f"not a GGUF file of version 2 or 3 (it begins with {contents[:8]!r})")
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    position = _HEADER.size
    for _ in range(n_entries):
        start = position
        key, position = _string(contents, position)
        (kind,) = _TYPE.unpack_from(contents, position)
        metadata[key], position = _value(contents, position + _TYPE.size, kind)
        spans[key] = (start, position)
    for _ in range(n_tensors):
        _, position = _string(contents, position)
        (n_dimensions,) = _TYPE.unpack_from(contents, position)
        # The number of dimensions, the dimensions, the type of the values, the offset.
        position += _TYPE.size + _LENGTH.size * n_dimensions + _TYPE.size + _LENGTH.size
    if position > len(contents):
        raise ValueError(_CUT_OFF)
    return GGUFFile(contents, metadata, spans, position)


def _value(contents: bytes, position: int, kind: int) -> tuple[Any, int]:
    """One value of a type, and the position after it."""
    if kind == _STRING:
        return _string(contents, position)
    if kind == _ARRAY:
        (element_kind,) = _TYPE.unpack_from(contents, position)
        (count,) = _LENGTH.unpack_from(contents, position + _TYPE.size)
        return _array(contents, position + _TYPE.size + _LENGTH.size, element_kind, count)
    values, position = _fixed(contents, position, kind, 1)
    return values[0], position


def _array(contents: bytes, position: int, kind: int, count: int) -> tuple[list[Any], int]:
    if kind in _FIXED:
        return _fixed(contents, position, kind, count)
    values: list[Any] = []
    for _ in range(count):
        value, position = _value(contents, position, kind)
        values.append(value)
    return values, position


def _fixed(contents: bytes, position: int, kind: int, count: int) -> tuple[list[Any], int]:
    if kind not in _FIXED:
        raise ValueError(f"the GGUF file has a value of the unknown type {kind}")
    layout = f"<{count}{_FIXED[kind]}"
    return list(struct.unpack_from(layout, contents, position)), position + struct.calcsize(layout)


def _string(contents: bytes, position: int) -> tuple[str, int]:
    (length,) = _LENGTH.unpack_from(contents, position)
    start = position + _LENGTH.size
    end = start + length
    if end > len(contents):
        raise ValueError(_CUT_OFF)
    return contents[start:end].decode(), end


def _packed_string(text: str) -> bytes:
    encoded = text.encode()
    return _LENGTH.pack(len(encoded)) + encoded
