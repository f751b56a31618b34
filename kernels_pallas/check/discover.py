"""The cases that the kernels' folders register."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Collection

import kernels_pallas
from kernels_pallas.check.case import Case
from kernels_pallas.check.chips import CHIPS
from kernels_pallas.check.run import Task


def kernels() -> dict[str, list[Case]]:
    """The list `CASES` of every folder with a `cases.py`, by the folder's name.

    Raises:
        ValueError: two cases of one name and platform.
    """
    found = {}
    for module in pkgutil.iter_modules(kernels_pallas.__path__):
        place = f"{kernels_pallas.__name__}.{module.name}.cases"
        if module.ispkg and importlib.util.find_spec(place) is not None:
            found[module.name] = importlib.import_module(place).CASES
            _check_names(place, found[module.name])
    return found


def tasks(only: Collection[str], chips: Collection[str]) -> list[Task]:
    """The cases of some kernels, or of all, each with some of the chips, or with all.

    Raises:
        ValueError: an unknown kernel or chip.
    """
    found = kernels()
    _check_known("kernel", only, found)
    _check_known("chip", chips, CHIPS)
    chosen = []
    for kernel, cases in found.items():
        for case in cases:
            platform = [x for x, y in CHIPS.items() if y.platform == case.platform]
            mine = tuple(x for x in platform if not chips or x in chips)
            if mine and (not only or kernel in only):
                chosen.append(Task(kernel, case, mine))
    return chosen


def _check_names(place: str, cases: list[Case]) -> None:
    names = [(case.platform, case.name) for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{place}: cases of the same platform and name: {twice}")


def _check_known(what: str, asked: Collection[str], known: Collection[str]) -> None:
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(f"unknown {what} {unknown}; choose among {list(known)}")
