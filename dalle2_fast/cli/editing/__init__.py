"""The commands that begin with a picture."""
