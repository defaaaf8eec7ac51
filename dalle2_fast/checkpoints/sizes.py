"""The sizes that a file of tensors claims, checked before anything in it is unpickled, inflated or mapped.

torch trusts the lengths in the pickle: it maps compressed records as if they were numbers, reads beyond a
record that is too short, and makes room for storages and records of any size.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

LARGEST_RECORD = 64 << 20  # bytes of a record that is no storage; the pickle of Karlo's decoder has 0.3 MB
# Weights shrink to about 0.9 of their size, those of a new network with many zeros to a third. A file that
# inflates to more than this multiple, plus 64 MB for small files of zeros, is a zip bomb.
LARGEST_RATIO = 20
LEGACY_BEGIN = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # torch's magic number
DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,  # of the dtypes that are younger, such as float8
}


def is_stored(archive: zipfile.ZipFile) -> bool:
    """Whether no record is compressed, so that a storage can be mapped from the file."""
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def check_sizes(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise ValueError if the archive inflates to far more than its file holds."""
    entries = archive.infolist()
    for entry in entries:
        if "/data/" not in entry.filename and entry.file_size > LARGEST_RECORD:
            limit = f"at most {LARGEST_RECORD:,} bytes"
            raise ValueError(f"{entry.filename}: expected {limit}, got {entry.file_size:,}")
    held, inflated = path.stat().st_size, sum(entry.file_size for entry in entries)
    if inflated > LARGEST_RATIO * held + LARGEST_RECORD:
        raise ValueError(f"{held:,} bytes that inflate to {inflated:,} are no weights")


def check_storages(archive: zipfile.ZipFile) -> None:
    """Raise ValueError if a storage of a torch.save file has another length than its pickle says."""
    (pickled,) = (name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
    folder = pickled.removesuffix("data.pkl") + "data/"
    for key, size in _claimed(BytesIO(archive.read(pickled))).items():
        check_length(archive, folder + key, size)


def check_legacy(path: Path) -> None:
    """Raise ValueError if the storages of a file in torch's format before zip archives are longer than it."""
    with open(path, "rb") as file:
        if file.read(len(LEGACY_BEGIN)) != LEGACY_BEGIN:
            return  # torch refuses the file
        # Three more pickles follow: version, machine, content.
        claimed = sum(size for _ in range(3) for size in _claimed(file).values())
    if claimed > path.stat().st_size:
        raise ValueError(f"its tensors claim {claimed:,} bytes")


def check_memory(pickled: BinaryIO) -> None:
    """Raise ValueError if a pickle, up to its end, asks for a memory of objects that it cannot fill.

    Python's unpickler makes room for 2^32 objects, 32 GB, if one is to be stored at that place.
    """
    count = 0
    for opcode, argument, _ in pickletools.genops(pickled):
        count += 1
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise ValueError(f"object {argument:,} of the {count:,} in its pickle")


def check_length(archive: zipfile.ZipFile, name: str, size: int) -> zipfile.ZipInfo:
    """The entry of a storage; ValueError if it has not `size` bytes, KeyError if it is missing."""
    entry = archive.getinfo(name)
    if entry.file_size != size:
        raise ValueError(f"{name.partition('/')[2]}: expected {size} bytes, got {entry.file_size}")
    return entry


def _claimed(pickled: BinaryIO) -> dict[str, int]:
    """Storage -> the bytes that a pickle says it has; the file is read up to the end of the pickle."""
    begin = pickled.tell()
    check_memory(pickled)
    pickled.seek(begin)
    reader = _Lengths(pickled)
    reader.load()
    return reader.sizes


class _Inert:
    """Stands for every class and function that a pickle names, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    add = extend = append


class _Lengths(pickle.Unpickler):
    """Collects the lengths of the storages that a pickle refers to; nothing that it names is looked up."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return DTYPES.get(name, _Inert) if module in ("torch", "torch.storage") else _Inert

    def persistent_load(self, identity: Any) -> Any:
        _, dtype, key, _, count, *_ = identity
        if isinstance(dtype, torch.dtype):  # torch refuses the others
            self.sizes[str(key)] = count * dtype.itemsize
        return _Inert()
