"""Steps that leave nothing behind, and counts of them. Each test names the fault it would catch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from dalle2_fast import cli
from dalle2_fast.training.folder import StageFolder
from dalle2_fast.training.planning.config_file import change
from dalle2_fast.training.planning.rehearsal import find_learning_rate, rehearse, steepest
from dalle2_fast.training.planning.utilisation import flops_of_loss, peak_flops, watch_utilisation
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import STAGES
from dalle2_fast.training.stages.registry import make_stage
from dalle2_fast.training.trainer import Trainer

ON_CPU = dict(device=torch.device("cpu"), dtype=torch.float32)


def test_a_dry_run_states_every_stage_and_leaves_nothing(tmp_path):
    """Catches: files in the run, a stage that needs the weights of one that is not trained yet."""
    sampled = "upsampler.data.sampled={fraction: 1, strength: [0.2, 0.4], steps: 4, guidance: [1.0]}"
    preset = change(PRESETS["tiny"], [sampled, "clip.optimisation.minutes=1"])
    needs = list(rehearse(STAGES, preset, tmp_path, freeze=None, **ON_CPU))
    assert [each.stage for each in needs] == list(STAGES) and list(tmp_path.iterdir()) == []
    clip = make_stage("clip", preset, out=tmp_path, seed=0, device=torch.device("cpu")).model
    assert needs[0].parameters == sum(each.numel() for each in clip.parameters())
    assert needs[0].state_bytes > 2 * 4 * needs[0].parameters  # at least the weights and their average
    assert needs[0].steps == max(1, int(60 / needs[0].seconds)) and needs[1].steps == 4
    assert f"clip: {needs[0].parameters:,} parameters; state 0.2 MB" in str(needs[0])
    (frozen,) = rehearse(("clip",), preset, tmp_path, freeze=["visual"], **ON_CPU)
    assert frozen.trained < frozen.parameters and "of them trained" in str(frozen)


def test_a_dry_run_on_own_data(tmp_path):
    """Catches: text towers of another size than in the training, a preset for own data without any."""
    pytest.importorskip("webdataset")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, caption in enumerate(["a quiet harbour", "two dogs", "the sea at night", "a red bicycle"]):
        Image.new("RGB", (40, 32), (60 * index, 90, 200)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(caption)
    options = dict(shards=str(pictures), **ON_CPU)
    (words,) = rehearse(("clip",), PRESETS["tiny"], tmp_path / "run", **options)
    (pieces,) = rehearse(("clip",), PRESETS["tiny"], tmp_path / "run", tokenizer="clip", **options)
    assert pieces.parameters - words.parameters > 49_000 * 16
    with pytest.raises(ValueError, match="--data: expected images with captions for the preset photos-64"):
        next(rehearse(("clip",), PRESETS["photos-64"], tmp_path / "run", **ON_CPU))
    assert not (tmp_path / "run").exists()


def test_the_range_test_stops_where_the_loss_diverges(tmp_path, monkeypatch):
    """Catches: a suggestion behind the minimum, a test that goes on with losses that are not finite."""
    losses = iter([4.0, 4.0, 3.9, 3.5, 2.5, 1.5, 1.2, 1.1, 1.1, 1.2, 1.5, 30.0, 900.0, 1e9, 1.0, 1.0])
    rates = []

    def step(trainer, rate):
        rates.append(rate)
        trainer.state.window.loss += next(losses)

    monkeypatch.setattr(Trainer, "step", step)
    found = find_learning_rate("clip", PRESETS["tiny"], tmp_path, low=1e-5, high=1.0, steps=16, **ON_CPU)
    assert len(rates) < 16 and len(found.rates) == len(rates) - 1 == len(found.losses)
    assert rates[0] == 1e-5 and rates[1] / rates[0] == pytest.approx(rates[2] / rates[1])
    assert rates[1] < found.suggested < rates[8] and list(tmp_path.iterdir()) == []
    assert steepest([1.0, 2.0], [1.0, 1.5], span=1) is None
    with pytest.raises(ValueError, match="--find-lr: expected 0 < low < high"):
        find_learning_rate("clip", PRESETS["tiny"], tmp_path, low=1.0, high=0.1, **ON_CPU)


class TwoLayers:
    """A loss of a frozen and a trained matrix product, 3 rows x 5 x 7 each."""

    def __init__(self):
        self.frozen = nn.Linear(5, 5, bias=False).requires_grad_(False)
        self.model = nn.Linear(5, 7, bias=False)

    def loss(self, batch, generator):
        return self.model(self.frozen(torch.rand(3, 5, generator=generator)).requires_grad_()).sum()


def test_flops_are_those_of_the_trained_network():
    """Catches: frozen networks that count, a backward pass that does not, random numbers that are used up."""
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert flops_of_loss(TwoLayers(), {}, generator) == 3 * (2 * 3 * 5 * 7)
    assert torch.equal(generator.get_state(), state)


def test_utilisation_in_the_log(tmp_path, monkeypatch):
    """Catches: a utilisation of another batch, of a GPU whose peak nobody knows, on a CPU."""
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float16) == 989e12
    assert peak_flops("NVIDIA H200", torch.float32) is None
    assert peak_flops("Quadro", torch.bfloat16) is None
    stage = make_stage("clip", PRESETS["tiny"], out=tmp_path, seed=0, device=torch.device("cpu"))
    folder = StageFolder(tmp_path / "clip")
    folder.prepare()
    trainer = Trainer(stage, stage.recipe.optimisation, folder, show_progress=False)
    watch_utilisation(trainer)
    assert trainer.flops_per_image is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator.clone_state())
    trainer.device, trainer.dtype = SimpleNamespace(type="cuda"), torch.bfloat16
    watch_utilisation(trainer)
    whole = flops_of_loss(stage, stage.batch(0), torch.default_generator.clone_state())
    assert trainer.flops_per_image == pytest.approx(whole / 4, rel=0.1) and trainer.peak_flops == 989e12


def test_commands(tmp_path, capsys):
    """Catches: options that a resumed run forgets, a preset file that is not kept."""
    words = ["train", "clip", "--out", str(tmp_path / "run"), "--quiet", "--report-to", "none"]
    assert cli.main([*words, "--preset", "tiny", "--set", "clip.optimisation.steps=2", "--print-config"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out.replace("name: tiny", "name: mine"))
    assert cli.main([*words, "--preset", str(tmp_path / "mine.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("clip: ") and not (tmp_path / "run").exists()
    assert cli.main(["train", "all", *words[2:], "--preset", "tiny", "--find-lr"]) == 2
    assert "--find-lr: expected one stage, got all" in capsys.readouterr().err
    assert cli.main([*words, "--preset", "tiny", "--set", "clip.optimisation.stesp=2"]) == 2
    assert "expected some of batch_size" in capsys.readouterr().err
    assert cli.main([*words, "--preset", str(tmp_path / "mine.yaml")]) == 0
    assert "name: mine" in (tmp_path / "run" / "preset.yaml").read_text()
    assert cli.main(["train", "prior", *words[2:], "--resume"]) == 0  # the preset is that of the run
    assert (tmp_path / "run" / "prior" / "model.safetensors").exists()
