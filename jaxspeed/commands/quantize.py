"""`--quantize=FORMAT` and `--group=N`, for commands that load a model."""

import argparse

from kernels_pallas.quant_matmul import FORMATS


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; `arguments.quantize` and `arguments.group` are None without them."""
    parser.add_argument(
        "--quantize",
        choices=list(FORMATS),
        default=None,
        metavar="FORMAT",
        help=f"quantize the weights of the layers: {', '.join(FORMATS)}",
    )
    parser.add_argument(
        "--group",
        type=int,
        default=None,
        metavar="N",
        help="rows that share a scale, 128 or a multiple of 256 (default: all rows, or "
        "what the format says)",
    )


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a group of a format that is not there."""
    if arguments.group is not None and arguments.quantize is None:
        raise ValueError(
            f"--group={arguments.group} says how --quantize does it; give both"
        )
