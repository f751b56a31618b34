"""The formats by name."""

from kernels_pallas.quant_matmul.format import Format
from kernels_pallas.quant_matmul.fp4 import MXFP4, NVFP4
from kernels_pallas.quant_matmul.fp6 import FP6_E2M3, FP6_E3M2
from kernels_pallas.quant_matmul.fp8 import FP8_E4M3, FP8_E5M2
from kernels_pallas.quant_matmul.integer import INT4, INT8

FORMATS = {
    each.name: each
    for each in (INT8, INT4, FP8_E4M3, FP8_E5M2, FP6_E3M2, FP6_E2M3, MXFP4, NVFP4)
}


def get(name: str) -> Format:
    """The format of this name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in FORMATS:
        raise ValueError(f"format {name!r}; choose one of {list(FORMATS)}")
    return FORMATS[name]
