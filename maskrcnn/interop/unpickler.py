"""Read a pickle of NumPy arrays and plain containers, and nothing else.

A pickle is a program: it may call every function that it names. Here, a fixed list of names stands for functions of
this module, which build tensors, and every other name is an error. NumPy's own functions are not called, because their
state comes from the file too: an array of objects with forged bytes would be read as pointers.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from pickle import UnpicklingError, _Unpickler  # in Python: the one in C reserves memory for what a file claims
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"}


def read_pickle(content: bytes) -> Any:
    """Return the object in a pickle, with tensors in place of NumPy arrays.

    Text of Python 2 is read as Latin-1, as the files of Detectron and Detectron2 need.

    Raises:
        UnpicklingError: it names anything but NumPy arrays and plain containers, or an array is inconsistent.
    """
    return _tensors(_Reader(io.BytesIO(content), encoding="latin1").load())


class _Reader(_Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the function of this module that stands for a name in the file."""
        if (module, name) not in _NAMES:
            raise UnpicklingError(f"it refers to {module}.{name}, and nothing from a file is run")
        return _NAMES[module, name]


class _DType:
    """Stands for `numpy.dtype`: a number of a fixed size and byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = _text(code).lstrip("<>|="), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = _text(state[1])

    def resolve(self) -> np.dtype:
        if self.code not in DTYPES or self.order not in ("<", ">", "|", "="):
            raise UnpicklingError(f"it has an array of type {self.code[:20]!r}, which is no number")
        return np.dtype(self.order + self.code)


class _Array:
    """Stands for `numpy.ndarray`, empty until its state is set."""

    tensor: Tensor

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.tensor = _tensor(data, dtype, shape, "F" if fortran else "C")


def _empty_array(*_: Any) -> _Array:
    return _Array()


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.tensor = _tensor(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> float | int:
    return _tensor(data, dtype, (), "C").item()


def _no_bytes() -> bytes:
    return b""


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UnpicklingError(f"it encodes text as {encoding[:20]!r}")
    return text.encode("latin1")


def _tensor(data: Any, dtype: Any, shape: Sequence[int], order: Any) -> Tensor:
    """Return the tensor of raw bytes, which Python 2 stored as text."""
    if not isinstance(dtype, _DType):
        raise UnpicklingError("it has an array without a type")
    number = dtype.resolve()
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    array = np.frombuffer(raw, number).reshape(shape, order="F" if order == "F" else "C")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _tensors(value: Any) -> Any:
    """Return containers with tensors in place of arrays."""
    if isinstance(value, _Array):
        return value.tensor
    if isinstance(value, dict):
        return {key: _tensors(item) for key, item in value.items()}
    return [_tensors(item) for item in value] if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
}
for _module in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _NAMES[f"{_module}.multiarray", "_reconstruct"] = _empty_array
    _NAMES[f"{_module}.multiarray", "scalar"] = _scalar
    _NAMES[f"{_module}.numeric", "_frombuffer"] = _array_from_buffer
