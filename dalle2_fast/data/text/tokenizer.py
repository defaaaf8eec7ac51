"""WordTokenizer: one token per word. `tokenizer_from_config` rebuilds this one or the byte-pair one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dalle2_fast.data.synthetic.vocabulary import BOS, EOS, MAX_LENGTH, PAD, SPECIALS, UNK, WORDS
from dalle2_fast.data.synthetic.words import scene_words
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.data.text.bpe import BPETokenizer

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")  # letters and digits, joined by - or '


class WordTokenizer:
    """Captions to rows of word ids: 0 padding, 1 begin, 2 end, 3 unknown, then the words.

    table: every word, in the order of the ids (the specials not counted).
    context_length: tokens of a row, begin and end included.
    known: the words of the table that a caption may use (None: all): those that a checkpoint was trained on.
    """

    def __init__(
        self, table: Sequence[str], context_length: int = MAX_LENGTH, known: Iterable[str] | None = None
    ) -> None:
        if isinstance(table, str):
            raise TypeError("table: expected a sequence of words, got a single string")
        self.table = tuple(table)
        if not isinstance(context_length, int) or context_length < 3:
            raise ValueError(f"context_length: expected an int >= 3, got {context_length!r}")
        bad = [word for word in self.table if split_words(word) != [word]]
        if bad or len(set(self.table)) < len(self.table):
            got = f"got {', '.join(map(repr, bad[:5]))}" if bad else "some word occurs twice"
            raise ValueError(f"table: expected different lower-case words, {got}")
        self.context_length = context_length
        self._ids = {word: index for index, word in enumerate(self.table, start=len(SPECIALS))}
        wanted = set(self.table if known is None else known)
        if strangers := sorted(wanted - set(self.table)):
            raise ValueError(f"known: expected words of the table, got {', '.join(strangers)}")
        self.words = tuple(word for word in self.table if word in wanted)
        self._known = frozenset(wanted)

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""
        return len(SPECIALS) + len(self.table)

    def encode(
        self, captions: str | Sequence[str], *, unknown: str = "error", truncate: bool = False
    ) -> Tensor:
        """int64 [captions, context_length]. Case and punctuation do not matter.

        unknown: "error" names the unknown words in a ValueError, "token" writes id 3 for them.
        truncate: cut over-long captions instead of raising ValueError. An empty caption always raises.
        """
        if unknown not in ("error", "token"):
            raise ValueError(f'unknown: expected "error" or "token", got {unknown!r}')
        captions = [captions] if isinstance(captions, str) else list(captions)
        rows = [self._encode(caption, unknown, truncate) for caption in captions]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.context_length)

    def _encode(self, caption: str, unknown: str, truncate: bool) -> list[int]:
        if not isinstance(caption, str):
            raise TypeError(f"captions: expected str, got {type(caption).__name__}")
        words, room = split_words(caption), self.context_length - 2
        if not words:
            raise ValueError(f"the caption {caption!r} is empty: expected 1 to {room} words")
        strangers = list(dict.fromkeys(word for word in words if word not in self._known))
        if strangers and unknown == "error":
            names = ", ".join(f'"{word}"' for word in strangers)
            raise ValueError(
                f"unknown {'word' if len(strangers) == 1 else 'words'} {names} in the caption; the "
                f"{len(self.words)} known words (listed by `dalle2-fast vocabulary`) are: "
                f"{' '.join(sorted(self.words))}"
            )
        if len(words) > room and not truncate:
            raise ValueError(f"the caption has {len(words)} words: expected at most {room}")
        ids = [self._ids[word] if word in self._known else UNK for word in words[:room]]
        return [BOS, *ids, EOS] + [PAD] * (room - len(ids))

    def decode(self, row: Tensor | Sequence[int]) -> str:
        """The words of one row [L] of ids; padding, begin and end are left out."""
        if isinstance(row, Tensor) and row.dim() != 1:
            raise ValueError(f"row: expected [L], got {tuple(row.shape)}")
        ids = [int(index) for index in row]
        bad = [index for index in ids if not 0 <= index < self.vocab_size]
        if bad:
            raise ValueError(f"row: expected ids from 0 to {self.vocab_size - 1}, got {bad[0]}")
        names = SPECIALS + self.table
        return " ".join(names[index] for index in ids if index not in (PAD, BOS, EOS))

    def to_config(self) -> dict:
        """JSON-able; `WordTokenizer.from_config` rebuilds it."""
        known = None if self.words == self.table else list(self.words)
        return {"table": list(self.table), "context_length": self.context_length, "known": known}

    @classmethod
    def from_config(cls, config: dict) -> WordTokenizer:
        unexpected = sorted(set(config) - {"table", "context_length", "known"})
        if unexpected or "table" not in config:
            raise ValueError(f"tokenizer: expected keys table, context_length, known; got {sorted(config)}")
        return cls(**config)

    @classmethod
    def scenes(cls, world: World | None = None) -> WordTokenizer:
        """The scenes' 126 ids, whatever the world; known are the words that its captions use."""
        return cls(WORDS[len(SPECIALS) :], MAX_LENGTH, known=scene_words(world))

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], size: int = 8192, context_length: int = MAX_LENGTH
    ) -> WordTokenizer:
        """The most frequent words of one's own captions; `size` is the resulting vocab_size at most."""
        if size <= len(SPECIALS):
            raise ValueError(f"size: expected more than {len(SPECIALS)}, got {size}")
        counts = Counter(word for caption in captions for word in split_words(caption))
        if not counts:
            raise ValueError("captions: expected at least one word, got none")
        ranked = sorted(counts, key=lambda word: (-counts[word], word))  # ties by name: the same on every run
        return cls(ranked[: size - len(SPECIALS)], context_length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordTokenizer) and self.to_config() == other.to_config()


def split_words(caption: str) -> list[str]:
    """Lower-case words of a caption, punctuation removed."""
    return _WORD.findall(caption.lower())


Tokenizer = WordTokenizer | BPETokenizer  # what a CLIP and a DALLE2 can read with


def tokenizer_from_config(config: dict) -> Tokenizer:
    """Rebuild what `to_config` described: `kind` says which; without it, as in older checkpoints, words."""
    if (kind := config.get("kind", "words")) not in ("words", "bpe"):
        raise ValueError(f'tokenizer: expected kind "bpe" or none, got {kind!r}')
    return BPETokenizer.from_config(config) if kind == "bpe" else WordTokenizer.from_config(config)
