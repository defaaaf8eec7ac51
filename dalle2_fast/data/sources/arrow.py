"""Arrow tables that hold the pictures themselves: folders of Hugging Face `datasets`, and Parquet files.

A saved dataset is mapped into memory, and every row is read in its place. Parquet is compressed by row
groups: samples are shuffled within a few of them, which each process keeps decompressed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from dalle2_fast.data.samples import text_of
from dalle2_fast.data.sources.base import (
    ROWS,
    Pair,
    Remembered,
    SampleError,
    held_out_mask,
)
from dalle2_fast.data.sources.files import read_file
from dalle2_fast.data.sources.lists import choose_columns

GROUPS = 8  # row groups whose samples are shuffled together; twice as many stay in memory


class ArrowRows:
    """A `PairSource` of tables with an image column and a caption column.

    Args:
        paths: of .arrow files as `datasets` saves them, or of .parquet files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths, self.complaints = list(paths), []
        self.kind = "Parquet files" if paths[0].endswith(".parquet") else "Hugging Face dataset"
        self._parts: list[tuple[int, int]] = []  # file and first row, or file and row group
        self.counts, self.names = [], []
        self._columns = []
        groups = []
        for number, path in enumerate(paths):
            if self.kind == "Parquet files":
                file = open_parquet(path)
                names = file.schema_arrow.names
                counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                self._parts += [(number, group) for group in range(len(counts))]
                groups += counts
            else:
                table = _open_arrow(path)
                names, total = table.schema.names, table.num_rows
                _validate(path, table.select([name for name in choose_columns(path, names) if name]))
                counts = [min(ROWS, total - begin) for begin in range(0, total, ROWS)]
                self._parts += [(number, begin) for begin in range(0, total, ROWS)]
            self._columns.append(choose_columns(path, names))
            self.counts += counts
            self.names += [path] * len(counts)
        self.near = GROUPS * int(np.median(groups)) if groups else None
        self._tables = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_tables": None}

    def held_out(self, shard: int) -> np.ndarray:
        column = self._columns[self._parts[shard][0]][2]
        keys = (self._key(shard, row) for row in range(self.counts[shard]))
        if column is not None:
            with suppress(SampleError, UnicodeError):  # of rows that cannot be read it does not matter
                table, first = self._table(shard)
                keys = map(str, table.column(column).slice(first, self.counts[shard]).to_pylist())
        return held_out_mask(self.names[shard], keys)

    def count_held_out(self, shard: int) -> int:
        return int(self.held_out(shard).sum())

    def read(self, shard: int, row: int, *, image: bool = True) -> Pair:
        name = self.names[shard]
        image_column, caption_column, key_column = self._columns[self._parts[shard][0]]
        table, first = self._table(shard)
        if first + row >= table.num_rows:
            raise SampleError("shard has changed", name, f"sample {row}")
        key, data = self._key(shard, row), None
        try:
            caption = text_of(table.column(caption_column)[first + row].as_py() or "")
            if key_column is not None:
                key = str(table.column(key_column)[first + row].as_py())
        except UnicodeError as error:
            raise SampleError("caption is no text", name, f"sample {key}") from error
        if image:
            data = self._image(table.column(image_column)[first + row].as_py(), name, key)
        return Pair(data, caption, name, key)

    def _image(self, value: object, name: str, key: str) -> bytes:
        path = None
        if isinstance(value, dict):  # of datasets.Image: bytes, or the path of a file
            path, value = value.get("path"), value.get("bytes")
        if isinstance(value, str):
            path, value = value, None
        if isinstance(value, bytes):
            return value
        if not isinstance(path, str):
            raise SampleError("no image", name, f"sample {key}")
        return read_file(Path(name).parent / path, name, key)

    def _key(self, shard: int, row: int) -> str:
        """The number of a row within its file, or within its row group."""
        first = self._parts[shard][1]
        return f"{first}-{row}" if self.kind == "Parquet files" else str(first + row)

    def _table(self, shard: int):
        """The table that has the rows of a shard, and the first of them."""
        if self._tables is None:
            if self.kind == "Parquet files":
                limit = 2 * GROUPS * max(self.counts)
                self._tables = Remembered(self._read_group, limit)
            else:
                self._tables = Remembered(lambda number: _open_arrow(self._paths[number]), 2**62)
        if self.kind == "Parquet files":
            return self._tables(shard), 0
        number, first = self._parts[shard]
        return self._tables(number), first

    def _read_group(self, shard: int):
        number, group = self._parts[shard]
        path, columns = self._paths[number], [name for name in self._columns[number] if name is not None]
        try:
            return open_parquet(path).read_row_group(group, columns=columns)
        except (OSError, ValueError, import_pyarrow().ArrowException) as error:
            raise SampleError("row group cannot be read", path, f"{group}: {line_of(error)}") from error


def saved_dataset_files(folder: Path) -> list[str] | None:
    """The .arrow files of a folder that `datasets` saved; of several splits, those of "train".

    Returns:
        None if it is no such folder.

    Raises:
        ValueError: it has no split "train", or its files are not in the order of its rows.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits", [])
        if "train" not in splits:
            found = ", ".join(map(str, splits)) or "none"
            raise ValueError(f"data: {folder}: expected a split train, got {found}; give one split's folder")
        folder = folder / "train"
    if not (folder / "state.json").is_file():
        return None
    state = _read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise ValueError(f"data: {folder}: an index reorders its rows: save flatten_indices() instead")
    names = [each.get("filename") for each in state.get("_data_files", []) if isinstance(each, dict)]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"data: {folder}/state.json: expected the names of .arrow files, got {names!r}")
    return [str(folder / name) for name in names]


def holds_images(path: str) -> bool:
    """Whether the image column of a Parquet file holds pictures, not paths."""
    arrow = import_pyarrow()
    schema = open_parquet(path).schema_arrow
    kind = schema.field(choose_columns(path, schema.names)[0]).type
    types = arrow.types
    return types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def open_parquet(path: str):
    """A pyarrow ParquetFile. ImportError without pyarrow; ValueError if the file is none."""
    arrow = import_pyarrow()
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        file.schema_arrow.names  # noqa: B018, they may be no text
        return file
    except (OSError, UnicodeError, arrow.ArrowException) as error:
        raise ValueError(f"data: {path}: it cannot be read as a Parquet file: {line_of(error)}") from error


def _open_arrow(path: str):
    arrow = import_pyarrow()
    import pyarrow.ipc

    try:
        return pyarrow.ipc.open_stream(arrow.memory_map(path)).read_all()
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"data: {path}: it cannot be read as an Arrow stream: {line_of(error)}") from error


def _validate(path: str, table) -> None:
    """Raise ValueError for a damaged table: Arrow does not look, and would read outside of the file."""
    try:
        table.validate(full=True)
    except import_pyarrow().ArrowException as error:
        raise ValueError(f"data: {path}: it is damaged: {line_of(error)}") from error


def line_of(error: Exception) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())[:200]


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {path}: it is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"data: {path}: expected a JSON object")
    return content


def import_pyarrow():
    """The library pyarrow, which reads Parquet and Arrow files."""
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            "data: Parquet files and Hugging Face datasets need the library pyarrow, which is not installed: "
            "pip install 'dalle2-fast[train]'"
        ) from error
    return pyarrow
