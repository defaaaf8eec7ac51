"""The world of captioned scenes that needs no download: drawn, described and rendered by rules."""
