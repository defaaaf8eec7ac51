"""What can be done to a file of torch.save or TorchScript: its pickle, its storages, its zip archive."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from tests.hostile.damage import FLIPPED, Damage, void

BOMB = 1 << 29  # bytes


class Code:
    """A pickle of it runs a command that creates the file named in the environment."""

    def __reduce__(self):
        return os.system, ('touch "$DALLE2_FAST_SENTINEL"',)


def rewrite_zip(
    change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED
) -> Damage:
    def damage(path: Path) -> None:
        if not zipfile.is_zipfile(path):
            return
        out = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
            for name in old.namelist():
                data = change(name, old.read(name))
                if data is not None:
                    new.writestr(name, data)
        path.write_bytes(out.getvalue())

    return damage


def is_storage(name: str, number: str = "0") -> bool:
    return name.endswith(f"/data/{number}")


def deflating(file: io.BytesIO) -> zipfile.ZipFile:
    return zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)


def zip_bomb(path: Path) -> None:
    """One storage inflates to half a gigabyte; the pickle says nothing of that."""
    records = io.BytesIO()
    with zipfile.ZipFile(path) as old, deflating(records) as new:
        for name in old.namelist():
            new.writestr(name, bytes(BOMB) if is_storage(name) else old.read(name))
    path.write_bytes(records.getvalue())


@cache
def bomb(record: str, filling: bytes, claimed: int) -> bytes:
    """A file of one tensor, with half a gigabyte in one of its records.

    Args:
        record: the end of the record's name.
        filling: the byte that is appended to it, until it has that length.
        claimed: how many numbers the pickle says the tensor has.
    """
    small, large = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": {"x": torch.zeros(16)}}, small)
    with zipfile.ZipFile(small) as old, deflating(large) as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"K\x10", b"J" + struct.pack("<i", claimed))
            new.writestr(name, data.ljust(BOMB, filling) if name.endswith(record) else data)
    return large.getvalue()


def huge_memo(path: Path) -> None:
    """A pickle that stores one object at place 2^31 of its memory."""
    body = b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b"."
    rewrite_zip(lambda name, data: body if name.endswith("data.pkl") else data)(path)


def legacy(path: Path) -> None:
    """The format before zip archives, with a storage that claims 10^12 numbers."""
    out = io.BytesIO()
    torch.save({"state_dict": {"x": torch.zeros(16)}}, out, _use_new_zipfile_serialization=False)
    path.write_bytes(out.getvalue().replace(b"K\x10", b"\x8a\x06" + (10**12).to_bytes(6, "little")))


def code_in_pickle(path: Path) -> None:
    rewrite_zip(lambda name, data: pickle.dumps(Code(), 2) if name.endswith("data.pkl") else data)(path)


def nested_pickle(path: Path) -> None:
    """100,000 tuples inside each other, which only an iterative reader survives."""
    body = b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."
    rewrite_zip(lambda name, data: body if name.endswith("data.pkl") else data)(path)


def sparse_tensors(path: Path) -> None:
    torch.save({"state_dict": {"x": torch.eye(3).to_sparse()}, "y": torch.eye(3).to_sparse()}, path)


def flip_first_storage(path: Path) -> None:
    """The first byte of the largest storage, found by its content."""
    with zipfile.ZipFile(path) as archive:
        largest = max((x for x in archive.infolist() if "/data/" in x.filename), key=lambda x: x.file_size)
        content = archive.read(largest)
    data = bytearray(path.read_bytes())
    place = data.index(content)
    data[place + 3] ^= 0x40  # of the exponent, so that the difference is large
    path.write_bytes(data)


def traversal(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../../../tmp/dalle2_fast_escaped", b"escaped")


TORCH: dict[str, Damage] = {
    "code in the pickle": code_in_pickle,
    "code in a plain pickle": lambda path: void(path.write_bytes(pickle.dumps({"state_dict": Code()}))),
    "a pickle nested deeply": nested_pickle,
    "deflated": rewrite_zip(lambda name, data: data, zipfile.ZIP_DEFLATED),
    "a zip bomb": zip_bomb,
    "a zip bomb that says so": lambda path: void(path.write_bytes(bomb("/data/0", b"\0", BOMB // 4))),
    "a pickle of half a gigabyte": lambda path: void(path.write_bytes(bomb("/data.pkl", b"N", 16))),
    "a pickle with a memory of 2^31": huge_memo,
    "10^12 numbers in the legacy format": legacy,
    "a long storage": rewrite_zip(lambda name, data: data + bytes(64) if is_storage(name) else data),
    "a storage is missing": rewrite_zip(lambda name, data: None if is_storage(name) else data),
    "a short storage": rewrite_zip(lambda name, data: data[: len(data) // 2] if is_storage(name) else data),
    "sparse tensors": sparse_tensors,
    "a member outside of the archive": traversal,
    "no dictionary": lambda path: torch.save([1, 2], path),
    FLIPPED: flip_first_storage,
    "numbers for tensors": lambda path: torch.save({"state_dict": {"model.x": 3}}, path),
}
