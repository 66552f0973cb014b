from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from hsnn_core import arrayfile
from hsnn_core.arrayfile import open_arrays, write_arrays
from hsnn_core.errors import FormatError

GOLDEN = Path(__file__).parent / "golden"


def sample() -> tuple[dict[str, np.ndarray], dict]:
    arrays = {
        "item_ids": np.array([10, -3, 2**62], dtype=np.int64),
        "embedding": np.arange(6, dtype=np.float32).reshape(2, 3) / 4,
        "half": np.array([0.5, -2.0], dtype=np.float16),
        "mask": np.array([[True], [False]]),
        "empty": np.empty((0, 4), dtype=np.int32),
        "scalar": np.array(7, dtype=np.uint8),
    }
    return arrays, {"schema": "0123456789abcdef", "layers": 3}


def test_every_past_version_still_opens():
    arrays, meta = sample()
    golden = sorted(GOLDEN.glob("arrays_v*.hsnn"))
    assert golden[-1].name == f"arrays_v{arrayfile.FORMAT_VERSION}.hsnn"
    for path in golden:
        found = open_arrays(path, "golden")
        assert found.meta == meta
        assert list(found.arrays) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found.arrays[name], array)
            assert found.arrays[name].dtype == array.dtype
            assert found.arrays[name].shape == array.shape


def test_todays_writer_writes_the_golden_bytes(tmp_path):
    write_arrays(tmp_path / "again.hsnn", "golden", *sample())
    golden = GOLDEN / f"arrays_v{arrayfile.FORMAT_VERSION}.hsnn"
    assert (tmp_path / "again.hsnn").read_bytes() == golden.read_bytes()


def test_round_trip_of_views_and_byte_orders(tmp_path):
    path = tmp_path / "x.hsnn"
    big = np.arange(12, dtype=">i4").reshape(3, 4)
    write_arrays(path, "test", {"big": big, "columns": big[:, ::2], "flipped": big.T[::-1]})
    found = open_arrays(path, "test").arrays
    np.testing.assert_array_equal(found["big"], big)
    np.testing.assert_array_equal(found["columns"], big[:, ::2])
    np.testing.assert_array_equal(found["flipped"], big.T[::-1])
    assert os.listdir(tmp_path) == ["x.hsnn"]


def test_arrays_are_aligned_read_only_views(tmp_path):
    path = tmp_path / "x.hsnn"
    write_arrays(path, "test", {"a": np.arange(3), "b": np.arange(5, dtype=np.int8), "c": np.empty(0)})
    found = open_arrays(path, "test").arrays
    for array in found.values():
        assert not array.flags.writeable
    assert found["b"].ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 1
    # An open file keeps its content when the path is replaced.
    write_arrays(path, "test", {"a": np.zeros(3, dtype=np.int64)})
    assert found["a"].tolist() == [0, 1, 2]


@pytest.fixture
def path(tmp_path) -> Path:
    write_arrays(tmp_path / "x.hsnn", "test", {"a": np.arange(100), "b": np.ones(3)}, {"note": "hello"})
    return tmp_path / "x.hsnn"


def edited(path: Path, position: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[position : position + len(data)] = data
    path.write_bytes(bytes(content))


def test_missing(tmp_path):
    with pytest.raises(FormatError, match=r"none.hsnn: cannot be read \(No such file or directory\)"):
        open_arrays(tmp_path / "none.hsnn", "test")


def test_wrong_magic(path):
    edited(path, 0, b"PK")
    with pytest.raises(FormatError, match=r"starts with b'PKNNARR.*expected b'HSNNARR.*not an array file"):
        open_arrays(path, "test")
    path.write_bytes(b"")
    with pytest.raises(FormatError, match=r"starts with b''.*not an array file"):
        open_arrays(path, "test")


def test_wrong_version(path):
    edited(path, 8, b"\2")
    with pytest.raises(FormatError, match="x.hsnn: format version 2, expected 1; write it again"):
        open_arrays(path, "test")


def test_wrong_kind(path):
    with pytest.raises(FormatError, match="x.hsnn: holds kind 'test', expected 'index'"):
        open_arrays(path, "index")


@pytest.mark.parametrize("keep", [20, 200, -1])
def test_truncated(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    length = len(content[:keep])
    with pytest.raises(FormatError, match=rf"x.hsnn: truncated: {length} bytes, expected (at least )?\d+"):
        open_arrays(path, "test")


def test_too_long(path):
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(FormatError, match="x.hsnn: too long"):
        open_arrays(path, "test")


def test_edited_payload(path):
    content = path.read_bytes()
    edited(path, len(content) - 500, b"\x55")
    with pytest.raises(FormatError) as caught:
        open_arrays(path, "test")
    start = arrayfile._aligned(16 + int.from_bytes(content[12:16], "little"))
    expected = hashlib.sha256(content[start:]).hexdigest()
    got = hashlib.sha256(path.read_bytes()[start:]).hexdigest()
    assert str(caught.value) == (
        f"{path}: damaged or edited: its payload has sha256 {got}, expected {expected}; "
        "restore it or write it again"
    )
    assert open_arrays(path, "test", verify=False).meta == {"note": "hello"}


def test_edited_header(path):
    edited(path, 20, b"\xff\xff")
    with pytest.raises(FormatError, match="damaged: its header is not the expected JSON"):
        open_arrays(path, "test")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "<i8", "shape": [200], "offset": 0, "nbytes": 800},
        {"dtype": "<i8", "shape": [100], "offset": 10**6, "nbytes": 800},
        {"dtype": "<i8", "shape": [-1, -100], "offset": 0, "nbytes": 800},
        {"dtype": "|O", "shape": [100], "offset": 0, "nbytes": 800},
        {"dtype": "nonsense", "shape": [100], "offset": 0, "nbytes": 800},
        {"shape": [100]},
    ],
)
def test_impossible_array(path, entry):
    content = path.read_bytes()
    length = int.from_bytes(content[12:16], "little")
    header = json.loads(content[16 : 16 + length])
    payload = content[arrayfile._aligned(16 + length) :]
    header["arrays"]["a"] = entry
    text = json.dumps(header).encode()
    start = content[:12] + len(text).to_bytes(4, "little") + text
    path.write_bytes(start + bytes(arrayfile._aligned(len(start)) - len(start)) + payload)
    with pytest.raises(FormatError, match="x.hsnn: damaged: array 'a' is described as"):
        open_arrays(path, "test")


def test_dtype_that_cannot_be_stored(tmp_path):
    with pytest.raises(FormatError, match="array 'names' is <U2, expected bool, integers or floats"):
        write_arrays(tmp_path / "x.hsnn", "test", {"names": np.array(["ab"])})
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arrayfile.os, "fsync", full)
    with pytest.raises(
        FormatError, match=r"could not write \d+ bytes \(No space left on device\); make room"
    ):
        write_arrays(path, "test", {"a": np.zeros(5)})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
