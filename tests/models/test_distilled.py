"""Networks that were distilled: what they know, and guidance as an input. Each test names the fault it would
catch."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast import Decoder, DiffusionPrior, Upsampler
from dalle2_fast.models.distilled import GuidanceInput, known_steps
from tests.support.graphs.runs import WithoutCapture, pipeline, sample

STUDENT = dict(consistency_steps=4, sample_timesteps=2)
GUIDED = STUDENT | dict(guidance_input=[1.0, 4.0])


@pytest.fixture(scope="module")
def teacher():
    return pipeline()


def converted(network, **options):
    """A network with the weights of another one, and other options."""
    changed = type(network)(**network.config | options)
    missing, unexpected = changed.load_state_dict(network.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("guidance_input.") for name in missing)
    return changed.eval()


@pytest.fixture(scope="module")
def student(teacher):
    """A pipeline of converted networks, which still compute what the teacher's do."""
    pipe = pipeline()
    pipe.prior, pipe.decoder = converted(teacher.prior, **GUIDED), converted(teacher.decoder, **GUIDED)
    pipe.upsampler = converted(teacher.upsampler, **STUDENT)
    return pipe


def test_old_configurations_build_the_same_network(teacher):
    """Catches: an option without a default, or a new weight in a network that does not use it."""
    for network in (teacher.prior, teacher.decoder, teacher.upsampler):
        config = {
            name: value for name, value in network.config.items()
            if name not in ("guidance_input", "consistency_steps")
        }  # fmt: skip
        assert len(config) < len(network.config)
        again = type(network)(**config)
        assert again.config == network.config and again.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_converted_teacher_computes_as_before_for_every_weight(teacher, student, stage):
    """Catches: an input of the guidance weight that changes the network before it is trained."""
    other = pipeline()
    setattr(other, stage, converted(getattr(teacher, stage), **STUDENT))  # without the input
    for weight in (1.0, 2.5, torch.tensor([4.0, 1.0])):
        for steps in known_steps(4):
            drawn = sample(student, stage, steps=steps, guidance=weight)
            assert torch.equal(drawn, sample(other, stage, steps=steps))


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_the_weight_is_an_input_of_every_row(student, stage):
    """Catches: a weight that reaches no row, all rows, or the rows of another caption; 2 B rows."""
    network = getattr(student, stage)
    last = network.guidance_input.net[2]
    torch.manual_seed(0)
    torch.nn.init.normal_(last.weight, std=0.5)
    rows = []
    inner = network.net if stage == "prior" else network.unet
    hook = (inner.transformer if stage == "prior" else inner.conv_in).register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0]))
    )
    options = dict(num_samples_per_batch=3) if stage == "prior" else {}
    try:
        low, high = (sample(student, stage, steps=2, guidance=weight, **options) for weight in (1.0, 4.0))
        mixed = sample(student, stage, steps=2, guidance=torch.tensor([1.0, 4.0]), **options)
    finally:
        hook.remove()
        torch.nn.init.zeros_(last.weight)
    assert not torch.equal(low[0], high[0])
    torch.testing.assert_close(mixed, torch.stack([low[0], high[1]]), rtol=1e-5, atol=1e-5)
    assert set(rows) <= {2 * options.get("num_samples_per_batch", 1)}


def test_static_steps_take_the_weight_from_a_buffer(student):
    """Catches: a graph of one weight that serves another one."""
    torch.manual_seed(0)
    last = student.decoder.guidance_input.net[2]
    torch.nn.init.normal_(last.weight, std=0.5)
    static = WithoutCapture()
    try:
        for weight in (1.5, 4.0):
            expected = sample(student, "decoder", steps=2, guidance=weight)
            assert torch.equal(sample(student, "decoder", steps=2, guidance=weight, graphs=static), expected)
    finally:
        torch.nn.init.zeros_(last.weight)
    assert len(static.static) == 1


def test_defaults_of_a_student(student):
    """Catches: a student that is sampled with the defaults of its teacher."""
    for stage in ("prior", "decoder", "upsampler"):
        assert torch.equal(sample(student, stage, steps=None), sample(student, stage, steps=2))


@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler"])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=3), "steps: expected 1, 2 or 4, for which this {} was distilled, got 3"),
        (dict(steps=12), "steps: expected 1, 2 or 4, for which this {} was distilled, got 12"),
        (dict(sampler="ddim"), "sampler: expected 'consistency', for which this {} was distilled, got "
                               "'ddim'"),
        (dict(spacing="time"), "spacing: expected 'trailing', for which this {} was distilled, got 'time'"),
    ],
)
def test_what_a_student_does_not_know_is_named(student, stage, options, message):
    with pytest.raises(ValueError) as error:
        sample(student, stage, **options)
    assert str(error.value) == message.format(stage)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_guidance_outside_its_range_is_named(student, stage):
    for weight, came in ((0.5, "0.5"), (torch.tensor([2.0, 7.0]), "7")):
        with pytest.raises(ValueError) as error:
            sample(student, stage, guidance=weight)
        expected = f"guidance: expected 1 to 4, for which this {stage} was distilled, got {came}"
        assert str(error.value) == expected
    with pytest.raises(ValueError, match="guidance_interval: expected None, because this .* as an input"):
        sample(student, stage, guidance_interval=(-4.0, 1.0))
    negative = student.clip.encode_text(student.tokenizer.encode(["a blue ring"]))
    with pytest.raises(ValueError, match="negative: expected None, because this .* as an input"):
        sample(student, stage, negative=negative)


@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler"])
def test_a_teacher_does_not_know_the_sampler(teacher, stage):
    """Catches: noise that looks like a weak checkpoint."""
    message = f"sampler: expected one of ddpm, ddim, dpm[+][+], because this {stage} was not distilled"
    with pytest.raises(ValueError, match=message):
        sample(teacher, stage, sampler="consistency")


def test_a_student_cannot_be_inverted(student):
    with pytest.raises(ValueError, match="invert: expected a decoder that was not distilled"):
        student.decoder.invert(torch.rand(1, 3, 16, 16), torch.randn(1, 16))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(guidance_input=(3.0, 1.0)), ValueError, "guidance_input: expected finite numbers 0 <= low"),
        (dict(guidance_input=3.0), TypeError, "guidance_input: expected two numbers"),
        (dict(consistency_steps=0), ValueError, "consistency_steps: expected an int of at least 1"),
        (dict(consistency_steps=True), ValueError, "consistency_steps: expected an int of at least 1"),
    ],
)
def test_bad_options_are_named(teacher, options, error, message):
    for kind, network in ((Decoder, teacher.decoder), (DiffusionPrior, teacher.prior)):
        with pytest.raises(error, match=message):
            kind(**network.config | options)
    if "guidance_input" not in options:
        with pytest.raises(error, match=message):
            Upsampler(**teacher.upsampler.config | options)


def test_the_embedding_tells_weights_apart():
    """Catches: a scale at which the embeddings of all weights are the same."""
    guidance = GuidanceInput(8, (1.0, 10.0))
    torch.nn.init.normal_(guidance.net[2].weight)
    values = guidance(torch.linspace(1, 10, 19))
    distances = torch.cdist(values, values) + torch.eye(19)
    assert distances.min() > 1e-3
