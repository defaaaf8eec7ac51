"""Lists of pictures in files: CSV, Parquet, and the metadata of Hugging Face's imagefolder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from dalle2_fast.data.samples import text_of
from dalle2_fast.data.sources.files import FileList

LISTS = (".csv", ".tsv", ".parquet")
METADATA = ("metadata.jsonl", "metadata.csv")  # of imagefolder
IMAGE_COLUMNS = ("image", "path", "file_name", "image_path", "filepath", "jpg", "jpeg", "png", "webp", "url")
CAPTION_COLUMNS = ("caption", "text", "captions")


def read_lists(paths: Sequence[str]) -> FileList:
    """The pairs of CSV files and of Parquet files with paths.

    Raises:
        ValueError: a file cannot be read as a list, or has no such columns; or its pictures are not local.
        ImportError: pyarrow is not installed, which reads Parquet.
    """

    def entries() -> Iterator[tuple[str, str, str]]:
        for name in paths:
            path = Path(name)
            rows = {".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix.lower(), _csv)(path)
            yield from _entries(path, rows)

    return FileList(paths[0] if len(paths) == 1 else f"{len(paths)} lists ({paths[0]} ...)", entries())


def choose_columns(where: str, columns: Sequence[str]) -> tuple[str, str, str | None]:
    """The columns of image, caption and key; case is ignored.

    Raises:
        ValueError: there is no column for the image or for the caption.

    Example:
        >>> choose_columns("a.csv", ["URL", "TEXT", "path"])
        ('path', 'TEXT', None)
    """
    lowered = {name.lower(): name for name in reversed(columns)}
    image = next((lowered[name] for name in IMAGE_COLUMNS if name in lowered), None)
    caption = next((lowered[name] for name in CAPTION_COLUMNS if name in lowered), None)
    if image is None or caption is None:
        what, names = ("image", IMAGE_COLUMNS) if image is None else ("caption", CAPTION_COLUMNS)
        got = ", ".join(filter(str.isprintable, columns[:20])) or "none"
        raise ValueError(f"data: {where}: expected a column of the {what} ({', '.join(names)}), got {got}")
    return image, caption, lowered.get("key")


def _entries(path: Path, rows: Iterator[dict]) -> Iterator[tuple[str, str, str]]:
    first = next(rows, None)
    if first is None:
        return
    image_column, caption_column, key_column = choose_columns(str(path), list(filter(None, first)))
    folder = path.parent.resolve()
    for row in _chain(first, rows):
        image = row.get(image_column)
        if not isinstance(image, str) or not image or "\0" in image:
            continue
        if image.startswith("file://"):
            image = image.removeprefix("file://")
        elif "://" in image:
            raise ValueError(
                f"data: {path}: expected paths of local pictures in the column {image_column}, got "
                f"{image[:80]}; img2dataset downloads them, and the folder that it makes can be given instead"
            )
        key = row.get(key_column) if key_column else None
        key = str(PurePosixPath(image).with_suffix("")) if key in (None, "") else str(key)
        yield str(folder / _valid(image)), _valid(text_of(row.get(caption_column)) or ""), _valid(key)


def _valid(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON may hold and no file can."""
    return text.encode(errors="replace").decode()


def _chain(first: dict, rows: Iterator[dict]) -> Iterator[dict]:
    yield first
    yield from rows


def _csv(path: Path) -> Iterator[dict]:
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = data.decode(encoding, errors="replace")
    header = text.partition("\n")[0]
    delimiter = max(",\t;", key=header.count)
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    except csv.Error as error:
        raise ValueError(f"data: {path}: it is no CSV list: {error}") from error


def _jsonl(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"data: {path}, line {number}: it is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"data: {path}, line {number}: expected a JSON object, got {line[:40]!r}")
            yield row


def _parquet(path: Path) -> Iterator[dict]:
    from dalle2_fast.data.sources.arrow import import_pyarrow, line_of, open_parquet

    file = open_parquet(str(path))
    columns = choose_columns(str(path), file.schema_arrow.names)
    try:
        for batch in file.iter_batches(columns=[name for name in columns if name is not None]):
            yield from batch.to_pylist()
    except (OSError, UnicodeError, import_pyarrow().ArrowException) as error:
        raise ValueError(f"data: {path}: it is a damaged Parquet file: {line_of(error)}") from error
