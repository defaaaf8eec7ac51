"""slerp: exact ends, even turning, lengths, refusals."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast.pipeline.slerp import slerp


def close(a, b, atol):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_slerp_ends_to_the_bit_and_lengths():
    a, b = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    theta = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    made = slerp(a.double(), b.double(), theta).flatten(1)
    lengths = torch.lerp(a.flatten(1).norm(dim=1).double(), b.flatten(1).norm(dim=1).double(), theta.double())
    close(made.norm(dim=1), lengths, 1e-6)


def test_slerp_turns_evenly():
    """A linear mixture brought to length would not: 0.25 of the way would be 0.18 of a right angle."""
    a, b = torch.eye(3, dtype=torch.float64)[:2].unsqueeze(1)
    for theta in (0.1, 0.25, 0.5):
        angle = torch.tensor(theta * torch.pi / 2, dtype=torch.float64)
        close(slerp(a, b, theta)[0, :2], torch.stack([angle.cos(), angle.sin()]), 1e-12)
    near = a + 1e-9 * b
    assert slerp(a, near, 0.5).isfinite().all()


def test_slerp_refuses():
    a = torch.ones(1, 3)
    short = a[:, :2], r"got \(1, 3\) and \(1, 2\)"
    for b, words in [(-a, "not opposite"), (0 * a, "got a zero vector"), short]:
        with pytest.raises(ValueError, match=words):
            slerp(a, b, 0.5)
