"""BPETokenizer: CLIP's byte-pair tokenizer, which reads any text.

The text is cleaned (broken encodings, HTML entities, white space, capitals), cut into words, numerals and
runs of signs, and each of these written as UTF-8 bytes, of which neighbours are merged in the order in which
the merges were learnt (Sennrich et al., arXiv 1508.07909; on bytes: GPT-2). Ids: 256 bytes, 256 bytes that
end a word, one for each merge, begin, end. The ids are those of OpenAI's CLIP and of open_clip.
"""

from __future__ import annotations

import gzip
import heapq
import html
import json
from collections.abc import Sequence
from functools import cache, lru_cache
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

MERGES_FILE = Path(__file__).with_name("clip_merges.txt.gz")
BEGIN, END = "<start_of_text>", "<end_of_text>"
WORD_END = "</w>"
CACHED_WORDS = 100_000


class BPETokenizer:
    """Captions to rows of byte-pair ids: begin, at most context_length - 2 ids of text, end, zeros.

    0 is the id of a real "!", too: where a row ends is known from its `end`, never from zeros.

    context_length: ids of a row, begin and end included.
    merges: "a b" pairs of symbols in the order in which they were learnt; None: OpenAI's 48,894.
    """

    def __init__(self, context_length: int = 77, merges: Sequence[str] | None = None) -> None:
        if not isinstance(context_length, int) or context_length < 3:
            raise ValueError(f"context_length: expected an int >= 3, got {context_length!r}")
        if isinstance(merges, str):
            raise TypeError("merges: expected a sequence of pairs, got a single string")
        self.context_length = context_length
        self.merges = clip_merges() if merges is None else tuple(merges)
        self._ranks, self._names, self._ids = _tables(self.merges)
        self.bos, self.eos = self.vocab_size - 2, self.vocab_size - 1
        self._cache: dict[str, list[int]] = {BEGIN: [self.bos], END: [self.eos]}

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1: 49,408 for OpenAI's merges."""
        return len(self._names)

    def encode(
        self, captions: str | Sequence[str], *, unknown: str = "error", truncate: bool = False
    ) -> Tensor:
        """int64 [captions, context_length]. An empty caption is begin and end: CLIP's "no text".

        unknown: as of WordTokenizer, without effect: there are no unknown words.
        truncate: cut over-long captions, which keep their end, instead of raising ValueError.
        """
        if unknown not in ("error", "token"):
            raise ValueError(f'unknown: expected "error" or "token", got {unknown!r}')
        captions = [captions] if isinstance(captions, str) else list(captions)
        rows = [self._encode(caption, truncate) for caption in captions]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.context_length)

    def _encode(self, caption: str, truncate: bool) -> list[int]:
        if not isinstance(caption, str):
            raise TypeError(f"captions: expected str, got {type(caption).__name__}")
        ids, room = self.tokenize(caption), self.context_length - 2
        if len(ids) > room and not truncate:
            raise ValueError(f"the caption has {len(ids)} tokens: expected at most {room}")
        ids = ids[:room]
        return [self.bos, *ids, self.eos] + [0] * (room - len(ids))

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text of any length, without begin, end and padding."""
        ids: list[int] = []
        for word in _pattern().findall(clean(text)):
            if (known := self._cache.get(word)) is None:
                known = self._merge(word)
                if len(self._cache) < CACHED_WORDS:
                    self._cache[word] = known
            ids += known
        return ids

    def _merge(self, word: str) -> list[int]:
        """The ids of one word. With a heap of the pairs, a word of n letters takes n log n steps."""
        letters = byte_letters()
        symbols: list[str | None] = [letters[byte] for byte in word.encode("utf-8")]
        symbols[-1] += WORD_END
        count = len(symbols)
        before, after = list(range(-1, count - 1)), list(range(1, count + 1))
        heap: list[tuple[int, int, str, str]] = []

        def consider(left: int) -> None:
            if left >= 0 and (right := after[left]) < count:
                pair = (symbols[left], symbols[right])
                if (rank := self._ranks.get(pair)) is not None:
                    heapq.heappush(heap, (rank, left, *pair))

        for index in range(count):
            consider(index)
        while heap:
            _, left, first, second = heapq.heappop(heap)
            right = after[left]
            if symbols[left] != first or right >= count or symbols[right] != second:
                continue  # one of the two has been merged with its other neighbour
            symbols[left], symbols[right] = first + second, None
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
            consider(left)
            consider(before[left])
        return [self._ids[symbol] for symbol in symbols if symbol is not None]

    def decode(self, row: Tensor | Sequence[int]) -> str:
        """The text of one row [L] of ids up to its end: cleaned and in lower case, words and signs apart."""
        if isinstance(row, Tensor) and row.dim() != 1:
            raise ValueError(f"row: expected [L], got {tuple(row.shape)}")
        ids = [int(index) for index in row]
        if bad := [index for index in ids if not 0 <= index < self.vocab_size]:
            raise ValueError(f"row: expected ids from 0 to {self.vocab_size - 1}, got {bad[0]}")
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        letters = "".join(self._names[index] for index in ids if index != self.bos)
        bytes_of = {letter: byte for byte, letter in byte_letters().items()}
        text = bytes(bytes_of[letter] for letter in letters).decode("utf-8", errors="replace")
        return text.replace(WORD_END, " ").strip()

    def to_config(self) -> dict:
        """JSON-able; `BPETokenizer.from_config` rebuilds it. OpenAI's merges are not repeated in it."""
        merges = None if self.merges == clip_merges() else list(self.merges)
        return {"kind": "bpe", "context_length": self.context_length, "merges": merges}

    @classmethod
    def from_config(cls, config: dict) -> BPETokenizer:
        unexpected = sorted(set(config) - {"kind", "context_length", "merges"})
        if unexpected or config.get("kind") != "bpe":
            raise ValueError(f'tokenizer: expected kind "bpe", context_length, merges; got {sorted(config)}')
        return cls(**{name: value for name, value in config.items() if name != "kind"})

    @classmethod
    def from_folder(cls, path: str | PathLike, context_length: int = 77) -> BPETokenizer:
        """Read a Hugging Face CLIP tokenizer folder: tokenizer.json, or merges.txt with vocab.json.

        Its ids must be those that the merges give, as in every published CLIP. Raises FileNotFoundError or
        ValueError, which name the file.
        """
        folder = Path(path).expanduser()
        file, words = folder / "tokenizer.json", folder / "vocab.json"
        try:
            if file.is_file():
                model = json.loads(file.read_text(encoding="utf-8"))["model"]
                pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
                vocabulary = model["vocab"]
            elif (file := folder / "merges.txt").is_file() and words.is_file():
                lines = file.read_text(encoding="utf-8").split("\n")
                pairs = [line for line in lines if line and not line.startswith("#version")]
                vocabulary = json.loads(words.read_text(encoding="utf-8"))
            else:
                raise FileNotFoundError(f"{folder}: expected tokenizer.json, or merges.txt and vocab.json")
            tokenizer = cls(context_length, pairs)
            for name, index in tokenizer._ids.items():
                # Only begin and end are spelled differently there.
                if index < tokenizer.bos and vocabulary.get(name) != index:
                    raise ValueError(f"the id of {name!r}: expected {index}, got {vocabulary.get(name)}")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not a byte-pair tokenizer ({error!r})") from None
        except ValueError as error:  # of json, of Unicode, of the merges
            raise ValueError(f"{file}: not a tokenizer of CLIP's kind ({error})") from None
        return tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BPETokenizer) and self.to_config() == other.to_config()


