"""DeepSpeed's `optimizer` block as an `optim.Optimizer`.

Numbers that the file leaves out are DeepSpeed's (or torch's) defaults, not ours. Weight
decay acts on all parameters, as torch does within one parameter group.
"""

from collections.abc import Mapping
from typing import Any

from jaxspeed.ds_config.verdicts import (
    Translation,
    boolean,
    is_auto,
    number,
    unknown_key,
)

DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    "adamw": dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    "lamb": dict(
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        min_coeff=0.01,
        max_coeff=10.0,
    ),
    "lion": dict(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0),
    "adagrad": dict(lr=1e-2, eps=1e-10, weight_decay=0.0),
    "sgd": dict(lr=1e-3, momentum=0.0, weight_decay=0.0),
    "muon": dict(
        lr=None,
        muon_lr=0.02,
        adam_lr=3e-4,
        momentum=0.95,
        betas=(0.9, 0.95),
        eps=1e-10,
        weight_decay=0.0,
    ),
}
"""Parameters of each type that set a field, with their defaults."""

FIELDS = {
    "lr": "learning_rate",
    "muon_lr": "learning_rate",
    "adam_lr": "adam_learning_rate",
    "betas": "betas",
    "eps": "epsilon",
    "weight_decay": "weight_decay",
    "momentum": "momentum",
    "min_coeff": "trust_ratio[0]",
    "max_coeff": "trust_ratio[1]",
}
ONLY: dict[str, Any] = dict(
    amsgrad=False,
    dampening=0,
    eps_inside_sqrt=False,
    fp32_optimizer_states=True,
    initial_accumulator_value=0,
    lr_decay=0,
    maximize=False,
    nesterov=False,
)
"""Variants of which there is one here."""
IGNORED = {
    "comm_backend_name": "gradients travel as the compiler and the mesh say",
    "cuda_aware": "gradients travel as the compiler and the mesh say",
    "capturable": "the update is part of the compiled step",
    "differentiable": "the update is part of the compiled step",
    "foreach": "the update is part of the compiled step",
    "fused": "the update is part of the compiled step",
    "ns_method": "both methods compute the same orthogonal matrix",
    "set_grad_none": "gradients are values, there is nothing to reset",
    "torch_adam": "there is one Adam",
}
NOT_BUILT = {
    "onebitadam": "1-bit Adam is not built yet; use Adam",
    "zerooneadam": "0/1 Adam is not built yet; use Adam",
    "onebitlamb": "1-bit LAMB is not built yet; use Lamb",
    "muadam": "muP is not built yet; use Adam",
    "muadamw": "muP is not built yet; use AdamW",
    "musgd": "muP is not built yet; use SGD",
}


def translate_optimizer(given: Mapping[str, Any], out: Translation) -> None:
    """Verdicts on `optimizer.*`; without the block `Config`'s own optimizer stays."""
    kind, params = given.get("optimizer.type"), given.get("optimizer.params") or {}
    if kind is None:
        if params:
            out.ignore("optimizer.params", "there is no optimizer.type")
        out.notes.append(
            "there is no optimizer in the file: give js.initialize the one that you "
            "gave deepspeed.initialize, or config.optimizer is used"
        )
        return
    if is_auto("optimizer.type", kind, out):
        return
    name = str(kind).lower()
    if name not in DEFAULTS:
        why = NOT_BUILT.get(
            name,
            f"{kind!r} is not one of {', '.join(DEFAULTS)}; give js.initialize an "
            "optax optimizer instead",
        )
        out.refuse("optimizer.type", why)
        if params:
            out.refuse("optimizer.params", "parameters of the optimizer refused above")
        return
    name = _adam_or_adamw(name, params)
    out.set("optimizer.type", "optimizer.name", name)
    out.fields["optimizer.decay"] = "all"
    for parameter, value in params.items():
        _judge(name, parameter, value, out)
    _set_fields(name, params, out)


def _adam_or_adamw(name: str, params: Mapping[str, Any]) -> str:
    """DeepSpeed's Adam is AdamW unless `adam_w_mode` is false."""
    mode = boolean("optimizer.params.adam_w_mode", params.get("adam_w_mode", True))
    return "adamw" if name == "adam" and mode else name


def _judge(name: str, parameter: str, value: Any, out: Translation) -> None:
    key = f"optimizer.params.{parameter}"
    if parameter == "max_grad_norm":
        out.refuse(key, "DeepSpeed does not take it here; set gradient_clipping")
    elif parameter in DEFAULTS[name]:
        if not is_auto(key, value, out):
            _check(key, value)
            out.honour(key, f"optimizer.{FIELDS[parameter]} = {value!r}")
    elif parameter == "bias_correction" and name in ("adam", "adamw", "lamb"):
        out.set(key, "optimizer.bias_correction", boolean(key, value))
    elif parameter in ONLY:
        if value == ONLY[parameter]:
            out.honour(key, "as it is here")
        else:
            out.refuse(key, f"only {ONLY[parameter]!r} is built; remove it")
    elif parameter == "adam_w_mode" and name in ("adam", "adamw"):
        out.honour(key, f"optimizer.name = {name!r}")
    elif parameter in IGNORED:
        out.ignore(key, IGNORED[parameter])
    else:
        flags = ("adam_w_mode", "bias_correction")
        raise unknown_key(key, [*DEFAULTS[name], *flags, *ONLY, *IGNORED])


def _check(key: str, value: Any) -> None:
    if not key.endswith(".betas"):
        number(key, value)
    elif not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{key} is {value!r}; it must be a list of two numbers")
    else:
        for index, beta in enumerate(value):
            number(f"{key}[{index}]", beta)


def _set_fields(name: str, params: Mapping[str, Any], out: Translation) -> None:
    usable = {k: v for k, v in params.items() if v != "auto" and k in DEFAULTS[name]}
    numbers = {**DEFAULTS[name], **usable}
    if name == "adamw" and params.get("torch_adam") is True:
        numbers["weight_decay"] = usable.get("weight_decay", 0.01)  # torch's default
    if name == "muon" and "lr" in usable:
        numbers["muon_lr"] = usable.get("muon_lr", usable["lr"])
        numbers["adam_lr"] = usable.get("adam_lr", usable["lr"])
    if name == "lamb":
        bounds = (float(numbers["min_coeff"]), float(numbers["max_coeff"]))
        out.fields["optimizer.trust_ratio"] = bounds
    for parameter, value in numbers.items():
        field = f"optimizer.{FIELDS[parameter]}"
        if parameter == "betas":
            out.fields[field] = tuple(float(beta) for beta in value)
        elif value is not None and not field.endswith("]"):
            out.fields[field] = float(value)
