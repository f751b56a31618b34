"""Kernels compiled for chips that are not there, and their instructions counted.

`python -m kernels_pallas.check` does it for the `cases.py` of every folder; `measure`
does it for one case.
"""

from kernels_pallas.check.case import Case
from kernels_pallas.check.result import Result
from kernels_pallas.check.run import measure

__all__ = ["Case", "Result", "measure"]
