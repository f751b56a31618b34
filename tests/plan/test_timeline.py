"""Hidden and exposed transfers of programs whose times are known by construction.

The chip does 1e12 operations and a link carries 1e9 bytes a second; memory is free
unless a test says otherwise. `MATMUL` takes 2 ms and a permute of `PERMUTE` 1 ms.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jaxspeed.chips import Chip, chip_of
from jaxspeed.mesh import make_mesh
from jaxspeed.plan import collectives
from jaxspeed.plan.compiler import compile_lowered
from jaxspeed.plan.timeline import timeline

CHIP = Chip(
    name="made up",
    hbm_bytes=1,
    usable_hbm_bytes=1,
    bf16_flops=1e12,
    hbm_bytes_per_second=math.inf,
    link_bytes_per_second=1e9,
    torus_dims=1,
    network_bytes_per_second=1e8,
    ring_multiple=1,
)
HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8\n"
UP = "{{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}"
DOWN = "{{1,0},{2,1},{3,2},{4,3},{5,4},{6,5},{7,6},{0,7}}"
ALL = "replica_groups=[1,8]<=[8], use_global_device_ids=true"
X = "%x = f32[250000]{0} parameter(0)"
Y = "%y = f32[1000,1000]{1,0} parameter(1)"
PERMUTED = "(f32[250000]{0}, f32[250000]{0})"


def matmul(name, operand="%y"):
    return (
        f"%{name} = f32[1000,1000]{{1,0}} dot({operand}, {operand}), "
        "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    )


def start(name, pairs=UP, operand="%x"):
    return (
        f"%{name} = {PERMUTED} collective-permute-start({operand}), channel_id=1, "
        f"source_target_pairs={pairs}"
    )


def done(name, operand):
    return f"%{name} = f32[250000]{{0}} collective-permute-done(%{operand})"


def gather(name):
    return (
        f"%{name} = f32[2000000]{{0}} all-gather(%x), channel_id=1, {ALL}, "
        "dimensions={0}"
    )


def entry(*lines, root="%x"):
    body = "\n".join(f"  {line}" for line in (X, Y, *lines))
    return (
        "ENTRY %main (x: f32[250000], y: f32[1000,1000]) -> f32[250000] {\n"
        f"{body}\n  ROOT %root = f32[250000]{{0}} copy({root})\n}}\n"
    )


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=8)


def run(mesh, *lines, before="", chip=CHIP):
    return timeline(HEADER + before + entry(*lines), mesh, chip)


def milliseconds(found):
    return pytest.approx(found.seconds * 1e3), pytest.approx(
        found.exposed_seconds * 1e3
    )


def test_synchronous_collective_is_exposed(mesh):
    found = run(mesh, matmul("a"), gather("g"), matmul("b"))
    # Seven shards of 1 MB, in both directions of the ring.
    assert (2 + 3.5 + 2, 3.5) == milliseconds(found)
    assert found.entries[0].hidden == pytest.approx(0)
    assert found.network_seconds == {"data": pytest.approx(3.5e-3)}
    assert not found.entries[0].collective.asynchronous


def test_transfer_under_a_matmul_is_hidden(mesh):
    found = run(mesh, start("s"), matmul("a"), done("d", "s"))
    assert (2, 0) == milliseconds(found)
    assert found.hidden == 1
    assert found.hidden_bytes == found.bytes_sent == 10**6
    assert found.entries[0].collective.asynchronous


def test_transfer_without_computation_is_exposed(mesh):
    found = run(mesh, matmul("a"), start("s"), done("d", "s"), matmul("b"))
    assert (5, 1) == milliseconds(found)
    assert found.hidden == pytest.approx(0)


def test_same_direction_takes_turns(mesh):
    lines = [start(f"s{i}") for i in range(3)], [done(f"d{i}", f"s{i}") for i in (0, 1)]
    found = run(mesh, *lines[0], matmul("a"), *lines[1], done("d2", "s2"))
    assert (3, 1) == milliseconds(found)
    assert [each.hidden for each in found.entries] == pytest.approx([1, 1, 0])
    assert found.hidden == pytest.approx(2 / 3)


def test_opposite_directions_go_at_once(mesh):
    found = run(
        mesh,
        start("s0", UP),
        start("s1", DOWN),
        start("s2", UP),
        start("s3", DOWN),
        matmul("a"),
        *(done(f"d{i}", f"s{i}") for i in range(4)),
    )
    assert (2, 0) == milliseconds(found)


def test_gather_and_permute_share_the_links(mesh):
    found = run(mesh, start("s"), gather("g"), done("d", "s"))
    # The gather waits for the permute on the way up, the permute for nothing.
    assert (4.5, 4.5) == milliseconds(found)


def test_exposed_is_whichever_is_on_the_links(mesh):
    """The second transfer is waited for first; the first one is what holds it up."""
    found = run(mesh, start("s0"), start("s1"), done("d1", "s1"), done("d0", "s0"))
    assert (2, 2) == milliseconds(found)
    assert [each.exposed_seconds for each in found.entries] == pytest.approx([1e-3] * 2)


def test_axes_have_links_of_their_own():
    mesh = make_mesh(data=4, tensor=2)
    along_tensor = "{{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}"
    along_data = "{{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}"
    lines = start("s0", along_tensor), start("s1", along_data), done("d0", "s0")
    found = run(mesh, *lines, done("d1", "s1"))
    assert (1, 1) == milliseconds(found)
    assert found.network_seconds == pytest.approx({"tensor": 1e-3, "data": 1e-3})


LOOP_STATE = "(s32[], f32[250000]{0}, f32[1000,1000]{1,0})"
CONDITION = f"""
%condition (state: {LOOP_STATE}) -> pred[] {{
  %state = {LOOP_STATE} parameter(0)
  ROOT %less = pred[] constant(true)
}}
"""


def loop(*lines, trips=5):
    """A loop of `trips` iterations, and the lines of the entry that run it."""
    body = "\n".join(f"  {line}" for line in lines)
    computation = f"""
