"""dalle2_fast's parts in other libraries' trainers and pipelines: explicit, reversible, nothing on import."""
