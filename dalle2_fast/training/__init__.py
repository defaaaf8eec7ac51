"""Training: presets, stages, and one loop for all of them."""
