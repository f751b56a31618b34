"""A run: what it writes, how it stops, and that it goes on exactly."""

import dataclasses
import json
import os
import pathlib
import signal
import threading

import pytest

import jaxspeed as js
from jaxspeed.models import AttentionConfig, DecoderConfig, FeedForwardConfig
from jaxspeed.train import loop
from jaxspeed.train.record import Metrics, read_metrics

MODEL = DecoderConfig(
    dim=32,
    num_layers=2,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(hidden_dim=64),
)


def config(steps, **changes):
    return js.Config(
        model=MODEL,
        mesh=js.MeshShape(data=4, tensor=2),
        zero=js.Zero(stage=3, min_size=256),
        batch=js.Batch(size=8),
        data=js.Data(sequence_length=64),
        optimizer=js.Optimizer(schedule=js.Schedule(total_steps=12, warmup_steps=2)),
        run=js.Run(steps=steps, evaluate_batches=2, evaluate_every=6, log_every=4),
        checkpoint=js.Checkpoint(every=5),
        **changes,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    folder = tmp_path_factory.mktemp("whole")
    lines = []
    outcome = loop.train(config(12), str(folder), lines.append)
    return folder, outcome, lines


def losses(folder):
    rows = read_metrics(pathlib.Path(folder) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_writes_what_the_contract_says(whole):
    folder, outcome, lines = whole
    assert not outcome.interrupted and outcome.step == 12
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    expected = {"loss", "grad_norm", "tokens_per_second", "step_seconds", "skipped"}
    assert expected <= set(steps[0])
    assert [row["step"] for row in rows if "held_out_loss" in row] == [6, 12]
    assert (folder / "loss.png").stat().st_size > 5000
    assert json.loads((folder / "config.json").read_text())["model"]["dim"] == 32
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"5", "10", "12"}
    assert any("step 4/12" in line for line in lines)


def test_held_out_figures(whole):
    held_out = whole[1].held_out
    assert held_out.tokens == 2 * 8 * 64
    assert 4 < held_out.unigram_bits_per_byte < 5.5
    # Bytes and ends of documents: slightly more tokens than bytes.
    assert held_out.bits_per_byte == pytest.approx(held_out.loss / 0.6931, rel=0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_rerun_goes_on_exactly(whole, tmp_path, number):
    lines = []

    def say(line):
        lines.append(line)
        if "step 4/12" in line:
            os.kill(os.getpid(), number)

    outcome = loop.train(config(12), str(tmp_path), say)
    assert outcome.interrupted and outcome.step < 12
    assert threading.current_thread() is threading.main_thread()
    again = loop.train(config(12), str(tmp_path), lines.append)
    assert again.step == 12 and not again.interrupted
    assert any(f"resuming after step {outcome.step}" in line for line in lines)
    assert losses(tmp_path) == losses(whole[0])


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole, tmp_path, monkeypatch):
    """Steps after the checkpoint are made again; no line stands twice."""

    class KilledError(BaseException):
        """Nothing that the loop could handle."""

    write = Metrics.write

    def write_or_die(self, row):
        write(self, row)
        if row["step"] == 8:
            raise KilledError

    monkeypatch.setattr(Metrics, "write", write_or_die)
    with pytest.raises(KilledError):
        loop.train(config(12), str(tmp_path), lambda line: None)
    monkeypatch.undo()
    assert max(losses(tmp_path)) == 8
    other = dataclasses.replace(config(12), mesh=js.MeshShape(data=8))
    loop.train(other, str(tmp_path), lambda line: None)
    resumed, expected = losses(tmp_path), losses(whole[0])
    assert list(resumed) == list(expected)
    for step, loss in resumed.items():
        assert loss == pytest.approx(expected[step], rel=2e-6)


def test_a_finished_run_is_left_as_it_is(whole):
    before = losses(whole[0])
    outcome = loop.train(config(12), str(whole[0]), lambda line: None)
    assert outcome.step == 12 and losses(whole[0]) == before


def test_refuses_another_model_in_the_same_folder(whole):
    other = dataclasses.replace(config(12), model=dataclasses.replace(MODEL, dim=64))
    with pytest.raises(ValueError, match="holds a run of another model"):
        loop.train(other, str(whole[0]), lambda line: None)


def test_refuses_a_vocabulary_too_small(tmp_path):
    other = config(1)
    other = dataclasses.replace(other, model=dataclasses.replace(MODEL, vocab_size=100))
    with pytest.raises(ValueError, match=r"model.vocab_size=257"):
        loop.train(other, str(tmp_path), lambda line: None)


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n3\n{"a": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_not_a_number_is_written_as_null(tmp_path):
    record = Metrics(tmp_path / "metrics.jsonl", 0)
    record.write({"step": 1, "loss": float("nan")})
    record.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}]


def test_a_damaged_file_costs_no_step(tmp_path, monkeypatch):
    """The steps made before the bad batch are saved; the error still ends the run."""
    count = iter(range(100))
    take = loop.Batches.__next__

    def take_or_fail(self):
        if next(count) == 3:
            raise ValueError("line 7 of text.jsonl is not JSON")
        return take(self)

    monkeypatch.setattr(loop.Batches, "__next__", take_or_fail)
    with pytest.raises(ValueError, match=r"line 7 of text.jsonl"):
        loop.train(config(12), str(tmp_path), lambda line: None)
    monkeypatch.undo()
    lines = []
    loop.train(config(12), str(tmp_path), lines.append)
    assert any("resuming after step 3" in line for line in lines)


def test_a_run_that_never_started_leaves_the_folder_free(tmp_path):
    wrong = dataclasses.replace(config(1), mesh=js.MeshShape(data=1, tensor=8))
    with pytest.raises(ValueError, match="does not divide"):
        loop.train(wrong, str(tmp_path), lambda line: None)
    assert not (tmp_path / "config.json").exists()


def test_a_signal_right_after_a_save(tmp_path, monkeypatch):
    """The step that was just saved is not saved twice."""
    save = loop.Metrics.write

    def write_and_stop(self, row):
        save(self, row)
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.Metrics, "write", write_and_stop)
    settings = dataclasses.replace(config(12), checkpoint=js.Checkpoint(every=1))
    outcome = loop.train(settings, str(tmp_path), lambda line: None)
    assert outcome.interrupted and outcome.step in (5, 6)
    assert max(outcome.engine.steps()) == outcome.step