def clean(text: str) -> str:
    """Broken encodings mended, HTML entities read (twice), runs of white space to one blank, lower case."""
    from ftfy import fix_text

    return " ".join(html.unescape(html.unescape(fix_text(text))).split()).lower()


@cache
def _pattern():
    """Endings after an apostrophe, runs of letters, single numerals, runs of other signs."""
    import regex  # the standard library's `re` cannot ask for letters or numerals of all scripts

    return regex.compile(
        rf"{BEGIN}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
    )


@cache
def byte_letters() -> dict[int, str]:
    """Each byte as one printable letter, in the order of the ids: itself or, if not printable, U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + index) for index, byte in enumerate(others)}


@cache
def clip_merges() -> tuple[str, ...]:
    """OpenAI's merges, which are part of the package."""
    return tuple(gzip.decompress(MERGES_FILE.read_bytes()).decode("utf-8").removesuffix("\n").split("\n"))


@lru_cache(maxsize=4)
def _tables(merges: tuple[str, ...]) -> tuple[dict[tuple[str, str], int], tuple[str, ...], dict[str, int]]:
    """(pair -> rank, id -> symbol, symbol -> id)."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    letters = list(byte_letters().values())
    letters += [letter + WORD_END for letter in letters]
    names = (*letters, *("".join(pair) for pair in pairs), BEGIN, END)
    ids = {name: index for index, name in enumerate(names)}
    known = set(letters)
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or not known.issuperset(pair):
            raise ValueError(f"merges: expected pairs of symbols made before them, got {merge!r}")
        known.add("".join(pair))
    return {pair: rank for rank, pair in enumerate(pairs)}, names, ids
