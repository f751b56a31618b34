"""Collectives of programs whose traffic is known by construction, compiled for CPU.

Every device holds x, f32[32, 16], 2048 bytes.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxspeed.mesh import AXES, make_mesh
from jaxspeed.plan import bytes_by_axis, collectives, program_memory, summarise

X_BYTES = 2048
SPLIT = PartitionSpec(("data", "seq", "tensor"))
AXIS_SETS = [
    ("data",),
    ("seq",),
    ("tensor",),
    ("data", "seq"),
    ("data", "tensor"),
    ("seq", "tensor"),
    ("data", "seq", "tensor"),
]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, seq=2, tensor=2)


def compiled(function, mesh):
    """The compiled program of `function` on each device's own x."""
    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False
    )
    x = jax.ShapeDtypeStruct((8 * 32, 16), jnp.float32)
    return jax.jit(sharded).lower(x).compile()


def one(function, mesh):
    (found,) = collectives(compiled(function, mesh), mesh)
    return found


@pytest.mark.parametrize("axes", AXIS_SETS, ids="-".join)
class TestEachCollective:
    def test_all_gather(self, mesh, axes):
        n = 2 ** len(axes)
        found = one(lambda x: lax.all_gather(x, axes, tiled=True), mesh)
        assert (found.op, found.axes, found.group_size) == ("all-gather", axes, n)
        assert found.payload_bytes == n * X_BYTES
        assert found.bytes_sent == (n - 1) * X_BYTES
        assert [str(shape) for shape in found.operands] == ["f32[32,16]"]

    def test_reduce_scatter(self, mesh, axes):
        n = 2 ** len(axes)
        found = one(lambda x: lax.psum_scatter(x, axes, tiled=True), mesh)
        assert (found.op, found.axes, found.group_size) == ("reduce-scatter", axes, n)
        assert found.payload_bytes == X_BYTES
        assert found.bytes_sent == (n - 1) * X_BYTES // n

    def test_all_reduce(self, mesh, axes):
        n = 2 ** len(axes)
        found = one(lambda x: lax.psum(x, axes), mesh)
        assert (found.op, found.axes, found.group_size) == ("all-reduce", axes, n)
        assert found.payload_bytes == X_BYTES
        assert found.bytes_sent == 2 * (n - 1) * X_BYTES // n

    def test_all_to_all(self, mesh, axes):
        n = 2 ** len(axes)
        found = one(lambda x: lax.all_to_all(x, axes, 1, 0, tiled=True), mesh)
        assert (found.op, found.axes, found.group_size) == ("all-to-all", axes, n)
        assert found.payload_bytes == X_BYTES
        assert found.bytes_sent == (n - 1) * X_BYTES // n

    def test_ring_of_permutes(self, mesh, axes):
        n = 2 ** len(axes)
        ring = [(i, (i + 1) % n) for i in range(n)]
        found = one(lambda x: lax.ppermute(x, axes, ring), mesh)
        assert (found.op, found.axes) == ("collective-permute", axes)
        assert found.payload_bytes == found.bytes_sent == X_BYTES


