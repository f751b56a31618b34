"""What was found about a case on a chip."""

import dataclasses
from typing import Any, Literal

Status = Literal["compiled", "failed", "skipped"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One case on one chip.

    Attributes:
        kernel: the folder.
        case: its name in there.
        chip: compiled for.
        status: "failed" if the compiler refused or broke down; "skipped" if there is
            no compiler.
        reason: why not compiled, or which figures could not be read; else "".
        seconds: that compiling took.
        figures: by name; see `tpu.FIGURES` and `gpu.FIGURES`.
    """

    kernel: str
    case: str
    chip: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


class NoCompiler(Exception):
    """There is no compiler for a chip here; the message says what to install."""


class NoDump(Exception):
    """The compiler did not write what it was asked for; the message says what."""
