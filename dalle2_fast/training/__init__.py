"""Training: presets, stages, one loop, and the `dalle2-fast train` command."""
