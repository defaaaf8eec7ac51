"""SceneStream: a function of seed and step."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast.data.synthetic.scenes import has_held_out_pair
from dalle2_fast.data.synthetic.stream import SceneStream
from dalle2_fast.data.synthetic.world import World


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b)


def test_stream_is_a_function_of_seed_and_step():
    options = dict(batch_size=16, resolutions=(16, 32), negatives=2)
    stream = SceneStream(**options)
    first = [stream.batch(step) for step in range(3)]
    assert equal(SceneStream(**options).batch(2), first[2])
    assert equal(stream.batch(0), first[0])
    assert not torch.equal(first[0]["tokens"], first[1]["tokens"])
    assert not torch.equal(SceneStream(**options, seed=1).batch(0)["tokens"], first[0]["tokens"])
    assert first[0]["images"][16].shape == (16, 3, 16, 16) and first[0]["images"][32].shape == (16, 3, 32, 32)
    assert first[0]["negatives"].shape == (16, 2, 36) and first[0]["negative_mask"].shape == (16, 2)


def test_batches_made_together_are_cut_from_one():
    """Catches: a batch of the previous block; rows of one tensor with other rows of another."""
    options = dict(resolutions=(16,), seed=3, negatives=2)
    together, whole = SceneStream(batch_size=4, at_once=3, **options), SceneStream(batch_size=12, **options)
    for step in (4, 2, 3, 4):
        batch, expected = together.batch(step), whole.batch(step // 3)
        rows = slice(step % 3 * 4, step % 3 * 4 + 4)
        assert torch.equal(batch["images"][16], expected["images"][16][rows])
        for key in ("tokens", "negatives", "negative_mask"):
            assert torch.equal(batch[key], expected[key][rows])
        for key, value in expected["scenes"].items():
            assert torch.equal(batch["scenes"][key], value[rows])


def test_negatives_do_not_change_the_batch():
    plain, hard = SceneStream(None, 16, (16,)).batch(5), SceneStream(None, 16, (16,), negatives=True).batch(5)
    assert "negatives" not in plain
    assert hard.pop("negatives").shape == (16, 3, 36) and hard.pop("negative_mask").dtype == torch.bool
    assert equal(plain, hard)


def test_stream_of_a_world_and_split():
    world = World(kinds=["one"], shapes=["circle"], colors=["green"])  # a held-out pair
    batch = SceneStream(world, 8, (8,), split="comp").batch(0)
    assert has_held_out_pair(batch["scenes"]).all()
    with pytest.raises(ValueError, match="no scene .*in the split 'train'"):
        SceneStream(world, 8, (8,)).batch(0)
    with pytest.raises(ValueError, match="batch_size: expected an int >= 1, got 0"):
        SceneStream(world, 0)
    with pytest.raises(ValueError, match="at_once: expected an int >= 1, got 0"):
        SceneStream(world, at_once=0)


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_rows_of_all_ranks_are_the_batch(at_once):
    """Catches: ranks that see the same scenes, rows in another order, or draws that depend on it."""
    options = dict(batch_size=8, resolutions=(8,), seed=3, negatives=2, at_once=at_once)
    whole = SceneStream(**options)
    parts = [SceneStream(**options, rank=rank, world_size=4) for rank in range(4)]
    for step in (0, 1, 4):
        batch, rows = whole.batch(step), [part.batch(step) for part in parts]
        assert [len(each["tokens"]) for each in rows] == [2] * 4
        for name in ("tokens", "negatives", "negative_mask"):
            assert torch.equal(torch.cat([each[name] for each in rows]), batch[name]), (step, name)
        for name in batch["scenes"]:
            assert torch.equal(torch.cat([each["scenes"][name] for each in rows]), batch["scenes"][name])
        images = torch.cat([each["images"][8] for each in rows])
        torch.testing.assert_close(images, batch["images"][8], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(world_size=3), "world_size: expected an int >= 1 that divides batch_size = 8, got 3"),
        (dict(world_size=0), "world_size: .*got 0"),
        (dict(rank=2, world_size=2), "rank: expected an int, 0 <= rank < 2, got 2"),
    ],
)
def test_ranks_that_do_not_exist(wrong, message):
    with pytest.raises(ValueError, match=message):
        SceneStream(batch_size=8, **wrong)
