"""The losses of several processes against autograd in one process in float64, and against open_clip.

The processes are started once for each world size (`loss_processes`). What they do, and the truth, is in
`distributed_cases`.
"""

from __future__ import annotations

import argparse
import re

import pytest
import torch

from dalle2_fast import functional
from dalle2_fast.losses import ClipLoss, SigLipLoss, SoftClipLoss
from tests.support import loss_processes
from tests.support.losses.distributed_cases import (
    BIAS,
    FUSED,
    MODES,
    ROUNDED,
    UPSTREAM,
    WRAPPED,
    Towers,
    batch,
    everything,
    features,
    like_open_clip,
    one_dies,
    one_skips_backward,
    one_sleeps,
    open_clip_loss,
    truth,
    upstream,
)

WORLDS = (1, 2, 4)
_answers = {}


@pytest.fixture
def answers(tmp_path_factory):
    """world_size -> what `everything` returned on each rank; the processes run at the first request."""

    def ask(world_size: int) -> list[dict]:
        if world_size not in _answers:
            if world_size == 1:
                _answers[1] = [everything(0, 1)]
            else:
                folder = tmp_path_factory.mktemp(f"world{world_size}")
                _answers[world_size] = loss_processes.run(everything, world_size, folder)
        for rank, answer in enumerate(_answers[world_size]):
            assert isinstance(answer, dict), f"rank {rank}: {answer}"
        return _answers[world_size]

    return ask


def is_local(mode: tuple, world_size: int) -> bool:
    return world_size > 1 and mode[0] == "clip" and mode[1]


def averaged(expected: list[dict]) -> list[dict]:
    """The scale's gradient replaced by its mean over processes, which local_loss=True returns."""
    mean = sum(values["d scale"] for values in expected) / len(expected)
    return [values | {"d scale": mean} for values in expected]


@pytest.mark.parametrize("impl", sorted({"reference", FUSED}))
@pytest.mark.parametrize("weights", list(UPSTREAM))
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("world_size", WORLDS)
def test_values_and_gradients_in_float64(answers, world_size, mode, weights, impl):
    # Catches: a factor W or 1/W, an offset of the positives, a term of another process lost or counted twice,
    # a gradient of texts returned to the wrong process, gradients of the other processes' losses mixed up,
    # NaN where a process weights its loss with 0 or with another sign.
    expected = truth(mode, *features(world_size), upstream(world_size, weights))
    expected = averaged(expected) if is_local(mode, world_size) else expected
    for rank, answer in enumerate(answers(world_size)):
        actual = answer["exact", mode, weights, impl]
        for name, value in expected[rank].items():
            where = f"{name}, rank {rank}"
            torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-12, msg=where)


@pytest.mark.parametrize("mode, dtype", ROUNDED, ids=str)
def test_low_precision_is_close_to_truth(answers, mode, dtype):
    # Catches: a small factor applied before a float16 is rounded, sums over processes in the features' dtype.
    expected = truth(mode, *features(2, dtype), [1.0, 1.0])
    expected = averaged(expected) if is_local(mode, 2) else expected
    for rank, answer in enumerate(answers(2)):
        actual = answer["rounded", mode, dtype]
        assert actual["loss"].dtype == torch.float32 and actual["d image"].dtype == dtype
        for name, value in expected[rank].items():
            error, size = (actual[name].double() - value).norm().item(), value.norm().item()
            assert error <= torch.finfo(actual[name].dtype).eps * size + 2e-6, (name, rank, error, size)


