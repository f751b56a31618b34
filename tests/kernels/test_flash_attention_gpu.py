"""The GPU kernels of flash attention, without a GPU.

Their blocks are compared with single tokens, they are lowered for CUDA, and, where JAX
has an interpreter for them (from 0.11 on), they are run and compared with the
reference. `test_gpu_flash_attention.py` compiles them to machine code.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.flash_attention import flash_attention, gpu, gpu_matmul, reference
from kernels_pallas.flash_attention.gpu_blocks import Sight
from kernels_pallas.flash_attention.inputs import Inputs, Options

# Rounding of bfloat16 weights and outputs, of the largest entry.
TOLERANCE = 2e-2

# (length, heads, key heads, head dim), and what is special.
CASES = {
    "causal": ((200, 2, 1, 64), {}),
    "float16": ((130, 1, 1, 64), {"dtype": "float16"}),
    "groups": ((256, 4, 2, 128), {}),
    "wide_heads": ((200, 1, 1, 256), {}),
    "documents": ((300, 1, 1, 64), {"segments": 4}),
    "window": ((400, 1, 1, 64), {"window": 70}),
    "traced_window": ((400, 1, 1, 64), {"window": np.int32(129)}),
    "slopes": ((200, 2, 1, 64), {"slopes": True}),
    "sinks": ((200, 2, 1, 64), {"sinks": True}),
    "softcap": ((200, 1, 1, 64), {"softcap": 2.0}),
    "negative_scale": ((200, 1, 1, 64), {"scale": -0.3}),
    "both_ways": ((200, 1, 1, 64), {"causal": False}),
    "both_ways_window": ((400, 1, 1, 64), {"causal": False, "window": 70}),
    "everything": (
        (300, 2, 1, 64),
        dict(segments=3, window=90, slopes=True, sinks=True, softcap=3.0),
    ),
}


def inputs(length, heads, groups, head_dim, dtype="bfloat16", batch=1, **given):
    """Random arrays, and the options of `given`."""
    random = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    q, k, v = (array(batch, length, n, head_dim) for n in (heads, groups, groups))
    segments = given.pop("segments", None)
    if segments is not None:
        ids = np.sort(random.integers(0, segments, (batch, length)), axis=1)
        segments = jnp.asarray(ids, jnp.int32)
    window = given.pop("window", None)
    slopes = 2.0 ** -jnp.arange(1, heads + 1, dtype=jnp.float32)
    sinks = jnp.linspace(-1.0, 2.0, heads, dtype=jnp.float32)
    arrays = Inputs(
        q,
        k,
        v,
        segments,
        None if window is None else jnp.asarray(window, jnp.int32),
        slopes if given.pop("slopes", False) else None,
        sinks if given.pop("sinks", False) else None,
    )
    scale = given.pop("scale", head_dim**-0.5)
    known = window if isinstance(window, int) else None
    return Options(scale, known, **given), arrays


@pytest.fixture
def interpreted(monkeypatch):
    """GPU kernels run on CPU; a product with an operand in registers by jnp."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} has no public interpreter of GPU kernels")
    kernel = functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(plgpu, "kernel", kernel)

    def accumulate(total, left, right):
        product = jnp.dot(left, right[...], preferred_element_type=jnp.float32)
        return total + product

    monkeypatch.setattr(gpu_matmul, "accumulate", accumulate)


def assert_near(got, want):
    got, want = (np.asarray(x.astype(jnp.float32)) for x in (got, want))
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_reference(name, interpreted):
    shape, given = CASES[name]
    options, arrays = inputs(*shape, **given)
    out, lse = jax.jit(gpu.forward, static_argnums=0)(options, arrays)
    want_out, want_lse = reference.attention(options, arrays)
    assert_near(out, want_out)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)


BACKWARD = [name for name, (shape, _) in CASES.items() if shape[3] <= 128]


def gradients(options, arrays):
    """Arguments of the backward pass, and the reference's gradients of q, k, v."""

    def attend(q, k, v):
        replaced = dataclasses.replace(arrays, q=q, k=k, v=v)
        return reference.attention(options, replaced)

    qkv = [x.astype(jnp.float32) for x in (arrays.q, arrays.k, arrays.v)]
    (out, lse), pull = jax.vjp(attend, *qkv)
    random = np.random.default_rng(1)
    d_out = jnp.asarray(random.normal(size=out.shape), arrays.q.dtype)
    d_lse = jnp.asarray(random.normal(size=lse.shape), jnp.float32)
    wide = d_out.astype(jnp.float32)
    delta = (wide * out).sum(axis=-1).swapaxes(1, 2) - d_lse
    return (lse, delta, d_out), pull((wide, d_lse))


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_is_the_references(name, interpreted):
    shape, given = CASES[name]
    options, arrays = inputs(*shape, **given)
    arguments, want = gradients(options, arrays)
    got = jax.jit(gpu.backward, static_argnums=0)(options, arrays, *arguments)
    for mine, other in zip(got, want, strict=True):
        assert_near(mine, other)


