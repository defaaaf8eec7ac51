"""Read a scene back from the pixels of its image: plain, deterministic, nothing learned.

1. Background: the colour of the world that the frame of the image shows (background.py).
2. Objects: connected regions that are far from every tone of that background in CIE Lab (reader.py).
3. Colour (and fill) of an object: the tones of the world nearest to its inner pixels (colors.py).
   A piece of another colour inside a region is an object too, inside the first or touching it (objects.py).
4. Shape: the analytic mask that fits the object's soft mask best (templates.py). Size: from the area, given
   the shape. Position and relation: from centroids.

What the reader gets wrong on true renders is printed by `dalle2-fast evaluate` next to every score, as the
ceiling: nothing in a world of solid objects on plain backgrounds, up to 1 % per attribute in the whole world
(the dots of a small object, an object whose colour is that of the background's shadow).
"""