def test_axis_of_four():
    mesh = make_mesh(replica=4, tensor=2)
    split = PartitionSpec(("replica", "tensor"))
    sharded = jax.shard_map(
        lambda x: lax.all_gather(lax.psum(x, "tensor"), "replica", tiled=True),
        mesh=mesh,
        in_specs=split,
        out_specs=split,
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((8 * 32, 16), jnp.float32)
    found = collectives(jax.jit(sharded).lower(x).compile(), mesh)
    assert [(each.op, each.axes, each.bytes_sent) for each in found] == [
        ("all-reduce", ("tensor",), X_BYTES),
        ("all-gather", ("replica",), 3 * X_BYTES),
    ]


def test_part_of_an_axis_shows_in_the_group_size():
    mesh = make_mesh(data=8)
    sharded = jax.shard_map(
        lambda x: lax.all_gather(
            x, "data", tiled=True, axis_index_groups=[[0, 1], [2, 3], [4, 5], [6, 7]]
        ),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((8 * 32, 16), jnp.float32)
    (found,) = collectives(jax.jit(sharded).lower(x).compile(), mesh)
    assert (found.axes, found.group_size) == (("data",), 2)
    assert found.bytes_sent == X_BYTES


def test_shift_without_wrap_counts_a_device_that_sends(mesh):
    found = one(lambda x: lax.ppermute(x, "data", [(0, 1)]), mesh)
    assert (found.op, found.bytes_sent) == ("collective-permute", X_BYTES)


def test_nothing_sent_is_nothing_listed(mesh):
    program = compiled(lambda x: lax.psum(x, ("pipe", "replica")) * 2, mesh)
    assert collectives(program, mesh) == []


def test_psum_of_a_tree_counts_every_leaf_once(mesh):
    def reduce_tree(x):
        tree = {"weight": x, "bias": x[:, 0] + 1, "scale": x[0, 0]}
        total = lax.psum(tree, "data")
        return total["weight"] + total["bias"][:, None] * total["scale"]

    found = collectives(compiled(reduce_tree, mesh), mesh)
    assert {each.op for each in found} == {"all-reduce"}
    leaf_bytes = X_BYTES + 32 * 4 + 4
    assert sum(each.payload_bytes for each in found) == leaf_bytes
    assert bytes_by_axis(found) == {"data": leaf_bytes}


def test_scan_multiplies(mesh):
    def layers(x):
        def layer(x, _):
            x = jnp.sin(lax.all_gather(x, "data", tiled=True))
            return lax.psum_scatter(x, "data", tiled=True), None

        return lax.scan(layer, x, length=5)[0]

    found = collectives(compiled(layers, mesh), mesh)
    assert [(each.op, each.count, each.bytes_sent) for each in found] == [
        ("all-gather", 5, 5 * X_BYTES),
        ("reduce-scatter", 5, 5 * X_BYTES),
    ]
    assert all(each.trip_count_known for each in found)


def test_nested_scans_multiply(mesh):
    def nested(x):
        def outer(x, _):
            def inner(x, _):
                return lax.ppermute(jnp.sin(x), "seq", [(0, 1), (1, 0)]), None

            return lax.psum(lax.scan(inner, x, length=3)[0], "tensor"), None

        return lax.scan(outer, x, length=4)[0]

    found = collectives(compiled(nested, mesh), mesh)
    assert summarise(found) == [
        {
            "op": "collective-permute",
            "axes": ["seq"],
            "count": 12,
            "bytes_per_step": 12 * X_BYTES,
        },
        {
            "op": "all-reduce",
            "axes": ["tensor"],
            "count": 4,
            "bytes_per_step": 4 * X_BYTES,
        },
    ]


def test_unknown_trip_count_is_marked(mesh):
    def until_large(x):
        return lax.while_loop(
            lambda x: lax.psum(x.sum(), "data") < 100, lambda x: lax.pmax(x, "seq"), x
        )

    found = collectives(compiled(until_large, mesh), mesh)
    assert [(each.axes, each.count) for each in found] == [
        (("data",), 1),
        (("seq",), 1),
    ]
    assert not any(each.trip_count_known for each in found)


def test_branch_that_sends_most_is_counted_and_marked(mesh):
    def branches(x):
        return lax.cond(
            x[0, 0] > 0,
            lambda x: x * lax.psum(x[0, 0], "data"),
            lambda x: lax.psum(x, "tensor"),
            x,
        )

    found = one(branches, mesh)
    assert (found.axes, found.bytes_sent) == (("tensor",), X_BYTES)
    assert found.conditional


@pytest.mark.parametrize("axis", ["data", "seq", "tensor"])
def test_partitioned_matmul_reduces_over_the_contracted_axis(mesh, axis):
    def array(*spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)

    matmul = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, PartitionSpec()))
    program = matmul.lower(array(None, axis), array(axis, None)).compile()
    (found,) = collectives(program, mesh)
    assert (found.op, found.axes) == ("all-reduce", (axis,))
    assert found.bytes_sent == 64 * 64 * 4


def test_source_names_the_line_and_the_operation(mesh):
    found = one(lambda x: lax.psum(x, "data"), mesh)
    assert "test_traffic.py:" in found.source
    assert found.source.endswith("psum")


def test_bytes_by_axis_keeps_joint_axes_apart(mesh):
    def both(x):
        return lax.psum(jnp.sin(lax.psum(x, "data")), ("data", "seq"))

    found = collectives(compiled(both, mesh), mesh)
    assert bytes_by_axis(found) == {"data": X_BYTES, "data+seq": 2 * X_BYTES * 3 // 4}


def test_text_counts_as_the_program_does(mesh):
    program = compiled(lambda x: lax.psum(x, "data"), mesh)
    text = program.as_text()
    assert text and collectives(text, mesh) == collectives(program, mesh)


def test_mesh_of_another_size_is_refused(mesh):
    program = compiled(lambda x: lax.psum(x, "data"), mesh)
    small = make_mesh(data=4, devices=jax.devices()[:4])
    with pytest.raises(ValueError, match=r"runs on 8 devices.*'data': 4.* has 4"):
        collectives(program, small)


def test_abstract_mesh_will_do(mesh):
    program = compiled(lambda x: lax.psum(x, "seq"), mesh)
    (found,) = collectives(program, jax.sharding.AbstractMesh((1, 1, 2, 1, 2, 2), AXES))
    assert found.axes == ("seq",)


def test_program_memory_per_device(mesh):
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=sharding)
    step = jax.jit(lambda x, y: (x + y, y.sum()), donate_argnums=0)
    memory = program_memory(step.lower(x, x).compile())
    shard_bytes = 64 * 16 * 4 // 2
    assert memory["argument_bytes"] == 2 * shard_bytes
    assert memory["alias_bytes"] == shard_bytes
    # The output tuple's own table of two pointers is counted, too.
    assert memory["output_bytes"] == shard_bytes + 4 + 2 * 8
    assert memory["host_bytes"] == 0
    peak = memory["peak_bytes"]
    assert peak is None or peak >= 2 * shard_bytes


class NoAnalysis:
    def memory_analysis(self):
        return None


def test_backend_without_memory_analysis_is_refused():
    with pytest.raises(ValueError, match="does not report memory"):
        program_memory(NoAnalysis())  # pyright: ignore[reportArgumentType]
