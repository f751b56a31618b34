"""What each primitive of a jaxpr computes and moves.

Work is counted from shapes alone: multiply-adds of contractions, and single operations
on elements (arithmetic, comparisons, selections and reductions).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp cos "
    "cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow "
    "is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or "
    "population_count pow rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square sub tan tanh xor".split()
)
"""One operation for each element of the result."""

REDUCTIONS = frozenset(
    "argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce reduce_and "
    "reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor".split()
)
"""One operation for each element of the operand."""

LAYOUT = frozenset(
    "bitcast_convert_type broadcast_in_dim concatenate convert_element_type copy "
    "copy_p expand_dims iota optimization_barrier pad pbroadcast pcast pvary real "
    "reduce_precision reshape rev slice split squeeze stop_gradient "
    "sharding_constraint transpose".split()
)
"""No arithmetic: another shape, dtype or order."""

FUSIBLE = ELEMENTWISE | LAYOUT
"""Taken to be computed where the result is used, without a way through memory."""

UNKNOWN = frozenset(
    "cholesky eig eigh fft ffi_call hessenberg householder_product lu "
    "qr schur svd triangular_solve tridiagonal tridiagonal_solve".split()
)
"""Work that the shapes do not tell; reported, not guessed."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """Work of a piece of a program.

    Attributes:
        macs: multiply-adds of matmuls and convolutions.
        flops: two for each of them.
        elementwise: single operations on elements.
        bytes: read and written.
    """

    flops: int = 0
    macs: int = 0
    elementwise: int = 0
    bytes: int = 0

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(
            self.flops + other.flops,
            self.macs + other.macs,
            self.elementwise + other.elementwise,
            self.bytes + other.bytes,
        )

    def times(self, count: int) -> "Figures":
        """The same work `count` times."""
        return Figures(*(count * value for value in dataclasses.astuple(self)))


def arithmetic(equation: Any) -> Figures:
    """FLOPs, multiply-adds and elementwise operations of one equation of a jaxpr.

    Its bytes, and work inside of a jaxpr that it calls, are not included.
    """
    name, params = equation.primitive.name, equation.params
    shapes = [variable.aval for variable in equation.invars]
    out = equation.outvars[0].aval if equation.outvars else None
    if name == "dot_general":
        return _contraction(_dot_macs(shapes, params))
    if name == "ragged_dot_general":
        return _contraction(_ragged_dot_macs(shapes, params))
    if name == "conv_general_dilated":
        return _contraction(_convolution_macs(shapes, out, params))
    if name in ELEMENTWISE:
        return Figures(elementwise=elements(out))
    if name in REDUCTIONS:
        return Figures(elementwise=elements(shapes[0]))
    if name.startswith("reduce_window"):
        window = math.prod(params["window_dimensions"])
        return Figures(elementwise=elements(out) * window)
    if name.startswith(("select_and_scatter_add", "select_and_gather_add")):
        window = math.prod(params["window_dimensions"])
        return Figures(elementwise=elements(shapes[0]) * window)
    if name.startswith("scatter") and name != "scatter":
        return Figures(elementwise=elements(shapes[2]))
    return Figures()


def elements(shape: Any) -> int:
    """Number of elements; 0 for what is no array, such as a token."""
    return math.prod(getattr(shape, "shape", (0,)))


def size_in_bytes(shape: Any) -> int:
    """Bytes of an array, sub-byte dtypes rounded up; 0 for what is no array."""
    dtype = getattr(shape, "dtype", None)
    return elements(shape) * dtype.itemsize if dtype is not None else 0


def bytes_moved(equation: Any) -> int:
    """Bytes that an equation reads and writes when it is not fused with another.

    A gather or slice reads what it takes; a scatter or update in place reads and writes
    what it puts. Everything else reads its operands and writes its results.
    """
    name = equation.primitive.name
    operands = [size_in_bytes(v.aval) for v in equation.invars]
    results = sum(size_in_bytes(v.aval) for v in equation.outvars)
    if name in ("gather", "dynamic_slice"):
        return 2 * results + sum(operands[1:])
    if name == "dynamic_update_slice":
        return 2 * operands[1]
    if name.startswith("scatter"):
        rounds = 2 if name == "scatter" else 3  # adding reads the old values as well
        return operands[1] + rounds * operands[2]
    return sum(operands) + results


def _contraction(macs: int) -> Figures:
    return Figures(flops=2 * macs, macs=macs)


def _dot_macs(shapes: list[Any], params: Mapping[str, Any]) -> int:
    left, right = (shape.shape for shape in shapes)
    (_, contracted), (_, batch) = params["dimension_numbers"]
    taken = {*contracted, *batch}
    columns = math.prod(n for dim, n in enumerate(right) if dim not in taken)
    return math.prod(left) * columns


def _ragged_dot_macs(shapes: list[Any], params: Mapping[str, Any]) -> int:
    """Every row belongs to one group at most, so the groups' dim adds no work."""
    left, right = (shape.shape for shape in shapes[:2])
    numbers = params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    taken = {*contracted, *batch, *numbers.rhs_group_dimensions}
    columns = math.prod(n for dim, n in enumerate(right) if dim not in taken)
    return math.prod(left) * columns


def _convolution_macs(shapes: list[Any], out: Any, params: Mapping[str, Any]) -> int:
    """Each output element takes a kernel's window over the inputs of its group.

    Of a dilated input (a transposed convolution) only the elements that are there.
    """
    kernel = shapes[1].shape
    _, inputs, *spatial = params["dimension_numbers"].rhs_spec
    window = math.prod(kernel[dim] for dim in spatial)
    macs = elements(out) * window * kernel[inputs]
    return macs // math.prod(params["lhs_dilation"] or (1,))
