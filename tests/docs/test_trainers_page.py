"""docs/trainers.md: every block of code on the page runs, against the real packages where they are installed.

Catches: a line of the page that does not work.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.cases import foreign_unets
from dalle2_fast.adapters._swap import Patched
from tests.support.tiny_pipeline import tiny_pipeline

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
BLOCKS = dict(re.findall(r"<!-- ([\w -]+?) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
NEEDS = {"diffusers": "diffusers", "dalle2-pytorch": "dalle2_pytorch", "lightning": "lightning",
         "accelerate": "accelerate", "ddp": "diffusers", "fsdp2": "diffusers"}  # fmt: skip
TOKENS = torch.tensor([[1, 2, 4, 0, 0, 0, 0, 0], [1, 3, 5, 6, 2, 0, 0, 0]])


def test_every_block_has_a_name():
    assert len(BLOCKS) == PAGE.count("```python") == 12


def is_patched(model) -> bool:
    return any(isinstance(module, Patched) for module in model.modules())


@pytest.fixture
def names(tmp_path):
    """The names that the code on the page uses without defining them."""
    torch.manual_seed(0)
    pipe = tiny_pipeline().requires_grad_(True)
    images = torch.rand(2, 3, 32, 32)
    embed = nn.functional.normalize(torch.randn(2, 16), dim=-1)
    batch = (nn.functional.avg_pool2d(images, 2), embed, TOKENS)
    quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                 default_root_dir=tmp_path)  # fmt: skip
    return dict(
        torch=torch, our_decoder=pipe.decoder.train(), our_upsampler=pipe.upsampler.train(), images=images,
        embed=embed, text=TOKENS, image_features=embed, text_features=embed.flip(0), options=quiet,
        loader=torch.utils.data.DataLoader(list(zip(*batch, strict=True)), batch_size=2),
        logit_scale=torch.tensor(14.3),
    )  # fmt: skip


def karlo() -> tuple[nn.Module, dict]:
    unet = foreign_unets.build("karlo decoder", small=True)
    return unet, foreign_unets.inputs("karlo decoder", unet, 2)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("ddp", "fsdp2")])
def test_block(name, names):
    for prefix, package in NEEDS.items():
        if name.startswith(prefix):
            pytest.importorskip(package, reason=f"{package} is not installed")
    unet = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU())
    if name.startswith("diffusers"):
        import diffusers

        unet, given = karlo()
        scheduler = diffusers.UnCLIPScheduler(variance_type="learned_range")
        scheduler.set_timesteps(2)
        names |= dict(x=given["sample"], context=given["encoder_hidden_states"], labels=given["class_labels"],
                      scheduler=scheduler, pipe=Pipe(diffusers, unet))  # fmt: skip
    if name == "dalle2-pytorch patch":
        from dalle2_pytorch import Decoder, Unet

        net = Unet(dim=16, image_embed_dim=16, cond_dim=16, dim_mults=(1, 2))
        names["decoder"] = Decoder(unet=net, image_size=16, timesteps=10, learned_variance=False)
    names["unet"] = unet
    before = {key: value.clone() for key, value in names["our_decoder"].state_dict().items()}
    exec(BLOCKS[name], names)
    after = names["our_decoder"].state_dict()
    trained = any(not torch.equal(value, after[key]) for key, value in before.items())
    assert trained == (name in ("plain", "lightning", "accelerate", "dalle2-pytorch ours"))
    if "loss" in names:
        assert torch.as_tensor(names["loss"]).isfinite().all()
    if name == "patch":
        assert len(names["report"].swapped) == 2 and not is_patched(unet)
    if name in ("diffusers pipeline", "diffusers training", "dalle2-pytorch patch"):
        assert is_patched(names["decoder"] if name.startswith("dalle2") else unet)
    if name == "diffusers pipeline":
        assert type(names["pipe"].decoder_scheduler).__module__ == "dalle2_fast.adapters.diffusers"


def Pipe(diffusers, unet):
    """A diffusers pipeline of a U-Net and its scheduler."""

    class UnCLIP(diffusers.DiffusionPipeline):
        def __init__(self, decoder, decoder_scheduler) -> None:
            super().__init__()
            self.register_modules(decoder=decoder, decoder_scheduler=decoder_scheduler)

        def __call__(self) -> SimpleNamespace:
            return SimpleNamespace(images=[])

    return UnCLIP(unet, diffusers.UnCLIPScheduler())


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_block_with_a_process_group(name, tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "meet"), 1), rank=0, world_size=1)
    try:
        unet, given = karlo()
        names = dict(unet=unet, mesh=init_device_mesh("cpu", (1,)))
        exec(BLOCKS[name], names)
        foreign_unets.run(names.get("model", unet), given).square().mean().backward()
        assert is_patched(unet) and all(value.grad is not None for value in unet.parameters())
    finally:
        dist.destroy_process_group()
