"""Arrays in 4, 6 and 8 bits for the wire: quantized, packed, and summed on arrival."""

from kernels_pallas.quantize_pack.api import Packed, quantize_pack, unpack_reduce
from kernels_pallas.quantize_pack.format import FORMATS

__all__ = ["FORMATS", "Packed", "quantize_pack", "unpack_reduce"]
