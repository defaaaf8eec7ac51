"""Our modules in other training loops: the losses are those of a plain loop, in one process or two.

Each test names the fault it would catch. Lightning and Accelerate are the real packages, where installed.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.support import loss_processes
from tests.support.tiny_pipeline import tiny_pipeline

STEPS, BATCH = 4, 4
TOKENS = torch.tensor([[1, 2, 4, 0], [1, 3, 5, 6], [2, 5, 0, 0], [6, 4, 3, 0]])


class Stage(nn.Module):
    """A module whose forward returns the loss of one batch, as trainers expect. Every batch contains a seed
    for the random numbers of the loss, so that only the loops differ."""

    def __init__(self, name: str) -> None:
        super().__init__()
        pipe = tiny_pipeline()
        pipe.requires_grad_(True)
        self.name, self.net = name, getattr(pipe, name).train()

    def forward(self, batch: dict) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(batch["seed"][0]))
        images, text, embed = batch["images"], batch["text"], batch["embed"]
        if self.name == "clip":
            return self.net(text, images)
        if self.name == "prior":
            # With encodings: without them their projection has no gradient, for which DDP needs an option.
            caption = dict(text_embed=embed.flip(0), text_encodings=embed.flip(1)[:, None].expand(-1, 8, -1))
            return self.net(image_embed=embed, generator=generator, **caption)
        return self.net(images, text=text, image_embed=embed, generator=generator)


class Batches(torch.utils.data.Dataset):
    """STEPS times the same BATCH rows, with a seed for each step."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = torch.rand(BATCH, 3, 16, 16, generator=generator)
        self.embed = nn.functional.normalize(torch.randn(BATCH, 16, generator=generator), dim=-1)

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict:
        step, row = divmod(index, BATCH)
        text = nn.functional.pad(TOKENS[row], (0, 4))
        return dict(images=self.images[row], embed=self.embed[row], text=text, seed=torch.tensor(step))


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Batches(), batch_size=BATCH)


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=3e-3)


def plain_loop(name: str, call=None) -> tuple[nn.Module, list[float]]:
    """The loop to compare with; call(stage) -> the function of a batch."""
    stage = Stage(name)
    called = stage if call is None else call(stage)
    steps, losses = optimizer(stage), []
    for batch in loader():
        loss = called(batch)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return stage, losses


def assert_same(stage: nn.Module, losses: list[float], name: str, **tolerance) -> None:
    expected, expected_losses = plain_loop(name)
    torch.testing.assert_close(losses, expected_losses, **tolerance or dict(rtol=1e-6, atol=1e-7))
    if not tolerance:
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(stage.state_dict()[key], value, rtol=1e-5, atol=1e-7, msg=key)


STAGES = pytest.mark.parametrize("name", ["clip", "prior", "decoder"])


@STAGES
def test_a_plain_loop_learns(name):
    """Catches: a loss that gives no gradient to some weight, or does not fall on a repeated batch."""
    stage = Stage(name)
    steps, batch = optimizer(stage), next(iter(loader()))
    first = stage(batch).item()
    for _ in range(30):
        steps.zero_grad()
        stage(batch).backward()
        steps.step()
    assert stage(batch).item() < 0.8 * first


@STAGES
def test_lightning(name, tmp_path):
    """Catches: a module that does not work inside a LightningModule, or whose steps differ in its loop."""
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.stage, self.losses = Stage(name), []

        def training_step(self, batch, _):
            loss = self.stage(batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return optimizer(self)

    lit = Lit()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(lit, loader())
    assert_same(lit.stage, lit.losses, name)
    assert list(tmp_path.rglob("*.ckpt"))  # Lightning stores what it trained


@STAGES
def test_accelerate(name, tmp_path):
    """Catches: a module that `prepare` or `save_state` cannot handle."""
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")

    accelerator = accelerate.Accelerator(cpu=True)
    stage = Stage(name)
    stage, steps, batches = accelerator.prepare(stage, optimizer(stage), loader())
    losses = []
    for batch in batches:
        loss = stage(batch)
        steps.zero_grad()
        accelerator.backward(loss)
        steps.step()
        losses.append(loss.item())
    assert_same(accelerator.unwrap_model(stage), losses, name)
    accelerator.save_state(tmp_path / "state")
    before = copy.deepcopy(stage.state_dict())
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(before[key], value) for key, value in stage.state_dict().items())


