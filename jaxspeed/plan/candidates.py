"""All ways to run one model on so many devices, with what the formulas say of each.

Axes that split nothing the engine can split yet (`pipe`, `seq`) and those that a dense
decoder uses like `data` (`expert`) stay at size 1.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from jaxspeed.chips import Chip
from jaxspeed.config import Batch, Config
from jaxspeed.mesh import MeshShape
from jaxspeed.models.remat import POLICIES
from jaxspeed.plan.estimate import Estimate, estimate


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run, and its estimate."""

    config: Config
    estimate: Estimate

    @property
    def name(self) -> str:
        """The choices in one line."""
        mesh = dataclasses.asdict(self.config.mesh)
        axes = " x ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1)
        return (
            f"{axes or 'one device'}, ZeRO-{self.config.zero.stage}, "
            f"remat {self.config.remat}, {self.estimate.sequences} sequences x "
            f"{self.config.batch.accumulation}"
        )


def candidates(
    config: Config, num_devices: int, chip: Chip | None, *, global_batch: int
) -> list[Candidate]:
    """Every candidate for `config` with a step of `global_batch` sequences.

    Args:
        config: all but mesh, ZeRO stage, remat policy and batch stays as it is.
        num_devices: devices to use, all of them.
        chip: what the devices are, if known.
        global_batch: sequences in a step, on all devices together.

    Raises:
        ValueError: no mesh of so many devices divides the batch and the model; says
            what the first mesh of each size of `tensor` fails on.
    """
    found: list[Candidate] = []
    problems: dict[int, str] = {}
    for mesh in meshes(num_devices):
        rows = mesh.replica * mesh.data
        if global_batch % rows:
            problems.setdefault(
                mesh.tensor,
                f"{global_batch} sequences do not divide over replica x data = {rows}",
            )
            continue
        try:
            found += _on_mesh(config, mesh, num_devices, chip, global_batch)
        except ValueError as error:
            problems.setdefault(mesh.tensor, str(error))
    if not found:
        raise ValueError(
            f"no mesh of {num_devices} devices takes a global batch of {global_batch}: "
            + "; ".join(f"tensor={n}: {why}" for n, why in sorted(problems.items()))
        )
    return found


def meshes(num_devices: int) -> Iterator[MeshShape]:
    """Every factorisation of `num_devices` into replica x data x tensor."""
    for tensor in _divisors(num_devices):
        for data in _divisors(num_devices // tensor):
            yield MeshShape(
                replica=num_devices // tensor // data, data=data, tensor=tensor
            )


def _on_mesh(
    config: Config,
    mesh: MeshShape,
    num_devices: int,
    chip: Chip | None,
    global_batch: int,
) -> Iterator[Candidate]:
    rows = global_batch // (mesh.replica * mesh.data)
    for stage, remat, accumulation in itertools.product(
        _stages(mesh), POLICIES, _divisors(rows)
    ):
        chosen = dataclasses.replace(
            config,
            mesh=mesh,
            zero=dataclasses.replace(config.zero, stage=stage),
            remat=remat,
            batch=Batch(size=global_batch, accumulation=accumulation),
        )
        yield Candidate(chosen, estimate(chosen, num_devices, chip))


def _stages(mesh: MeshShape) -> tuple[int, ...]:
    """The stages that differ: shards on one device are no shards.

    Without shards every device along `replica` x `data` does the same, so one mesh
    with all of them on `data` stands for all.
    """
    if mesh.data == 1:
        return (0,) if mesh.replica == 1 else ()
    return (0, 1, 2, 3) if mesh.replica == 1 else (1, 2, 3)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
