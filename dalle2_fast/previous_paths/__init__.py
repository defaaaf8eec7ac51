"""Module paths of version 0.1.0 that have moved since, because its pickles name them.

Each file re-exports the classes that pickles hold. `models/__init__.py` and `data/__init__.py` add the folder
of their name to their search path, so that `dalle2_fast.models.unet_blocks` is still found.
"""