@STAGES
def test_compile(name):
    """Catches: a training step that cannot be traced, or that computes something else when traced."""
    stage, losses = plain_loop(name, lambda stage: torch.compile(stage, backend="eager"))
    assert_same(stage, losses, name, rtol=1e-5, atol=1e-6)


@STAGES
def test_gradient_checkpointing(name):
    """Catches: a forward pass that uses other random numbers when it is repeated for the backward pass."""

    def checkpointed(stage):
        again = torch.utils.checkpoint.checkpoint
        return lambda batch: again(stage, batch, use_reentrant=False)

    stage, losses = plain_loop(name, checkpointed)
    assert_same(stage, losses, name)


@STAGES
def test_bf16_autocast(name):
    """Catches: dtypes that clash under autocast; a loss that is not near the one in float32."""

    def automatic(stage):
        def call(batch):
            with torch.autocast("cpu", torch.bfloat16):
                return stage(batch)

        return call

    stage, losses = plain_loop(name, automatic)
    assert all(value.dtype == torch.float32 for value in stage.parameters())
    assert_same(stage, losses, name, rtol=0.03, atol=0.03)  # eight bits of mantissa


@STAGES
def test_average_of_swa_utils(name):
    """Catches: modules that cannot be copied, buffers or weights that the average misses."""
    stage = Stage(name)
    average = AveragedModel(stage, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    steps = optimizer(stage)
    expected = {key: value.clone() for key, value in stage.state_dict().items()}
    for count, batch in enumerate(loader()):
        steps.zero_grad()
        stage(batch).backward()
        steps.step()
        average.update_parameters(stage)
        for key, value in stage.state_dict().items():  # the first update copies
            mix = value if count == 0 or not value.is_floating_point() else 0.5 * (expected[key] + value)
            expected[key] = mix.clone()
    for key, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[key], msg=key)
    assert average(next(iter(loader()))).isfinite()


# ------------------------------------------------------------------------------------------ two processes


def part(batch: dict, rank: int) -> dict:
    half = BATCH // 2
    return {key: value[rank * half : (rank + 1) * half] for key, value in batch.items()}


def train_wrapped(rank: int, world_size: int, name: str, kind: str) -> dict:
    stage = Stage(name)
    whole_scalars = []
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(stage)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # FSDP2 does not shard scalars (CLIP's logit_scale): they stay whole, and their gradient is averaged
        # here.
        whole_scalars = [value for value in stage.parameters() if value.dim() == 0]
        mesh = init_device_mesh("cpu", (world_size,))
        whole = dict(ignored_params=set(whole_scalars)) if whole_scalars else {}
        wrapped = fully_shard(stage, mesh=mesh, **whole)
    steps, losses = optimizer(wrapped), []
    for batch in loader():
        loss = wrapped(part(batch, rank))
        steps.zero_grad()
        loss.backward()
        for value in whole_scalars:
            torch.distributed.all_reduce(value.grad)
            value.grad /= world_size
        steps.step()
        losses.append(loss.item())
    whole = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in stage.state_dict().items()
    }
    return dict(losses=losses, weights={key: value.detach().clone() for key, value in whole.items()})


def train_halves(name: str) -> tuple[list[list[float]], dict]:
    """The expected result of two processes: the mean of the gradients of both halves."""
    stage = Stage(name)
    steps, losses = optimizer(stage), [[], []]
    for batch in loader():
        steps.zero_grad()
        for rank in (0, 1):
            loss = stage(part(batch, rank))
            (loss / 2).backward()
            losses[rank].append(loss.item())
        steps.step()
    return losses, stage.state_dict()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@STAGES
def test_two_processes(name, kind, tmp_path):
    """Catches: weights that a wrapper does not see or leaves without a gradient, sharded weights that a
    module uses past its hooks, scalars that cannot be sharded. (The contrastive loss over the batches of all
    processes: test_losses.)"""
    results = loss_processes.run(train_wrapped, 2, tmp_path, name, kind)
    expected, weights = train_halves(name)
    for rank, result in enumerate(results):
        assert not isinstance(result, str), result
        torch.testing.assert_close(result["losses"], expected[rank], rtol=1e-5, atol=1e-6)
        for key, value in weights.items():
            torch.testing.assert_close(result["weights"][key], value, rtol=1e-4, atol=1e-6, msg=key)