@pytest.mark.parametrize("mode, wrapper", WRAPPED, ids=str)
def test_ddp_and_fsdp_around_a_clip_give_the_gradients_of_one_process(answers, mode, wrapper):
    # Catches: a backward pass that deadlocks with a wrapper's collectives, a gradient without the factor W.
    if mode[:3] == ("clip", True, False):  # not the gradient of a loss: it runs, and is the same on both
        first, second = (answer["model", mode, wrapper] for answer in answers(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        return
    model = Towers()
    image, text, scale = model(*batch(2))
    loss = functional.sigmoid_loss(image, text, scale, BIAS) if mode[0] == "siglip" else (
        functional.contrastive_loss(image, text, scale))  # fmt: skip
    loss.backward()
    # The gradient is 1 x true instead of W x true, so half of it is left after the wrapper's mean.
    weak = mode == ("clip", False, False)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            share = 0.5 if weak and not name.endswith("logit_scale") else 1.0
            for answer in answers(2):
                actual = answer["model", mode, wrapper][name].reshape(parameter.shape)
                torch.testing.assert_close(actual, share * parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_locked_towers_and_no_gradients(answers):
    for rank, answer in enumerate(answers(2)):
        for mode, value, gradient in answer["frozen"]:
            expected = answer["exact", mode, "equal", "reference"]
            torch.testing.assert_close(value, expected["loss"])
            torch.testing.assert_close(gradient, expected["d text"], msg=f"{mode}, {rank}")


def test_forms_of_the_arguments_do_not_change_the_loss(answers):
    for answer in answers(2):
        for mode, (loss, *others) in answer["options"]:
            for other in others:
                torch.testing.assert_close(other, loss, check_dtype=False, msg=str(mode))


@pytest.mark.parametrize("name, here, there", [
    ("rows", r"ValueError: .*\[n, D\] = \(3, 5\) on every rank as on rank 0, got \(2, 5\) on rank 1",
     r"ValueError: .*\(2, 5\) on every rank as on rank 1, got \(3, 5\) on rank 0"),
    ("width", r"ValueError: .*got \(3, 4\) on rank 1", r"ValueError: .*got \(3, 5\) on rank 0"),
    ("dtype", "TypeError: .*expected torch.float64 on every rank as on rank 0, got torch.float32 on rank 1",
     "TypeError: .*expected torch.float32"),
    ("options", "ValueError: ClipLoss: rank 1 was built with other", "ValueError: ClipLoss: rank 0 was"),
    ("exchange", "ValueError: SigLipLoss: rank 1 was built with other", "ValueError: SigLipLoss: rank 0 was"),
    ("arguments", "RuntimeError: ClipLoss: the arguments on rank 1 are wrong", "TypeError: image_f.*int64"),
    ("empty", "RuntimeError: ClipLoss: the arguments on rank 1 are wrong", r"ValueError: .* got \(0, 5\)"),
    ("rank", "ValueError: ClipLoss: expected the process group's rank = 0 and world_size = 2, got 1 and 2",
     "rank = 1 and world_size = 2, got 0 and 2"),
    ("world", "rank = 0 and world_size = 2, got 0 and 3", "rank = 1 and world_size = 2, got 1 and 3"),
    ("soft", "SoftClipLoss: expected local_loss = False", "SoftClipLoss: expected local_loss = False"),
    ("grad", "RuntimeError: ClipLoss: with world_size > 1", "RuntimeError: ClipLoss: with world_size > 1"),
    ("jvp", "RuntimeError: SigLipLoss: with world_size > 1", "RuntimeError: SigLipLoss: with world_size > 1"),
])  # fmt: skip
def test_wrong_arguments_raise_on_every_process(answers, name, here, there):
    for answer, message in zip(answers(2), (here, there), strict=True):
        assert re.search(message, answer["errors"][name]), answer["errors"][name]


def test_a_process_that_dies_is_an_error_for_the_others(tmp_path):
    for function in (one_dies, one_skips_backward):
        folder = tmp_path / function.__name__
        folder.mkdir()
        first, second = loss_processes.run(function, 2, folder, seconds=30, limit=100)
        assert second == "ArithmeticError: out of luck"
        assert isinstance(first, str) and "Error" in first, first


def test_a_process_that_is_late_is_an_error_after_the_time_out(tmp_path):
    first, second = loss_processes.run(one_sleeps, 2, tmp_path, 3.0, seconds=3.0, limit=100)
    assert second == "ArithmeticError: too late"
    assert first.startswith("RuntimeError: after ") and float(first.split()[2]) < 6.0, first


@pytest.mark.skipif(open_clip_loss is None, reason="needs open_clip_torch")
def test_same_as_open_clip(tmp_path):
    for world_size in WORLDS:
        folder = tmp_path / str(world_size)
        folder.mkdir()
        answers = loss_processes.run(like_open_clip, world_size, folder)
        for mode, weights in answers[0]:
            ours, theirs = zip(*(answer[mode, weights] for answer in answers), strict=True)
            theirs = averaged(theirs) if is_local(mode, world_size) else theirs
            for rank in range(world_size):
                for name in theirs[rank]:
                    torch.testing.assert_close(
                        ours[rank][name], theirs[rank][name], rtol=1e-11, atol=1e-12,
                        msg=f"{mode}, {name}, rank {rank} of {world_size}",
                    )  # fmt: skip


@pytest.mark.skipif(open_clip_loss is None, reason="needs open_clip_torch")
@pytest.mark.parametrize("siglip", [False, True])
def test_open_clip_builds_our_losses_after_the_line_of_the_readme(monkeypatch, siglip):
    import open_clip.factory

    for kind in (ClipLoss, SigLipLoss):
        monkeypatch.setattr(open_clip.factory, kind.__name__, kind)
    options = dict(distill=False, model="ViT-B-32", siglip=siglip, horovod=False, local_loss=True,
                   gather_with_grad=True, loss_dist_impl=None, rank=1, world_size=2)  # fmt: skip
    loss = open_clip.factory.create_loss(argparse.Namespace(**options))
    assert type(loss) is (SigLipLoss if siglip else ClipLoss) and (loss.rank, loss.world_size) == (1, 2)


# ----------------------------------------------------------------------------------------------- one process


def test_one_process_calls_like_open_clip():
    image, text = torch.randn(2, 6, 4).unbind()
    expected = functional.contrastive_loss(image, text, 5.0)
    loss = ClipLoss(True, True, True, 0, 1, False)
    torch.testing.assert_close(loss(image, text, torch.tensor(5.0)), expected)
    torch.testing.assert_close(loss(image, text, 5.0, 1.5), expected)  # a bias cancels
    assert list(loss(image, text, 5.0, output_dict=True)) == ["contrastive_loss"]
    assert list(loss.parameters()) == [] and loss.state_dict() == {}
    named = loss(image_features=image, text_features=text, logit_scale=5.0, logit_bias=None, output_dict=True)
    torch.testing.assert_close(named["contrastive_loss"], expected)

    soft = SoftClipLoss()
    torch.testing.assert_close(soft(image, text, 5.0), functional.soft_contrastive_loss(image, text, 5.0))

    loss = SigLipLoss(True, 0, 1, "shift")
    for bias, given in ((-10.0, -10.0), (0.0, None)):
        expected = functional.sigmoid_loss(image, text, 5.0, bias)
        torch.testing.assert_close(loss(image, text, 5.0, given), expected)
    assert list(loss(image, text, 5.0, -10.0, True)) == ["contrastive_loss"]
    assert SigLipLoss().dist_impl == SigLipLoss(dist_impl="").dist_impl == "bidir"
    with pytest.raises(TypeError, match="logit_bias"):
        loss(image, text, 5.0)


@pytest.mark.parametrize("kind, arguments, error, message", [
    (ClipLoss, dict(use_horovod=True), NotImplementedError, "expected use_horovod = False"),
    (ClipLoss, dict(world_size=0), ValueError, "ClipLoss: world_size: expected an int >= 1, got 0"),
    (SigLipLoss, dict(world_size=2, rank=2), ValueError, "SigLipLoss: rank: expected .* < 2, got 2"),
    (SigLipLoss, dict(dist_impl="ring"), ValueError, "dist_impl: expected one of 'bidir', .*, got 'ring'"),
])  # fmt: skip
def test_wrong_constructions(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**arguments)


@pytest.mark.parametrize("kind", [ClipLoss, SoftClipLoss, SigLipLoss])
def test_several_processes_need_a_process_group(kind):
    image, text = torch.randn(2, 6, 4).unbind()
    with pytest.raises(RuntimeError, match=r"\(world_size=4\) needs .* default process group"):
        kind(world_size=4)(image, text, 5.0, -10.0)
