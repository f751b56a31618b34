"""The batch triple: train batch = micro-batch x accumulation x data shards.

Any two give the third. With only the train batch, or only the micro-batch, given,
accumulation is 1.
"""

from collections.abc import Mapping
from typing import Any

from jaxspeed.ds_config.verdicts import Translation, integer

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
KEYS = (TRAIN, MICRO, ACCUMULATION)


def translate_batch(
    given: Mapping[str, Any], num_data_shards: int | None, out: Translation
) -> None:
    """Verdicts on the three keys; `batch.size` and `batch.accumulation`.

    Args:
        given: the flat configuration.
        num_data_shards: devices that the batch is split over; None if not known yet,
            which leaves a size that depends on it open.
        out: what is added to.

    Raises:
        ValueError: numbers that contradict each other, or too few of them.
    """
    present = {key: given[key] for key in KEYS if given.get(key) is not None}
    unresolved = _unresolved(present)
    for key in unresolved:
        out.refuse(
            key,
            '"auto" cannot be resolved from the other two of '
            f"{', '.join(KEYS)}; write a number",
        )
    numbers = {}
    for key, value in present.items():
        if value == "auto":
            if key not in unresolved:
                out.honour(key, "follows from the others")
            continue
        numbers[key] = integer(key, value)
        if numbers[key] < 1:
            raise ValueError(f"{key} is {value}; it must be 1 or more")
        out.honour(key, _MEANING[key].format(numbers[key]))
    if unresolved:
        return
    if TRAIN not in numbers and MICRO not in numbers:
        if num_data_shards is not None:
            raise ValueError(f"the configuration sets neither {TRAIN} nor {MICRO}")
        out.notes.append(f"neither {TRAIN} nor {MICRO} is set; one of them is needed")
    elif num_data_shards is not None:
        size, accumulation = solve(numbers, num_data_shards)
        out.fields["batch.size"] = size
        out.fields["batch.accumulation"] = accumulation


_MEANING = {
    TRAIN: "batch.size = {}",
    MICRO: "batch.size / batch.accumulation / devices with different data = {}",
    ACCUMULATION: "batch.accumulation = {}",
}


def _unresolved(present: Mapping[str, Any]) -> list[str]:
    """The keys with "auto" that the other two do not determine."""
    autos = [key for key in KEYS if present.get(key) == "auto"]
    numbers = [key for key in KEYS if key in present and key not in autos]
    if len(autos) == 1:
        (auto,) = autos
        enough = len(numbers) == 2 or (
            numbers in ([TRAIN], [MICRO]) and auto != ACCUMULATION
        )
        return [] if enough else autos
    return autos


def solve(numbers: Mapping[str, int], num_data_shards: int) -> tuple[int, int]:
    """Sequences per step, and accumulation.

    Raises:
        ValueError: the train batch is not a multiple of what it consists of.
    """
    train, micro = numbers.get(TRAIN), numbers.get(MICRO)
    accumulation = numbers.get(ACCUMULATION)
    if train is None:
        accumulation = accumulation or 1
        return numbers[MICRO] * accumulation * num_data_shards, accumulation
    if accumulation is None:
        accumulation = 1 if micro is None else train // (micro * num_data_shards)
    if micro is None:
        micro = train // (accumulation * num_data_shards)
    if train != micro * accumulation * num_data_shards or not train:
        parts = {MICRO: micro, ACCUMULATION: accumulation}
        chosen = ", ".join(
            f"{key} {value}{'' if key in numbers else ' (the nearest)'}"
            for key, value in parts.items()
        )
        raise ValueError(
            f"{TRAIN} {train} is not the product of {chosen} and {num_data_shards} "
            "devices that hold different data; change one of them"
        )
    return train, accumulation
