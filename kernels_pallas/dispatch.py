"""Which implementation of a kernel runs: the one asked for, or the platform's own.

A kernel has up to four: "tpu" (Pallas, Mosaic), "gpu" (Pallas, Mosaic GPU), "xla"
(plain JAX, fast enough everywhere, always there) and "reference" (plain JAX, the
meaning, for tests). What an implementation cannot do it says in a sentence, which is
what a caller who insists on it reads.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jax import lax

PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}
"""Implementations that belong to a platform, by the name that JAX gives it."""

Candidates = Mapping[str, Callable[..., Any] | str]
"""For each implementation a function, or the reason why it cannot run here."""


def run(
    kernel: str, implementation: str | None, candidates: Candidates, *arguments: Any
) -> Any:
    """Calls one of several functions of the same arguments and results.

    Args:
        kernel: its name, for messages.
        implementation: which one; None goes by the platform that the program is
            compiled for, and takes "xla" where that platform's own cannot run (of GPUs,
            `devices.hopper_candidate` tells them apart).
        candidates: "xla" among them. Not differentiated: call it inside of a custom
            gradient.
        arguments: pytrees of arrays.

    Raises:
        ValueError: an unknown implementation, or one that cannot run and why.
    """
    check(kernel, implementation, candidates)
    able = {
        name: each for name, each in candidates.items() if not isinstance(each, str)
    }
    if implementation is not None:
        return able[implementation](*arguments)
    own = {platform: able[name] for name, platform in PLATFORMS.items() if name in able}
    return lax.platform_dependent(*arguments, default=able["xla"], **own)


def check(kernel: str, implementation: str | None, candidates: Candidates) -> None:
    """Raises the ValueError of `run`, without calling anything."""
    if implementation is None:
        return
    if implementation not in candidates:
        raise ValueError(
            f"{kernel}: implementation {implementation!r}; choose one of "
            f"{list(candidates)}, or None to go by the platform"
        )
    chosen = candidates[implementation]
    if isinstance(chosen, str):
        able = [name for name, each in candidates.items() if callable(each)]
        raise ValueError(
            f"{kernel}: implementation {implementation!r} cannot run here: {chosen}; "
            f"these can: {able}"
        )


def reasons(candidates: Candidates) -> dict[str, str]:
    """Why each of the implementations that cannot run cannot."""
    return {name: each for name, each in candidates.items() if isinstance(each, str)}
