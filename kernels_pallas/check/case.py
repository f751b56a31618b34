"""What a kernel's folder registers to be compiled and counted."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Union


@dataclasses.dataclass(frozen=True)
class Case:
    """A program around a kernel, at one size, for one platform.

    Schedules are counted as they stand in the program: a loop's body counts once. What
    a case says of weights and bytes has to be of what is counted. On TPU, write the
    work of one grid step without a loop, and give the same at half the size as
    `smaller`: the difference has neither prologue nor latency in it. On GPU the
    innermost loop with a tensor core instruction is what is counted.

    Attributes:
        name: unique within the folder and platform, such as "int4 M=16".
        platform: "tpu" or "gpu", whose chips it is compiled for.
        function: called with `arguments`; at the top of a module, or a
            `functools.partial` of such a one, as another process imports it.
        arguments: pytrees of `jax.ShapeDtypeStruct`.
        weights: that the counted schedule multiplies with. On TPU: all of the program;
            on GPU: one pass of the inner loop of one warpgroup. 0 where nothing is
            counted per weight.
        hbm_bytes: that the counted schedule moves from and to HBM; 0: not said.
        smaller: a case whose cycles, weights and bytes are subtracted, or None.
    """

    name: str
    platform: Literal["tpu", "gpu"]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    weights: int = 0
    hbm_bytes: int = 0
    smaller: Union["Case", None] = None
