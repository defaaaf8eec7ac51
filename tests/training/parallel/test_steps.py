"""Parts of a step: chunks of a contrastive loss, the scale of a float16 loss, blocks that are prepared."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.training.folder import StageFolder
from dalle2_fast.training.parallel.blocks import prepare_blocks, repeated_blocks
from dalle2_fast.training.parallel.contrastive import contrastive_loss, two_passes
from dalle2_fast.training.parallel.execution import Execution
from dalle2_fast.training.parallel.gradient import rows_of
from dalle2_fast.training.parallel.processes import ALONE, is_restarted, mark_as_begun
from dalle2_fast.training.parallel.strategies import make_strategy
from dalle2_fast.training.recipes import Optimisation
from dalle2_fast.training.run import check_execution
from dalle2_fast.training.trainer import Trainer
from tests.support.toy_training import Toy, log_rows


def small_clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(dim_text=16, dim_image=16, dim_latent=8, num_text_tokens=10, text_enc_depth=1, text_seq_len=6,
                text_heads=2, visual_enc_depth=1, visual_heads=2, visual_image_size=16, visual_patch_size=8)


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_two_passes_have_the_gradient_of_one(size, negatives):
    """Catches: chunks that are compared with themselves only, a scale or a last chunk without gradient."""
    rows = torch.Generator().manual_seed(1)
    images = torch.rand(7, 3, 16, 16, generator=rows)
    texts = torch.randint(1, 10, (7, 1 + negatives, 6), generator=rows)
    mask = torch.rand(7, negatives, generator=rows) < 0.7 if negatives else None
    once, twice = small_clip(), small_clip()
    other = texts[:, 1:] if negatives else None
    loss = once(texts[:, 0], images, negative_text=other, negative_mask=mask)
    loss.backward()

    def features(chunk):
        embeds = twice.encode_text(chunk["texts"].flatten(0, 1))[0].unflatten(0, (-1, 1 + negatives))
        return twice.encode_image(chunk["images"]), embeds[:, 0], embeds[:, 1:] if negatives else None

    batch = {"images": images, "texts": texts}
    got = two_passes(
        features,
        lambda values, scale: contrastive_loss(values, mask, scale, ALONE),
        twice.logit_scale,
        [rows_of(batch, begin, begin + size) for begin in range(0, 7, size)],
        lambda function, *arguments, last: function(*arguments),
    )
    torch.testing.assert_close(got, loss.detach())
    for (name, one), two in zip(once.named_parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)


def trainer_of(path, dtype) -> Trainer:
    folder = StageFolder(path)
    folder.prepare()
    options = Optimisation(batch_size=4, steps=6, warmup_steps=1, log_steps=2, first_validation=2**40)
    return Trainer(Toy(), options, folder, dtype=dtype, show_progress=False)


def test_an_overflow_of_float16_changes_no_weight_and_halves_the_scale(tmp_path):
    """Catches: infinite gradients in the weights or in the log, and a scale that a resumed run forgets."""
    trainer = trainer_of(tmp_path / "a", torch.float16)
    before = {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
    trainer.state.loss_scale.value = 2.0**60
    trainer.step(1e-3)
    assert trainer.state.loss_scale.value == 2.0**59 and trainer.state.step == 1
    assert trainer.state.window.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.state.model.state_dict().items())
    trainer.state.loss_scale.value = 2.0**8
    trainer.step(1e-3)
    assert not torch.equal(trainer.state.model[0].weight, before["0.weight"])
    trainer.save()
    resumed = trainer_of(tmp_path / "a", torch.float16)
    resumed.resume()
    assert resumed.state.loss_scale.state_dict() == {"value": 2.0**8, "good_steps": 1}


def test_float16_trains_as_float32_does(tmp_path):
    """Catches: a gradient that is clipped before the scale is taken out of it."""
    half, whole = trainer_of(tmp_path / "half", torch.float16), trainer_of(tmp_path / "whole", torch.float32)
    half.state.loss_scale.value = 2.0**8  # with the first one, the first steps of this model overflow
    assert half.train() == whole.train() == "finished"
    rows, others = (
        [row for row in log_rows(tmp_path / name) if "loss" in row] for name in ("whole", "half")
    )
    assert len(rows) == len(others) >= 2
    for row, other in zip(rows, others, strict=True):
        for name in ("loss", "grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=0.03), (row["step"], name)


def test_prepared_blocks_have_the_same_gradient_and_names(monkeypatch):
    """Catches: a block that is computed again with other numbers, or weights that are renamed."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, prepared = small_clip(), small_clip()
    prepare_blocks(prepared, checkpoint_activations=True, compile=True)
    assert len(repeated_blocks(prepared)) == 2
    text, images = torch.randint(1, 10, (4, 6)), torch.rand(4, 3, 16, 16)
    for clip in (plain, prepared):
        clip(text, images).backward()
    assert list(plain.state_dict()) == list(prepared.state_dict())
    for one, two in zip(plain.parameters(), prepared.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-6)


def test_options_that_do_not_fit():
    """Catches: an option that is accepted and does nothing."""
    for wrong, message in (
        (dict(accumulate=0), "--accumulate: expected at least 1, got 0"),
        (dict(shard_size=2), "--shard-size: is for --parallel fsdp"),
        (dict(parallel="tp"), "--parallel: expected one of ddp, fsdp"),
    ):
        with pytest.raises(ValueError, match=message):
            Execution(**wrong)
    with pytest.raises(ValueError, match="--parallel fsdp: expected several processes"):
        make_strategy(small_clip(), Execution(parallel="fsdp"), ALONE, torch.device("cpu"))
    norms = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    with pytest.raises(RuntimeError, match="batch norms"):
        make_strategy(norms, Execution(accumulate=2), ALONE, torch.device("cpu"))
    with pytest.raises(ValueError, match="--graphs"):
        check_execution(True, torch.device("cpu"), None, ALONE, Execution(accumulate=2))


def test_a_restarted_attempt_goes_on_and_another_command_does_not(tmp_path, monkeypatch):
    """Catches: `torchrun --max-restarts` that resumes a run which its command was not allowed to touch."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not is_restarted(ALONE, tmp_path)
    mark_as_begun(ALONE, tmp_path)
    assert is_restarted(ALONE, tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not is_restarted(ALONE, tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr("os.getppid", lambda: -1)
    assert not is_restarted(ALONE, tmp_path)
