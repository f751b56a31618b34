"""DeepSpeed's `scheduler` block as an `optim.Schedule`."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxspeed.ds_config.verdicts import (
    Translation,
    boolean,
    integer,
    is_auto,
    number,
    unknown_key,
)

REQUIRED = object()
"""In place of a default: the file has to give it."""
PEAK = "optimizer.learning_rate"
SCHEDULE = "optimizer.schedule"
CYCLE = f"{SCHEDULE}.one_cycle"
RANGE = f"{SCHEDULE}.range_test"


def text(key: str, value: Any) -> str:
    """`value` as a string."""
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}; it must be a string")
    return value


Parameter = tuple[str, Callable[[str, Any], Any], Any]
"""The field that a parameter sets, how it is read, and DeepSpeed's default."""

_WARMUP: dict[str, Parameter] = {
    "warmup_num_steps": (f"{SCHEDULE}.warmup_steps", integer, 1000),
    "warmup_type": (f"{SCHEDULE}.warmup_shape", text, "log"),
}
# A default of None leaves the field to other keys, or to its own default.
SCHEDULERS: dict[str, dict[str, Parameter]] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": (PEAK, number, 1e-3),
        "lr_range_test_step_size": (f"{RANGE}.step_size", integer, 2000),
        "lr_range_test_step_rate": (f"{RANGE}.step_rate", number, 1.0),
        "lr_range_test_staircase": (f"{RANGE}.staircase", boolean, False),
    },
    "OneCycle": {
        "cycle_max_lr": (PEAK, number, REQUIRED),
        "cycle_min_lr": (f"{SCHEDULE}.start", number, REQUIRED),
        "cycle_first_step_size": (f"{CYCLE}.first_steps", integer, 2000),
        "cycle_second_step_size": (f"{CYCLE}.second_steps", integer, None),
        "cycle_first_stair_count": (f"{CYCLE}.first_stairs", integer, 0),
        "cycle_second_stair_count": (f"{CYCLE}.second_stairs", integer, None),
        "decay_step_size": (f"{CYCLE}.decay_steps", integer, 0),
        "decay_lr_rate": (f"{CYCLE}.decay_rate", number, 0.0),
        "cycle_momentum": (f"{CYCLE}.cycle_momentum", boolean, True),
        "cycle_min_mom": (f"{CYCLE}.min_momentum", number, 0.8),
        "cycle_max_mom": (f"{CYCLE}.max_momentum", number, 0.9),
        "decay_mom_rate": (f"{CYCLE}.momentum_decay_rate", number, 0.0),
    },
    "WarmupLR": {
        "warmup_max_lr": (PEAK, number, None),
        "warmup_min_lr": (f"{SCHEDULE}.start", number, 0.0),
        **_WARMUP,
    },
    "WarmupDecayLR": {
        "warmup_max_lr": (PEAK, number, 1e-3),
        "warmup_min_lr": (f"{SCHEDULE}.start", number, 0.0),
        "total_num_steps": (f"{SCHEDULE}.total_steps", integer, REQUIRED),
        **_WARMUP,
    },
    "WarmupCosineLR": {
        "warmup_min_ratio": (f"{SCHEDULE}.start", number, 0.0),
        "cos_min_ratio": (f"{SCHEDULE}.floor", number, 1e-4),
        "total_num_steps": (f"{SCHEDULE}.total_steps", integer, REQUIRED),
        **_WARMUP,
    },
}


def translate_scheduler(given: Mapping[str, Any], out: Translation) -> None:
    """Verdicts on `scheduler.*`, after the optimizer's, whose rate it may replace."""
    kind = given.get("scheduler.type")
    params = given.get("scheduler.params") or {}
    out.fields[f"{SCHEDULE}.kind"] = "constant"
    if kind is None:
        if params:
            out.ignore("scheduler.params", "there is no scheduler.type")
        return
    if is_auto("scheduler.type", kind, out):
        return
    if kind not in SCHEDULERS:
        out.refuse(
            "scheduler.type",
            f"{kind!r} is not one of {', '.join(SCHEDULERS)}; for another schedule "
            "give js.initialize an optax optimizer that has it",
        )
        return
    out.set("scheduler.type", f"{SCHEDULE}.kind", kind)
    _translate_params(kind, params, out)
    if kind == "OneCycle":
        _cycle_betas(out)


def _translate_params(kind: str, params: Mapping[str, Any], out: Translation) -> None:
    known = SCHEDULERS[kind]
    for name, (field, read, default) in known.items():
        key, value = f"scheduler.params.{name}", params.get(name)
        if value is None and default is REQUIRED:
            raise ValueError(f"{key} is missing; {kind} needs it")
        if name == "total_num_steps" and value == "auto":
            out.honour(key, f"{field} = None: the end of the run")
            continue
        if value is None or is_auto(key, value, out):
            value = default
        if value is None or value is REQUIRED:
            continue
        value = read(key, value)
        if name in ("warmup_min_lr", "cycle_min_lr"):
            value = value / out.fields.get(PEAK, 1e-3)
        if name == "warmup_num_steps":
            value = max(2, value)  # as DeepSpeed rounds it up
        out.fields[field] = value
        if params.get(name) not in (None, "auto"):
            out.honour(key, f"{field} = {value!r}")
    for name, value in params.items():
        key = f"scheduler.params.{name}"
        if name == "last_batch_iteration":
            if value == -1:
                out.honour(key, "starts from the beginning, or where the checkpoint is")
            else:
                out.refuse(key, "a run resumes from its checkpoint; remove it")
        elif name not in known:
            raise unknown_key(key, list(known))
        elif value is None:
            out.ignore(key, "not set")


def _cycle_betas(out: Translation) -> None:
    """DeepSpeed cycles only what has betas, and then sets the second beta to 0.99."""
    moving = f"{CYCLE}.cycle_momentum"
    if not out.fields[moving]:
        return
    name = out.fields.get("optimizer.name", "adamw")
    if name in ("adam", "adamw", "lamb", "lion"):
        first = out.fields.get("optimizer.betas", (0.9, 0.999))[0]
        out.fields["optimizer.betas"] = (first, 0.99)
        out.notes.append(
            "OneCycle moves the first beta and, as in DeepSpeed, sets the second to "
            "0.99; cycle_momentum: false keeps both"
        )
    else:
        out.fields[moving] = False
        out.notes.append(
            f"OneCycle leaves the momentum of {name} alone, as in DeepSpeed: it has "
            "no betas"
        )
