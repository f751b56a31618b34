"""The grammar of compiled HLO: types, operands, attributes, source positions."""

import pytest

from jaxspeed.plan import hlo

PROGRAM = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, \
replica_count=2, num_partitions=4

FileNames
1 "/home/me/model.py"
2 "/home/me/train.py"

FunctionNames
1 "layer"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=4 end_column=9}
2 {file_name_id=2 function_name_id=1 line=34 end_line=35 column=4 end_column=9}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}

%sum.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}, execution_thread="sparsecore"

ENTRY %main.2 (x: f32[8]) -> (f32[8], /*index=1*/f32[8]) {
  %x = f32[8]{0:T(128)} parameter(0), metadata={op_name="x"}
  %psum.3 = f32[8]{0:T(128)S(1)} all-reduce(%x), to_apply=%sum.1, \
metadata={op_name="jit(f)/psum" stack_frame_id=2}
  %old.4 = f32[8]{0} add(f32[8]{0:T(8,128)(2,1)} %x, f32[8]{0} %psum.3), \
metadata={op_name="jit(f)/add" source_file="/home/me/old.py" source_line=56}
  ROOT %tuple.5 = (f32[8]{0:T(128)}, /*index=1*/f32[8]{0}) \
tuple(%psum.3, /*index=1*/%old.4)
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.parse(PROGRAM)


@pytest.mark.parametrize(
    ("dtype", "dims", "num_bytes"),
    [
        ("f32", (8, 16), 512),
        ("bf16", (3, 5), 30),
        ("f8e4m3fn", (7,), 7),
        ("f4e2m1fn", (6,), 3),
        ("s4", (2, 3), 3),
        ("u4", (5,), 3),
        ("s2", (8,), 2),
        ("pred", (9,), 9),
        ("c64", (2,), 16),
        ("f64", (), 8),
        ("f32", (0, 4), 0),
        ("token", (), 0),
    ],
)
def test_bytes_of_a_shape(dtype, dims, num_bytes):
    assert hlo.Shape(dtype, dims).bytes == num_bytes


def test_unknown_element_type_is_refused():
    with pytest.raises(ValueError, match="unknown HLO element type 'q7'"):
        _ = hlo.Shape("q7", (2,)).bytes


def test_program_structure(module):
    assert (module.num_replicas, module.num_partitions) == (2, 4)
    assert module.entry == "main.2"
    assert set(module.computations) == {"sum.1", "main.2"}
    assert module.computations["sum.1"].root == "add.1"
    assert list(module.computations["main.2"].instructions) == [
        "x",
        "psum.3",
        "old.4",
        "tuple.5",
    ]


def test_instruction_parts(module):
    instructions = module.computations["main.2"].instructions
    reduce, total = instructions["psum.3"], instructions["tuple.5"]
    assert reduce.opcode == "all-reduce"
    assert reduce.operands == ("x",)
    assert reduce.called == ("sum.1",)
    assert total.operands == ("psum.3", "old.4")
    assert [str(shape) for shape in total.shapes] == ["f32[8]", "f32[8]"]
    assert instructions["old.4"].operands == ("x", "psum.3")


def test_tiled_nested_and_dynamic_types():
    line = (
        "  %start = ((bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, pred[]), s4[<=64,2]{1,0:E(4)}, "
        "u32[]{:S(2)}) async-start(%y), calls=%wrapped"
    )
    text = PROGRAM.replace("  ROOT %tuple.5", line + "\n  ROOT %tuple.5")
    start = hlo.parse(text).computations["main.2"].instructions["start"]
    assert start.opcode == "async-start"
    assert start.shapes == (
        hlo.Shape("bf16", (4, 8)),
        hlo.Shape("pred", ()),
        hlo.Shape("s4", (64, 2)),
        hlo.Shape("u32", ()),
    )
    assert start.called == ("wrapped",)


def test_names_without_percent_signs():
    instructions = (
        hlo.parse(PROGRAM.replace("%", "")).computations["main.2"].instructions
    )
    assert instructions["tuple.5"].operands == ("psum.3", "old.4")
    assert instructions["old.4"].operands == ("x", "psum.3")


def test_operands_that_are_elements_of_tuples():
    """`%pair#1`, as newer compilers write it, is an instruction like any other."""
    text = """HloModule m

ENTRY %main (x: (f32[2,3], (s32[], bf16[4]))) -> f32[4] {
  %x = (f32[2,3]{1,0:T(8,128)(2,1)}, /*index=1*/(s32[], bf16[4]{0})) parameter(0)
  %sum = f32[2,3]{1,0} add(%x#0, %x#0)
  ROOT %wide = f32[4]{0} convert(%x#1#1), metadata={op_name="a#b"}
}
"""
    instructions = hlo.parse(text).computations["main"].instructions
    assert instructions["sum"].operands == ("x#0", "x#0")
    assert instructions["wide"].operands == ("x#1#1",)
    assert list(instructions) == ["x", "x#0", "sum", "x#1", "x#1#1", "wide"]
    first, inner = instructions["x#0"], instructions["x#1#1"]
    assert (first.opcode, first.operands) == ("get-tuple-element", ("x",))
    assert first.type == "f32[2,3]{1,0:T(8,128)(2,1)}"
    assert inner.operands == ("x#1",)
    assert inner.attribute(r"\bindex=(\d+)") == "1"
    assert inner.shapes == (hlo.Shape("bf16", (4,)),)


def test_source_from_stack_frames_and_from_metadata(module):
    instructions = module.computations["main.2"].instructions
    assert module.source(instructions["psum.3"]) == ("/home/me/model.py:12 jit(f)/psum")
    assert module.source(instructions["old.4"]) == "/home/me/old.py:56 jit(f)/add"
    assert module.source(instructions["x"]) == "x"
    assert module.source(instructions["tuple.5"]) == ""


@pytest.mark.parametrize("text", ["module @jit_f {\n}\n", "", PROGRAM + PROGRAM])
def test_text_that_is_not_one_compiled_program_is_refused(text):
    with pytest.raises(ValueError, match=r"ENTRY computations, not 1.*compile\(\)"):
        hlo.parse(text)
