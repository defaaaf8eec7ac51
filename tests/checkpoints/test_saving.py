"""save_pretrained and from_pretrained: every class bit for bit, older formats, files that are not right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils import _device

from dalle2_fast import CLIP, DALLE2, ARPrior, Decoder, DiffusionPrior, Upsampler, checkpoints
from dalle2_fast.checkpoints import CheckpointError
from dalle2_fast.checkpoints.weights import unfilled
from dalle2_fast.pipeline.context import resolve_seed
from tests.support.tiny_pipeline import load_on_cpu, tiny_pipeline

UNET = dict(channels=(16, 16), layers_per_block=1, patch_size=2, num_groups=4)
UPSAMPLER = UNET | dict(in_channels=6, out_channels=3, attention_levels=())


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    if kind in ("clip", "prior", "decoder", "upsampler"):
        return getattr(pipe, kind)
    if kind == "two nets":
        return Upsampler(UPSAMPLER, last_unet=UPSAMPLER, image_size=32, low_res_size=16)
    if kind == "ar_prior":
        net = dict(dim=16, depth=1, heads=2, dim_head=8, embed_dim=16, text_dim=16, context_length=8,
                   num_components=6, num_buckets=8)
        prior = ARPrior(net)
        prior.fit(torch.randn(40, 16), torch.randn(40, 16))
        return prior
    return pipe


KINDS = ["clip", "prior", "ar_prior", "decoder", "upsampler", "two nets", "pipeline"]


@pytest.fixture(params=KINDS)
def model(request):
    return make(request.param)


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(
        torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)


def test_loaded_is_what_was_saved_to_the_bit(model, tmp_path):
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):  # numbers that any rounding would change
            parameter.add_(torch.rand_like(parameter) * 2.0 ** -(index % 20))
    before = torch.random.get_rng_state()
    loaded = type(model).from_pretrained(model.save_pretrained(tmp_path / "saved"), dtype=torch.float32)
    assert same(loaded, model) and not any(module.training for module in loaded.modules())
    assert getattr(loaded, "config", None) == getattr(model, "config", None)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(os.listdir(tmp_path / "saved")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", ["clip", "prior", "pipeline"])
def test_the_file_is_not_needed_after_loading(tmp_path, kind):
    """Weights that were still mapped from the file would change with it."""
    folder = make(kind).save_pretrained(tmp_path)
    loaded = type(make(kind)).from_pretrained(folder, dtype=torch.float32)
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert same(loaded, make(kind))


def test_a_trained_model_may_be_trained_on(tmp_path):
    """What was loaded can be changed in place: it is no view of a file or of another weight."""
    loaded = DiffusionPrior.from_pretrained(make("prior").save_pretrained(tmp_path)).train()
    loss = loaded(image_embed=torch.randn(4, 16), text_embed=torch.randn(4, 16))
    loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert not same(loaded, make("prior"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_file_and_model_are_independent(tmp_path, dtype):
    prior = make("prior")
    folder = prior.save_pretrained(tmp_path, dtype=dtype)
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {dtype}
    loaded = DiffusionPrior.from_pretrained(folder, dtype=torch.bfloat16)
    assert {x.dtype for x in loaded.state_dict().values()} == {torch.bfloat16}
    expected = {name: x.to(dtype).to(torch.bfloat16) for name, x in prior.state_dict().items()}
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())


def test_whole_numbers_keep_their_dtype(tmp_path):
    prior = ARPrior.from_pretrained(make("ar_prior").save_pretrained(tmp_path), dtype=torch.bfloat16)
    assert prior.fitted.dtype == torch.bool and prior.fitted


@pytest.mark.parametrize(("kind", "part"), [(CLIP, "clip"), (DiffusionPrior, "prior"), (Decoder, "decoder"),
                                            (Upsampler, "upsampler")])  # fmt: skip
def test_a_part_out_of_a_pipeline(tmp_path, kind, part):
    pipe = make("pipeline")
    folder = pipe.save_pretrained(tmp_path)
    assert same(kind.from_pretrained(folder), getattr(pipe, part))


def test_the_second_upsampler_of_a_pipeline(tmp_path):
    pipe = make("pipeline")
    pipe.upsampler2 = Upsampler(UPSAMPLER, image_size=64, low_res_size=32)
    folder = pipe.save_pretrained(tmp_path)
    assert same(Upsampler.from_pretrained(folder, part="upsampler2"), pipe.upsampler2)
    assert same(Upsampler.from_pretrained(folder), pipe.upsampler)


def test_the_embedded_pipeline_by_parts():
    assert Decoder.from_pretrained().image_size == 64
    assert DiffusionPrior.from_pretrained().image_embed_dim == Decoder.from_pretrained().image_embed_dim


@pytest.mark.parametrize(("saved", "kind", "says"), [
    ("prior", Decoder, "expected a Decoder or a DALLE2, got 'DiffusionPrior'"),
    ("prior", ARPrior, "expected a ARPrior or a DALLE2, got 'DiffusionPrior'"),
    ("pipeline", ARPrior, "expected a DALLE2 with a ARPrior as its prior, got a DiffusionPrior"),
    ("decoder", DALLE2, "expected a checkpoint of model 'DALLE2', got 'Decoder'"),
])  # fmt: skip
def test_another_model_is_named(tmp_path, saved, kind, says):
    with pytest.raises(CheckpointError, match=says):
        kind.from_pretrained(make(saved).save_pretrained(tmp_path))


def test_a_pipeline_without_the_part(tmp_path):
    folder = tiny_pipeline(upsampler=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a DALLE2 with a Upsampler as its upsampler, got none"):
        Upsampler.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------- older formats

# What a config of the first release had not: each must have a default that means what was meant then.
YOUNGER = {
    "": ["prior_class", "upsampler2"],
    "sampling": ["candidates", "prior_candidates", "negative_prompt", "upsampler2_steps", "tile",
                 "guidance_interval", "prior_guidance_interval"],
    "upsampler": ["last_unet", "sample_tile"],
    "decoder": ["inpaint"],
    "clip": ["eos_token_id"],
}


def rewrite(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = change(config) or config
    (folder / "config.json").write_text(json.dumps(config))


def test_a_config_of_the_first_release_loads(tmp_path):
    pipe = make("pipeline")
    folder = pipe.save_pretrained(tmp_path)

    def age(config):
        for place, names in YOUNGER.items():
            for name in names:
                (config[place] if place else config).pop(name, None)

    rewrite(folder, age)
    loaded = load_on_cpu(folder)
    assert same(loaded, pipe) and loaded.sampling == pipe.sampling
    assert torch.equal(loaded("a ring", 1, seed=0), pipe("a ring", 1, seed=0))


def test_the_first_releases_config_loads(tmp_path):
    """The config of the first checkpoint that was in the package, written before most options were there."""
    config = json.loads((Path(__file__).parent / "first_release_config.json").read_text())
    kinds = {"clip": CLIP, "prior": DiffusionPrior, "decoder": Decoder, "upsampler": Upsampler}
    parts = {name: kind(**config[name]) for name, kind in kinds.items()}
    saved = {name: config[name] for name in config if name not in ("format_version", "weights_sha256")}
    checkpoints.save_folder(tmp_path, saved, checkpoints.join_states(parts))
    loaded = load_on_cpu(tmp_path)
    assert "prior_class" not in config and loaded.sizes == (64, 256)
    assert all(same(getattr(loaded, name), part) for name, part in parts.items())


def test_an_older_version_is_brought_up_to_date_step_by_step(tmp_path, monkeypatch):
    folder = make("prior").save_pretrained(tmp_path)
    rewrite(folder, lambda config: config | {"prior": None, "the_prior": config["prior"]})
    steps = {
        1: lambda config: config | {"a_prior": config.pop("the_prior")},
        2: lambda config: config | {"prior": config.pop("a_prior")},
    }
    monkeypatch.setattr(checkpoints.folder, "FORMAT_VERSION", 3)
    monkeypatch.setattr(checkpoints.folder, "MIGRATIONS", steps)
    assert same(DiffusionPrior.from_pretrained(folder), make("prior"))
    for version in (0, 4, True, 1.0):
        rewrite(folder, lambda config, version=version: config | {"format_version": version})
        with pytest.raises(CheckpointError, match="this version of dalle2_fast reads 1 to 3"):
            DiffusionPrior.from_pretrained(folder)


# ------------------------------------------------------------------------------------- files that are damaged


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def put_back(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")
    rewrite(folder, lambda config: {k: v for k, v in config.items() if k != "weights_sha256"})


def renamed(tensors):
    tensors["prior.net.query_"] = tensors.pop("prior.net.query")


def missing(tensors):
    del tensors["prior.net.query"]


def left_over(tensors):
    tensors["prior.net.extra"] = torch.zeros(1)


def stranger(tensors):
    tensors["priors.net.query"] = torch.zeros(1)


def reshaped(tensors):
    tensors["prior.net.query"] = tensors["prior.net.query"][:-1].clone()


@pytest.mark.parametrize(("damage", "says"), [
    (renamed, r"missing 1 \(prior.net.query\); left over 1 \(prior.net.query_\)"),
    (missing, r"missing 1 \(prior.net.query\)"),
    (left_over, r"left over 1 \(prior.net.extra\)"),
    (stranger, r"belong to no part of the config: 1 \(priors.net.query\)"),
    (reshaped, r"prior.net.query: expected \[16\], got \[15\]"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["prior", "pipeline"])
def test_tensors_that_do_not_fit_are_named(tmp_path, kind, damage, says):
    model = make(kind)
    folder = model.save_pretrained(tmp_path)
    tensors = tensors_of(folder)
    damage(tensors)
    put_back(folder, tensors)
    with pytest.raises(CheckpointError, match=says):
        type(model).from_pretrained(folder)


def test_partial_and_truncated_folders(tmp_path):
    folder = make("prior").save_pretrained(tmp_path)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors: truncated or damaged"):
        DiffusionPrior.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        DiffusionPrior.from_pretrained(folder)
    weights.write_bytes(content)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        DiffusionPrior.from_pretrained(folder)


class Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch '{self.proof}'",)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "prior.ckpt"])
def test_a_pickle_in_the_place_of_weights_is_not_run(tmp_path, name):
    folder, proof = make("prior").save_pretrained(tmp_path / "folder"), tmp_path / "proof"
    if name != "model.safetensors":  # then there is nothing of ours, and the file is looked at
        for file in folder.iterdir():
            file.unlink()
    torch.save({"state_dict": {"model.prd_emb": Evil(proof)}}, folder / name)
    with pytest.raises((CheckpointError, FileNotFoundError)):
        DiffusionPrior.from_pretrained(folder)
    assert not proof.exists()


def test_a_failed_save_leaves_the_earlier_one(tmp_path, monkeypatch):
    prior = make("prior")
    folder = prior.save_pretrained(tmp_path)
    other = make("prior")
    torch.nn.init.zeros_(other.net.query)

    def fail(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(folder)
    assert same(DiffusionPrior.from_pretrained(folder), prior)


@pytest.mark.parametrize("change", [
    lambda config: config | {"prior": None}, lambda config: config | {"prior": 3},
    lambda config: {k: v for k, v in config.items() if k != "prior"},
    lambda config: config | {"prior": config["prior"] | {"unknown": 1}},
])  # fmt: skip
def test_configs_that_build_nothing(tmp_path, change):
    folder = make("prior").save_pretrained(tmp_path)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="prior"):
        DiffusionPrior.from_pretrained(folder)


LOADED = """
import sys, torch
before = set(sys.modules)
from dalle2_fast import DALLE2
DALLE2.from_pretrained()
print(*(name for name in ("torch._dynamo", "sympy", "triton") if name in set(sys.modules) - before))
"""


def test_loading_imports_no_compiler():
    """It takes longer than the loading; operations on the "meta" device would bring it in."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stdout.split() == [], done


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_making_a_model_for_loading_takes_no_memory():
    """Drawing or zeroing the initial weights of Karlo would take longer, and more room, than reading them."""

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    before, state = pages(), torch.random.get_rng_state()
    with unfilled():
        decoder = Decoder()
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 893_318_086
    assert (pages() - before) * os.sysconf("SC_PAGE_SIZE") < 200e6  # of 3.6 GB
    assert torch.equal(state, torch.random.get_rng_state())


