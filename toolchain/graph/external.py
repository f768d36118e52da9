"""External data of an ONNX model: tensors of 1 KiB and more live in `model.onnx.data`, which the runtime maps instead of reading.

By hand, because a package's tensors are streamed one at a time (the model need not fit in memory twice), tensors with equal bytes
are stored once (a tied embedding and head then share their packed codes though their shapes differ), and the location of every
tensor is checked to stay inside the folder before it is opened.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper

from toolchain.errors import DamagedFileError
from toolchain.files import inside
from toolchain.session import MODEL as MODEL_NAME

INLINE_BELOW_BYTES = 1024
ALIGNMENT_BYTES = 64
DATA_NAME = "model.onnx.data"


class DataWriter:
    """Writes tensors to one data file in call order; `tensor` returns the TensorProto that refers to them. `size`: bytes so far.

    path None: nothing is written, only counted. sync False: what is measured and thrown away need not reach the disk.
    """

    def __init__(self, path: Path | None, sync: bool = True) -> None:
        self._sync = sync and path is not None
        self._name = path.name if path else DATA_NAME
        self._stream = open(path, "wb") if path else open(os.devnull, "wb")  # noqa: SIM115 - closed by __exit__: the writer is the context manager
        self.size = 0
        self._written: dict[bytes, tuple[int, int]] = {}

    def __enter__(self) -> DataWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._stream.flush()
            if self._sync:
                os.fsync(self._stream.fileno())
        self._stream.close()

    def tensor(self, name: str, array: np.ndarray) -> TensorProto:
        """A TensorProto named `name` for `array`: inline when small, else in the data file (once per distinct content)."""
        array = np.ascontiguousarray(array)
        if array.nbytes < INLINE_BELOW_BYTES:
            return numpy_helper.from_array(array, name)
        view = array.reshape(-1).view(np.uint8).data
        digest = hashlib.blake2b(view, digest_size=16).digest()
        if digest not in self._written:
            padding = -self.size % ALIGNMENT_BYTES
            self._stream.write(b"\0" * padding)
            self.size += padding
            self._stream.write(view)
            self._written[digest] = (self.size, array.nbytes)
            self.size += array.nbytes
        offset, length = self._written[digest]
        proto = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._name), ("offset", offset), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        return proto


def load_array(tensor: TensorProto, folder: Path) -> np.ndarray:
    """The tensor's values; external data is mapped read-only. Raises DamagedFileError when the data file is short, InputError when it is
    outside. Nothing is allocated for what a tensor says it holds and does not."""
    shape, name = tuple(tensor.dims), tensor.name[:80]
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if min(shape, default=0) < 0:
            raise ValueError(f"the shape {shape}")
        if dtype.hasobject:
            raise ValueError("text")
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"expected a tensor {name!r} of a known type and its own size in {folder}, got: {error}") from error
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        if not isinstance(entries["location"], str):  # protobuf hands out what is no UTF-8 as bytes
            raise ValueError("a location that is no text")
        path, offset = inside(folder, entries["location"]), int(entries.get("offset", 0))
    except (KeyError, ValueError) as error:
        raise DamagedFileError(f"expected location and offset of tensor {name!r} in {folder}, got {entries}") from error
    size = math.prod(shape) * dtype.itemsize  # not numpy's, which wraps around
    needed = offset + size
    if offset < 0 or not path.is_file() or path.stat().st_size < needed:
        raise DamagedFileError(
            f"expected {needed} bytes or more in {path}, got {path.stat().st_size if path.is_file() else 'no file'}"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape) if size else np.empty(shape, dtype)


def read_model(folder: Path, name: str = MODEL_NAME) -> onnx.ModelProto:
    """The graph without its external data. Raises DamagedFileError if it does not parse, InputError if it is a link out of the folder."""
    path = inside(folder, name)
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f"expected an ONNX model in {path}, got {error}") from error
    except Exception as error:  # protobuf's DecodeError has no public base class
        raise DamagedFileError(f"expected an ONNX model in {path}, got {type(error).__name__}") from error
    for text in _texts(model):
        if not isinstance(text, str):  # protobuf hands out what is no UTF-8 as bytes, and refuses it in another message
            raise DamagedFileError(f"expected an ONNX model in {path}, got text that is no UTF-8: {text!r:.80}")
    return model


def _texts(root: Any) -> Iterator[str | bytes]:
    """Every text in a message and in what is inside it: names, most of all."""
    left = [root]
    while left:
        for field, value in left.pop().ListFields():
            several = not isinstance(value, str | bytes | Message)
            if field.type == field.TYPE_MESSAGE:
                left += value if several else [value]
            elif field.type == field.TYPE_STRING:
                yield from value if several else [value]
