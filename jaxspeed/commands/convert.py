"""`jaxspeed convert SOURCE TARGET`: Hugging Face folder to run folder, and back.

With `--quantize` the target has quantized weights.
"""

import argparse

from jaxspeed.commands.quantize import add_quantize_arguments, check
from jaxspeed.convert import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("source", help="a Hugging Face folder or a run's folder")
    parser.add_argument("target", help="the folder to write, new or empty")
    add_quantize_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Converts, and says what was written."""
    check(arguments)
    print(
        convert(
            arguments.source,
            arguments.target,
            format=arguments.quantize,
            group=arguments.group,
        )
    )
    return 0
