"""`jaxspeed generate`: streams a model's continuation of a prompt."""

import argparse
import sys

import jax

from jaxspeed.commands.quantize import add_quantize_arguments, check
from jaxspeed.convert import load_model
from jaxspeed.data import TextStream
from jaxspeed.mesh import MeshShape, make_mesh
from jaxspeed.models import quantize
from jaxspeed.serve import Sampling, generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument(
        "--from",
        dest="source",
        default="runs/default",
        metavar="FOLDER",
        help="a run's folder, a Hugging Face folder or a quantized one (default "
        "%(default)s)",
    )
    parser.add_argument("--prompt", default="def ", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=None, metavar="K")
    parser.add_argument("--top-p", type=float, default=None, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="devices to split over"
    )
    add_quantize_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints the prompt and, as they are drawn, the tokens after it."""
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    devices = jax.devices()
    if not 1 <= arguments.tensor <= len(devices):
        raise ValueError(
            f"--tensor={arguments.tensor}; there are {len(devices)} devices to split "
            "over"
        )
    mesh = make_mesh(
        MeshShape(data=1, tensor=arguments.tensor), devices=devices[: arguments.tensor]
    )
    check(arguments)
    model, tokenizer, _ = load_model(arguments.source, mesh)
    if arguments.quantize is not None:
        model = quantize(model, arguments.quantize, group=arguments.group)
    prompt = list(tokenizer.encode(arguments.prompt))
    if not prompt:
        raise ValueError("the prompt is empty; give some text: --prompt='def '")
    drawn = generate(
        model,
        [prompt],
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        end=tokenizer.end_of_document,
        mesh=mesh,
    )
    stream = TextStream(tokenizer)
    sys.stdout.write(arguments.prompt)
    for row in drawn:
        sys.stdout.write(stream.push([int(row[0])]))
        sys.stdout.flush()
    sys.stdout.write(stream.finish() + "\n")
    return 0
