"""WordTokenizer: one token per word. `tokenizer_from_config` rebuilds a WordTokenizer or a BPETokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor

from dalle2_fast.data.synthetic.meaning import check_meaning
from dalle2_fast.data.synthetic.vocabulary import BOS, EOS, MAX_LENGTH, PAD, SPECIALS, UNK, WORDS
from dalle2_fast.data.synthetic.words import scene_words
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.data.text.bpe import BPETokenizer
from dalle2_fast.data.text.rows import check_context_length, checked_ids, encode_rows
from dalle2_fast.data.text.words import check_known, check_length, split_words


class WordTokenizer:
    """Captions -> rows of word ids: 0 padding, 1 begin, 2 end, 3 unknown, then the words.

    Args:
        table: every word, different and in lower case, in the order of the ids, without the four specials.
        context_length: tokens per row, begin and end included; at least 3.
        known: the words of the table that a caption may use, such as those that a checkpoint was trained on.
            None allows all.

    Raises:
        TypeError, ValueError: the arguments are not as described; the message names the words.

    Example:
        >>> tokenizer = WordTokenizer(["a", "red", "star"], context_length=6)
        >>> tokenizer.encode("A red star.")
        tensor([[1, 4, 5, 6, 2, 0]])
        >>> tokenizer.encode("a blue star", unknown="token")
        tensor([[1, 4, 3, 6, 2, 0]])
    """

    def __init__(
        self, table: Sequence[str], context_length: int = MAX_LENGTH, known: Iterable[str] | None = None
    ) -> None:
        if isinstance(table, str):
            raise TypeError("table: expected a sequence of words, got a single string")
        self.table = tuple(table)
        check_context_length(context_length)
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
    def of_scenes(self) -> bool:
        """Whether the words are those of the synthetic scenes, whose captions follow a pattern."""
        return self.table == WORDS[len(SPECIALS) :]

    @property
    def vocab_size(self) -> int:
        """The number of ids, which run from 0 to vocab_size - 1."""
        return len(SPECIALS) + len(self.table)

    def encode(
        self, captions: str | Sequence[str], *, unknown: str = "error", truncate: bool = False
    ) -> Tensor:
        """One row of ids per caption; case and punctuation do not matter.

        Args:
            captions: one or several, of 1 to context_length - 2 words.
            unknown: "error" raises for unknown words, "token" writes id 3 for them.
            truncate: cut captions that are too long instead of raising.

        Returns:
            int64 [captions, context_length].

        Raises:
            TypeError: a caption is not a str.
            ValueError: a caption is empty, too long, has unknown words, which the message names with the
                nearest known ones, or, for scenes, asks for what no scene shows (see `check_meaning`).
        """
        return encode_rows(
            captions, lambda caption: self._encode(caption, unknown, truncate), self.context_length, unknown
        )

    def has_text(self, caption: str) -> bool:
        """Whether a caption has a word, known or not.

        Example:
            >>> WordTokenizer(["red"]).has_text("?!")
            False
        """
        return bool(split_words(caption))

    def _encode(self, caption: str, unknown: str, truncate: bool) -> list[int]:
        words, room = split_words(caption), self.context_length - 2
        # With unknown="token" every word is allowed, but there must be one.
        check_known(caption, words, self._known if unknown == "error" else words, room)
        if self.of_scenes and unknown == "error":
            check_meaning(words)
        if not truncate:
            check_length(len(words), room)
        ids = [self._ids[word] if word in self._known else UNK for word in words[:room]]
        return [BOS, *ids, EOS] + [PAD] * (room - len(ids))

    def decode(self, row: Tensor | Sequence[int]) -> str:
        """The words of one row, without padding, begin and end.

        Args:
            row: ids [L], a tensor or a sequence of ints.

        Raises:
            ValueError: the row has another shape, or an id lies outside of the vocabulary.
        """
        ids = checked_ids(row, self.vocab_size)
        names = SPECIALS + self.table
        return " ".join(names[index] for index in ids if index not in (PAD, BOS, EOS))

    def to_config(self) -> dict:
        """A JSON-able dict from which `from_config` rebuilds the tokenizer."""
        known = None if self.words == self.table else list(self.words)
        return {"table": list(self.table), "context_length": self.context_length, "known": known}

    @classmethod
    def from_config(cls, config: dict) -> WordTokenizer:
        """Rebuild a tokenizer from `to_config()`; ValueError for other keys."""
        unexpected = sorted(set(config) - {"table", "context_length", "known"})
        if unexpected or "table" not in config:
            raise ValueError(f"tokenizer: expected keys table, context_length, known; got {sorted(config)}")
        return cls(**config)

    @classmethod
    def scenes(cls, world: World | None = None) -> WordTokenizer:
        """The tokenizer of the synthetic scenes: always their 126 ids; known are the words of `world`.

        Example:
            >>> WordTokenizer.scenes().vocab_size
            126
        """
        return cls(WORDS[len(SPECIALS) :], MAX_LENGTH, known=scene_words(world))

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], size: int = 8192, context_length: int = MAX_LENGTH
    ) -> WordTokenizer:
        """A tokenizer of the most frequent words of some captions.

        Args:
            captions: the text to count; at least one word.
            size: the largest vocab_size; more than the four specials.
            context_length: tokens per row, begin and end included.

        Raises:
            ValueError: `size` is too small, or there is no word.

        Example:
            >>> WordTokenizer.from_captions(["the cat", "the dog"], size=6).words
            ('the', 'cat')
        """
        if size <= len(SPECIALS):
            raise ValueError(f"size: expected more than {len(SPECIALS)}, got {size}")
        counts = Counter(word for caption in captions for word in split_words(caption))
        if not counts:
            raise ValueError("captions: expected at least one word, got none")
        ranked = sorted(counts, key=lambda word: (-counts[word], word))  # ties by name: every run agrees
        return cls(ranked[: size - len(SPECIALS)], context_length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordTokenizer) and self.to_config() == other.to_config()


Tokenizer = WordTokenizer | BPETokenizer
"""What turns captions into token ids for a CLIP and a DALLE2: one of two classes."""


def tokenizer_from_config(config: dict) -> Tokenizer:
    """Rebuild a tokenizer from its `to_config()`.

    Args:
        config: its "kind" is "bpe", "words" or missing, as in older checkpoints, which means words.

    Returns:
        The tokenizer, which gives the same ids as the one that wrote the config.

    Raises:
        ValueError: another kind, or other keys than that kind has.

    Example:
        >>> config = BPETokenizer(context_length=20).to_config()
        >>> tokenizer_from_config(config).context_length
        20
    """
    if (kind := config.get("kind", "words")) not in ("words", "bpe"):
        raise ValueError(f'tokenizer: expected kind "bpe" or none, got {kind!r}')
    return BPETokenizer.from_config(config) if kind == "bpe" else WordTokenizer.from_config(config)
