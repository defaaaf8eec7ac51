"""The order of the samples: every sample once for any number of processes, and any step at once."""

from __future__ import annotations

import gzip
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch

from dalle2_fast.data import PairStream, WordTokenizer
from dalle2_fast.data.order import Order
from dalle2_fast.data.sources import tars
from tests.data.pairs.making import caption, write_pictures, write_shards

WORDS = WordTokenizer(["picture"])
SIZES = [5, 9, 0, 1, 7, 10, 3, 5]  # 40 samples


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stream(data, **options):
    return PairStream(data, **dict(batch_size=8, resolutions=(4,), tokenizer=WORDS, shuffle=12) | options)


def captions(data, steps, world_size=1, **options):
    """The captions of each step, of all processes together."""
    streams = [stream(data, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    try:
        return [[text for each in streams for text in each.batch(step)["captions"]] for step in steps]
    finally:
        for each in streams:
            each.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_no_sample_is_lost_or_doubled_in_an_epoch(tmp_path, world_size, workers):
    """Catches: rows that two processes read, or none; an order that depends on the number of processes or of
    workers; a resumed run that reads other samples than the uninterrupted one."""
    data = write_shards(tmp_path / "data", SIZES)
    whole = captions(data, range(10))
    for epoch in (whole[:5], whole[5:]):
        assert Counter(sum(epoch, [])) == Counter(map(caption, range(40)))
    begun = captions(data, range(3), world_size, workers=workers)
    resumed = captions(data, range(3, 10), world_size, workers=workers)
    assert begun + resumed == whole


def test_the_rows_of_a_batch_do_not_depend_on_processes_and_workers(tmp_path):
    """Catches: images that do not belong to their captions, parts of a batch in another order."""
    data = write_shards(tmp_path / "data", SIZES)
    whole = stream(data).batch(4)
    part = stream(data, rank=1, world_size=2, workers=2)
    rows = part.batch(4)
    part.close()
    assert rows["captions"] == whole["captions"][4:]
    assert torch.equal(rows["images"][4], whole["images"][4][4:])
    assert torch.equal(rows["tokens"], whole["tokens"][4:])


def test_each_epoch_has_an_order_of_its_own_and_the_seed_decides(tmp_path):
    """Catches: a shuffle that repeats, or that never leaves its shard."""
    data = write_shards(tmp_path / "data", SIZES)
    whole = captions(data, range(10))
    assert whole[:5] != whole[5:] and captions(data, range(5), seed=1) != whole[:5]
    assert captions(data, range(5), shuffle=0) == [[caption(8 * s + k) for k in range(8)] for s in range(5)]
    order = Order([100] * 10, seed=0, shuffle=300)
    shards = [order.locate(position)[0] for position in range(1000)]
    assert len(set(shards[:300])) == 3, "a group is read from few shards"
    assert sum(a != b for a, b in pairwise(shards)) > 500, "and they are mixed"


def test_the_order_is_fixed_for_ever():
    """Catches: another order in a later release, or with another numpy, of which a resumed run says nothing.
    If it has to change, so must order.VERSION."""
    order = Order([3, 2, 4], seed=5, shuffle=4)
    first = [(2, 1), (2, 3), (2, 0), (2, 2), (0, 2), (0, 1)]
    assert [order.locate(position) for position in range(6)] == first
    assert [order.locate(position) for position in range(9, 12)] == [(1, 0), (0, 0), (1, 1)]
    assert [order.locate(3, attempt) for attempt in (1, 2, 9, 10)] == [(2, 1), (2, 3), (1, 0), (1, 1)]


def test_a_jump_reads_only_its_own_rows(tmp_path, monkeypatch):
    """Catches: a resumed run that reads its way from the beginning."""
    data = write_shards(tmp_path / "data", SIZES)
    reads = []
    read = tars.TarShards.read
    monkeypatch.setattr(
        tars.TarShards, "read", lambda *args, **options: reads.append(args) or read(*args, **options)
    )
    stream(data).batch(1_000_000)
    assert len(reads) == 8


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_shards_are_split_and_resumed(tmp_path, world_size, workers, monkeypatch):
    """Catches: shards that two processes stream; a resumed run that opens earlier shards, or reads others."""
    data = write_shards(tmp_path / "data", [10] * 4, compressed=True)
    options = dict(workers=workers, shuffle=5, batch_size=4)
    whole = captions(data, range(20), world_size, **options)
    for epoch in (whole[:10], whole[10:]):  # processes with shards of one size end their passes together
        assert Counter(sum(epoch, [])) == Counter(map(caption, range(40)))
    assert captions(data, range(7, 20), world_size, **options) == whole[7:]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert captions(data, range(7, 20), world_size, **options) == whole[7:], "without the kept positions"


def test_a_resumed_stream_opens_no_earlier_shard(tmp_path, monkeypatch):
    from dalle2_fast.data.sources import streamed

    data = write_shards(tmp_path / "data", [10] * 8, compressed=True)
    opened = []
    open_shard = streamed.open_shard
    monkeypatch.setattr(streamed, "open_shard", lambda shard: opened.append(shard) or open_shard(shard))
    before = stream(data, shuffle=5)
    for step in range(8):
        last = before.batch(step)
    opened.clear()
    assert stream(data, shuffle=5).batch(7)["captions"] == last["captions"]
    assert len(opened) <= 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_lost_of_streamed_shards_is_counted(tmp_path, workers):
    """Catches: damage in a shard that was opened for an earlier batch, of which nothing is said."""
    data = write_shards(tmp_path / "data", [9], compressed=True)
    shard = bytearray(gzip.decompress((data / "00000.tar").read_bytes()))
    shard[5 * 4 * 512 + 3] ^= 0x40  # in the name of the sixth picture
    (data / "00000.tar").write_bytes(gzip.compress(shard))
    one = stream(data, shuffle=1, batch_size=4, workers=workers)
    for step in range(2):
        one.batch(step)
    one.close()
    assert one.skipped == {"tar header is damaged": 1, "no image": 1}


def test_errors_about_processes(tmp_path):
    """Catches: a batch that is rounded, and a process without a shard."""
    data = write_shards(tmp_path / "data", [4] * 3, compressed=True)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of .* processes, 3, got 8"):
        stream(data, world_size=3)
    with pytest.raises(ValueError, match="rank: expected an int from 0 to 1, got 2"):
        stream(data, world_size=2, rank=2)
    with pytest.raises(ValueError, match="expected at least 4, got 3"):
        stream(data, world_size=4)  # before a run has written anything
    with pytest.raises(ValueError, match="--allow-pipe"):
        stream("pipe:cat a.tar")


def test_commands_are_read_if_allowed(tmp_path):
    pytest.importorskip("webdataset")
    data = write_shards(tmp_path / "data", [6])
    piped = stream(f"pipe:cat '{data}/00000.tar'", allow_pipe=True, batch_size=6, shuffle=0)
    assert piped.batch(0)["captions"] == [caption(number) for number in range(6)]


def test_lists_of_shards_are_cached_and_made_anew(tmp_path, monkeypatch):
    """Catches: a file next to the user's data; an old list of a shard that has changed; a damaged cache."""
    monkeypatch.setattr(tars, "CACHED_FROM", 1)
    data = write_shards(tmp_path / "data", [6, 7])
    before = sorted(data.iterdir())
    stream(data).batch(0)
    (first, second) = sorted((tmp_path / "cache" / "dalle2_fast" / "shards").iterdir())
    assert sorted(data.iterdir()) == before
    monkeypatch.setattr(tars, "index_of", None)  # would be called if the cache were not read
    assert captions(data, range(2), shuffle=0)[1][-1] == caption(2)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first.write_bytes(second.read_bytes()[:100])
    write_shards(data, [6, 8])
    assert sum(captions(data, range(2), shuffle=0, batch_size=7), [])[-1] == caption(13)


def test_background_processes_end(tmp_path):
    """Catches: processes, or their memory, that are left behind by close, by an error or by the last step."""
    import multiprocessing

    data = write_pictures(tmp_path / "data", 9)
    one = stream(data, workers=2)
    one.batch(0)
    assert len(multiprocessing.active_children()) == 2
    one.batch(5)  # a jump replaces them
    assert len(multiprocessing.active_children()) == 2
    one.close()
    assert not multiprocessing.active_children()
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no image can be decoded"):
        for step in range(3):
            one.batch(step)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_background_process_that_is_killed_ends_the_training(tmp_path):
    """Catches: a training that waits for ever for a process that the system has killed for its memory."""
    import multiprocessing

    one = stream(write_pictures(tmp_path / "data", 9), workers=1)
    one.batch(0)
    with pytest.raises((OSError, RuntimeError), match="DataLoader worker"):
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        for step in range(1, 9):
            one.batch(step)
    one.close()


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_are_those_of_the_cpu(tmp_path, workers):
    """Catches: page-locked memory that is used again before it has been copied."""
    data = write_shards(tmp_path / "data", SIZES)
    here, there = stream(data), stream(data, workers=workers, device="cuda")
    found = [there.batch(step) for step in range(12)]
    there.close()
    for step, batch in enumerate(found):
        expected = here.batch(step)
        assert batch["images"][4].is_cuda and torch.equal(batch["images"][4].cpu(), expected["images"][4])
        assert torch.equal(batch["tokens"].cpu(), expected["tokens"])


def test_the_generator_of_the_training_is_left_alone(tmp_path):
    """Catches: dropout that depends on the number of workers, or on where a run was resumed."""
    data = write_pictures(tmp_path / "data", 9)
    torch.manual_seed(0)
    with_workers = stream(data, workers=1)
    with_workers.batch(0)
    with_workers.close()
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))
