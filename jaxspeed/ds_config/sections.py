"""The keys of ds_config that are understood only together, section by section."""

from collections.abc import Mapping
from typing import Any

from jaxspeed.ds_config.verdicts import (
    SETS,
    Translation,
    boolean,
    integer,
    is_auto,
    judge_by_table,
    number,
)

DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "torch.float32": "float32",
    "fp16": "float16",
    "float16": "float16",
    "torch.float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "torch.bfloat16": "bfloat16",
}
CLIPPING = 1.0
"""What DeepSpeed clips to when the file says nothing, since June 2026."""
PERSISTENCE = 100_000
"""Parameters up to this size stay whole at stage 3 when the file says nothing."""


def translate_precision(given: Mapping[str, Any], out: Translation) -> None:
    """`fp16`, `bf16`, `torch_autocast`, `data_types` and what gradients travel in.

    Raises:
        ValueError: fp16 and bf16 are both on, or a dtype that does not exist.
    """
    switches = {"bf16.enabled": "bfloat16", "fp16.enabled": "float16"}
    on = []
    for key, dtype in switches.items():
        if key in given and not is_auto(key, given[key], out):
            if boolean(key, given[key]):
                on.append(dtype)
                out.set(key, "precision.compute", dtype)
            else:
                out.honour(key, "off")
    if len(on) > 1:
        raise ValueError("fp16.enabled and bf16.enabled are both true; keep one")
    _translate_autocast(given, bool(on), out)
    compute = out.fields.get("precision.compute", "float32")
    _translate_loss_scale(given, compute, out)
    _translate_data_types(given, compute, out)


def _translate_autocast(given: Mapping[str, Any], has: bool, out: Translation) -> None:
    enabled, dtype = "torch_autocast.enabled", "torch_autocast.dtype"
    on = enabled in given and boolean(enabled, given[enabled])
    name = _dtype(dtype, given.get(dtype) or "bfloat16")
    for key in (enabled, dtype):
        if key not in given:
            continue
        if not on:
            out.ignore(key, "torch_autocast is off")
        elif has:
            out.ignore(key, "fp16.enabled or bf16.enabled decides")
        else:
            out.set(key, "precision.compute", name)


def _translate_loss_scale(
    given: Mapping[str, Any], compute: str, out: Translation
) -> None:
    key = "fp16.loss_scale"
    for each in (key, *SETS):
        if each not in given or not each.startswith("fp16."):
            continue
        if compute != "float16":
            out.ignore(each, "only float16 needs its loss scaled")
        elif is_auto(each, given[each], out):
            continue
        elif each != key:
            judge_by_table(each, given[each], out)
        elif number(key, given[key]) == 0:
            out.honour(key, "dynamic: precision.loss_scale.static = None")
        else:
            out.set(key, "precision.loss_scale.static", number(key, given[key]))


def _translate_data_types(
    given: Mapping[str, Any], compute: str, out: Translation
) -> None:
    built = {
        "data_types.grad_accum_dtype": ("float32", "gradients are accumulated"),
        "data_types.param_dtype": (compute, "parameters are used"),
    }
    for key, (dtype, what) in built.items():
        value = given.get(key)
        if key not in given or is_auto(key, value, out):
            continue
        if value is None or _dtype(key, value) == dtype:
            out.honour(key, f"{what} in {dtype}, as it is here")
        else:
            out.refuse(key, f"{what} in {dtype}; remove it, or change fp16 or bf16")
    key = "communication_data_type"
    if given.get(key) is None:
        if key in given:
            out.honour(key, f"gradients travel in {compute}")
    elif not is_auto(key, given[key], out):
        out.set(key, "zero.reduce_dtype", _dtype(key, given[key]))


def _dtype(key: str, value: Any) -> str:
    if str(value).lower() not in DTYPES:
        raise ValueError(f"{key} is {value!r}; it must be fp32, fp16 or bf16")
    return DTYPES[str(value).lower()]


