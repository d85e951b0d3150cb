"""This module finds, before the runtime reads an ONNX file, whether it keeps tensors in other files.

onnxruntime looks for such files in the working directory of the process, where anybody may have put them, and no hash
that was pinned for the model covers them. So a model must hold its weights itself. An ONNX file is a protobuf; only
those fields are followed that lead to tensors (onnx.proto3 of ONNX 1.18), and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator

from memscan.errors import ModelError

_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING = range(8)
# Kind of message -> number of a field -> kind of the message in it.
_FIELDS = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def refuse_external_data(data: bytes, where: str) -> None:
    """Raise ModelError if a tensor of an ONNX model lies in another file, or the bytes are no protobuf."""
    try:
        found = _has_external_data(memoryview(data))
    except (ValueError, IndexError) as error:
        raise ModelError(f"not a loadable ONNX model ({error or 'it ends too early'})", where=where) from error
    if found:
        raise ModelError(
            "keeps weights in another file, which its hash does not cover",
            where=where,
            hint="save it in one file: onnx.save(onnx.load(PATH), PATH)",
        )


def _has_external_data(model: memoryview) -> bool:
    waiting = [(_MODEL, model)]
    while waiting:
        kind, message = waiting.pop()
        for number, value in _fields(message):
            if kind == _TENSOR and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)):
                return True
            inner = _FIELDS[kind].get(number)
            if inner is not None and isinstance(value, memoryview):
                waiting.append((inner, value))
    return False


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a protobuf message. Raises ValueError, IndexError where it is none."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
        elif wire == _BYTES:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("it ends too early")
            yield number, message[at : at + length]
            at += length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")