%body (state: {LOOP_STATE}) -> {LOOP_STATE} {{
  %state = {LOOP_STATE} parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[250000]{{0}} get-tuple-element(%state), index=1
  %y = f32[1000,1000]{{1,0}} get-tuple-element(%state), index=2
{body}
  ROOT %next = {LOOP_STATE} tuple(%i, %x, %y)
}}
{CONDITION}
"""
    while_ = (
        f"%while = {LOOP_STATE} while(%init), condition=%condition, body=%body, "
        f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    )
    init = f"%init = {LOOP_STATE} tuple(%zero, %x, %y)"
    return computation, ("%zero = s32[] constant(0)", init, while_)


@pytest.mark.parametrize("trips", [0, 1, 2, 5])
def test_trip_counts_multiply(mesh, trips):
    computations, lines = loop(
        start("s"), matmul("a"), done("d", "s"), gather("g"), trips=trips
    )
    found = run(mesh, *lines, before=computations)
    assert (5.5 * trips, 3.5 * trips) == milliseconds(found)
    assert found.compute_seconds == pytest.approx(2e-3 * trips)
    assert [each.collective.count for each in found.entries] == [trips] * 2 * bool(
        trips
    )


def test_nested_loops_multiply(mesh):
    inner, lines = loop(start("s"), matmul("a"), done("d", "s"), gather("g"), trips=3)
    outer, outer_lines = loop(*lines, trips=4)
    inner = inner.replace("%body", "%inner").replace("%condition", "%inner_condition")
    outer = outer.replace("body=%body", "body=%inner").replace(
        "condition=%condition", "condition=%inner_condition"
    )
    found = run(mesh, *outer_lines, before=inner + outer)
    assert (5.5 * 12, 3.5 * 12) == milliseconds(found)
    assert [each.collective.count for each in found.entries] == [12, 12]


CARRIED_STATE = f"(s32[], {PERMUTED}, f32[1000,1000]{{1,0}})"
CARRIED = f"""
%body (state: {CARRIED_STATE}) -> {CARRIED_STATE} {{
  %state = {CARRIED_STATE} parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %flight = {PERMUTED} get-tuple-element(%state), index=1
  %y = f32[1000,1000]{{1,0}} get-tuple-element(%state), index=2
  {matmul("a")}
  {done("x", "flight")}
  {start("again")}
  ROOT %next = {CARRIED_STATE} tuple(%i, %again, %y)
}}

