"""`jaxspeed convert SOURCE TARGET`: Hugging Face folder to run folder, and back."""

import argparse

from jaxspeed.convert import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("source", help="a Hugging Face folder or a run's folder")
    parser.add_argument("target", help="the folder to write, new or empty")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Converts, and says what was written."""
    print(convert(arguments.source, arguments.target))
    return 0
