"""How TPU and GPU programs write collectives: each is counted once, at its start.

The excerpts are cut from programs compiled ahead of time for v5e, v5p, tpu7x and H200
devices; layouts are kept as they were, long backend configurations are not.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jaxspeed.mesh import make_mesh
from jaxspeed.plan import collectives, summarise

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8\n"

TPU_PERMUTE = """
ENTRY %main () -> bf16[256,1024] {
  %x = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %start = (bf16[256,1024]{1,0:T(8,128)(2,1)}, \
bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, \
source_target_pairs={{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}
  ROOT %done = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%start)
}
"""

# One all-gather in four fusions: start, two computations it overlaps with, done.
TPU_ASYNC_FUSION = """
%start_fusion (p: s4[128,512]) -> (s4[128,512], s4[256,512], s32[2], u32[]) {
  %p = s4[128,512]{1,0:T(64,128)(8,1)E(4)S(1)} parameter(0)
  %all-gather.12 = s4[256,512]{1,0:T(64,128)(8,1)E(4)} all-gather(%p), channel_id=1, \
replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}, use_global_device_ids=true, \
frontend_attributes={chain_id="0"}, backend_config={"flag_configs":[],\
"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.1 = (s4[128,512]{1,0:T(64,128)(8,1)E(4)S(1)}, \
s4[256,512]{1,0:T(64,128)(8,1)E(4)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) \
custom-call(%all-gather.12), custom_call_target="AsyncCollectiveStart"
}

%step_fusion (p: s4[128,512], q: s4[256,512], r: s32[2], s: u32[]) -> s4[256,512] {
  %p = s4[128,512]{1,0:T(64,128)(8,1)E(4)S(1)} parameter(0)
  %q = s4[256,512]{1,0:T(64,128)(8,1)E(4)S(1)} parameter(1)
  ROOT %all-gather.14 = s4[256,512]{1,0:T(64,128)(8,1)E(4)S(1)} all-gather(%p), \
channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}, \
use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={\
"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

ENTRY %main (x: s4[128,512]) -> s4[256,512] {
  %x = s4[128,512]{1,0:T(64,128)(8,1)E(4)S(1)} parameter(0)
  %async-collective-start = (s4[128,512]{1,0:T(64,128)(8,1)E(4)S(1)}, \
s4[256,512]{1,0:T(64,128)(8,1)E(4)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%x), \
kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start_fusion
  %get.0 = s4[128,512]{1,0} get-tuple-element(%async-collective-start), index=0
  %get.1 = s4[256,512]{1,0} get-tuple-element(%async-collective-start), index=1
  %get.2 = s32[2]{0:S(4)} get-tuple-element(%async-collective-start), index=2
  %get.3 = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=3
  %fusion.33 = s4[256,512]{1,0} fusion(%get.0, %get.1, %get.2, %get.3), \
kind=kOutput, calls=%step_fusion
  ROOT %async-collective-done = s4[256,512]{1,0:T(64,128)(8,1)E(4)S(1)} \
fusion(%get.0, %fusion.33, %get.2, %get.3), kind=kCustom, calls=%step_fusion
}
"""

# The sum is cut to 560 rows, of which 2048 / 4 = 512 are wanted.
TPU_REDUCE_SCATTER_FUSION = """
%all-reduce-scatter.clone.1 (input.5: bf16[2048,4096]) -> bf16[560,4096] {
  %input.5 = bf16[2048,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %constant.124 = bf16[] constant(0)
  %pad.5 = bf16[2240,4096]{1,0:T(8,128)(2,1)} pad(%input.5, %constant.124), \
padding=0_192x0_0
  %all-reduce.7 = bf16[2240,4096]{1,0:T(8,128)(2,1)} all-reduce(%pad.5), \
channel_id=4, replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true, \
to_apply=%region_7.7.clone
  %table = u32[8]{0:T(128)} constant({0, 0, 1, 1, 2, 2, 3, 3})
  %partition-id.16 = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %dynamic-slice.29 = bf16[560,4096]{1,0:T(8,128)(2,1)} \
dynamic-slice(%all-reduce.7, %partition-id.16, %zero), dynamic_slice_sizes={560,4096}
}

ENTRY %main (x: bf16[2048,4096]) -> bf16[560,4096] {
  %x = bf16[2048,4096]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %fusion.69 = bf16[560,4096]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, \
calls=%all-reduce-scatter.clone.1
}
"""

TPU_SPARSE_CORE_CALL = """
%called (p: bf16[1024,1024], q: token[]) -> bf16[256,1024] {
  %p = bf16[1024,1024]{0,1:T(8,128)(2,1)} parameter(0)
  %q = token[] parameter(1)
  ROOT %reduce-scatter.1 = bf16[256,1024]{0,1:T(8,128)(2,1)} reduce-scatter(%p), \
channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true, \
dimensions={0}, to_apply=%region_3.4.clone
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[1024,1024]) -> bf16[256,1024] {
  %x = bf16[1024,1024]{0,1:T(8,128)(2,1)} parameter(0)
  %ready = token[] custom-call(), custom_call_target="PrepareDone"
  %call-start = ((bf16[1024,1024]{0,1:T(8,128)(2,1)}, token[]), \
bf16[256,1024]{0,1:T(8,128)(2,1)}) call-start(%x, %ready), \
async_execution_thread="sparsecore", to_apply=%called
  ROOT %call-done = bf16[256,1024]{0,1:T(8,128)(2,1)} call-done(%call-start)
}
"""

GPU_STARTS = """
ENTRY %main (x: bf16[256,1024], y: f32[64]) -> bf16[1024,1024] {
  %x = bf16[256,1024]{1,0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %all-gather-start = (bf16[256,1024]{1,0}, bf16[1024,1024]{1,0}) \
all-gather-start(%x), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, \
dimensions={0}, use_global_device_ids=true, \
backend_config={"collective_backend_config":{"is_sync":true}}
  %all-gather-done = bf16[1024,1024]{1,0} all-gather-done(%all-gather-start)
  %all-reduce-start = (bf16[256,1024]{1,0}, f32[64]{0}) all-reduce-start(%x, %y), \
channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true, to_apply=%add
  %all-reduce-done = (bf16[256,1024]{1,0}, f32[64]{0}) \
all-reduce-done(%all-reduce-start)
  %all-to-all-start = ((bf16[256,1024]{1,0}), bf16[256,1024]{1,0}) \
all-to-all-start(%x), channel_id=1, replica_groups={{0,2},{1,3},{4,6},{5,7}}, \
dimensions={1}
  %all-to-all-done = bf16[256,1024]{1,0} all-to-all-done(%all-to-all-start)
  %reduce-scatter-start = ((bf16[256,1024]{1,0}), bf16[64,1024]{1,0}) \
reduce-scatter-start(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, \
use_global_device_ids=true, dimensions={0}, to_apply=%add
  %reduce-scatter-done = bf16[64,1024]{1,0} reduce-scatter-done(%reduce-scatter-start)
  ROOT %copy = bf16[1024,1024]{1,0} copy(%all-gather-done)
}
"""

WRAPPED_ASYNC = """
%wrapped_all_gather (p: f32[8]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-gather.1 = f32[16]{0} all-gather(%p), channel_id=2, \
replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, use_global_device_ids=true
}

ENTRY %main (x: f32[8]) -> f32[16] {
  %x = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[16]{0}, u32[]) async-start(%x), calls=%wrapped_all_gather
  %update = ((f32[8]{0}), f32[16]{0}, u32[]) async-update(%start), \
calls=%wrapped_all_gather
  ROOT %done = f32[16]{0} async-done(%update), calls=%wrapped_all_gather
}
"""

SEND_AND_RECEIVE = """
ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %after-all = token[] after-all()
  %recv = (f32[16]{0}, u32[], token[]) recv(%after-all), channel_id=1, \
frontend_attributes={_xla_send_recv_source_target_pairs={{0,4},{1,5},{2,6},{3,7}}}
  %send = (f32[16]{0}, u32[], token[]) send(%x, %after-all), channel_id=1, \
frontend_attributes={_xla_send_recv_source_target_pairs={{0,4},{1,5},{2,6},{3,7}}}
  %send-done = token[] send-done(%send), channel_id=1
  %to_host = (f32[16]{0}, u32[], token[]) send(%x, %after-all), channel_id=2, \
is_host_transfer=true
  %recv-done = (f32[16]{0}, token[]) recv-done(%recv), channel_id=1
  ROOT %received = f32[16]{0} get-tuple-element(%recv-done), index=0
}
"""

IN_PLACE_PERMUTE = """
ENTRY %main (x: f32[4,128], out: f32[8,128]) -> f32[8,128] {
  %x = f32[4,128]{1,0} parameter(0)
  %out = f32[8,128]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %offsets = (s32[], s32[]) tuple(%zero, %zero)
  ROOT %permute = f32[8,128]{1,0} collective-permute(%x, %out, %offsets, %offsets), \
channel_id=1, source_target_pairs={{0,1},{1,0}}, slice_sizes={{2,128}}
}
"""

RAGGED = """
ENTRY %main (x: bf16[64,128], out: bf16[64,128], sizes: s32[2]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %out = bf16[64,128]{1,0} parameter(1)
  %n = s32[2]{0} parameter(2)
  ROOT %ragged = bf16[64,128]{1,0} ragged-all-to-all(%x, %out, %n, %n, %n, %n), \
channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}
}
"""

BROADCAST = """
ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  ROOT %all = f32[16]{0} collective-broadcast(%x), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""

# Three iterations test the condition four times.
COLLECTIVE_IN_CONDITION = """
%body (state: (s32[])) -> (s32[]) {
  ROOT %state = (s32[]) parameter(0)
}

%condition (state: (s32[])) -> pred[] {
  %state = (s32[]) parameter(0)
  %x = f32[] constant(1)
  %sum = f32[] all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, \
use_global_device_ids=true, to_apply=%add
  ROOT %less = pred[] compare(%sum, %x), direction=LT
}

ENTRY %main () -> (s32[]) {
  %zero = s32[] constant(0)
  %tuple = (s32[]) tuple(%zero)
  ROOT %while = (s32[]) while(%tuple), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


ASYNCHRONOUS = (
    TPU_PERMUTE,
    TPU_ASYNC_FUSION,
    TPU_SPARSE_CORE_CALL,
    WRAPPED_ASYNC,
    SEND_AND_RECEIVE,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, seq=2, tensor=2)


@pytest.mark.parametrize(
    ("program", "op", "axes", "payload_bytes", "bytes_sent"),
    [
        (TPU_PERMUTE, "collective-permute", ("seq",), 524288, 524288),
        (TPU_ASYNC_FUSION, "all-gather", ("tensor",), 65536, 32768),
        (
            TPU_REDUCE_SCATTER_FUSION,
            "reduce-scatter",
            ("data", "seq"),
            2240 * 4096 * 2,
            2240 * 4096 * 2 * 3 // 4,
        ),
        (
            TPU_SPARSE_CORE_CALL,
            "reduce-scatter",
            ("data", "seq"),
            2097152,
            1572864,
        ),
        (WRAPPED_ASYNC, "all-gather", ("data",), 64, 32),
        (SEND_AND_RECEIVE, "collective-permute", ("data",), 64, 64),
        (IN_PLACE_PERMUTE, "collective-permute", ("tensor",), 1024, 1024),
        (RAGGED, "ragged-all-to-all", ("data",), 16384, 8192),
        (BROADCAST, "collective-broadcast", ("seq", "tensor"), 64, 64),
    ],
)
def test_counted_once(mesh, program, op, axes, payload_bytes, bytes_sent):
    (found,) = collectives(HEADER + program, mesh)
    assert (found.op, found.axes) == (op, axes)
    assert (found.payload_bytes, found.bytes_sent) == (payload_bytes, bytes_sent)
    assert found.count == 1
    assert found.asynchronous == (program in ASYNCHRONOUS)


def test_tokens_are_not_operands(mesh):
    (found,) = collectives(HEADER + SEND_AND_RECEIVE, mesh)
    assert [str(shape) for shape in found.operands] == ["f32[16]"]


def test_gpu_starts(mesh):
    found = collectives(HEADER + GPU_STARTS, mesh)
    x_bytes = 256 * 1024 * 2
    assert [(each.op, each.axes, each.bytes_sent) for each in found] == [
        ("all-gather", ("data", "seq"), 3 * x_bytes),
        ("all-reduce", ("tensor",), x_bytes + 64 * 4),
        ("all-to-all", ("seq",), x_bytes // 2),
        ("reduce-scatter", ("seq", "tensor"), x_bytes * 3 // 4),
    ]
    assert [each.asynchronous for each in found] == [False, True, True, True]


def test_loop_condition_runs_once_more_than_the_body(mesh):
    (found,) = collectives(HEADER + COLLECTIVE_IN_CONDITION, mesh)
    assert (found.count, found.bytes_sent) == (4, 4 * 4)


def test_groups_that_disagree_are_irregular(mesh):
    program = re.sub(
        r"replica_groups=\S+ ", "replica_groups={{0,1},{2,6}}, ", WRAPPED_ASYNC
    )
    (found,) = collectives(HEADER + program, mesh)
    assert found.axes == ("irregular",)


def test_permute_to_oneself_sends_nothing(mesh):
    program = re.sub(
        r"source_target_pairs=\S+", "source_target_pairs={{0,0},{1,1}}", TPU_PERMUTE
    )
    assert collectives(HEADER + program, mesh) == []


def test_fraction_of_a_byte_is_rounded_up():
    program = BROADCAST.replace("collective-broadcast", "all-reduce").replace(
        "{{0,1,2,3},{4,5,6,7}}", "{{0,1,2}}, use_global_device_ids=true"
    )
    mesh = make_mesh(data=3, devices=jax.devices()[:3])
    header = HEADER.replace("num_partitions=8", "num_partitions=3")
    (found,) = collectives(header + program, mesh)
    assert found.bytes_sent == 86  # 2 * 64 * 2 / 3 = 85.3


@pytest.mark.tpu_aot
def test_program_compiled_for_a_tpu_topology():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = make_mesh(data=2, seq=2, tensor=2, devices=topology.devices)

    def step(weights, x, small):
        def layer(x, weight):
            x = jnp.tanh(x @ lax.all_gather(weight, ("data", "seq"), tiled=True))
            return lax.psum(x, "tensor"), None

        x, _ = lax.scan(layer, x, weights)
        small = lax.all_gather(small.astype(jnp.int4), "tensor", tiled=True)
        return lax.ppermute(x, "seq", [(0, 1), (1, 0)]), small

    def argument(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    split = ("data", "seq")
    arguments = [
        argument((5, 1024, 1024), None, split),
        argument((1024, 1024), split),
        argument((512, 512), split),
    ]
    specs = (PartitionSpec(None, split), PartitionSpec(split), PartitionSpec(split))
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec(("data", "seq", "tensor")),
        check_vma=False,
    )
    program = jax.jit(sharded).lower(*arguments).compile()
    weight_bytes, x_bytes, small_bytes = 1024 * 1024 * 2, 256 * 1024 * 2, 128 * 512 // 2
    assert summarise(collectives(program, mesh)) == [
        {
            "op": "all-gather",
            "axes": ["data", "seq"],
            "count": 5,
            "bytes_per_step": 5 * weight_bytes * 3 // 4,
        },
        {
            "op": "all-reduce",
            "axes": ["tensor"],
            "count": 5,
            "bytes_per_step": 5 * x_bytes,
        },
        {
            "op": "collective-permute",
            "axes": ["seq"],
            "count": 1,
            "bytes_per_step": x_bytes,
        },
        {
            "op": "all-gather",
            "axes": ["tensor"],
            "count": 1,
            "bytes_per_step": small_bytes,
        },
    ]
