"""dalle2_fast's parts in other libraries' trainers and pipelines: explicit, reversible, nothing on import."""

from pathlib import Path

# Modules that have moved are still found by their old names, which pickles hold.
__path__.append(str(Path(__file__).parents[1] / "previous_paths" / __name__.rpartition(".")[2]))
