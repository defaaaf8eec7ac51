"""The words of the scenes: the names of every attribute, their synonyms and the phrases of the captions.

The index of a name in its tuple is the value in the scene tensors; the index of a word in `WORDS` is its
token. Both are fixed, because trained checkpoints and committed measurements depend on them.
"""

from __future__ import annotations

SHAPES = (
    "circle", "square", "triangle", "diamond", "pentagon", "hexagon",
    "star", "cross", "heart", "ring", "crescent", "drop",
)  # fmt: skip
PLURALS = tuple("crosses" if shape == "cross" else shape + "s" for shape in SHAPES)
COLORS = (
    "red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "white", "black", "gray",
)  # fmt: skip
FILLS = ("solid", "striped", "dotted")
SIZES = ("small", "medium", "large")
POSITIONS = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
RELATIONS = ("left", "right", "above", "below", "inside")
COUNTS = ("zero", "one", "two", "three", "four", "five")
BACKGROUNDS = ("white", "black", "gray", "beige", "navy", "mint", "lavender", "sky")
TEXTURES = ("plain", "striped", "checkered", "dotted", "gradient")
KINDS = ("one", "two", "count", "three")
NAMED_OBJECTS = 3  # the most noun phrases of a caption; "count" names its equal objects once

# The same names as indices, for code that asks about one of them.
ONE, TWO, COUNT, THREE = range(4)
LEFT, RIGHT, ABOVE, BELOW, INSIDE = range(5)
SOLID, STRIPED, DOTTED = range(3)
SMALL, MEDIUM, LARGE = range(3)
MAX_OBJECTS = 5

# Synonyms. The canonical name is sampled more often than each of them.
SHAPE_SYNONYMS = {
    "circle": ("disk",),
    "cross": ("plus",),
    "ring": ("donut",),
    "crescent": ("moon",),
    "drop": ("teardrop",),
    "diamond": ("rhombus",),
}
PLURAL_SYNONYMS = {
    "circles": ("disks",),
    "crosses": ("pluses",),
    "rings": ("donuts",),
    "crescents": ("moons",),
    "drops": ("teardrops",),
    "diamonds": ("rhombuses",),
}
COLOR_SYNONYMS = {
    "red": ("crimson",),
    "green": ("emerald",),
    "cyan": ("turquoise",),
    "purple": ("violet",),
    "gray": ("grey",),
}
FILL_SYNONYMS = {"solid": ("plain",), "striped": ("stripy",), "dotted": ("spotted",)}
SIZE_SYNONYMS = {"small": ("little", "tiny"), "medium": ("mid-sized",), "large": ("big", "huge")}

# Phrases. One is sampled per caption.
OPENERS = ("", "", "", "a picture of", "an image of", "a drawing of", "there is", "a photo of")
FILL_NOUNS = {"striped": "stripes", "dotted": "dots"}  # "a red circle with stripes"
RELATION_PHRASES = (
    ("to the left of", "left of", "on the left of"),
    ("to the right of", "right of", "on the right of"),
    ("above", "over", "on top of"),
    ("below", "under", "beneath"),
    ("inside", "within", "in"),
)
POSITION_PHRASES = (
    ("in the top left corner", "at the top left", "in the upper left"),
    ("at the top", "near the top edge", "in the upper part"),
    ("in the top right corner", "at the top right", "in the upper right"),
    ("on the left", "at the left side", "near the left edge"),
    ("in the center", "in the middle", "at the center"),
    ("on the right", "at the right side", "near the right edge"),
    ("in the bottom left corner", "at the bottom left", "in the lower left"),
    ("at the bottom", "near the bottom edge", "in the lower part"),
    ("in the bottom right corner", "at the bottom right", "in the lower right"),
)
BACKGROUND_PHRASES = (  # what stands before and after "<texture> <color>"
    ("on a", "background"),
    ("against a", "backdrop"),
    ("over a", "background"),
    ("with a", "background"),
)

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
MAX_LENGTH = 36  # tokens per caption row, <bos> and <eos> included


def _words() -> tuple[str, ...]:
    """Every word once, in the order of the token ids."""
    names = (SHAPES, PLURALS, COLORS, FILLS, SIZES, BACKGROUNDS, TEXTURES, COUNTS, OPENERS)
    extra = ("and", "a", "an", "with", "stripes", "dots", "textured")
    synonyms = (SHAPE_SYNONYMS, PLURAL_SYNONYMS, COLOR_SYNONYMS, FILL_SYNONYMS, SIZE_SYNONYMS)
    phrases = [phrase for group in (*names, extra) for phrase in group]
    phrases += [word for table in synonyms for words in table.values() for word in words]
    phrases += [phrase for group in RELATION_PHRASES + POSITION_PHRASES for phrase in group]
    phrases += [part for pair in BACKGROUND_PHRASES for part in pair]
    return tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


WORDS = SPECIALS + _words()
WORD_TO_ID = {word: index for index, word in enumerate(WORDS)}