def test_making_a_model_for_loading_draws_nothing_and_sets_nothing_that_other_threads_see():
    """Restoring the random state afterwards gives a thread that draws in the meantime the same numbers twice.

    `with torch.device("cpu")` sets a global variable, in which two threads can leave each other's value.
    """
    state, device = torch.random.get_rng_state(), _device.CURRENT_DEVICE
    with unfilled():
        for kind in (CLIP, Decoder, DiffusionPrior, ARPrior):
            kind()
            assert torch.equal(state, torch.random.get_rng_state()) and _device.CURRENT_DEVICE is device


def test_a_default_device_is_not_used_for_loading():
    with torch.device("meta"), unfilled():
        assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_seeds_that_are_drawn_while_a_thread_loads_are_all_different():
    loading = threading.Thread(target=lambda: [DALLE2.from_pretrained() for _ in range(2)])
    loading.start()
    seeds = []
    while loading.is_alive():
        seeds.append(resolve_seed(None))
    assert len(set(seeds)) > 0.999 * len(seeds) > 0  # 2^32 seeds: two of 10,000 are equal once in 100 runs


def test_buffers_are_filled_where_parameters_are_not():
    with unfilled():
        norm, scale = torch.nn.BatchNorm2d(3), torch.nn.init.ones_(torch.empty(2))
    assert norm.running_var.tolist() == [1, 1, 1] and scale.tolist() == [1, 1]
