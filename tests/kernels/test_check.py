"""Dumps are read, limits held and reasons given, without a compiler."""

import dataclasses
import json
import pathlib
import pickle

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.check import (
    Case,
    Result,
    __main__,
    discover,
    gpu,
    limits,
    measure,
    run,
    sass,
    table,
    tpu,
    tpu_dump,
    worker,
)
from kernels_pallas.check.chips import CHIPS
from tests.kernels import check_cases

SCHEDULE = """== CAPACTIY:
MXU, XLU, VALU, VSTORE:SPILL
    4     3     4     1
== UTILIZATION:
0 0 1 0
4 0 2 1
4 1 0 1
"""

VMEM = """<script>
        const DATA ={
  "global_info": {"module_name": "m"},
  "hlo_breakdowns": {"kernel.1": {"blocks": [], "total_size": 2605056}}
};
"""

HLO = """
  %copy.1 = f32[8]{0} copy(%p)
  %kernel.1 = (f32[8]{0}, f32[]) custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %a-b.2 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  %sort = f32[8]{0} custom-call(%p), custom_call_target="other"
"""

REPORT = """ptxas info    : Function properties for kernel
    16 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 113 registers, used 2 barriers, 1 bytes smem
"""

# Two loops that wait, a loop with a tensor core instruction inside of another.
CODE = """
.text.kernel:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
   -:-:-:Y:01        /*0010*/                   SYNCS.PHASECHK P1, [R2] ;
   -:-:-:Y:05        /*0020*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
   -:-:-:Y:01        /*0030*/                   UMOV UR4, 0x1 ;
.L_x_2:
   -:-:-:Y:01        /*0040*/                   I2FP.F32.S32 R4, R5 ;
   -:-:-:Y:01        /*0050*/              @P0  IMAD.SHL.U32 R6, R4, 0x20, RZ ;
   -:-:-:Y:03        /*0060*/                   HGMMA.64x16x16.F32.BF16 R8, R4, R8 ;
   -:-:-:Y:05        /*0070*/               @P1 BRA `(.L_x_2) ;
   -:-:-:Y:05        /*0080*/                   BRA `(.L_x_1) ;
   -:-:-:Y:05        /*0090*/                   EXIT ;
"""

PASSES = "gpu.launch_func dynamic_shared_memory_size %c90144_i32 {\n"


def test_a_schedule_is_read():
    schedule = tpu_dump.parse_schedule(SCHEDULE)
    assert schedule.cycles == 3
    assert schedule.used == {"MXU": 8, "XLU": 1, "VALU": 3, "VSTORE:SPILL": 2}
    assert schedule.capacity["MXU"] == 4
    assert schedule.spills == 2


@pytest.mark.parametrize(
    "text", ["", "== CAPACTIY:\nMXU\n4\n== UTILIZATION:\n", SCHEDULE + "1 2\n"]
)
def test_a_schedule_in_another_layout_is_refused(text):
    with pytest.raises(ValueError, match="schedule's units"):
        tpu_dump.parse_schedule(text)


def test_memory_of_a_tpu_kernel_is_read():
    assert tpu_dump.parse_vmem(VMEM) == {"kernel.1": 2605056}
    with pytest.raises(ValueError, match="VMEM"):
        tpu_dump.parse_vmem("<html>")
    with pytest.raises(ValueError, match="VMEM"):
        tpu_dump.parse_vmem("const DATA = {}")


def test_kernels_of_a_program_are_found():
    assert tpu_dump.kernel_names(HLO) == ["kernel.1", "a-b.2"]


def test_a_gpu_report_is_read():
    assert sass.parse_report(REPORT) == sass.Report(registers=113, spill_bytes=24)
    with pytest.raises(ValueError, match="ptxas"):
        sass.parse_report("")


def test_the_inner_loop_is_found():
    code = sass.parse_code(CODE)
    assert len(code.instructions) == 10
    assert list(code.loop) == [
        "I2FP.F32.S32",
        "IMAD.SHL.U32",
        "HGMMA.64x16x16.F32.BF16",
        "BRA",
    ]
    assert code.mix == {"I2FP": 1, "IMAD": 1, "HGMMA": 1, "BRA": 1}
    assert code.tensor_core == ["HGMMA"]
    with pytest.raises(ValueError, match="no instruction"):
        sass.parse_code("")


def test_code_without_a_tensor_core_has_no_inner_loop():
    assert sass.parse_code(CODE.replace("HGMMA", "FFMA")).loop == []


def test_shared_memory_is_read():
    assert sass.parse_shared_memory(PASSES) == 90144
    with pytest.raises(ValueError, match="shared memory"):
        sass.parse_shared_memory("")


def test_bandwidth_is_of_one_core():
    per_cycle = {x: CHIPS[x].hbm_bytes_per_cycle for x in ("v5e", "v5p", "tpu7x")}
    assert {x: round(y) for x, y in per_cycle.items()} == {
        "v5e": 546,
        "v5p": 702,
        "tpu7x": 1682,
    }


def result(**changes):
    found = Result("kernel", "case", "v5e", "compiled", figures={"cycles": 100})
    return dataclasses.replace(found, **changes)


def test_limits_are_stored_and_held(tmp_path):
    file = tmp_path / "limits.json"
    assert limits.load(file) == {}
    assert "no limit" in limits.excess(result(), {})
    assert limits.store([result(), result(case="uncounted", figures={})], file) == 1
    stored = limits.load(file)
    assert limits.excess(result(), stored) == ""
    assert limits.excess(result(figures={"cycles": 105}), stored) == ""
    assert limits.excess(result(figures={"cycles": 106}), stored) == (
        "cycles 106 over the limit of 100"
    )
    assert limits.excess(result(status="skipped", figures={}), {}) == ""


