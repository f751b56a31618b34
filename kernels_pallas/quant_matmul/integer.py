"""INT8 and INT4 weights, symmetric, or with the zero points of a `QuantizedTensor`."""

import jax.numpy as jnp

from kernels_pallas.quant_matmul.format import Format
from kernels_pallas.quant_matmul.layouts import Native
from kernels_pallas.quant_matmul.numbers import Integer

INT8 = Format("int8", Integer(8), Native(jnp.dtype(jnp.int8)))
INT4 = Format("int4", Integer(4), Native(jnp.dtype(jnp.int4)))
