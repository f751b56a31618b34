"""FP8 weights, e4m3 and e5m2 (Micikevicius et al., 2022)."""

import jax.numpy as jnp

from kernels_pallas.quant_matmul.format import Format
from kernels_pallas.quant_matmul.layouts import Native
from kernels_pallas.quant_matmul.numbers import Minifloat

E4M3 = Minifloat(exponent=4, mantissa=3, bias=7, top=0x7E)
E5M2 = Minifloat(exponent=5, mantissa=2, bias=15, top=0x7B)

FP8_E4M3 = Format("fp8_e4m3", E4M3, Native(jnp.dtype(jnp.float8_e4m3fn)))
FP8_E5M2 = Format("fp8_e5m2", E5M2, Native(jnp.dtype(jnp.float8_e5m2)))
