"""The GPU kernels of flash attention, compiled to machine code; no GPU is needed."""

import pytest

from kernels_pallas.check import measure
from kernels_pallas.flash_attention import cases

pytestmark = pytest.mark.gpu_aot

GPU = [case for case in cases.CASES if case.platform == "gpu"]


@pytest.mark.parametrize("case", GPU, ids=lambda case: case.name)
def test_compiles_for_the_tensor_core_and_spills_nothing(case):
    (found,) = measure(case, "h200")
    assert found.status == "compiled" and not found.reason, found.reason
    figures = found.figures
    assert figures["tensor_core"] == ["HGMMA"]
    assert figures["spill_bytes"] == 0
    assert figures["shared_bytes"] <= 227 * 1024