%condition (state: {CARRIED_STATE}) -> pred[] {{
  %state = {CARRIED_STATE} parameter(0)
  ROOT %less = pred[] constant(true)
}}
"""


def test_transfer_of_the_next_iteration(mesh):
    """Each iteration waits for what the one before it started."""
    lines = (
        start("s"),
        "%zero = s32[] constant(0)",
        f"%init = {CARRIED_STATE} tuple(%zero, %s, %y)",
        f"%while = {CARRIED_STATE} while(%init), condition=%condition, body=%body, "
        'backend_config={"known_trip_count":{"n":"6"}}',
        f"%last = {PERMUTED} get-tuple-element(%while), index=1",
        done("d", "last"),
    )
    found = run(mesh, *lines, before=CARRIED)
    # The last one, after the loop, has nothing to hide under.
    assert (13, 1) == milliseconds(found)
    assert sum(each.collective.count for each in found.entries) == 7
    assert found.hidden == pytest.approx(6 / 7)


GATHERED = "f32[2000000]{0}"
WRAPPED = f"""
%wrapped (p: f32[250000]) -> f32[2000000] {{
  %p = f32[250000]{{0}} parameter(0)
  ROOT %g = {GATHERED} all-gather(%p), channel_id=2, {ALL}, dimensions={{0}}
}}
"""
ASYNC = f"((f32[250000]{{0}}), {GATHERED}, u32[])"
FUSED = f"""
%starting (p: f32[250000]) -> (f32[2000000], u32[]) {{
  %p = f32[250000]{{0}} parameter(0)
  %g = {GATHERED} all-gather(%p), channel_id=1, {ALL}, dimensions={{0}}, \
frontend_attributes={{chain_id="4"}}, backend_config={{\
"async_collective_fusion_config":{{"flag_start":"-1","flag_end":"-1"}}}}
  ROOT %start = ({GATHERED}, u32[]) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}}

