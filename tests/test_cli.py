"""The command line as a user sees it: output, exit status, one clear line on error."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from jaxspeed import cli, plan
from jaxspeed.chips import CHIPS
from jaxspeed.commands.progress import elapsed
from jaxspeed.commands.table import table
from jaxspeed.config import override
from jaxspeed.train.default import default_config

SMALL = [
    "--config.model.dim=32",
    "--config.model.num_layers=1",
    "--config.model.attention.heads=4",
    "--config.model.attention.kv_heads=2",
    "--config.model.attention.head_dim=8",
    "--config.model.feed_forward.hidden_dim=64",
    "--config.data.sequence_length=32",
    "--config.run.evaluate_batches=1",
]


def jaxspeed(*arguments, cwd, **options):
    """Runs the command as its own process, with settings of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "jaxspeed", *arguments],
        cwd=cwd,
        env=environment
        | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1]), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return folder, jaxspeed("train", *SMALL, "--config.run.steps=4", cwd=folder)


def test_train_runs_with_simulated_devices_and_says_what_it_did(trained):
    folder, result = trained
    assert result.returncode == 0, result.stderr
    assert "8 cpu devices as data 4 x tensor 2, ZeRO stage 3" in result.stdout
    assert "bits per byte (a unigram model: " in result.stdout
    assert "sample after 'def '" in result.stdout
    run = folder / "runs" / "default"
    expected = {"metrics.jsonl", "loss.png", "config.json", "checkpoints"}
    assert {p.name for p in run.iterdir()} == expected


def test_generate_streams_from_the_run(trained):
    folder, _ = trained
    arguments = ("generate", "--prompt=import ", "--max-new-tokens=12", "--tensor=2")
    first = jaxspeed(*arguments, "--temperature=0", cwd=folder)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("import ")
    assert jaxspeed(*arguments, "--temperature=0", cwd=folder).stdout == first.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--config.zero.stag=2"], "did you mean 'zero.stage'"),
        (["train", "--config.zero.stage=two"], "zero.stage"),
        (["train", "--config.zero.stage=7"], "zero.stage is 7"),
        (["train", "--config=absent.py"], "no config file 'absent.py'"),
        (["train", "--config.mesh.data=3"], "there are 8 devices"),
        (["train", "--cpu-devices=0"], "--cpu-devices=0; give at least 1"),
        (["generate", "--from=nowhere"], "nowhere"),
        (["generate", "--group=128"], "--group=128 says how --quantize does it"),
        (["convert", "nowhere", "target"], "nowhere"),
        (["ds-config", "nowhere.json"], "nowhere.json"),
        (["train", "--coordinator=127.0.0.1:1"], "needs --num-processes"),
        (["plan", "--topology=v9:2x2"], "unknown topology 'v9:2x2'"),
        (["plan", "--config.mesh.data=3"], "topology cpu:8 has 8 devices"),
        (["plan", "--config.zero.stage=7"], "zero.stage is 7"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = cli.main(arguments)
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["env", "--config.zero.stage=2"])
    assert stopped.value.code == 2
    assert "unknown arguments for env" in capsys.readouterr().err


def test_env_as_json(capsys):
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_ds_config_as_json(tmp_path, capsys):
    path = tmp_path / "ds_config.json"
    path.write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 2}}')
    assert cli.main(["ds-config", str(path), "--json"]) == 0
    keys = json.loads(capsys.readouterr().out)["keys"]
    assert {row["verdict"] for row in keys} == {"honoured"}
    path.write_text('{"train_batch_sise": 8}')
    assert cli.main(["ds-config", str(path)]) == 2


def test_plan_fits_one_screen_and_prints_the_contract(capsys, monkeypatch):
    made = []

    def report(config, topology):
        made.append(made[0] if made else plan.report(config, topology))
        return made[-1]

    monkeypatch.setattr(cli.plan, "report", report)
    arguments = ["plan", "--topology=cpu:8", *SMALL]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert "8 devices as data 4 x tensor 2, ZeRO stage 3" in shown.out
    for word in ("optimizer state", "largest at the peak", "all-gather", "fits"):
        assert word in shown.out
    assert len(shown.out.splitlines()) < 60
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 8 and found["per_device"]["peak_bytes"] > 0


def test_plan_says_what_does_not_fit(capsys, monkeypatch):
    made = plan.report(small_config(), "cpu:8")
    chip = dataclasses.replace(CHIPS["v5e"], usable_hbm_bytes=1000)
    advice = (plan.Advice("--config.remat=full", 5_000_000, True),)
    large = dataclasses.replace(made, chip=chip, advice=advice)
    monkeypatch.setattr(cli.plan, "report", lambda config, topology: large)
    assert cli.main(["plan", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    assert "--config.remat=full: saves 5 MB" in shown


class Screen(io.StringIO):
    """Stands for stderr, a terminal or not."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_long_work_shows_that_it_goes_on(terminal, monkeypatch):
    screen = Screen(terminal)
    monkeypatch.setattr("sys.stderr", screen)
    with elapsed("compiling", every=0.001):
        while "compiling" not in screen.getvalue():
            time.sleep(0.001)
    assert screen.getvalue().endswith("\x1b[K" if terminal else "compiling ...\n")


def small_config():
    return override(default_config(), SMALL)


def test_a_bench_prints_the_contract(capsys, monkeypatch):
    monkeypatch.setitem(
        cli.bench.BENCHES, "zero", lambda: [{"stage": 1, "sent_ratio": 1.0}]
    )
    assert cli.main(["bench", "zero", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"name", "rows", "environment"}
    assert result["name"] == "zero" and result["rows"][0]["stage"] == 1


def test_tables_line_up():
    rows = [{"name": "a", "bytes": 1234567}, {"name": "long", "bytes": 8}]
    assert table(rows).splitlines() == [
        "name      bytes",
        "---------------",
        "a     1,234,567",
        "long          8",
    ]
