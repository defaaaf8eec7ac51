"""Runs that a YAML file describes. Each test names the fault it would catch."""

from __future__ import annotations

import pytest
import yaml

from dalle2_fast.training.planning.config_file import change, dump_preset, load_preset
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import Optimisation


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_file(tmp_path, name):
    """Catches: a value that YAML changes, or that is not written."""
    file = tmp_path / "run.yaml"
    file.write_text(dump_preset(PRESETS[name]))
    read = load_preset(str(file))
    assert yaml.safe_load(dump_preset(read)) == yaml.safe_load(dump_preset(PRESETS[name]))
    assert read.decoder.optimisation == PRESETS[name].decoder.optimisation


def test_a_file_says_only_what_differs(tmp_path):
    """Catches: a nested value that drops its neighbours, 1e-3 read as a string, minutes beside steps."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "base: tiny\n"
        "decoder:\n  model: {unet: {num_groups: 2}}\n"
        "  optimisation: {learning_rate: 1e-3, betas: [0.8, 0.9]}\n"
        "clip:\n  optimisation: {minutes: 3}\n"
    )
    preset, tiny = load_preset(str(file)), PRESETS["tiny"]
    assert preset.name == "mine" and preset.prior == tiny.prior
    assert preset.decoder.model["unet"] == tiny.decoder.model["unet"] | {"num_groups": 2}
    assert preset.decoder.optimisation.learning_rate == 1e-3
    assert preset.decoder.optimisation.betas == (0.8, 0.9)
    assert (preset.clip.optimisation.minutes, preset.clip.optimisation.steps) == (3.0, None)


def test_every_option_can_be_set():
    """Catches: a field that has no name on the command line."""
    tiny = PRESETS["tiny"]
    preset = change(tiny, ["decoder.optimisation.ema_decay=0.5", "world.shapes=[ring, star]", "name=other"])
    assert preset.decoder.optimisation.ema_decay == 0.5
    assert (preset.world["shapes"], preset.name) == (["ring", "star"], "other")
    assert change(tiny, ["upsampler2=null"]).upsampler2 is None
    assert change(tiny, []) is tiny


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("base: huge", "base: expected one of scenes-cpu, .*, got 'huge'"),
        ("[1, 2]", "expected a mapping with base, name and stages, got"),
        ("base: tiny\ndecodr: {}", "expected some of name, world, .*, got 'decodr'"),
        ("base: tiny\ndecoder: {modle: {}}", "decoder: expected some of model, .*, got 'modle'"),
        ("base: tiny\ndecoder: {optimisation: {lr: 1}}", "optimisation: expected some of batch_size"),
        ("base: tiny\nclip: {optimisation: {steps: many}}", "steps: expected an int, got 'many'"),
        ("base: tiny\nclip: {optimisation: {batch_size: 0}}", "batch_size: expected a number above 0, got 0"),
        ("base: tiny\nclip: {optimisation: {betas: 0.9}}", "betas: expected two numbers, got 0.9"),
        ("base: tiny\nclip: {model: 3}", "clip: model: expected a mapping, got 3"),
        ("name: alone", "expected base, a preset, or all stages; it has no clip, prior, decoder, upsampler"),
        ("a: [1", "no YAML: while parsing"),
        ("name: !!python/object/apply:os.system ['true']\nbase: tiny", "no YAML: could not determine"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, says):
    """Catches: a name that is ignored because it is misspelt, and code that a file runs."""
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"run.yaml: .*{says}"):
        load_preset(str(file))


def test_what_is_no_file_and_no_assignment():
    with pytest.raises(FileNotFoundError, match="--preset: no file nowhere.yaml"):
        load_preset("nowhere.yaml")
    for text in ("steps", "=3", "clip..steps=3"):
        with pytest.raises(ValueError, match=f"--set: expected NAME=VALUE, .*, got '{text}'"):
            change(PRESETS["tiny"], [text])
    with pytest.raises(ValueError, match="--set clip.optimisation.hold: clip: optimisation: hold: expected"):
        change(PRESETS["tiny"], ["clip.optimisation.hold=1.0"])


def test_a_file_without_a_base_needs_a_length(tmp_path):
    """Catches: the batch size or the length of another preset as a silent default."""
    file = tmp_path / "run.yaml"
    names = ("clip", "prior", "decoder")
    stages = "".join(f"{name}: {{optimisation: {{batch_size: 2}}}}\n" for name in names)
    file.write_text(stages + "upsampler: {optimisation: {batch_size: 2, steps: 3}}\n")
    with pytest.raises(ValueError, match="clip: optimisation: length of training: expected steps or minutes"):
        load_preset(str(file))
    file.write_text(file.read_text().replace("batch_size: 2}", "batch_size: 2, minutes: 1}"))
    preset = load_preset(str(file))
    assert preset.clip.optimisation == Optimisation(batch_size=2, minutes=1.0)
    assert preset.upsampler.optimisation.steps == 3 and preset.ar_prior is None