def translate_gradients(given: Mapping[str, Any], out: Translation) -> None:
    """Clipping, and how gradients of different devices become one."""
    key = "gradient_clipping"
    if given.get(key) is None:
        out.fields["optimizer.clip_norm"] = CLIPPING
        out.notes.append(
            f"{key} is not set: gradients are clipped to a norm of {CLIPPING}, as in "
            "DeepSpeed since June 2026; releases before did not clip, write 0 for that"
        )
        if key in given:
            out.honour(key, f"optimizer.clip_norm = {CLIPPING}")
    elif not is_auto(key, given[key], out):
        norm = number(key, given[key])
        out.set(key, "optimizer.clip_norm", norm if norm > 0 else None)
    key = "gradient_allreduce_op"
    if key in given:
        if str(given[key]).lower() == "mean":
            out.honour(key, "gradients are those of the mean loss, as it is here")
        else:
            out.refuse(
                key,
                "gradients are those of the mean loss; remove it, and multiply the "
                "loss if you want the sum",
            )


def translate_zero(
    given: Mapping[str, Any], num_data_shards: int | None, out: Translation
) -> None:
    """Thresholds and groups, which depend on the stage.

    Raises:
        ValueError: a MiCS group that does not divide the devices.
    """
    stage = given.get("zero_optimization.stage", 0)
    names = ("param_persistence_threshold", "stage3_param_persistence_threshold")
    found = [f"zero_optimization.{name}" for name in names]
    found = [key for key in found if key in given]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} are one key; keep the second")
    for key in found:
        if stage != 3:
            out.ignore(key, "only stage 3 keeps small parameters whole")
        elif not is_auto(key, given[key], out):
            out.set(key, "zero.min_size", integer(key, given[key]) + 1)
    if stage == 3 and not found:
        out.fields["zero.min_size"] = PERSISTENCE + 1
        out.notes.append(
            f"{names[1]} is not set: parameters of up to {PERSISTENCE} elements stay "
            "whole, as in DeepSpeed"
        )
    _translate_mics(given, num_data_shards, out)


def _translate_mics(
    given: Mapping[str, Any], num_data_shards: int | None, out: Translation
) -> None:
    """MiCS shards all state within groups: our `data` axis, repeated over `replica`."""
    key = "zero_optimization.mics_shard_size"
    if key not in given or is_auto(key, given[key], out):
        return
    size = integer(key, given[key])
    if size < 1:
        out.honour(key, "off: state is split over all devices")
    elif given.get("zero_optimization.stage") != 3:
        out.ignore(key, "only read at stage 3")
    elif num_data_shards is None:
        out.set(key, "mesh.data", size)
    elif num_data_shards % size:
        raise ValueError(
            f"{key} {size} does not divide the {num_data_shards} devices that hold "
            "different data"
        )
    else:
        out.set(key, "mesh.data", size)
        out.fields["mesh.replica"] = num_data_shards // size


def translate_parallelism(
    given: Mapping[str, Any], num_data_shards: int | None, out: Translation
) -> None:
    """Sizes of mesh axes, activations, compiler passes, and how often to print.

    Raises:
        ValueError: a `data_parallel_size` other than `num_data_shards`.
    """
    key = "tensor_parallel.autotp_size"
    if key in given and not is_auto(key, given[key], out):
        out.set(key, "mesh.tensor", max(1, integer(key, given[key])))
    key = "data_parallel_size"
    if key in given and not is_auto(key, given[key], out):
        size = integer(key, given[key])
        if num_data_shards not in (None, size):
            raise ValueError(
                f"{key} is {size}, but the batch is split over {num_data_shards} "
                "devices"
            )
        out.honour(key, "the size of the mesh axes that split the batch")
    key = "activation_checkpointing.partition_activations"
    if key in given:
        if boolean(key, given[key]):
            out.set(key, "remat", "full")
        else:
            out.ignore(key, "a layer's input is split over `tensor` anyway")
    key = "compile.passes"
    if key in given:
        passes = [str(each) for each in given[key] or ()]
        others = [each for each in passes if each not in ("z1", "z3")]
        if others:
            out.refuse(key, f"{', '.join(others)} are not built; remove them")
        else:
            out.ignore(key, "ZeRO's schedule is the compiler's already")
    key = "steps_per_print"
    if key in given and not is_auto(key, given[key], out):
        if given[key] is None:
            out.ignore(key, "not set")
        else:
            out.set(key, "run.log_every", integer(key, given[key]))
