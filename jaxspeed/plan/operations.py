"""Floating-point operations of single HLO instructions.

A multiplication and an addition are two operations. The counts are those of XLA's own
`HloCostAnalysis`, written out because that analysis counts a loop's body once and is
absent on some backends: matmuls are `dot` or, on TPU, `convolution`, whose positions in
padding or between dilated elements multiply nothing.
"""

import functools
import math
import re

from jaxspeed.plan import hlo

_LIBRARY_MATMUL = ("__cublas$gemm", "__cublas$lt$matmul", "__onednn$matmul")
_COSTS = r'"cost_estimate":\{([^}]*)\}'
# `kernels_pallas.compat.gpu_kernel` writes them here.
_GPU_COSTS = r"frontend_attributes=\{([^}]*\bflops=[^}]*)\}"
# One operation for each element of the result; data movement and conversions are none.
_ARITHMETIC = frozenset(
    "abs add and atan2 cbrt ceil clamp compare complex cosine count-leading-zeros "
    "divide erf exponential exponential-minus-one floor is-finite log log-plus-one "
    "logistic maximum minimum multiply negate not or popcnt power remainder round-"
    "nearest-afz round-nearest-even rsqrt select shift-left shift-right-arithmetic "
    "shift-right-logical sign sine sqrt subtract tan tanh xor".split()
)


def matmul_operations(
    computation: hlo.Computation, instruction: hlo.Instruction
) -> int | None:
    """Operations of a dot, a convolution or a library's matmul; None for the rest.

    Raises:
        ValueError: one of these in a form that is not known.
    """
    match instruction.opcode:
        case "dot":
            return _dot(computation, instruction)
        case "convolution":
            return _convolution(computation, instruction)
        case "custom-call":
            target = custom_call_target(instruction)
            if target.startswith(_LIBRARY_MATMUL):
                return _library_matmul(computation, instruction)
            if target.startswith("__cudnn$conv"):
                return _convolution(computation, instruction)
    return None


def elementwise_operations(
    computation: hlo.Computation, instruction: hlo.Instruction
) -> int:
    """Arithmetic of an instruction on single elements, one for each result's element.

    A reduction counts the elements that it folds into others.
    """
    if instruction.opcode in _ARITHMETIC:
        return instruction.shapes[0].size
    if instruction.opcode in ("reduce", "reduce-window"):
        # Operands come first, then as many initial values.
        arrays = len(instruction.operands) // 2
        read = sum(
            computation.instructions[name].shapes[0].size
            for name in instruction.operands[:arrays]
        )
        return max(0, read - sum(shape.size for shape in instruction.shapes))
    return 0


def kernel_estimate(instruction: hlo.Instruction) -> dict[str, int] | None:
    """What a Pallas kernel says that it costs; None if it says nothing.

    Returns:
        the fields of `pl.CostEstimate`: `flops`, `transcendentals`, `bytes_accessed`,
        `remote_bytes_transferred`.
    """
    estimate = instruction.attribute(_COSTS) or instruction.attribute(_GPU_COSTS)
    if estimate is None:
        return None
    pairs = re.findall(r'"?(\w+)"?[:=]"?(\d+)', estimate)
    return {key: int(value) for key, value in pairs}


def is_kernel(instruction: hlo.Instruction) -> bool:
    """Whether it is a hand-written kernel, whose operations XLA cannot see."""
    return instruction.opcode == "custom-call" and custom_call_target(
        instruction
    ).startswith(("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "triton_"))


def custom_call_target(instruction: hlo.Instruction) -> str:
    """The name of what a custom call runs."""
    return instruction.attribute(r'custom_call_target="([^"]*)"') or ""


def _operand(
    computation: hlo.Computation, instruction: hlo.Instruction, index: int
) -> hlo.Shape:
    return computation.instructions[instruction.operands[index]].shapes[0]


def _dot(computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    dims = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    left = _operand(computation, instruction, 0)
    contracted = math.prod(left.dims[int(dim)] for dim in dims.split(",") if dim)
    return 2 * instruction.shapes[0].size * contracted


def _library_matmul(computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    """GPU libraries keep the dot's dims in their backend configuration, oneDNN none."""
    left = _operand(computation, instruction, 0)
    dims = re.search(
        r'lhs_contracting_dimensions\\?":\[([^\]]*)\]', instruction.attributes
    )
    names = re.findall(r"\d+", dims[1]) if dims else [str(len(left.dims) - 1)]
    contracted = math.prod(left.dims[int(dim)] for dim in names)
    return 2 * instruction.shapes[0].size * contracted


def _convolution(computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    labels = instruction.attribute(r"dim_labels=(\w+_\w+->\w+)")
    if labels is None:
        raise ValueError(
            f"convolution {instruction.name!r} has no dim_labels: "
            f"{instruction.attributes[:200]!r}; expected dim_labels=b01f_01io->b01f"
        )
    inputs, kernel, output = re.split(r"_|->", labels)
    left = _operand(computation, instruction, 0)
    right = _operand(computation, instruction, 1)
    result = instruction.shapes[0]
    window = _window(instruction, sum(label.isdigit() for label in kernel))
    positions = 1
    for dim, side in enumerate(window):
        label = str(dim)
        positions *= _positions(
            left.dims[inputs.index(label)],
            right.dims[kernel.index(label)],
            result.dims[output.index(label)],
            side,
        )
    # "i" of the kernel is already the input's features of one group.
    batch_groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    batch = left.dims[inputs.index("b")] // batch_groups
    features = right.dims[kernel.index("i")] * result.dims[output.index("f")]
    return 2 * batch * features * positions


_Side = tuple[int, int, int, int]


def _window(instruction: hlo.Instruction, spatial: int) -> list[_Side]:
    """Stride, low padding, and dilations of input and kernel, of each spatial dim."""
    text = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(re.findall(r"(\w+)=(\S+)", text))

    def values(key: str, default: str) -> list[int]:
        parts = fields[key].split("x") if key in fields else [default] * spatial
        return [int(part.split("_")[0]) for part in parts]

    return list(
        zip(
            values("stride", "1"),
            values("pad", "0"),
            values("lhs_dilate", "1"),
            values("rhs_dilate", "1"),
            strict=True,
        )
    )


@functools.lru_cache(maxsize=4096)
def _positions(inputs: int, kernel: int, outputs: int, side: _Side) -> int:
    """Pairs of an output and a kernel position that meet an element of the input.

    Output o and kernel position k meet place o * stride + k * kernel dilation - padding
    of the dilated input, where every `dilation`-th place holds an element.
    """
    stride, padding, dilation, kernel_dilation = side
    common = math.gcd(stride, dilation)
    period = dilation // common
    total = 0
    for position in range(kernel):
        offset = position * kernel_dilation - padding
        if offset % common:
            continue
        first = max(0, -(offset // stride))
        last = min(outputs - 1, ((inputs - 1) * dilation - offset) // stride)
        if last < first:
            continue
        inverse = pow(stride // common, -1, period) if period > 1 else 0
        phase = (-offset // common) * inverse % period
        total += (last - phase) // period - (first - 1 - phase) // period
    return total
