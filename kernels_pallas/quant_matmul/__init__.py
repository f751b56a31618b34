"""Matrix products with weights of 4, 6 and 8 bits."""

from kernels_pallas.quant_matmul.api import quant_matmul
from kernels_pallas.quant_matmul.formats import FORMATS
from kernels_pallas.quant_matmul.gpu_tensor import (
    GpuTensor,
    arrange_for_gpu,
    arrange_from_gpu,
)
from kernels_pallas.quant_matmul.sharding import partition_specs
from kernels_pallas.quant_matmul.storage import from_arrays, to_arrays
from kernels_pallas.quant_matmul.tensor import QuantizedTensor, dequantize, quantize
from kernels_pallas.quant_matmul.two_plane import (
    TwoPlanes,
    from_two_planes,
    to_two_planes,
)
from kernels_pallas.quant_matmul.w8a8 import w8a8_matmul

__all__ = [
    "FORMATS",
    "GpuTensor",
    "QuantizedTensor",
    "TwoPlanes",
    "arrange_for_gpu",
    "arrange_from_gpu",
    "dequantize",
    "from_arrays",
    "from_two_planes",
    "partition_specs",
    "quant_matmul",
    "quantize",
    "to_arrays",
    "to_two_planes",
    "w8a8_matmul",
]
