"""The layouts in which other projects publish weights, one module each, and what those modules share."""
