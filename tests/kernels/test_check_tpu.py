"""Cycles of schedules that the TPU compiler makes; no TPU is needed."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.check import Case, measure
from kernels_pallas.check.chips import BF16_FLOPS_PER_CYCLE
from tests.kernels import check_cases

pytestmark = pytest.mark.tpu_aot

TPUS = list(BF16_FLOPS_PER_CYCLE)


def test_cycles_of_a_matmul_are_those_of_the_peak():
    """256 rows more take the time that the published peak says, to the cycle."""
    case = check_cases.matmul_case(512, smaller=check_cases.matmul_case(256))
    for found in measure(case, *TPUS):
        assert found.status == "compiled", found.reason
        flops = 2 * 256 * 1024 * 512
        figures = found.figures
        assert flops / figures["cycles"] == BF16_FLOPS_PER_CYCLE[found.chip]
        assert figures["mxu"] == 1.0
        assert figures["cycles_per_64k"] == figures["cycles"] / 4
        assert figures["vmem_bytes"] > 512 * 512 * 4


def test_what_does_not_compile_says_why():
    large = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    (found,) = measure(Case("large", "tpu", check_cases.too_large, (large,)), "v5e")
    assert found.status == "failed" and "vmem" in found.reason.lower()
    (found,) = measure(Case("none", "tpu", check_cases.no_kernel, (large,)), "v5e")
    assert found.status == "failed" and "no Pallas kernel" in found.reason