def test_the_first_spill_exceeds_a_limit_of_none(tmp_path):
    file = tmp_path / "limits.json"
    limits.store([result(figures={"spills": 0})], file)
    assert limits.excess(result(figures={"spills": 1}), limits.load(file))


def test_storing_some_keeps_the_others(tmp_path):
    file = tmp_path / "limits.json"
    limits.store([result(), result(case="other")], file)
    limits.store([result(figures={"cycles": 90})], file)
    stored = limits.load(file)["kernel"]
    assert stored["case"]["v5e"]["cycles"] == 90
    assert stored["other"]["v5e"]["cycles"] == 100


def test_limits_of_another_compiler_are_mentioned_only(tmp_path, monkeypatch):
    file = tmp_path / "limits.json"
    limits.store([result()], file)
    stored = limits.load(file)
    monkeypatch.setattr(limits, "_version", lambda package: "newer")
    worse = result(figures={"cycles": 200})
    assert limits.excess(worse, stored) == ""
    assert "not held to limits" in table.remarks([worse], stored)[0]


def test_stored_limits_are_of_cases_that_exist():
    known = {
        kernel: {case.name for case in cases}
        for kernel, cases in discover.kernels().items()
    }
    for kernel, cases in limits.load().items():
        assert set(cases) <= known[kernel]


def test_a_table_per_platform():
    found = [
        result(),
        result(chip="h200", figures={"instructions_per_weight": 4.126}),
        result(chip="v6e", status="failed", reason="refused", figures={}),
    ]
    lines = table.table(found, "tpu").splitlines()
    assert lines[0].split()[:4] == ["kernel", "case", "chip", "cycles"]
    assert lines[1].split()[:5] == ["kernel", "case", "v5e", "compiled", "100"]
    assert lines[2].split()[:5] == ["kernel", "case", "v6e", "failed", "-"]
    assert " 4.13 " in table.table(found, "gpu")
    assert table.table(found[:1], "gpu") == ""
    assert "kernel, case, v6e: failed: refused" in table.remarks(found, {})


def test_registered_cases_can_be_sent_to_a_process():
    for cases in discover.kernels().values():
        copies = pickle.loads(pickle.dumps(cases))
        for copy, case in zip(copies, cases, strict=True):
            assert (copy.name, copy.arguments) == (case.name, case.arguments)


def test_the_command_names_what_there_is(capsys):
    assert __main__.main(["--kernel", "flash"]) == 2
    assert "flash_attention" in capsys.readouterr().err
    assert __main__.main(["--chip", "v7"]) == 2
    assert "tpu7x" in capsys.readouterr().err


def test_the_command_fails_on_excess(monkeypatch, capsys):
    found = [result(kernel="flash_attention", case="forward")]
    monkeypatch.setattr(__main__, "run", lambda tasks: found)
    monkeypatch.setattr(limits, "load", lambda: {})
    assert __main__.main(["--kernel", "flash_attention", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert "no limit" in report["rows"][0]["excess"]
    found[0] = result(status="skipped", reason="no compiler", figures={})
    assert __main__.main([]) == 0
    assert "no compiler" in capsys.readouterr().out


def test_a_chip_of_another_platform_is_refused():
    with pytest.raises(ValueError, match="choose among"):
        measure(check_cases.matmul_case(8), "h200")


def test_a_process_that_ends_costs_its_chip_only():
    case = Case("exits", "tpu", check_cases.Exits(), ())
    found = measure(case, "v5e", "v6e")
    assert [x.chip for x in found] == ["v5e", "v6e"]
    assert all(x.status == "failed" and "status 3" in x.reason for x in found)


def test_a_compiler_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(run, "SECONDS", 0.01)
    (found,) = measure(check_cases.matmul_case(8), "v5e")
    assert found.status == "failed" and "within" in found.reason


@pytest.mark.parametrize("chip", ["v5e", "h200"])
def test_a_missing_compiler_is_skipped_with_a_reason(chip, monkeypatch, tmp_path):
    def missing(*_, **__):
        raise RuntimeError("unknown platform")

    monkeypatch.setenv(worker.DUMP, str(tmp_path))
    monkeypatch.setattr(gpu, "_disassembler", lambda: pathlib.Path("/"))
    monkeypatch.setattr(tpu.topologies, "get_topology_desc", missing)
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    case = Case("any", CHIPS[chip].platform, check_cases.no_kernel, (shape,))
    found = worker.measure("kernel", case, chip)
    assert found.status == "skipped" and "pip install" in found.reason


def test_a_missing_disassembler_is_skipped_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv(worker.DUMP, str(tmp_path))
    monkeypatch.setattr(gpu, "_disassembler", lambda: None)
    found = worker.measure("kernel", check_cases.weights_case(), "h200")
    assert found.status == "skipped" and "nvdisasm" in found.reason


def test_a_missing_dump_is_no_failure(monkeypatch, tmp_path):
    def compile_(*_):
        raise tpu.NoDump("0 files")

    monkeypatch.setenv(worker.DUMP, str(tmp_path))
    monkeypatch.setattr(tpu, "_one_device", lambda chip: None)
    monkeypatch.setattr(tpu, "_compile", compile_)
    found = worker.measure("kernel", check_cases.matmul_case(8), "v5e")
    assert found.status == "compiled" and found.figures == {}
    assert found.reason == "not counted: 0 files"
