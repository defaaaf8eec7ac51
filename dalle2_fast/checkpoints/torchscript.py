"""The tensors of a TorchScript archive, read without running or compiling anything in it.

OpenAI published CLIP as such archives: a zip file with the code of the model, its modules as a pickle, and
the storages of its tensors as raw bytes. `torch.jit.load` compiles the code, and
`torch.load(weights_only=True)` refuses the file. Here the code is not read, and the pickle reaches no class
or function except those below, which do nothing.
"""

from __future__ import annotations

import math
import pickle
import zipfile
import zlib
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle2_fast.checkpoints.errors import unreadable
from dalle2_fast.checkpoints.sizes import DTYPES, check_length, check_memory, check_sizes


def is_torchscript(path: str | PathLike) -> bool:
    """Whether a file is a zip archive as `torch.jit.save` writes it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # damage raises when the tensors are read
        return False


def read_torchscript(path: str | PathLike) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive.

    Args:
        path: the archive.

    Returns:
        Dotted name -> tensor, on the CPU and in the dtypes of the file.

    Raises:
        CheckpointError: the file is damaged, or its pickle asks for anything that is not a tensor.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_sizes(archive, Path(path))
            (pickled,) = (name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            root = _Reader(archive, pickled).load()
            return _tensors(root)
    except (
        pickle.UnpicklingError, zipfile.BadZipFile, KeyError, IndexError, ValueError, TypeError, EOFError,
        AttributeError, RuntimeError, NotImplementedError, OverflowError, MemoryError, zlib.error,
    ) as error:  # fmt: skip
        raise unreadable(Path(path), f"damaged or not a TorchScript archive of tensors ({error})") from None


class _Module:
    """Stands for every class of the archive: it stores its attributes and does nothing else."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """An unpickler that knows only tensors, lists, dicts and `_Module`."""

    def __init__(self, archive: zipfile.ZipFile, pickled: str) -> None:
        content = archive.read(pickled)
        check_memory(BytesIO(content))
        super().__init__(BytesIO(content))
        self.archive, self.folder = archive, pickled.removesuffix("data.pkl") + "data/"
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":
            return _contents
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a tensor; nothing was run")

    def persistent_load(self, identity: tuple) -> Tensor:
        kind, dtype, key, _, count = identity  # the device that it came from is ignored
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"expected a storage, got {kind!r}")
        if key not in self.storages:
            entry = check_length(self.archive, self.folder + str(key), count * dtype.itemsize)
            data = self.archive.read(entry)
            numbers = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self.storages[key] = numbers
        return self.storages[key]


def _view(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride), default=0) < 0 or (math.prod(size) and last >= storage.numel()):
        raise ValueError(f"a tensor of {tuple(size)} reaches outside of its {storage.numel()} numbers")
    return torch.as_strided(storage, size, stride, offset)


def _contents(values: Any, *_: Any) -> Any:
    return values


def _tensors(root: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    open_modules = [("", root)]
    while open_modules:
        prefix, module = open_modules.pop()
        if id(module) in seen or not isinstance(module.state, dict):
            continue
        seen.add(id(module))
        for name, value in module.state.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                open_modules.append((f"{prefix}{name}.", value))
    return found
