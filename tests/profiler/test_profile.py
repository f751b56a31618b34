"""Observed runs: what the loop tells, what a profile writes; nothing changes."""

import contextlib
import json
import types

import jax
import pytest

import jaxspeed as js
from jaxspeed.chips import CHIPS
from jaxspeed.cli import main
from jaxspeed.models import AttentionConfig, DecoderConfig, FeedForwardConfig
from jaxspeed.models.flops import model_flops
from jaxspeed.profiler import Profile
from jaxspeed.train import loop
from jaxspeed.train.record import read_metrics

MODEL = DecoderConfig(
    dim=32,
    num_layers=2,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(hidden_dim=64),
)


def config(steps):
    return js.Config(
        model=MODEL,
        mesh=js.MeshShape(data=4, tensor=2),
        batch=js.Batch(size=8),
        data=js.Data(sequence_length=32),
        optimizer=js.Optimizer(schedule=js.Schedule(total_steps=9)),
        run=js.Run(steps=steps, evaluate_batches=1, evaluate_every=5),
        checkpoint=js.Checkpoint(every=4),
    )


def profiled(folder, steps, traced):
    lines = []
    with Profile(folder / "profile", traced, lines.append) as observer:
        loop.train(config(steps), str(folder), lines.append, observer=observer)
    return lines, json.loads((folder / "profile" / "step_time.json").read_text())


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A profiled run of 6 steps, and another that takes it to 9."""
    folder = tmp_path_factory.mktemp("profiled")
    return folder, profiled(folder, 6, 2), profiled(folder, 9, 5)


def test_what_it_writes(interrupted):
    folder, (lines, timing), _ = interrupted
    said = "\n".join(lines)
    profile = folder / "profile"
    table = (profile / "modules.txt").read_text()
    assert table in said and "feed_forward" in table
    values = json.loads((profile / "modules.json").read_text())
    assert values["devices"] == 8
    needed = model_flops(MODEL, 8 * 32, 32)
    counted = sum(values["total"][half]["flops"] for half in ("forward", "backward"))
    # Beside what the model needs: masked scores, padding, recomputed activations.
    assert needed < counted < 2.5 * needed
    assert timing["steps"] == [4, 5]
    whole = timing["step_seconds"]
    assert sum(timing["host_seconds"].values()) == pytest.approx(whole)
    assert timing["host_seconds"]["save"] > 0  # of step 4
    assert timing["device_shares"]["devices"] == 8
    assert len(list(profile.glob("plugins/profile/*/*.xplane.pb"))) == 2
    assert "steps 4 to 5 take" in said and "https://ui.perfetto.dev" in said


def test_a_resumed_run_traces_what_is_left(interrupted):
    timing = interrupted[2][1]
    assert timing["steps"] == [7, 8, 9]


class Recorder:
    """Notes what the training loop tells."""

    def __init__(self):
        self.calls = []

    def begin(self, engine, state, batch):
        self.calls.append(("begin", int(state.step), batch["tokens"].shape))

    @contextlib.contextmanager
    def span(self, part, step):
        self.calls.append((part, step))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 9 steps without a profile, on what is taken for v5e."""
    folder, recorder = tmp_path_factory.mktemp("whole"), Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "chip_of", lambda device: CHIPS["v5e"])
        loop.train(config(9), str(folder), lambda line: None, observer=recorder)
    return folder, recorder.calls


def rows_of(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: row for row in rows if "loss" in row}


def test_it_is_the_same_run(interrupted, whole):
    observed, alone = rows_of(interrupted[0]), rows_of(whole[0])
    assert list(observed) == list(alone) == list(range(1, 10))
    for step, row in alone.items():
        assert observed[step]["loss"] == row["loss"]


def test_every_part_of_every_step_is_told(whole):
    calls = whole[1]
    assert calls[:3] == [("data", 1), ("begin", 0, (8, 32)), ("step", 1)]
    for part in ("data", "step", "metrics"):
        assert [call[1] for call in calls if call[0] == part] == list(range(1, 10))
    rest = [call for call in calls if call[0] in ("save", "evaluate")]
    assert rest == [("save", 4), ("evaluate", 5), ("save", 8)]


def test_model_flops_utilisation(interrupted, whole):
    """Only where the chip is known, which a CPU is not."""
    flops = model_flops(MODEL, 8 * 32, 32)
    for row in rows_of(whole[0]).values():
        rate = row["model_flops_per_second"]
        assert rate == pytest.approx(flops / row["step_seconds"])
        assert row["mfu"] == pytest.approx(rate / (8 * 197e12))
    for row in rows_of(interrupted[0]).values():
        assert row["model_flops_per_second"] > 0 and "mfu" not in row


def test_what_goes_wrong_does_not_end_the_run(tmp_path, monkeypatch):
    """No step to count, no trace to start: both are said, spans go on."""
    lines, state = [], types.SimpleNamespace(step=0)
    engine = types.SimpleNamespace(config=config(9), step=None)
    with Profile(tmp_path, 1, lines.append) as observer:
        observer.begin(engine, state, None)
        with observer.span("step", 4):
            pass
    assert len(lines) == 1 and lines[0].startswith("profile: TypeError")

    def refuse(*args, **kwargs):
        raise RuntimeError("Only one profile may be run at a time.")

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    monkeypatch.setattr(Profile, "_count", lambda self, engine, state, batch: None)
    with Profile(tmp_path, 1, lines.append) as observer:
        observer.begin(engine, state, None)
        for step in range(1, 7):
            with observer.span("step", step), observer.span("metrics", step):
                pass
    assert lines[1:] == [
        "profile: RuntimeError: Only one profile may be run at a time."
    ]


def test_an_error_in_the_run_ends_the_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(Profile, "_count", lambda self, engine, state, batch: None)
    lines = []
    with contextlib.suppress(KeyError), Profile(tmp_path, 3, lines.append) as observer:
        observer.begin(
            types.SimpleNamespace(config=config(1)), types.SimpleNamespace(step=0), None
        )
        with observer.span("data", 1), observer.span("step", 1):
            raise KeyError("in the run")
    jax.profiler.start_trace(tmp_path)  # none is running any more
    jax.profiler.stop_trace()


def test_refuses_no_steps(tmp_path, capsys):
    assert main(["train", "--profile=0", f"--workdir={tmp_path}"]) == 2
    assert "--profile=0; give a number of steps" in capsys.readouterr().err
