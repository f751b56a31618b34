"""Machine code that the GPU compiler makes; no GPU, driver or CUDA is needed."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.check import Case, measure
from tests.kernels import check_cases

pytestmark = pytest.mark.gpu_aot


def test_instructions_per_weight_of_int8_weights():
    """Converting a weight takes instructions that a longer loop does not save."""
    found = {}
    for depth in (128, 256):
        (result,) = measure(check_cases.weights_case(depth), "h200")
        assert result.status == "compiled", result.reason
        found[depth] = result.figures
    for figures in found.values():
        assert figures["tensor_core"] == ["HGMMA"]
        assert figures["spill_bytes"] == 0
        assert 0 < figures["registers"] <= 255
    assert found[128]["mix"]["HGMMA"] == 16  # 128 rows are two of 64, 128 deep is 8
    assert found[256]["mix"]["HGMMA"] == 32
    per_weight = {x: y["instructions_per_weight"] for x, y in found.items()}
    assert per_weight[256] == pytest.approx(per_weight[128], rel=0.2)
    assert 3 < per_weight[128] < 5
    # Four stages of weights and inputs, and the output.
    stages = 4 * 128 * (128 + 2 * check_cases.COLUMNS)
    assert found[128]["shared_bytes"] >= stages + 4 * 128 * check_cases.COLUMNS


def test_what_has_no_kernel_says_so():
    shape = jax.ShapeDtypeStruct((128,), jnp.float32)
    (found,) = measure(Case("none", "gpu", check_cases.no_kernel, (shape,)), "h200")
    assert found.status == "failed" and "no Mosaic GPU kernel" in found.reason
