"""The loop by itself, with a learner of one weight whose every step can be foretold. Real learners: test_resume.py."""

import json
import math
import os
import signal
import sys
import threading
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openemu3.records import InputError
from openemu3.training.checkpoint import list_checkpoints, load_checkpoint
from openemu3.training.trainer import MetricsLog, Trainer, TrainerConfig, cut_metrics, format_status, lock_folder

MEASURED = ("time", "steps_per_second", "data_wait", "memory_gb")  # what no two runs have in common


class Walker:
    """Its weight goes on by the mean of a step's batches, plus noise from torch's global generator as dropout takes it."""

    def __init__(self, bad_steps=(), at_step=None):
        self.weight = torch.zeros((), dtype=torch.float64)
        self.bad_steps, self.at_step = bad_steps, at_step or {}
        self.seen, self.validated, self.sampled = [], [], []

    def learn(self, step, batches):
        if step in self.at_step:
            self.at_step[step]()
        self.seen.append((step, batches))
        if step in self.bad_steps:
            return {"loss": math.nan}
        self.weight += sum(batches) / len(batches) + torch.rand((), dtype=torch.float64)
        return {"loss": self.weight.item()}

    def validate(self):
        self.validated.append(len(self.seen))
        torch.rand(3)  # measuring may draw random numbers, and the steps after it are the same
        return {"loss": -self.weight.item()}

    def write_samples(self, folder, step):
        self.sampled.append(step)

    def list_tensors(self):
        return {"weight": self.weight}

    def list_state(self):
        return {"sampled": self.sampled}

    def load(self, tensors, state):
        self.weight, self.sampled = tensors["weight"], state["sampled"]


def count_from(position):
    while True:
        yield position
        position += 1


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder, learner=None, **config):
    learner = learner or Walker()
    trainer = Trainer(TrainerConfig(folder, **{"num_steps": 10, "log_every": 1, **config}), learner, count_from, {"kind": "walk"})
    trainer.run()
    return trainer, learner


def test_cadences(tmp_path):
    trainer, learner = run(tmp_path, log_every=4, validate_every=3, sample_every=5, save_every=4, keep_checkpoints=5)
    assert trainer.step == 10 and trainer.is_complete
    assert learner.validated == [3, 6, 9, 10] and learner.sampled == [5, 10]
    assert [int(path.name[-2:]) for path in list_checkpoints(tmp_path / "checkpoints")] == [4, 8, 10]
    rows = [(row["step"], sorted(row.keys() - {"time"})) for row in read_rows(tmp_path)]
    logged = ["data_wait", "loss", "memory_gb", "position", "step", "steps_per_second"]
    measured = ["step", "validation/loss"]
    assert rows == [(3, measured), (4, logged), (6, measured), (8, logged), (9, measured), (10, measured)]
    assert json.loads((tmp_path / "run.json").read_text()) == {"kind": "walk"}


def test_zero_is_never_but_the_end_is_measured_and_saved(tmp_path):
    _, learner = run(tmp_path, log_every=0, validate_every=0, sample_every=0, save_every=0)
    assert learner.validated == [10] and learner.sampled == [10]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000010"]
    assert [row["step"] for row in read_rows(tmp_path)] == [10]


def test_micro_batches_are_taken_in_turn(tmp_path):
    _, learner = run(tmp_path, num_steps=3, micro_batches=2)
    assert learner.seen == [(0, [0, 1]), (1, [2, 3]), (2, [4, 5])]


def test_a_step_draws_the_same_random_numbers_whatever_came_before(tmp_path):
    _, whole = run(tmp_path / "whole", validate_every=2)
    torch.rand(100)
    _, again = run(tmp_path / "again", validate_every=3)
    _, other = run(tmp_path / "other", seed=1)
    assert whole.weight.equal(again.weight) and not whole.weight.equal(other.weight)


def test_a_complete_run_is_left_alone(tmp_path):
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    trainer, learner = run(tmp_path)
    assert trainer.step == 10 and learner.seen == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"} == before


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path):
    run(tmp_path / "a", num_steps=4)
    _, longer = run(tmp_path / "a", num_steps=10)
    assert [step for step, _ in longer.seen] == [4, 5, 6, 7, 8, 9]
    _, whole = run(tmp_path / "b")
    assert whole.weight.equal(longer.weight)


# ---- steps that are not finite


