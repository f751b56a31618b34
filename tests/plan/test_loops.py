"""Trip counts: annotated by the compiler, or derived where it left no annotation."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxspeed.plan import hlo, loops

LOOP = """\
HloModule jit_f, is_scheduled=true

%body (state: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %state = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8]{{0}} get-tuple-element(%state), index=1
  %last = s32[] get-tuple-element(%state), index=2
  %step = s32[] constant({step})
  %next = s32[] {advance}
  ROOT %new = (s32[], f32[8]{{0}}, s32[]) tuple(%next, %x, %last)
}}

%condition (state: (s32[], f32[8], s32[])) -> pred[] {{
  %state = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %last = s32[] get-tuple-element(%state), index=2
  %bound = s32[] constant({bound})
  %two = s32[] constant(2)
  %ahead = s32[] add(%two, %i)
  ROOT %compare = pred[] compare({operands}), direction={direction}
}}

ENTRY %main (x: f32[8], n: s32[]) -> (s32[], f32[8], s32[]) {{
  %x = f32[8]{{0}} parameter(0)
  %n = s32[] parameter(1)
  %start = s32[] constant({start})
  %copy = s32[] copy(%start)
  %carried = s32[] constant(6)
  %tuple = (s32[], f32[8]{{0}}, s32[]) tuple({first}, %x, %carried)
  ROOT %while = (s32[], f32[8]{{0}}, s32[]) while(%tuple), condition=%condition, \
body=%body
}}
"""


DEFAULTS = {
    "start": 0,
    "step": 1,
    "direction": "LT",
    "bound": 5,
    "operands": "%i, %bound",
    "first": "%copy",
    "advance": "add(%i, %step)",
}


def written(**changes):
    return LOOP.format(**(DEFAULTS | changes))


def trip_counts(text):
    """Trip counts of all loops, outermost first."""
    module = hlo.parse(text)
    found = []

    def visit(scope):
        for instruction in scope.computation.instructions.values():
            if instruction.opcode == "while":
                found.append(loops.trip_count(scope, instruction))
                _, body = loops.condition_and_body(instruction)
                visit(scope.iterate(body, instruction))
            elif instruction.opcode == "call":
                visit(scope.call(instruction.called[0], instruction.operands))

    visit(loops.Scope(module, module.computations[module.entry]))
    return found


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        (dict(), 5),
        (dict(start=2), 3),
        (dict(direction="LE"), 6),
        (dict(step=2), 3),
        (dict(start=7), 0),
        (dict(start=10, step=-3, direction="GT", bound=0), 4),
        (dict(start=9, step=-3, direction="GE", bound=0), 4),
        (dict(direction="NE", step=5, bound=20), 4),
        (dict(direction="GT", operands="%bound, %i"), 5),
        (dict(operands="%i, %last"), 6),
        (dict(operands="%state#0, %bound", advance="add(%state#0, %step)"), 5),
        (dict(operands="%i, %state#2"), 6),
        (dict(operands="%ahead, %bound"), 3),
        (dict(start=5, advance="subtract(%i, %step)", direction="GT", bound=0), 5),
        (dict(advance="add(%last, %step)"), None),
        (dict(advance="subtract(%step, %i)"), None),
        (dict(direction="NE", step=3, bound=20), None),
        (dict(step=0), None),
        (dict(step=-1), None),
        (dict(direction="GT"), None),
        (dict(direction="EQ"), None),
        (dict(first="%n"), None),
        (dict(operands="%bound, %last"), None),
    ],
)
def test_derived_from_start_step_and_bound(loop, expected):
    assert trip_counts(written(**loop)) == [expected]


NESTED = """\
HloModule jit_f, is_scheduled=true

%increment (i: s32[], one: s32[]) -> s32[] {
  %i = s32[] parameter(0)
  %one = s32[] parameter(1)
  ROOT %add = s32[] add(%i, %one)
}

%less (i: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %bound = s32[] constant(5)
  ROOT %compare = pred[] compare(%i, %bound), direction=LT
}

%inner_body (state: (s32[])) -> (s32[]) {
  %state = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] fusion(%i, %one), kind=kLoop, calls=%increment
  ROOT %new = (s32[]) tuple(%next)
}

%inner_condition (state: (s32[])) -> pred[] {
  %state = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %less.1 = pred[] fusion(%i), kind=kLoop, calls=%less
}

%outer_body (state: (s32[], s32[])) -> (s32[], s32[]) {
  %state = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %first = s32[] get-tuple-element(%state), index=1
  %copied = s32[] copy(%first)
  %tuple = (s32[]) tuple(%copied)
  %while = (s32[]) while(%tuple), condition=%inner_condition, body=%inner_body
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %new = (s32[], s32[]) tuple(%next, CARRIED)
}

%outer_condition (state: (s32[], s32[])) -> pred[] {
  %state = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %less.1 = pred[] fusion(%i), kind=kLoop, calls=%less
}

ENTRY %main () -> (s32[], s32[]) {
  %zero = s32[] constant(0)
  %two = s32[] constant(2)
  %tuple = (s32[], s32[]) tuple(%zero, %two)
  ROOT %while = (s32[], s32[]) while(%tuple), condition=%outer_condition, \
body=%outer_body
}
"""


@pytest.mark.parametrize(
    ("carried", "expected"), [("%first", [5, 3]), ("%next", [5, None])]
)
def test_start_carried_by_the_loop_around(carried, expected):
    assert trip_counts(NESTED.replace("CARRIED", carried)) == expected


@pytest.mark.parametrize(
    "annotation",
    [
        'backend_config={"known_trip_count":{"n":"12"}}',
        r'backend_config="{\"known_trip_count\":{\"n\":\"12\"}}"',
    ],
)
def test_annotation_comes_first(annotation):
    text = written().replace("body=%body", f"body=%body, {annotation}")
    assert trip_counts(text) == [12]


def nested(x):
    def outer(x, _):
        return lax.fori_loop(2, 6, lambda i, x: jnp.sin(x * i), x), None

    return lax.scan(outer, x, length=7)[0]


def backwards(x):
    return lax.scan(lambda x, y: (jnp.sin(x + y), x), x, jnp.ones((9, 8)), reverse=True)


def descending(x):
    return lax.while_loop(
        lambda state: state[0] > 0,
        lambda state: (state[0] - 3, jnp.sin(state[1])),
        (jnp.int32(10), x),
    )


@pytest.mark.parametrize(
    ("function", "expected"),
    [(nested, [7, 4]), (backwards, [9]), (descending, [4])],
)
def test_derived_counts_equal_those_of_compiled_programs(function, expected):
    text = jax.jit(function).lower(jnp.ones(8)).compile().as_text() or ""
    bare = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert "known_trip_count" not in bare
    assert trip_counts(bare) == expected
    assert trip_counts(text) == expected


def test_loop_that_depends_on_data_is_unknown():
    def until_large(x):
        return lax.while_loop(lambda x: x.sum() < 100, lambda x: x * 2 + 1, x)

    text = jax.jit(until_large).lower(jnp.ones(8)).compile().as_text() or ""
    assert trip_counts(text) == [None]
