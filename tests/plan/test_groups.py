"""Replica groups in every written form, and the mesh axes they span."""

import pytest

from jaxspeed.plan import groups, hlo

NAMES, SIZES = ("data", "seq", "tensor"), (2, 2, 2)


def instruction(attributes):
    return hlo.Instruction("op.1", "f32[8]", "all-gather", "%x", attributes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{{0,1,2},{3}}", ((0, 1, 2), (3,))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['x'=2,'y'=4] {'y'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['x'=2,'y'=4] {'x'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['x'=2,'y'=4] {'y':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['x'=2,'y'=4] {'y':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['x'=8] {'x':(1)2,'x':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        (
            "mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}",
            ((0, 2, 4, 6), (1, 3, 5, 7)),
        ),
        ("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", ((0, 2), (1, 3))),
        ("mesh['x'=8], device_ids=([8]) {'x'}", (tuple(range(8)),)),
        ("{}", (tuple(range(8)),)),
    ],
)
def test_written_forms(text, expected):
    attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true"
    assert groups.replica_groups(instruction(attributes), 8) == expected


def test_groups_of_the_only_replica_are_all_partitions():
    of_replicas = instruction(", channel_id=1, replica_groups={{0}}, dimensions={0}")
    assert groups.replica_groups(of_replicas, 4) == ((0, 1, 2, 3),)
    within_replica = instruction(", replica_groups={{0}}, dimensions={0}")
    assert groups.replica_groups(within_replica, 4) == ((0,),)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match=r"cannot read the replica groups.*'op.1'"):
        groups.replica_groups(instruction(", replica_groups=everyone"), 8)


@pytest.mark.parametrize(
    "text",
    [
        "source_target_pairs={{0,1},{1,0}}",
        'frontend_attributes={_xla_send_recv_source_target_pairs="{{0,1}, {1,0}}"}',
        "frontend_attributes={_xla_send_recv_source_target_pairs={{0,1},{1,0}}}",
    ],
)
def test_source_target_pairs(text):
    assert groups.source_target_pairs(instruction(text)) == ((0, 1), (1, 0))


def test_missing_pairs_are_refused():
    with pytest.raises(ValueError, match="cannot read the source_target_pairs"):
        groups.source_target_pairs(instruction(", channel_id=1"))


@pytest.mark.parametrize(
    ("members", "axes"),
    [
        (((0, 1), (2, 3), (4, 5), (6, 7)), ("tensor",)),
        (((0, 2), (1, 3)), ("seq",)),
        (((4, 0), (5, 1)), ("data",)),
        (((0, 1, 4, 5), (2, 3, 6, 7)), ("data", "tensor")),
        ((tuple(range(8)),), ("data", "seq", "tensor")),
        (((0, 1), (2, 6)), (groups.IRREGULAR,)),
    ],
)
def test_axes_of_groups(members, axes):
    assert groups.spanned_axes(members, NAMES, SIZES) == axes


def test_axes_of_a_ring_are_those_that_any_step_crosses():
    ring = tuple((i, (i + 1) % 4) for i in range(4))
    assert groups.shifted_axes(ring, NAMES, SIZES) == ("seq", "tensor")
    assert groups.shifted_axes(((0, 4), (1, 5)), NAMES, SIZES) == ("data",)


@pytest.mark.parametrize(("stride", "size"), [(1, 4), (4, 4), (16, 4), (8, 8)])
def test_rings_over_part_of_an_axis_are_of_that_axis(stride, size):
    """An axis of 64 taken as 4 x 4 x 4 or 8 x 8: each ring of part of it is of it."""
    moved = [
        (
            i + j * 64,
            i + (((i // stride) + 1) % size - (i // stride) % size) * stride + j * 64,
        )
        for j in range(8)
        for i in range(64)
    ]
    names, sizes = ("replica", "data"), (8, 64)
    assert groups.shifted_axes(tuple(moved), names, sizes) == ("data",)


def test_pairs_of_hundreds_of_devices_are_read_once():
    pairs = "{" + ",".join(f"{{{i},{(i + 1) % 512}}}" for i in range(512)) + "}"
    first, second = (
        groups.source_target_pairs(instruction(f"source_target_pairs={pairs}"))
        for _ in range(2)
    )
    assert first is second
    assert first[511] == (511, 0)
