"""`plan.search`: what is weighed, what is compiled, what is kept and written."""

import argparse
import dataclasses
import importlib
import json

import jax
import pytest

import jaxspeed as js
from jaxspeed import config as configs
from jaxspeed.chips import CHIPS
from jaxspeed.commands import plan_search
from jaxspeed.models import AttentionConfig, DecoderConfig, FeedForwardConfig
from jaxspeed.plan import cache, pareto
from jaxspeed.plan.candidates import candidates, meshes
from jaxspeed.plan.config_file import write_config
from jaxspeed.plan.report import report

search = importlib.import_module("jaxspeed.plan.search")

MODEL = DecoderConfig(
    vocab_size=256,
    dim=128,
    num_layers=8,
    attention=AttentionConfig(heads=2, kv_heads=2, head_dim=64),
    feed_forward=FeedForwardConfig(hidden_dim=512),
)
CONFIG = js.Config(
    model=MODEL, zero=js.Zero(min_size=64), data=js.Data(sequence_length=16)
)
# Slow at everything alike, so that a small model is bound by one thing or another.
CHIP = dataclasses.replace(
    CHIPS["v5e"],
    bf16_flops=1e9,
    hbm_bytes_per_second=1e9,
    link_bytes_per_second=1e7,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSPEED_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that agrees with the formulas, and remembers what it was asked."""
    fake = Compiler()
    monkeypatch.setattr(search, "report", fake)
    monkeypatch.setattr(search.time, "monotonic", lambda: fake.now)
    return fake


class Compiler:
    """Stands for `plan.report`; every compile takes `seconds` on its clock."""

    def __init__(self):
        self.asked, self.now, self.seconds = [], 0.0, 10.0
        self.bytes_ratio, self.refuses, self.fails = 1.0, (), ()

    def __call__(self, config, topology):
        self.asked.append(config)
        self.now += self.seconds
        if config.remat in self.fails:
            raise jax.errors.JaxRuntimeError("INTERNAL: broken\nmore")
        made = search.candidates(
            config, 8, CHIP, global_batch=config.batch.size
        )  # all of them, this one included
        (same,) = [each for each in made if each.config == config]
        size = same.estimate.total_bytes * self.bytes_ratio
        found = {
            "per_device": {"reserved_bytes": int(size)},
            "fits": config.remat not in self.refuses,
            "step_seconds": same.estimate.expected_seconds,
            "roofline_seconds": {"compute": 3.0, "memory": 2.0, "network": 1.0},
            "mfu_bound": 0.5,
            "compile_seconds": self.seconds,
        }
        return Answer(found)


class Answer:
    def __init__(self, found):
        self.found = found

    def as_json(self):
        return self.found


def run(chip=CHIP, budget=1000.0, batch=16, **options):
    return search.search(
        CONFIG, "cpu:8", global_batch=batch, time_budget=budget, chip=chip, **options
    )


def small(share, chip=CHIP):
    """The chip with memory for a share of what the smallest candidate needs."""
    every = candidates(CONFIG, 8, chip, global_batch=16)
    least = min(each.estimate.total_bytes for each in every)
    return dataclasses.replace(chip, usable_hbm_bytes=int(least * share))


def test_meshes_are_all_factorisations():
    found = list(meshes(8))
    assert len(found) == len(set(found)) == 10
    assert all(each.resolve(8) == each for each in found)


def test_candidates_divide_the_batch_and_the_model():
    every = candidates(CONFIG, 8, CHIP, global_batch=16)
    assert len({each.config for each in every}) == len(every)
    for each in every:
        mesh, batch = each.config.mesh, each.config.batch
        rows = mesh.replica * mesh.data * batch.accumulation
        assert each.estimate.sequences * rows == batch.size == 16
        assert mesh.tensor <= 2  # heads
        assert each.config.model is MODEL
    assert {each.config.zero.stage for each in every} == {0, 1, 2, 3}
    assert {each.config.remat for each in every} == set(js.models.remat.POLICIES)


def test_a_front_is_what_nothing_beats():
    points = [(1, 9), (2, 8), (2, 9), (3, 3), (3, 3), (4, 3.1), (9, 1)]
    assert pareto.front(points, lambda p: p) == [(1, 9), (2, 8), (3, 3), (9, 1)]
    near = pareto.front(points, lambda p: p, slack=0.05)
    assert near == [(1, 9), (2, 8), (3, 3), (9, 1)]
    assert pareto.front([(100, 1), (99, 1), (50, 1)], sum_and_one, slack=0.05) == [
        (50, 1)
    ]
    close = [(100, 1.0), (99, 1.0), (98, 1.04)]
    assert pareto.front(close, lambda p: p, slack=0.05) == close
    assert pareto.front([], lambda p: p) == []


def sum_and_one(point):
    return (sum(point), 1)


def test_finds_the_fastest_of_all_that_fit(compiler):
    found = run()
    every = candidates(CONFIG, 8, CHIP, global_batch=16)
    fastest = min(each.estimate.expected_seconds for each in every)
    assert found.best.seconds <= fastest * (1 + search.NEAR)
    assert found.considered == len(every)
    assert len(compiler.asked) == len(found.points) <= search.MOST_COMPILED
    assert not found.out_of_time
    seconds = [point.seconds for point in found.front]
    sizes = [point.bytes for point in found.front]
    assert seconds == sorted(seconds) and sizes == sorted(sizes, reverse=True)


def test_little_memory_forces_shards_and_recomputation(compiler):
    found = run(chip=small(1.01))
    best = found.best.candidate.config
    assert best.zero.stage == 3 and best.remat == "full"
    assert found.too_large > 0
    assert all(point.fits for point in found.front)


def test_goes_on_to_what_fits_when_programs_are_larger_than_estimated(compiler):
    compiler.bytes_ratio = 1.2
    found = run(chip=small(1.25))
    assert not all(point.fits for point in found.points)
    assert found.best is not None
    refused = [point for point in found.points if not point.fits]
    assert {point.limit for point in refused} == {"capacity"}


def test_a_refusal_is_a_result(compiler):
    compiler.refuses = ("none", "dots", "dots_no_batch")
    found = run()
    assert found.best.candidate.config.remat == "full"
    assert any(point.limit == "capacity" for point in found.points)


def test_a_compiler_that_breaks_is_no_end(compiler):
    compiler.fails = ("none", "dots")
    found = run()
    broken = [point for point in found.points if point.problem]
    assert broken and all(point.problem == "INTERNAL: broken" for point in broken)
    assert found.best is not None
    before = len(compiler.asked)
    run()
    assert len(compiler.asked) == before + len(broken)  # failures are not kept


def test_keeps_the_time_budget_and_goes_on_later(compiler):
    found = run(budget=25.0)
    # 10 seconds each: a third would end after 30.
    assert len(compiler.asked) == 2 and compiler.now <= 25
    assert found.out_of_time and found.left
    later = run(budget=25.0)
    assert [point.cached for point in later.points].count(True) == 2
    assert len(compiler.asked) == 4
    assert len(set(compiler.asked)) == 4
    while run(budget=25.0).out_of_time:
        pass
    before = len(compiler.asked)
    finished = run(budget=25.0)
    assert len(compiler.asked) == before
    assert all(point.cached for point in finished.points)


def test_the_first_compile_is_always_begun(compiler):
    assert len(run(budget=0.001).points) == 1


def test_the_cache_knows_steps_apart(monkeypatch):
    cache.write(CONFIG, "cpu:8", {"a": 1})
    assert cache.read(CONFIG, "cpu:8") == {"a": 1}
    assert cache.read(CONFIG, "cpu:4") is None
    assert cache.read(dataclasses.replace(CONFIG, remat="none"), "cpu:8") is None
    longer = dataclasses.replace(CONFIG, data=js.Data(sequence_length=128))
    assert cache.read(longer, "cpu:8") is None
    other = dataclasses.replace(CONFIG, run=js.Run(steps=7, seed=3))
    assert cache.read(other, "cpu:8") == {"a": 1}  # the same step
    monkeypatch.setattr(cache, "_versions", lambda: {"jax": "0"})
    assert cache.read(CONFIG, "cpu:8") is None


def test_a_damaged_file_in_the_cache_counts_as_none():
    cache.write(CONFIG, "cpu:8", {"a": 1})
    (path,) = cache.folder().rglob("*.json")
    path.write_text("{")
    assert cache.read(CONFIG, "cpu:8") is None


def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch):
    monkeypatch.delenv("JAXSPEED_CACHE")
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache.folder()) == "/somewhere/jaxspeed"


def test_nothing_fits_says_what_comes_closest():
    with pytest.raises(
        ValueError, match=r"nothing fits on cpu:8: the closest"
    ) as error:
        run(chip=small(0.5))
    assert "GB are missing" in str(error.value)
    assert "remat full" in str(error.value)


def test_refuses_a_batch_that_no_mesh_divides():
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(
            MODEL, attention=AttentionConfig(heads=3, kv_heads=3, head_dim=16)
        ),
    )
    with pytest.raises(ValueError, match="no mesh of 8 devices takes a global batch"):
        candidates(config, 8, CHIP, global_batch=3)


def test_refuses_devices_it_knows_nothing_of():
    with pytest.raises(ValueError, match="give a chip to judge by, one of"):
        search.search(CONFIG, "cpu:8", global_batch=16)
    with pytest.raises(ValueError, match="unknown topology"):
        search.search(CONFIG, "v9:2x2", global_batch=16)


@pytest.mark.parametrize("kind", [".py", ".json"])
def test_written_configs_load_as_they_were(tmp_path, kind):
    config = dataclasses.replace(
        CONFIG,
        mesh=js.MeshShape(data=4, tensor=2),
        batch=js.Batch(32, 4),
        data=js.Data(source="text", paths=('a "quoted"\\path',), sequence_length=64),
        optimizer=js.Optimizer(betas=(0.8, 0.9), clip_norm=None),
    )
    path = tmp_path / f"best{kind}"
    write_config(config, path, 'Says """what" it is\\.\n\nIn two parts.')
    assert configs.load(path) == config


def test_written_configs_have_a_known_ending(tmp_path):
    with pytest.raises(ValueError, match=r"name it .py or .json"):
        write_config(CONFIG, tmp_path / "best.yaml", "")


def test_the_command_writes_the_best_and_shows_all(compiler, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology")
    parser.add_argument("--json", action="store_true")
    plan_search.add_arguments(parser)
    path = tmp_path / "best.py"
    words = ["--search", "--topology=cpu:8", "--chip=v5e", f"--output={path}"]
    config = dataclasses.replace(CONFIG, batch=js.Batch(16))
    arguments = parser.parse_args(words)
    assert plan_search.run(arguments, config) == 0
    shown = capsys.readouterr().out
    assert "best" in shown and str(path) in shown
    written = path.read_text()
    assert f"jaxspeed train --config={path}" in written
    arguments = parser.parse_args([*words, "--json"])
    assert plan_search.run(arguments, config) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] == str(path) and found["global_batch"] == 16
    best = configs.load(path)
    assert best.batch.accumulation == found["best"]["accumulation"]
    assert best.zero.stage == found["best"]["zero_stage"]


def test_the_real_compiler_decides_and_its_choice_compiles(tmp_path, monkeypatch):
    """Memory for shards only: what is found, written and loaded compiles and fits."""
    monkeypatch.setattr(search, "MOST_COMPILED", 1)
    chip = small(1.6)
    found = run(chip=chip)
    best = found.best
    assert best is not None and best.candidate.config.zero.stage == 3
    assert best.bytes <= chip.usable_hbm_bytes
    path = tmp_path / "best.py"
    write_config(best.candidate.config, path, "Found.")
    again = report(configs.load(path), "cpu:8").as_json()
    assert again["per_device"]["reserved_bytes"] == best.bytes
    assert json.loads(json.dumps(found.as_json()))["best"]["fits"]
    assert run(chip=chip).best.cached
