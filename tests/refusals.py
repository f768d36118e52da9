"""What tests of hostile files share: a refusal of one short line that costs little memory, and a tensor whose data lies elsewhere."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from onnx import TensorProto

from toolchain.errors import BittailorError, InputError

MOST_BYTES = 200 << 20
"""By which a refusal may raise this process's peak."""


@contextmanager
def refused(word: str = "", kind: type[BittailorError] = InputError) -> Iterator[None]:
    """The block raises an error of one short line, with `word` (a pattern) in it, and little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(kind, match=word or None) as caught:
        yield
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000
    assert peak < MOST_BYTES


def external(dims: list[int], **entries: object) -> TensorProto:
    """A tensor whose bytes lie in a file. entries: what it says of them."""
    tensor = TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "data", **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
