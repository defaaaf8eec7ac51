"""The HTTP server of `dalle2-fast serve`: OpenAI's images API on a pipeline; see docs/serving.md."""
