"""The training step as a graph; on the CPU it is a tape. Each test names the fault it would catch."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast.cli import main
from dalle2_fast.cuda_graphs import CudaGraphs
from dalle2_fast.training.ema import ExponentialMovingAverage
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.graphs import step as graphs
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.stages.registry import make_stage
from tests.support.graphs.tape import TapeGraphs
from tests.support.toy_training import Toy, assert_same_state, log_rows, toy_trainer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_replays_equal_direct_steps(tmp_path, monkeypatch, optimizer):
    """Catches: a learning rate, decay of the average, bias correction, noise or batch of one step in all."""
    tape = TapeGraphs()
    replayed = toy_trainer(tmp_path / "replayed", graphs=tape, optimizer=optimizer)
    assert replayed.train() == "finished"
    assert (tape.captured, tape.warm_ups, tape.replayed) == (1, 3, 27)
    monkeypatch.setattr(graphs, "WARM_UPS", 10**9)
    direct = toy_trainer(tmp_path / "direct", graphs=TapeGraphs(), optimizer=optimizer)
    direct.train()
    assert_same_state(replayed, direct)
    rows = [[(row["step"], row.get("loss"), row.get("grad_norm")) for row in log_rows(tmp_path / name)]
            for name in ("replayed", "direct")]  # fmt: skip
    assert rows[0] == rows[1]
    plain = toy_trainer(tmp_path / "plain", optimizer=optimizer)
    plain.train()  # its learning rate is not rounded to float32
    for name, weight in plain.state.model.state_dict().items():
        torch.testing.assert_close(replayed.state.model.state_dict()[name], weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(replayed.state.ema.average[name], plain.state.ema.average[name],
                                   rtol=1e-4, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_after_a_kill_is_bit_identical(tmp_path, optimizer):
    """Catches: a state that is loaded beside the graph's tensors, steps of the warm-up that count twice."""
    whole = toy_trainer(tmp_path / "whole", graphs=TapeGraphs(), optimizer=optimizer)
    assert whole.train() == "finished"
    with pytest.raises(KeyboardInterrupt):
        cut = toy_trainer(tmp_path / "cut", Toy(stop_step=17), graphs=TapeGraphs(), optimizer=optimizer,
                          save_steps=7)  # fmt: skip
        cut.train()
    resumed = toy_trainer(tmp_path / "cut", graphs=TapeGraphs(), optimizer=optimizer, save_steps=7)
    assert resumed.state.step == 14 and resumed.train() == "finished"
    assert_same_state(whole, resumed)
    assert log_rows(tmp_path / "whole")[-1]["loss"] == log_rows(tmp_path / "cut")[-1]["loss"]
    toy_trainer(tmp_path / "cut", optimizer=optimizer, steps=32).train()  # goes on without graphs


class Changing(Toy):
    """Its last batches are smaller."""

    def batch(self, step):
        batch = super().batch(step)
        return batch if step < 6 else {"x": batch["x"][:3]}


class Waiting(Toy):
    def loss(self, batch, generator):
        return super().loss(batch, generator) * (1.0 if batch["x"].sum().item() < 1e9 else 2.0)


@pytest.mark.parametrize(
    "stage, says",
    [
        (Changing, r"--graphs: expected batches of one shape, \[\(4, 8\)\], got \[\(3, 8\)\]; train without"),
        (Waiting, r"--graphs: cannot capture the step of a batch of \[4, 8\]: _local_scalar_dense"),
    ],
)
def test_what_cannot_be_captured_is_named(tmp_path, stage, says):
    """Catches: a batch that is read beyond its end, a decision of the host that never changes again."""
    with pytest.raises(TrainingError, match=says):
        toy_trainer(tmp_path, stage(), graphs=TapeGraphs()).train()
    assert toy_trainer(tmp_path, Toy()).train() == "finished"


def test_the_average_takes_a_weight_on_the_device():
    """Catches: another recursion than that of the weight as a number, an update that is not counted."""
    torch.manual_seed(0)
    model = torch.nn.Linear(33, 17)
    numbers, tensors = ExponentialMovingAverage(model), ExponentialMovingAverage(model)
    for _ in range(5):
        torch.nn.init.normal_(model.weight)
        numbers.update(model)
        tensors.move(model, torch.tensor(tensors.next_weight()))
    assert numbers.updates == tensors.updates == 5
    for name, average in numbers.average.items():
        torch.testing.assert_close(tensors.average[name], average, rtol=1e-6, atol=1e-7)


def test_stages_that_decide_on_the_host_say_so(trained, tmp_path):
    """Catches: a stage that fails after hours, when a run of all stages reaches it."""
    (tmp_path / "clip").symlink_to(trained / "clip")
    stage = make_stage("upsampler", PRESETS["tiny"], out=tmp_path, seed=0, device=torch.device("cpu"))
    stage.model.degradation, stage.model.degradation_prob = "bsr", 0.5
    assert stage.why_not_captured() == "the degradation bsr chooses its steps on the host"
    stage.model.degradation_prob = 0.0
    assert stage.why_not_captured() is None


def test_command_line_refuses_a_cpu(tmp_path, capsys):
    """Catches: a flag that is ignored, and a traceback."""
    command = ["train", "clip", "--preset", "tiny", "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*command, "--device", "cpu", "--graphs"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--graphs: " in error and "CUDA graphs need a CUDA device" in error


class OnGpu(Toy):
    def batch(self, step):
        return {"x": super().batch(step)["x"].cuda()}

    def loss(self, batch, generator):
        noise = 0.1 * torch.randn(4, 1, generator=generator, device="cuda")
        return (self.model(batch["x"]) - batch["x"].sum(1, keepdim=True) + noise).square().mean()


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gpu_replays_and_resumes_bit_for_bit(tmp_path, optimizer):
    """Catches: random numbers, gradients or a learning rate of the captured step, on the device itself."""

    def trainer(name, **stops):
        graphs = CudaGraphs(torch.device("cuda", 0))
        return toy_trainer(tmp_path / name, OnGpu(**stops), graphs=graphs, device="cuda", optimizer=optimizer,
                           save_steps=7)  # fmt: skip

    whole = trainer("whole")
    assert whole.train() == "finished"
    with pytest.raises(KeyboardInterrupt):
        trainer("cut", stop_step=17).train()
    resumed = trainer("cut")
    assert resumed.state.step == 14 and resumed.train() == "finished"
    assert_same_state(whole, resumed)
