"""Every implementation of paged attention is the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.flash_attention import flash_attention
from kernels_pallas.paged_attention import (
    paged_attention,
    pages_shape,
    plan,
    write_pages,
)

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Queries and keys of each sequence, and the rest of a call."""

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    heads: int = 4
    groups: int = 2
    head_dim: int = 32
    page: int = 8
    extra: int = 0
    dtype: str = "float32"
    stored: str = "float32"
    window: int | None = None


CASES = {
    "decode": Case((1, 1, 1), (7, 40, 33)),
    "prefill": Case((19,), (19,), groups=4, extra=3),
    "part_of_a_prompt": Case((10,), (37,), heads=2, groups=1),
    "mixed": Case((1, 5, 0, 20, 1), (30, 5, 0, 33, 8), extra=4),
    "idle_slots": Case((0, 1, 0), (0, 9, 12)),
    "window": Case((1, 5, 20), (60, 40, 33), window=11),
    "bfloat16": Case((1, 9), (40, 33), page=16, dtype="bfloat16", stored="bfloat16"),
    "int8": Case((1, 9), (70, 33), page=32, dtype="bfloat16", stored="int8"),
    "fp8": Case((1, 9), (70, 33), page=32, stored="float8_e4m3fn"),
    "wide_fp8": Case((1, 3), (40, 33), page=32, stored="float8_e5m2"),
}


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels run on CPU, one grid step after the other."""
    call = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pl, "pallas_call", call)


def arguments(case, new=True, seed=0):
    """The arrays of a call; the pages of a sequence are anywhere in the pool."""
    random = np.random.default_rng(seed)
    sequences = len(case.counts)
    slots = max(-(-max(case.lengths) // case.page), 1)
    tokens = sum(case.counts) + case.extra
    pool = sequences * slots + 2
    shape = pages_shape(pool, case.page, case.groups, case.head_dim)
    spread = 40 if case.stored == "int8" else 1

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), case.dtype)

    scales = random.uniform(0.5, 2, (case.groups, 2)) / spread
    table = random.permutation(pool)[: sequences * slots].reshape(sequences, slots)
    given = {
        "q": normal(tokens, case.heads, case.head_dim),
        "pages": jnp.asarray(spread * random.normal(size=shape)).astype(case.stored),
        "table": jnp.asarray(table, jnp.int32),
        "lengths": jnp.asarray(case.lengths, jnp.int32),
        "starts": jnp.asarray(np.cumsum((0, *case.counts)), jnp.int32),
        "scales": jnp.asarray(scales, jnp.float32),
    }
    if new:
        shape = (tokens, case.groups, case.head_dim)
        given["new"] = (normal(*shape), normal(*shape))
    return given


def run(implementation, given, window=None):
    options = dict(window=window, implementation=implementation)
    return jax.jit(lambda given: paged_attention(**given, **options))(given)


def assert_same(got, want):
    for found, wanted in zip(got, want, strict=True):
        assert found.dtype == wanted.dtype
    out, wanted = (np.asarray(x[0].astype(jnp.float32)) for x in (got, want))
    assert np.abs(out - wanted).max() <= TOLERANCE[want[0].dtype.name]
    pages, wanted = (np.asarray(x[1].astype(jnp.float32)) for x in (got, want))
    np.testing.assert_array_equal(pages, wanted)


@functools.cache
def case_and_answer(name):
    given = arguments(CASES[name])
    return given, run("reference", given, CASES[name].window)


@pytest.mark.parametrize("name", CASES)
def test_xla_is_the_reference(name):
    given, want = case_and_answer(name)
    assert_same(run("xla", given, CASES[name].window), want)


@pytest.mark.parametrize("name", CASES)
def test_tpu_kernels_are_the_reference(name, interpreted):
    given, want = case_and_answer(name)
    assert_same(run("tpu", given, CASES[name].window), want)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_blocks_of_few_pages_and_queries(implementation, interpreted, monkeypatch):
    """Sequences of several blocks of both, and blocks of several sequences."""
    monkeypatch.setattr(plan, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(plan, "MOST_QUERIES", 4)
    monkeypatch.setattr(plan, "LEAST_QUERIES", 4)
    for name in ("mixed", "window"):
        given, want = case_and_answer(name)
        assert_same(run(implementation, given, CASES[name].window), want)


@pytest.mark.parametrize("detect_races", [False, True])
def test_tpu_kernels_read_nothing_unwritten(detect_races, monkeypatch, capfd):
    """In this interpreter memory is NaN until something was written there."""
    monkeypatch.setattr(plan, "CHUNK_TOKENS", 16)
    given, want = case_and_answer("mixed")
    params = pltpu.InterpretParams(detect_races=detect_races)
    with pltpu.force_tpu_interpret_mode(params):
        got = run("tpu", given)
    assert_same(got, want)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("window", [None, 9])
def test_whole_prompts_are_flash_attention(implementation, window):
    """A reference for the reference: nothing was in the pages before."""
    counts = (30, 12)
    case = Case(counts, counts)
    given = arguments(case)
    given["scales"] = None
    got, _ = run(implementation, given, window)
    segments = jnp.repeat(jnp.arange(2, dtype=jnp.int32), jnp.asarray(counts))
    want = flash_attention(
        given["q"][None],
        *(x[None] for x in given["new"]),
        segments=segments[None],
        window=window,
        implementation="reference",
    )
    np.testing.assert_allclose(got, want[0], atol=2e-6)


def test_token_by_token_is_the_prompt_at_once():
    """Written and read back through the pages, in three calls of different shape."""
    case = Case((21,), (21,))
    whole = arguments(case)
    want, want_pages = run("xla", whole)
    pages, found = whole["pages"], []
    for begin, end in ((0, 13), (13, 20), (20, 21)):
        part = dict(whole, pages=pages)
        part["q"] = whole["q"][begin:end]
        part["new"] = tuple(x[begin:end] for x in whole["new"])
        part["lengths"] = jnp.asarray([end], jnp.int32)
        part["starts"] = jnp.asarray([0, end - begin], jnp.int32)
        out, pages = run("xla", part)
        found.append(out)
    np.testing.assert_allclose(jnp.concatenate(found), want, atol=2e-6)
    np.testing.assert_array_equal(pages, want_pages)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_what_is_beyond_a_sequence_is_not_read(implementation, interpreted):
    """NaN after its last token, in other pages, and pages that are not in the pool."""
    case = CASES["mixed"]
    given, (want, _) = case_and_answer("mixed")
    pages = np.full(given["pages"].shape, np.nan, np.float32)
    table = np.full(given["table"].shape, 10**6, np.int32)
    for i, length in enumerate(case.lengths):
        for slot in range(-(-length // case.page)):
            page = int(given["table"][i, slot])
            table[i, slot] = page
            rows = min(case.page, length - slot * case.page)
            pages[page, :, :, :rows] = given["pages"][page, :, :, :rows]
    poisoned = dict(given, pages=jnp.asarray(pages), table=jnp.asarray(table))
    out, written = run(implementation, poisoned)
    np.testing.assert_allclose(out, want, atol=2e-5)
    changed = ~np.isnan(np.asarray(written)) & np.isnan(pages)
    assert not changed.any()


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_pages_without_new_tokens_stay(implementation, interpreted):
    given = arguments(CASES["mixed"])
    new = given.pop("new")
    _, pages = run(implementation, given)
    np.testing.assert_array_equal(pages, given["pages"])
    rest = {k: v for k, v in given.items() if k != "q"}
    idle = dict(rest, starts=jnp.zeros_like(given["starts"]))
    written = write_pages(new=new, implementation=implementation, **idle)
    np.testing.assert_array_equal(written, given["pages"])
    written = write_pages(new=new, implementation=implementation, **rest)
    assert (written != given["pages"]).any()


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_vmap_over_layers(implementation, interpreted):
    cases = [arguments(CASES["decode"], seed=i) for i in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    got = jax.vmap(functools.partial(run, implementation))(stacked)
    for i, given in enumerate(cases):
        assert_same([x[i] for x in got], run("reference", given))


def test_inside_shard_map_over_heads():
    given, want = case_and_answer("mixed")
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    heads, pool = P(None, "tensor"), P(None, "tensor")
    specs = {
        "q": heads,
        "pages": pool,
        "scales": P("tensor"),
        "new": (heads, heads),
        "table": P(),
        "lengths": P(),
        "starts": P(),
    }
    sharded = jax.shard_map(
        lambda given: paged_attention(**given),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(heads, pool),
    )
    assert_same(jax.jit(sharded)(given), want)


@pytest.mark.parametrize("platform", ["tpu", "cpu", "cuda"])
def test_platform_decides_when_lowering(platform):
    given = arguments(CASES["bfloat16"])
    traced = jax.jit(lambda given: paged_attention(**given)).trace(given)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@tpu_custom_call") == (2 if platform == "tpu" else 0)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(q=jnp.zeros((3, 4))), ValueError, r"q .T, H, K."),
        (dict(q=jnp.zeros((3, 3, 32))), ValueError, "a multiple of G = 2"),
        (dict(q=jnp.zeros((3, 4, 16))), ValueError, "the same K"),
        (dict(q=jnp.zeros((0, 4, 32))), ValueError, "is empty"),
        (dict(q=jnp.zeros((3, 4, 32), jnp.bfloat16)), TypeError, "pages are float32"),
        (dict(pages=jnp.zeros((9, 2, 2, 4, 32))), ValueError, "a multiple of 8"),
        (dict(pages=jnp.zeros((9, 2, 2, 8, 32), jnp.int8)), ValueError, "of 32"),
        (dict(lengths=jnp.zeros(2, jnp.int32)), ValueError, r"should be \(3,\)"),
        (dict(starts=jnp.zeros(3, jnp.int32)), ValueError, r"should be \(4,\)"),
        (dict(table=jnp.zeros((3, 5))), TypeError, "table are float32; give int32"),
        (dict(scales=jnp.ones((2, 3))), ValueError, r"should be \(2, 2\)"),
        (dict(new=(jnp.zeros((3, 4, 32)),) * 2), ValueError, r".T, G, K. = \(3, 2, 32"),
        (dict(new=(jnp.zeros((3, 2, 32), jnp.int8),) * 2), TypeError, "give both"),
        (dict(window=0), ValueError, "window=0; give at least 1"),
        (dict(implementation="cuda"), ValueError, "choose one of"),
        (dict(implementation="gpu"), ValueError, "no GPU kernel of it yet"),
    ],
)
def test_refuses_what_does_not_fit(changed, error, message):
    with pytest.raises(error, match=message):
        paged_attention(**{**arguments(CASES["decode"]), **changed})
