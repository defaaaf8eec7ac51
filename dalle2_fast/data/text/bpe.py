"""BPETokenizer: CLIP's byte-pair tokenizer, which reads any text.

The text is cleaned (broken encodings, HTML entities, white space, capitals) and split into words, numerals
and runs of signs. Each of these is written as UTF-8 bytes, whose neighbours are merged in the order in which
the merges were learnt (Sennrich et al., arXiv 1508.07909; on bytes: GPT-2). The ids are, in this order, 256
bytes, 256 bytes that end a word, one for each merge, begin and end: those of OpenAI's CLIP and of open_clip.
A text that spells a special token, "<start_of_text>" or "<end_of_text>", gets its id, as in open_clip.
OpenAI's names for these ids, "<|startoftext|>" and "<|endoftext|>", are read as text.

The merge loop is written here although the package `tokenizers` (0.23) gives the same ids, on 58 hard texts,
6,000 random strings and 15,000 words under 300 random tables of merges: it would replace only the 30 lines of
`_merge`, install 33 MB with huggingface-hub and hf-xet, and save 7 of 29 us per word that is not cached.
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

from torch import Tensor

from dalle2_fast.data.text.rows import check_context_length, checked_ids, encode_rows

MERGES_FILE = Path(__file__).with_name("clip_merges.txt.gz")
BEGIN, END = "<start_of_text>", "<end_of_text>"
WORD_END = "</w>"
CACHED_WORDS = 100_000


class BPETokenizer:
    """Captions -> rows of byte-pair ids: begin, at most context_length - 2 ids of text, end, then zeros.

    0 is also the id of a real "!": the end of a row is found by its end token, never by the zeros.

    Args:
        context_length: ids per row, begin and end included; at least 3.
        merges: pairs of symbols, written "a b", in the order in which they were learnt. None takes OpenAI's
            48,894.

    Raises:
        TypeError, ValueError: the context length or the merges are not as described; the message names the
            first wrong pair.

    Example:
        >>> tokenizer = BPETokenizer()
        >>> tokenizer.encode(["a photo of a cat", "two cats"]).shape
        torch.Size([2, 77])
        >>> tokenizer.decode(tokenizer.encode("Two   CATS!")[0])
        'two cats !'
    """

    def __init__(self, context_length: int = 77, merges: Sequence[str] | None = None) -> None:
        check_context_length(context_length)
        if isinstance(merges, str):
            raise TypeError("merges: expected a sequence of pairs, got a single string")
        self.context_length = context_length
        self.merges = clip_merges() if merges is None else tuple(merges)
        self._ranks, self._names, self._ids = _tables(self.merges)
        self.bos, self.eos = self.vocab_size - 2, self.vocab_size - 1
        self._cache: dict[str, list[int]] = {BEGIN: [self.bos], END: [self.eos]}

    @property
    def vocab_size(self) -> int:
        """The number of ids, which run from 0 to vocab_size - 1: 49,408 for OpenAI's merges."""
        return len(self._names)

    def encode(
        self, captions: str | Sequence[str], *, unknown: str = "error", truncate: bool = False
    ) -> Tensor:
        """One row of ids per caption. An empty caption is begin and end: CLIP's "no text".

        Args:
            captions: any text, or several.
            unknown: without effect, because there are no unknown words; accepted as by WordTokenizer.
            truncate: cut captions that are too long, which keep their end token, instead of raising.

        Returns:
            int64 [captions, context_length].

        Raises:
            TypeError: a caption is not a str.
            ValueError: a caption has more than context_length - 2 ids.
        """
        return encode_rows(captions, lambda x: self._encode(x, truncate), self.context_length, unknown)

    def has_text(self, caption: str) -> bool:
        """Whether a caption has a token; emoji and signs alone do.

        Example:
            >>> BPETokenizer().has_text("?!"), BPETokenizer().has_text(" ")
            (True, False)
        """
        return bool(self.tokenize(caption))

    def _encode(self, caption: str, truncate: bool) -> list[int]:
        ids, room = self.tokenize(caption), self.context_length - 2
        if len(ids) > room and not truncate:
            raise ValueError(f"the caption has {len(ids)} tokens: expected at most {room}")
        ids = ids[:room]
        return [self.bos, *ids, self.eos] + [0] * (room - len(ids))

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text of any length, without begin, end and padding.

        Example:
            >>> BPETokenizer().tokenize("a photo of a cat")
            [320, 1125, 539, 320, 2368]
        """
        ids: list[int] = []
        for word in _pattern().findall(clean(text)):
            if (known := self._cache.get(word)) is None:
                known = self._merge(word)
                if len(self._cache) < CACHED_WORDS:
                    self._cache[word] = known
            ids += known
        return ids

    def _merge(self, word: str) -> list[int]:
        """The ids of one word. The heap of pairs makes this n log n in the number of bytes, not quadratic."""
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
                continue  # one of the two symbols has been merged with its other neighbour
            symbols[left], symbols[right] = first + second, None
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
            consider(left)
            consider(before[left])
        return [self._ids[symbol] for symbol in symbols if symbol is not None]

    def decode(self, row: Tensor | Sequence[int]) -> str:
        """The text of one row up to its end token, in lower case, with blanks between words and signs.

        Args:
            row: ids [L], a tensor or a sequence of ints.

        Raises:
            ValueError: the row has another shape, or an id lies outside of the vocabulary.
        """
        ids = checked_ids(row, self.vocab_size)
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        letters = "".join(self._names[index] for index in ids if index != self.bos)
        bytes_of = {letter: byte for byte, letter in byte_letters().items()}
        text = bytes(bytes_of[letter] for letter in letters).decode("utf-8", errors="replace")
        return text.replace(WORD_END, " ").strip()

    def to_config(self) -> dict:
        """A JSON-able dict from which `from_config` rebuilds the tokenizer, without OpenAI's merges."""
        merges = None if self.merges == clip_merges() else list(self.merges)
        return {"kind": "bpe", "context_length": self.context_length, "merges": merges}

    @classmethod
    def from_config(cls, config: dict) -> BPETokenizer:
        """Rebuild a tokenizer from `to_config()`; ValueError for other keys."""
        unexpected = sorted(set(config) - {"kind", "context_length", "merges"})
        if unexpected or config.get("kind") != "bpe":
            raise ValueError(f'tokenizer: expected kind "bpe", context_length, merges; got {sorted(config)}')
        return cls(**{name: value for name, value in config.items() if name != "kind"})

    @classmethod
    def from_folder(cls, path: str | PathLike, context_length: int = 77) -> BPETokenizer:
        """Read the tokenizer folder of a Hugging Face CLIP.

        Args:
            path: a folder with tokenizer.json, or with merges.txt and vocab.json.
            context_length: ids per row, begin and end included.

        Raises:
            FileNotFoundError: the folder lacks these files.
            ValueError: a file, which the message names, is damaged, or has other ids than the merges give;
                every published CLIP has the ids that the merges give.
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
                # Begin and end are the only symbols that are spelled differently there.
                if index < tokenizer.bos and vocabulary.get(name) != index:
                    raise ValueError(f"the id of {name!r}: expected {index}, got {vocabulary.get(name)}")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not a byte-pair tokenizer ({error!r})") from None
        except (ValueError, RecursionError) as error:  # from JSON, Unicode or the merges
            raise ValueError(f"{file}: not a tokenizer of CLIP's kind ({error})") from None
        return tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BPETokenizer) and self.to_config() == other.to_config()


def clean(text: str) -> str:
    """Clean a text as CLIP does: mend encodings, decode HTML twice, collapse white space, lower the case.

    Example:
        >>> clean(" Tom &amp;amp;  JERRY ")
        'tom & jerry'
    """
    from ftfy import fix_text

    return " ".join(html.unescape(html.unescape(fix_text(text))).split()).lower()


@cache
def _pattern():
    """Matches endings after an apostrophe, runs of letters, single numerals, and runs of other signs."""
    import regex  # the standard library's `re` has no classes for the letters and numerals of all scripts

    return regex.compile(
        rf"{BEGIN}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
    )


@cache
def byte_letters() -> dict[int, str]:
    """Byte -> one printable letter, in the order of the ids: the byte itself, or a letter from U+0100 on.

    Example:
        >>> letters = byte_letters()
        >>> letters[ord("a")], letters[ord(" ")], len(letters)
        ('a', 'Ġ', 256)
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + index) for index, byte in enumerate(others)}


@cache
def clip_merges() -> tuple[str, ...]:
    """OpenAI's 48,894 merges, a file of the package."""
    return tuple(gzip.decompress(MERGES_FILE.read_bytes()).decode("utf-8").removesuffix("\n").split("\n"))


@lru_cache(maxsize=4)
def _tables(merges: tuple[str, ...]) -> tuple[dict[tuple[str, str], int], tuple[str, ...], dict[str, int]]:
    """Returns (pair -> rank, id -> symbol, symbol -> id)."""
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
