"""The commands that begin with an image."""