def test_bad_steps_are_logged_and_forgiven(tmp_path):
    trainer, learner = run(tmp_path, Walker(bad_steps=(2, 3, 6)), max_bad_steps=3, log_every=0, validate_every=0)
    assert trainer.is_complete
    rows = read_rows(tmp_path)[:-1]
    assert [(row["step"], row["skipped_not_finite"], row["loss"]) for row in rows] == [(3, 1, None), (4, 2, None), (7, 1, None)]


def test_a_run_that_has_diverged_ends_with_one_sentence(tmp_path):
    learner = Walker(bad_steps=range(5, 99))
    with pytest.raises(InputError, match="3 steps in a row, up to step 8, gave a loss or gradient that is not finite"):
        run(tmp_path, learner, max_bad_steps=3, save_every=2)
    assert len(learner.seen) == 8
    # The rows are strict JSON, and the checkpoint can be used.
    assert all("NaN" not in line for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])[1]["step"] == 6


def test_a_skipped_step_is_logged_with_what_was_in_it(tmp_path):
    learner = Walker(bad_steps=(2,))
    config = TrainerConfig(tmp_path, num_steps=4, micro_batches=2, log_every=0)
    Trainer(config, learner, count_from, name_samples=lambda batch: [f"sample-{batch}", "both"]).run()
    (row,) = [row for row in read_rows(tmp_path) if "skipped_not_finite" in row]
    assert row["step"] == 3 and row["skipped_samples"] == ["sample-4", "both", "sample-5"]


# ---- rates


class Counter(Walker):
    """Says how much it did; a step and its batch take a known time."""

    def learn(self, step, batches):
        time.sleep(0.02)
        return super().learn(step, batches) | {"tokens": 100.0, "flops": 3e6}


def test_rates_are_of_the_steps_since_the_last_row(tmp_path):
    def fetch(position):
        for number in count_from(position):
            time.sleep(0.01)
            yield number

    config = TrainerConfig(tmp_path, num_steps=6, log_every=3, peak_flops=1e9)
    began = time.perf_counter()
    Trainer(config, Counter(), fetch).run()
    seconds = time.perf_counter() - began
    rows = [row for row in read_rows(tmp_path) if "mfu" in row]
    assert [row["position"] for row in rows] == [3, 6] and "flops" not in rows[0]
    for row in rows:
        assert 6 / seconds < row["steps_per_second"] < 1 / 0.03
        assert row["tokens_per_second"] == pytest.approx(100 * row["steps_per_second"], rel=1e-4)
        assert row["mfu"] == pytest.approx(3e6 * row["steps_per_second"] / 1e9, rel=1e-4)
        assert 0.05 < row["data_wait"] < 0.5 and 0.05 < row["memory_gb"] < 50


def test_it_can_measure_before_the_first_step(tmp_path):
    _, learner = run(tmp_path, num_steps=2, validate_first=True, validate_every=0)
    assert learner.validated == [0, 2] and [row["step"] for row in read_rows(tmp_path) if "validation/loss" in row] == [0, 2]


def test_wandb_is_missed_when_it_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(InputError, match="wandb is asked for, but not installed"):
        run(tmp_path, wandb="walks")
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_wandb_is_logged_to_when_asked(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path / "with", wandb="walks", num_steps=3)
    assert wandb.run is None  # finished
    (written,) = (tmp_path / "with" / "wandb").glob("offline-run-*/*.wandb")
    assert b"validation/loss" in written.read_bytes()


# ---- resuming


def test_what_was_logged_after_the_checkpoint_is_forgotten(tmp_path):
    """The process dies after step 7 with its last checkpoint at 4: steps 5 to 7 come again and are logged once."""

    def die():
        raise SystemExit

    with pytest.raises(SystemExit):
        run(tmp_path / "killed", Walker(at_step={7: die}), save_every=4, validate_every=3)
    assert [row["step"] for row in read_rows(tmp_path / "killed")] == [1, 2, 3, 3, 4, 5, 6, 6, 7]
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "ti')  # it died while writing
    run(tmp_path / "killed", save_every=4, validate_every=3)
    run(tmp_path / "whole", save_every=4, validate_every=3)

    def read(folder):
        return [{key: value for key, value in row.items() if key not in MEASURED} for row in read_rows(folder)]

    assert read(tmp_path / "killed") == read(tmp_path / "whole")
    for name in ("loss", "validation/loss"):
        steps = {}
        for folder in ("killed", "whole"):
            events = EventAccumulator(str(tmp_path / folder / "tensorboard"))
            events.Reload()
            steps[folder] = [(event.step, event.value) for event in events.Scalars(name)]
        assert steps["killed"] == steps["whole"] and len(steps["whole"]) == (10 if name == "loss" else 4)


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, Walker(at_step={3: sys.exit}), save_every=5)
    _, learner = run(tmp_path)
    assert [step for step, _ in learner.seen] == list(range(10))
    assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == list(range(1, 11))


