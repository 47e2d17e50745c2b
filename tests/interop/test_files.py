"""Files of weights: torch's, safetensors, and pickles of NumPy arrays; what could run code is refused."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maskrcnn.errors import InputError
from maskrcnn.interop.files import read_content, read_weights, state_dict_of
from maskrcnn.interop.layouts import TORCHVISION

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">f4"),
    "counts": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float16),
}


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_and_plain_containers(tmp_path: Path, protocol: int) -> None:
    content = {
        "model": OrderedDict(ARRAYS),
        "__author__": "someone",
        "notes": [1, 2.5, None, True, ("a", b"b"), np.float32(0.5)],
    }
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = read_content(path)
    assert loaded["notes"] == [1, 2.5, None, True, ["a", b"b"], 0.5]
    for name, tensor in state_dict_of(loaded, "zoo.pkl").items():
        assert np.array_equal(tensor.numpy(), ARRAYS[name])
        assert tensor.numpy().dtype == ARRAYS[name].dtype.newbyteorder("=")


def python_2_array(code: bytes, data: bytes) -> bytes:
    """Return the pickle of {"w": array} as Python 2 writes it: the bytes of the array of two numbers as text."""
    dtype = b"cnumpy\ndtype\n(U\x02" + code + b"K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    return b"\x80\x02}U\x01w" + array + b"(K\x01(K\x02t" + dtype + b"\x89U" + bytes([len(data)]) + data + b"tbs."


def test_arrays_of_python_2(tmp_path: Path) -> None:
    (tmp_path / "old.pkl").write_bytes(python_2_array(b"f4", np.array([1, -2], np.float32).tobytes()))
    assert read_content(tmp_path / "old.pkl")["w"].tolist() == [1.0, -2.0]


def pickled(value: Callable[[Path], Any]) -> Callable[[Path, Path], object]:
    return lambda path, proof: path.write_bytes(pickle.dumps({"model": value(proof)}))


def opcodes(code: bytes) -> Callable[[Path, Path], object]:
    return lambda path, proof: path.write_bytes(code)


def torch_file(path: Path, proof: Path) -> None:
    torch.save({"model": Evil(proof)}, path)


def huge_header(path: Path, proof: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def outside(path: Path, proof: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("call.pkl", pickled(Evil), r"it refers to (posix|nt)\.mkdir, and nothing from a file is run"),
        ("class.pkl", pickled(lambda proof: Path("x")), "it refers to pathlib"),
        ("getattr.pkl", opcodes(b"\x80\x02c__builtin__\ngetattr\n."), "it refers to __builtin__.getattr"),
        ("dotted.pkl", opcodes(b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93."), "it refers to numpy.ndarray.dumps"),
        ("objects.pkl", pickled(lambda proof: np.array([None, {}], object)), "an array of type 'O8'"),
        ("forged.pkl", opcodes(python_2_array(b"O8", b"A" * 16)), "an array of type 'O8', which is no number"),
        ("short.pkl", opcodes(python_2_array(b"f8", b"A" * 8)), "cannot reshape"),
        ("claims.pkl", opcodes(b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x."), ""),
        ("memo.pkl", opcodes(b"\x80\x02Nr\xff\xff\xff\xff0."), ""),
        ("call.pth", torch_file, "it refers to (posix|nt).mkdir, and nothing from a file is run"),
        ("header.safetensors", huge_header, ""),
        ("outside.safetensors", outside, ""),
        ("pickle.safetensors", pickled(Evil), ""),
    ],
)
def test_hostile_files_are_refused(
    tmp_path: Path, name: str, write: Callable[[Path, Path], object], reason: str
) -> None:
    path, proof = tmp_path / name, tmp_path / "proof"
    write(path, proof)
    with pytest.raises(InputError, match=rf"{name}: this is not a file of tensors that can be read safely.*{reason}"):
        read_weights(path)
    assert not proof.exists()


def test_the_same_weights_in_every_kind_of_file(
    tmp_path: Path, foreign_state: Callable[..., dict[str, torch.Tensor]]
) -> None:
    state = foreign_state(TORCHVISION)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "x.pth")
    save_file(state, tmp_path / "x.safetensors")
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    files = [read_weights(tmp_path / f"x.{suffix}").checkpoint for suffix in ("pth", "safetensors", "pkl")]
    for other in files[1:]:
        assert other.model.keys() == files[0].model.keys()
        assert all(torch.equal(tensor, files[0].model[name]) for name, tensor in other.model.items())
