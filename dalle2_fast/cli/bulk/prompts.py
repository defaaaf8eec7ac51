"""The captions of `generate --prompts FILE`: read from text, CSV, JSON lines or Parquet, checked at once."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle2_fast.data.text.tokenizer import Tokenizer

COLUMNS = ("caption", "text")  # the first one that a file has, in any case
SHOWN = 10  # captions with an error that are named


def read_prompts(path: Path) -> list[str]:
    """The captions of a file, in its order.

    Args:
        path: .csv or .tsv (with a header), .jsonl (an object or a string per line) or .parquet with a column
            "caption" or "text"; any other name is text with one caption per line; "-" is such a text on
            standard input.

    Returns:
        The captions, at least one.

    Raises:
        OSError: the file cannot be read.
        ImportError: a .parquet file needs pyarrow.
        ValueError: it has no such column, no caption, or is not what its name says.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "two.jsonl")
        >>> _ = path.write_text('{"text": "a red ring"}\\n"a star"\\n')
        >>> read_prompts(path)
        ['a red ring', 'a star']
    """
    read = READERS.get(path.suffix.lower(), _read_text)
    try:
        prompts = list(read(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"--prompts: no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts: {path}: expected text in UTF-8 ({error})") from None
    if not prompts:
        raise ValueError(f"--prompts: {path}: expected at least one caption, got none")
    return prompts


def check_prompts(prompts: Sequence[str], tokenizer: Tokenizer, path: Path) -> None:
    """Raise one error for all captions that the tokenizer refuses.

    Args:
        prompts: the captions of the file.
        tokenizer: of the checkpoint.
        path: of the file, for the message.

    Raises:
        ValueError: a caption is empty, too long or has an unknown word; the first 10 of them are named.
    """
    wrong = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            if not prompt.strip():
                raise ValueError("it is empty")
            tokenizer.encode([prompt])
        except ValueError as error:
            wrong.append(f"caption {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"--prompts: {path}: {len(wrong)} of {len(prompts)} captions cannot be used: "
            f"{'; '.join(wrong[:SHOWN])}{more}"
        )


def _text(path: Path) -> str:
    if str(path) == "-":
        return sys.stdin.buffer.read().decode("utf-8-sig")
    return path.read_bytes().decode("utf-8-sig")  # Windows programs begin a text with a mark


def _read_text(path: Path) -> Iterator[str]:
    # Not splitlines, which also splits at form feeds and other rare letters.
    lines = _text(path).replace("\r\n", "\n").removesuffix("\n")
    yield from (line.strip() for line in lines.split("\n")) if lines else ()


def _read_csv(path: Path) -> Iterator[str]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        column = _column(rows.fieldnames or (), path)
        for row in rows:
            yield (row[column] or "").strip()
    except csv.Error as error:
        raise ValueError(f"--prompts: {path}: line {rows.line_num}: {error}") from None


def _read_json_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_text(path).removesuffix("\n").split("\n"), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--prompts: {path}: line {number}: expected JSON ({error})") from None
        if isinstance(entry, dict):
            entry = entry[_column(tuple(entry), path, f"line {number}: ")]
        if not isinstance(entry, str):
            raise ValueError(f"--prompts: {path}: line {number}: expected a caption, got {entry!r}")
        yield entry.strip()


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "--prompts: a .parquet file needs pyarrow, which is not installed: pip install "
            "'dalle2-fast[train]'"
        ) from error
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        file = parquet.ParquetFile(path)
        column = _column(file.schema_arrow.names, path)
        for batch in file.iter_batches(columns=[column]):
            yield from ("" if value is None else str(value).strip() for value in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        raise ValueError(f"--prompts: {path}: not a Parquet file ({error})") from None


def _column(names: Sequence[str], path: Path, where: str = "") -> str:
    for wanted in COLUMNS:
        for name in names:
            if str(name).strip().lower() == wanted:
                return name
    raise ValueError(
        f"--prompts: {path}: {where}expected a column {' or '.join(COLUMNS)}, got "
        f"{', '.join(map(str, names[:10])) or 'none'}"
    )


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet,
}  # fmt: skip