def test_cut_metrics_leaves_a_whole_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3}\n')
    before = path.stat()
    cut_metrics(path, 3)
    assert path.stat().st_ino == before.st_ino
    cut_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n'


def test_a_damaged_checkpoint_and_one_of_something_else_are_told(tmp_path):
    run(tmp_path / "cut")
    (path,) = list_checkpoints(tmp_path / "cut" / "checkpoints")[-1].glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="step-00000010 cannot be read"):
        run(tmp_path / "cut")

    class Other(Walker):
        def load(self, tensors, state):
            torch.nn.Linear(2, 2).load_state_dict(tensors)

    run(tmp_path / "other")
    with pytest.raises(InputError, match="step-00000010 is of another configuration .*name another run folder"):
        run(tmp_path / "other", Other())

    class Larger(Walker):
        def list_tensors(self):
            return super().list_tensors() | {"bias": torch.zeros(3)}

    with pytest.raises(
        InputError, match=r"step-00000010 is of another configuration \(1 tensors differ, first bias: absent there, float32 \[3\] here"
    ):
        run(tmp_path / "other", Larger())


def test_metrics_are_written_while_the_run_goes_on(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 0.1234567891, "norm": math.inf})
        (row,) = read_rows(tmp_path)
    assert row["step"] == 1 and row["loss"] == 0.123457 and row["norm"] is None


# ---- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_returns(tmp_path, number):
    before = signal.getsignal(number)
    learner = Walker(at_step={5: lambda: os.kill(os.getpid(), number)})
    trainer, _ = run(tmp_path, learner, save_every=4)
    assert trainer.step == 6 and not trainer.is_complete
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000004", "step-00000006"]
    assert signal.getsignal(number) is before
    _, rest = run(tmp_path)
    _, whole = run(tmp_path / "whole")
    assert rest.weight.equal(whole.weight)


def test_a_signal_at_a_step_that_is_saved_anyway(tmp_path):
    trainer, _ = run(tmp_path, Walker(at_step={3: lambda: os.kill(os.getpid(), signal.SIGTERM)}), save_every=4)
    assert trainer.step == 4 and [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000004"]


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def press_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Walker(at_step={5: press_twice}), save_every=2)
    assert load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])[1]["step"] == 4


def test_outside_the_main_thread_stop_does_what_a_signal_does(tmp_path):
    learner = Walker()
    trainer = Trainer(TrainerConfig(tmp_path, num_steps=10), learner, count_from)
    learner.at_step = {5: trainer.stop}
    thread = threading.Thread(target=trainer.run)
    thread.start()
    thread.join()
    assert trainer.step == 6 and load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])[1]["step"] == 6


def test_a_folder_in_which_somebody_trains_is_left_alone(tmp_path):
    with lock_folder(tmp_path), pytest.raises(InputError, match="another process is training in"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    run(tmp_path)  # the lock is free again


@pytest.mark.parametrize("name", ["num_steps", "micro_batches", "keep_checkpoints", "max_bad_steps"])
def test_impossible_settings(tmp_path, name):
    with pytest.raises(InputError, match=f"{name} is 0; it must be at least 1"):
        TrainerConfig(tmp_path, **{name: 0})
    with pytest.raises(InputError, match="save_every is -1; it must be at least 0, which means never"):
        TrainerConfig(tmp_path, save_every=-1)


def test_the_live_line_says_how_it_does():
    metrics = {"loss": 8.12345, "grad_norm": 2.0, "tokens_per_second": 512.3, "fill_rate": 0.991, "mfu": 0.034, "position": 8.0}
    assert format_status(metrics) == "loss 8.123 grad_norm 2 tokens_per_second 512.3 MFU 3.4% full 99.1%"
    assert format_status({"discriminator": 0.5}) == "discriminator 0.5"
