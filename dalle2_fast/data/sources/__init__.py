"""The kinds of data: what a path is, and the source that reads it."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle2_fast.data.samples import IMAGE_KEYS
from dalle2_fast.data.sources.base import PairSource
from dalle2_fast.data.sources.files import PictureFolder, walk
from dalle2_fast.data.sources.lists import LISTS, METADATA, read_lists
from dalle2_fast.data.sources.streamed import import_webdataset
from dalle2_fast.data.sources.tars import TarShards
from dalle2_fast.data.tar import is_compressed

KINDS = (
    "tar shards (a path or URL, data-{000..099}.tar, *.tar, or a folder of them), a folder of pictures "
    f"(NAME.{', '.join(IMAGE_KEYS)}) with captions (NAME.txt, caption, json), a CSV or Parquet list, a "
    "folder with metadata.jsonl, or a folder that Hugging Face datasets saved"
)


@dataclass(frozen=True)
class StreamedNames:
    """Shards that can only be read from the beginning to the end."""

    names: list[str]
    kind: str = "streamed shards"


def open_source(
    data: str | Path | Sequence[str | Path], *, rank: int = 0, world_size: int = 1, allow_pipe: bool = False
) -> PairSource | StreamedNames:
    """The source of what `data` is.

    Args:
        data: as of PairStream.
        rank, world_size: of this process; each begins to list shards at another one.
        allow_pipe: accept shards that are commands.

    Raises:
        FileNotFoundError: there is no file at `data`.
        ValueError: it is none of KINDS, or its files are damaged; or there are fewer shards that can only be
            streamed than processes.
        ImportError: a library that reads this kind is not installed.
    """
    kind, files = recognise(data)
    commands = [name for name in files if name.startswith("pipe:")]
    if commands and not allow_pipe:
        raise ValueError(
            f"data: {commands[0][:80]!r} is a command that this process would run; --allow-pipe "
            "(allow_pipe=True) accepts it, got none"
        )
    if kind == "folder":
        return PictureFolder(Path(files[0]))
    if kind == "list":
        return read_lists(files)
    if kind == "arrow":
        from dalle2_fast.data.sources.arrow import ArrowRows

        return ArrowRows(files)
    if any(map(_is_remote, files)):
        import_webdataset()
    if any(map(is_streamed, files)):
        if len(files) < world_size:
            raise ValueError(
                f"data: each of {world_size} processes streams shards of its own: expected at least "
                f"{world_size}, got {len(files)} (local, uncompressed ones are shared sample by sample)"
            )
        return StreamedNames(files)
    return TarShards(files, first=rank * len(files) // world_size)


def recognise(data: str | Path | Sequence[str | Path]) -> tuple[str, list[str]]:
    """What `data` is: "tar", "folder", "list" or "arrow", and its files (or the folder of pictures).

    Raises:
        as of `open_source`.

    Example:
        >>> recognise("https://host/data-{1..2}.tar")
        ('tar', ['https://host/data-1.tar', 'https://host/data-2.tar'])
    """
    if isinstance(data, str | Path) and not _is_remote(str(data)) and Path(data).is_dir():
        return _recognise_folder(Path(data))
    files = list(_expand(data))
    if not files:
        raise ValueError("data: expected at least one shard, got none")
    endings = {Path(name).suffix.lower() if not _is_remote(name) else "" for name in files}
    if endings <= set(LISTS):
        return _kind_of_lists(files), files
    if endings & set(LISTS):
        raise ValueError(f"data: expected files of one kind, got {', '.join(sorted(endings))}")
    return "tar", files


def data_files(data: str | Path | Sequence[str | Path]) -> list[str]:
    """The files and URLs that `data` is read from, in order; for a hash that recognises them.

    Raises:
        as of `recognise`.
    """
    kind, files = recognise(data)
    if kind != "folder":
        return files
    root = Path(files[0])
    return [str(root / name) for sample in walk(root) for name in sample[1:] if name is not None]


def expand_shards(data: str | Path | Sequence[str | Path]) -> list[str]:
    """The paths and URLs of all shards, in order.

    Args:
        data: a path or URL, with braces or wildcards, a folder of .tar files, or a list of these.

    Raises:
        ImportError: braces need the library braceexpand, which comes with webdataset.
        FileNotFoundError: a local shard does not exist, or a folder has no .tar file.
        ValueError: `data` is an empty list.

    Example:
        >>> expand_shards("https://host/data-{1..2}.tar")
        ['https://host/data-1.tar', 'https://host/data-2.tar']
    """
    if not (files := list(_expand(data))):
        raise ValueError("data: expected at least one shard, got none")
    return files


def _recognise_folder(folder: Path) -> tuple[str, list[str]]:
    from dalle2_fast.data.sources.arrow import saved_dataset_files

    if (files := saved_dataset_files(folder)) is not None:
        return "arrow", files
    if files := sorted(map(str, folder.glob("*.tar"))):
        return "tar", files
    for place in (folder, folder / "train"):  # imagefolder has its metadata there
        if files := [str(place / name) for name in METADATA if (place / name).is_file()]:
            return "list", files[:1]
    if any(sample.image is not None for sample in walk(folder)):
        return "folder", [str(folder)]
    for ending in LISTS:  # also those that lie next to the folders of a download
        if files := sorted(map(str, folder.glob(f"*{ending}"))):
            return _kind_of_lists(files), files
    raise ValueError(f"data: {folder} has no data that are read here: expected {KINDS}")


def _kind_of_lists(files: list[str]) -> str:
    if not files[0].lower().endswith(".parquet"):
        return "list"
    from dalle2_fast.data.sources.arrow import holds_images

    return "arrow" if holds_images(files[0]) else "list"


def _expand(data: str | Path | Sequence[str | Path]) -> Iterator[str]:
    for pattern in [data] if isinstance(data, str | Path) else data:
        names = [str(pattern)]
        if "{" in names[0] and not Path(names[0]).exists():
            names = list(_braces(names[0]))
        for name in names:
            if _is_remote(name):
                yield name
                continue
            found = Path(name).glob("*.tar") if Path(name).is_dir() else glob.glob(name)
            found = [name] if os.path.isfile(name) else sorted(map(str, found))
            if not found:
                raise FileNotFoundError(f"data: no file at {name}: expected {KINDS}")
            yield from found


def _braces(pattern: str) -> Iterator[str]:
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise ImportError(
            "data: braces need the library braceexpand, which comes with webdataset, which is not installed: "
            "pip install 'dalle2-fast[train]'"
        ) from error
    return braceexpand(pattern)


def _is_remote(name: str) -> bool:
    return "://" in name or name.startswith("pipe:")


def is_streamed(name: str) -> bool:
    """Whether a shard can only be read from the beginning to the end."""
    if _is_remote(name):
        return True
    try:
        with open(name, "rb") as file:
            return is_compressed(file.read(6))
    except OSError:  # is reported when it is listed
        return False
