"""Files -> tensors: safetensors, torch.save, TorchScript, shards of these. Nothing in a file is ever run."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dalle2_fast.checkpoints.errors import CheckpointError, damaged, unreadable
from dalle2_fast.checkpoints.sizes import check_legacy, check_sizes, check_storages, is_stored
from dalle2_fast.checkpoints.torchscript import is_torchscript, read_torchscript

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def read_tensors(path: str | PathLike) -> dict[str, Tensor]:
    """The tensors of one file, or of the shards that an index names.

    Args:
        path: a .safetensors file; a state_dict of torch.save, also under the key "state_dict" as trainers
            store it; a TorchScript archive; or a *.index.json of Hugging Face.

    Returns:
        name -> tensor, on the CPU and in the dtypes of the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds more than tensors.

    Example:
        >>> from dalle2_fast.checkpoints import embedded_path
        >>> tensors = read_tensors(embedded_path() / "model.safetensors")
        >>> tensors["clip.logit_scale"].shape
        torch.Size([])
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        with opened_safetensors(path) as content:
            return {name: content.get_tensor(name) for name in content.keys()}
    if is_torchscript(path):
        return read_torchscript(path)
    return state_dict(read_torch(path), path)


def read_json(path: Path, expected: str = "a JSON object") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        expected: what the error message says was expected.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, of Unicode, of lists nested a thousand deep
        raise unreadable(path, f"damaged, not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected {expected}, got {type(value).__name__}")
    return value


def find_tensors(folder: Path, names: tuple[str, ...]) -> Path:
    """The file of weights in a folder: the first of `names` that exists, else the only file of tensors.

    Raises:
        FileNotFoundError: there is none of them, or several files of tensors.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(others) == 1:
        return others[0]
    came = ", ".join(file.name for file in others[:6]) or "no file of tensors"
    raise FileNotFoundError(f"{folder}: expected {', '.join(names)} or one file of tensors, got {came}")


@contextmanager
def opened_safetensors(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file. CheckpointError if it is truncated or damaged, also while it is read."""
    try:
        with safe_open(path, framework="pt") as content:
            yield content
    except (SafetensorError, OSError) as error:  # the header is none, or does not fit the file's length
        raise damaged(path, error) from None


class Ignored:
    """Stands in the content of a file for an object whose class is not wanted, and runs none of its code.

    Attributes:
        arguments: with which the object was made.
        state: what it was given afterwards, or None.
    """

    arguments: tuple
    state: Any = None

    def __new__(cls, *arguments: Any) -> Ignored:
        ignored = super().__new__(cls)
        ignored.arguments = arguments
        return ignored

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_torch(path: Path, mapped: bool = False, ignored: tuple[str, ...] = ()) -> Any:
    """The content of a file of torch.save, read with weights_only=True: tensors, containers, numbers, text.

    Args:
        path: the file.
        mapped: map the tensors from the file, which is then read when they are used. A file whose records are
            compressed, or that is no zip archive, is read instead.
        ignored: packages, such as "packaging.", of whose classes objects may be in a zip archive. `Ignored`
            takes their place.

    Raises:
        CheckpointError: the file is damaged, or its pickle asks for anything else; nothing in it was run.
    """
    replaced: list[Any] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_sizes(archive, path)
                check_storages(archive)
                mapped = mapped and is_stored(archive)
            if ignored:
                named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                replaced = [(Ignored, name) for name in named if name.startswith(ignored)]
        else:
            check_legacy(path)
            mapped = False
        with torch.serialization.safe_globals(replaced):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's message advises to read the file without protection; only what it found is repeated here.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {found[1]}" if found else "its pickle holds something else"
        raise unreadable(
            path, f"not a file of tensors alone, so it was refused and nothing in it was run ({reason})"
        ) from None
    except Exception as error:  # torch and zipfile raise almost any exception on damaged files
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise MemoryError(f"{path}: not enough memory to read it") from None
        raise damaged(path, str(error).partition(". ")[0]) from None


def state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of what `read_torch` gave; CheckpointError, which names `path`, if it is no state_dict."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: expected a state_dict, got {type(content).__name__}")
    if strange := [str(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        names = ", ".join(strange[:5])
        raise CheckpointError(f"{path}: expected tensors only, got something else in {names}")
    return dict(content)


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: expected a weight_map of file names")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        # An index must not name a file in another folder, nor itself or another index.
        if Path(name).name != name or Path(name).suffix not in SUFFIXES:
            raise CheckpointError(f"{index}: expected names of files of tensors in its folder, got {name!r}")
        tensors |= read_tensors(index.parent / name)
    if missing := sorted(set(places) - set(tensors)):
        raise CheckpointError(f"{index}: its shards lack {len(missing)} tensors ({', '.join(missing[:5])})")
    return tensors