def lowered(function, *arguments):
    """The program's text for CUDA, with one kernel in it for every `mosaic_gpu`."""
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", ["groups", "wide_heads", "everything"])
def test_lowers_for_cuda(name):
    shape, given = CASES[name]
    options, arrays = inputs(*shape, **given)
    text = lowered(functools.partial(gpu.forward, options), arrays)
    assert text.count("@mosaic_gpu") == 1
    if gpu.backward_reason(arrays) is None:
        arguments, _ = gradients(options, arrays)
        backward = functools.partial(gpu.backward, options)
        text = lowered(backward, arrays, *arguments)
        assert text.count("@mosaic_gpu") == 2


def test_lowers_under_vmap_and_shard_map():
    options, arrays = inputs(200, 4, 2, 64, batch=2)
    q, k, v = arrays.q, arrays.k, arrays.v

    def forward(q, k, v):
        return gpu.forward(options, Inputs(q, k, v, None, None, None))

    stacked = [jnp.stack([x, x]) for x in (q, k, v)]
    assert lowered(jax.vmap(forward), *stacked).count("@mosaic_gpu") == 1
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    heads = P("data", None, "tensor")
    sharded = jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(heads, heads, heads),
        out_specs=(heads, P("data", "tensor")),
    )
    assert lowered(sharded, q, k, v).count("@mosaic_gpu") == 1


def gradient(implementation):
    """Of the public function, by q, k and v."""
    attend = functools.partial(flash_attention, implementation=implementation)

    def total(*qkv):
        return attend(*qkv).astype(jnp.float32).sum()

    return jax.grad(total, argnums=(0, 1, 2))


def kernels(kind, function, q):
    """How many there are in a program for CUDA devices of this kind, or of any."""
    if kind is None:
        return lowered(function, q, q, q).count("@mosaic_gpu")
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        return lowered(function, q, q, q).count("@mosaic_gpu")


Q = jax.ShapeDtypeStruct((1, 200, 2, 64), jnp.bfloat16)


@pytest.mark.parametrize(
    "kind, count",
    [
        ("NVIDIA H100 80GB HBM3", 3),
        ("NVIDIA GH200 480GB", 3),
        ("NVIDIA A100-SXM4-80GB", 0),
        ("NVIDIA B200", 0),
        (None, 0),
    ],
)
def test_only_hopper_gpus_get_the_kernels_unasked(kind, count):
    assert kernels(kind, gradient(None), Q) == count


def test_who_asks_gets_the_kernels_for_any_gpu():
    assert kernels(None, gradient("gpu"), Q) == 3
    assert kernels("NVIDIA B200", gradient("gpu"), Q) == 3


def test_what_the_kernels_cannot_is_left_to_xla_unless_asked_for():
    narrow, wide = (
        jax.ShapeDtypeStruct((1, 200, 2, size), jnp.bfloat16) for size in (80, 256)
    )
    assert kernels("NVIDIA H200", gradient(None), narrow) == 0
    with pytest.raises(ValueError, match=r"cannot run here: the head dim.*80"):
        kernels(None, gradient("gpu"), narrow)
    assert kernels("NVIDIA H200", gradient(None), wide) == 1
    with pytest.raises(ValueError, match="registers"):
        kernels(None, gradient("gpu"), wide)


def test_what_cannot_run_says_why():
    _, arrays = inputs(130, 1, 1, 64)
    assert gpu.reason(arrays) is None
    assert "float32" in gpu.reason(inputs(130, 1, 1, 64, dtype="float32")[1])
    assert "(1, 130, 1, 80)" in gpu.reason(inputs(130, 1, 1, 80)[1])
    wide = inputs(130, 1, 1, 256)[1]
    assert gpu.reason(wide) is None
    assert "registers" in gpu.backward_reason(wide)


def seen(sight):
    """bool [padded, padded]: whether query i sees key j."""
    i, j = np.indices((sight.padded, sight.padded))
    mask = (i >= j) if sight.causal else (j < sight.length)
    if sight.window is not None:
        mask = mask & (np.abs(i - j) < sight.window)
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 9, 16, 33, 1000])
@pytest.mark.parametrize("length", [40, 48])
def test_blocks_of_a_tile_are_those_that_it_sees(causal, window, length):
    rows, padded = 16, 48
    size_of_window = None if window is None else jnp.int32(window)
    sight = Sight(length, padded, causal, size_of_window, False)
    mask = seen(sight)
    for by_query, size, row in itertools.product((0, 1), (8, 16), range(0, 48, rows)):
        find = sight.queries_of if by_query else sight.keys_of
        spans = find(jnp.int32(row), rows, size)
        first, low, high, end = map(
            int, (spans.first, spans.low, spans.high, spans.end)
        )
        assert 0 <= first <= low <= high <= end <= padded // size
        tile = (mask.T if by_query else mask)[row : row + rows]
        for block in range(padded // size):
            part = tile[:, block * size : (block + 1) * size]
            if by_query:
                part = part[: max(0, length - row)]  # padding, for which nothing counts
            if low <= block < high:
                assert part.all()
            if not first <= block < end and part.size:
                assert not part[:, : max(0, length - block * size)].any()


def test_documents_leave_no_block_without_a_mask():
    spans = Sight(48, 48, True, None, True).keys_of(jnp.int32(32), 16, 8)
    assert int(spans.low) == int(spans.high) == int(spans.end) == 6
