"""A world of captioned scenes that needs no download: sampled, described and rendered by rules.

    vocabulary, words      the names of all attributes and the words of the captions
    grammar, meaning       what each word is said of, and a check of captions that people write
    world                  the part of the vocabulary that scenes are sampled from
    shapes, palette        what objects and colours look like
    scenes                 random arrangements of objects, as tensors
    rendering              their images
    captions, negatives    their captions, and captions that are wrong by one change
    stream                 batches of all of these
"""