%ending (p: f32[250000]) -> f32[2000000] {{
  %p = f32[250000]{{0}} parameter(0)
  %g = {GATHERED} all-gather(%p), channel_id=1, {ALL}, dimensions={{0}}, \
frontend_attributes={{chain_id="4"}}, backend_config={{\
"async_collective_fusion_config":{{"flag_start":"2","flag_end":"8"}}}}
  ROOT %done = {GATHERED} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}
"""


@pytest.mark.parametrize(
    ("before", "starting", "ending"),
    [
        (
            "",
            [
                f"%s = (f32[250000]{{0}}, {GATHERED}) all-gather-start(%x), "
                f"channel_id=1, {ALL}, dimensions={{0}}"
            ],
            [f"%d = {GATHERED} all-gather-done(%s)"],
        ),
        (
            WRAPPED,
            [f"%s = {ASYNC} async-start(%x), calls=%wrapped"],
            [f"%u = {ASYNC} async-update(%s)", f"%d = {GATHERED} async-done(%u)"],
        ),
        (
            WRAPPED,
            [
                "%s = ((), (), u32[]) async-start(), calls=%wrapped",
                f"%u = {ASYNC} async-update(%s, %x)",
            ],
            [f"%d = {GATHERED} async-done(%u)"],
        ),
        (
            WRAPPED,
            [f"%s = {ASYNC} call-start(%x), to_apply=%wrapped"],
            [f"%d = {GATHERED} call-done(%s)"],
        ),
        (
            FUSED,
            [f"%s = ({GATHERED}, u32[]) fusion(%x), kind=kCustom, calls=%starting"],
            [f"%d = {GATHERED} fusion(%x), kind=kCustom, calls=%ending"],
        ),
    ],
    ids=["start", "wrapped", "update starts", "call", "fusions"],
)
def test_asynchronous_forms(mesh, before, starting, ending):
    """3.5 ms of transfer under 2 ms of computation."""
    found = run(mesh, *starting, matmul("a"), *ending, before=before)
    assert (3.5, 1.5) == milliseconds(found)
    (one,) = found.entries
    assert one.collective.asynchronous
    assert one.hidden == pytest.approx(2 / 3.5)
    (counted,) = collectives(HEADER + before + entry(*starting, *ending), mesh)
    assert counted == one.collective


def test_call_prepared_before_it_has_operands_starts_at_its_update(mesh):
    found = run(
        mesh,
        "%s = ((), (), u32[]) async-start(), calls=%wrapped",
        matmul("a"),
        f"%u = {ASYNC} async-update(%s, %x)",
        f"%d = {GATHERED} async-done(%u)",
        before=WRAPPED,
    )
    assert (5.5, 3.5) == milliseconds(found)


def test_send_and_receive(mesh):
    attributes = f"channel_id=3, frontend_attributes={{_xla_source_target_pairs={UP}}}"
    state = "(f32[250000]{0}, u32[], token[])"
    found = run(
        mesh,
        "%after = token[] after-all()",
        f"%recv = {state} recv(%after), {attributes}",
        f"%send = {state} send(%x, %after), {attributes}",
        matmul("a", "%y"),
        "%sent = token[] send-done(%send), channel_id=3",
        "%received = (f32[250000]{0}, token[]) recv-done(%recv), channel_id=3",
    )
    assert (2, 0) == milliseconds(found)
    assert found.bytes_sent == 10**6


def test_gpu_start_that_is_synchronous(mesh):
    line = (
        start("s") + ', backend_config={"collective_backend_config":{"is_sync":true}}'
    )
    found = run(mesh, line, matmul("a"), done("d", "s"))
    assert (3, 1) == milliseconds(found)


def test_waiting_for_memory_is_not_waiting_for_the_network(mesh):
    chip = dataclasses.replace(CHIP, hbm_bytes_per_second=2e9)
    copy = (
        "%c = (f32[250000]{0}, f32[250000]{0:T(256)S(1)}, u32[]) copy-start(%x)",
        "%d = f32[250000]{0:T(256)S(1)} copy-done(%c)",
    )
    found = run(mesh, *copy, chip=chip)
    # 1 MB read, then read and written by the root.
    assert found.seconds == pytest.approx(1.5e-3)
    assert found.memory_seconds == pytest.approx(1.5e-3)
    assert found.exposed_seconds == 0


def test_roofline(mesh):
    found = run(mesh, matmul("a"), gather("g"))
    assert found.roofline == pytest.approx(
        {"compute": 2e-3, "memory": 0.0, "network": 3.5e-3}
    )
    assert found.limit == "network"
    assert found.mfu_bound(1.1e9) == pytest.approx(1.1 / 5.5)


def test_compiled_program_agrees_with_its_traffic():
    mesh = make_mesh(data=2, seq=2, tensor=2)

    def nested(x):
        def outer(x, _):
            def inner(x, _):
                return lax.ppermute(jnp.sin(x @ x.T @ x), "seq", [(0, 1), (1, 0)]), None

            x = lax.psum(lax.scan(inner, x, length=3)[0], "tensor")
            return lax.cond(
                x[0, 0] > 0, lambda x: lax.pmax(x, "data"), jnp.sin, x
            ), None

        return lax.scan(outer, x, length=4)[0]

    split = PartitionSpec(("data", "seq", "tensor"))
    sharded = jax.shard_map(
        nested, mesh=mesh, in_specs=split, out_specs=split, check_vma=False
    )
    x = jax.ShapeDtypeStruct((8 * 32, 16), jnp.float32)
    program = jax.jit(sharded).lower(x).compile()
    found = timeline(program, mesh, CHIP)
    assert [each.collective for each in found.entries] == collectives(program, mesh)
    assert found.exposed_seconds == pytest.approx(sum(found.network_seconds.values()))
    assert found.seconds >= sum(found.network_seconds.values())
    # Other matmuls than the inner loop's there are none.
    assert found.flops.matmul == 12 * 2 * 2 * 32 * 32 * 16


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_gathers_of_the_next_layer(topology):
    """Layer i + 1 is gathered while layer i computes, by a ring of permutes."""
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = make_mesh(devices=description.devices)
    n, width, depth = mesh.size, 1024, 6
    ring = [(i, (i + 1) % n) for i in range(n)]

    def gather(shard):
        shards = [shard]
        for _ in range(n - 1):
            shards.append(lax.ppermute(shards[-1], "data", ring))
        return jnp.concatenate(shards)

    def layers(x, weights):
        def layer(carry, following):
            x, weight = carry
            return (jnp.tanh(x @ weight), gather(following)), None

        (x, last), _ = lax.scan(layer, (x, gather(weights[0])), weights[1:])
        return x @ last

    specs = PartitionSpec("data"), PartitionSpec(None, "data")
    shapes = (n * 8192, width), (depth, width, width)
    sharded = jax.shard_map(
        layers, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
    )
    lowered = jax.jit(sharded).lower(
        *(
            jax.ShapeDtypeStruct(
                shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)
            )
            for shape, spec in zip(shapes, specs, strict=True)
        )
    )
    text = compile_lowered(lowered).text
    chip = chip_of(description.devices[0])
    assert chip is not None
    found = timeline(text, mesh, chip)
    assert [each.collective for each in found.entries] == collectives(text, mesh)
    assert found.flops.matmul == depth * 2 * 8192 * width * width
    assert found.bytes_sent == depth * (n - 1) * width * width * 2 // n
    assert found.seconds >= max(found.roofline.values())
    assert found.seconds >= found.compute_seconds + found.exposed_seconds
    # The first layer's gather has nothing to hide under.
    assert 0 <= found.hidden < 1 - 0.9 / depth
