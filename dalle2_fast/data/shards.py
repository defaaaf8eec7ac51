"""The names that the stream of pairs had when it read only WebDataset shards."""

from dalle2_fast.data.images import to_square as to_square
from dalle2_fast.data.sources import expand_shards as expand_shards
from dalle2_fast.data.sources.base import HELD_OUT as HELD_OUT
from dalle2_fast.data.sources.base import is_held_out as is_held_out
from dalle2_fast.data.stream import PairStream
from dalle2_fast.data.stream import SkippedSample as SkippedSample

WebDatasetStream = PairStream
"""The name that `PairStream` had when it read WebDataset shards only."""
