"""What would make a run fit that needs more memory than its chips have, by formula."""

import dataclasses
import math
from collections.abc import Iterator

from jaxspeed.chips import Chip
from jaxspeed.config import Config
from jaxspeed.mesh import BATCH_AXES
from jaxspeed.plan.estimate import estimate

_LARGEST_TENSOR = 8
_MOST_DEVICES = 64
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Advice:
    """One change to a run.

    Attributes:
        change: what to set, as on the command line, or how many devices to use.
        saves_bytes: per device, by `plan.estimate`.
        enough: whether that alone makes it fit.
    """

    change: str
    saves_bytes: int
    enough: bool


def what_would_fit(
    config: Config, devices: int, chip: Chip, missing: int
) -> list[Advice]:
    """The changes that suffice, the mildest first; else those that save the most.

    Args:
        config: the run, with all mesh axes and `batch.size` written out.
        devices: how many it has.
        chip: what they are.
        missing: bytes per device that it needs too many.
    """
    now = estimate(config, devices, chip).total_bytes
    found: list[Advice] = []
    for change, changed, number in _changes(config, devices):
        try:
            saves = now - estimate(changed, number, chip).total_bytes
        except ValueError:
            continue  # the model or the batch does not divide that way
        if saves > 0:
            found.append(Advice(change, saves, saves >= missing))
    enough = [each for each in found if each.enough]
    if enough:
        return enough[:_SHOWN]
    return sorted(found, key=lambda each: -each.saves_bytes)[:_SHOWN]


def _changes(config: Config, devices: int) -> Iterator[tuple[str, Config, int]]:
    """Changes, each with the run after it and its devices; the mildest first."""
    settings = [*_settings(config)]
    for words, changed in settings:
        yield words, changed, devices
    together, said = config, []
    for words, _ in settings:
        field = words.partition("=")[0]
        said = [each for each in said if not each.startswith(f"{field}=")] + [words]
    for words in said:
        together = dict(_settings(together)).get(words, together)
    if len(said) > 1:
        yield " ".join(said), together, devices
    tensor = 2 * config.mesh.tensor
    while tensor <= _LARGEST_TENSOR:
        changed = _with_tensor(together, tensor)
        if changed is not None:
            words = [each for each in said if ".accumulation=" not in each]
            words += [
                f"--config.mesh.tensor={tensor}",
                "--config.mesh.data=-1",
                f"--config.batch.accumulation={changed.batch.accumulation}",
            ]
            yield " ".join(words), changed, devices
        tensor *= 2
    factor = 2
    while factor <= _MOST_DEVICES:
        words = [*said, f"on {factor * devices} devices, the same batch on each"]
        yield " ".join(words), _on_more(together, factor), factor * devices
        factor *= 2


def _settings(config: Config) -> Iterator[tuple[str, Config]]:
    """Settings that need less memory on the same mesh with the same batch."""
    rows = config.batch.size // math.prod(
        getattr(config.mesh, axis) for axis in BATCH_AXES
    )
    if rows > config.batch.accumulation:
        batch = dataclasses.replace(config.batch, accumulation=rows)
        changed = dataclasses.replace(config, batch=batch)
        yield f"--config.batch.accumulation={rows}", changed
    if config.remat != "full":
        yield "--config.remat=full", dataclasses.replace(config, remat="full")
    for stage in range(config.zero.stage + 1, 4):
        zero = dataclasses.replace(config.zero, stage=stage)
        yield f"--config.zero.stage={stage}", dataclasses.replace(config, zero=zero)


def _with_tensor(config: Config, tensor: int) -> Config | None:
    """More of `tensor` and less of `data`; micro-batches stay as large as they are."""
    factor = tensor // config.mesh.tensor
    if config.mesh.data % factor:
        return None
    mesh = dataclasses.replace(
        config.mesh, tensor=tensor, data=config.mesh.data // factor
    )
    batch = dataclasses.replace(
        config.batch, accumulation=config.batch.accumulation * factor
    )
    return dataclasses.replace(config, mesh=mesh, batch=batch)


def _on_more(config: Config, factor: int) -> Config:
    mesh = dataclasses.replace(config.mesh, data=config.mesh.data * factor)
    batch = dataclasses.replace(config.batch, size=config.batch.size * factor)
    return dataclasses.replace(config, mesh=mesh, batch=batch)
