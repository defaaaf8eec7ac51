"""The page of `dalle2-fast demo`: a pipeline in the browser; see docs/demo.md."""
