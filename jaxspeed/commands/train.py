"""`jaxspeed train`: the main job, from text to a trained decoder and a sample."""

import argparse
import contextlib
import pathlib
import shlex
import sys
from typing import Any

import jax
from tqdm import tqdm

from jaxspeed import gin_config
from jaxspeed.config import Config, load, override
from jaxspeed.data import BareIds
from jaxspeed.models.parameters import to_decoder
from jaxspeed.profiler import Profile
from jaxspeed.profiler.profile import DEFAULT_STEPS
from jaxspeed.serve import Sampling, generate
from jaxspeed.train.default import default_config
from jaxspeed.train.loop import Outcome, train

PROMPT = "def "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--workdir", default="runs/default", help="folder of the run")
    parser.add_argument(
        "--from",
        dest="pretrained",
        metavar="FOLDER",
        help="start from the weights of a Hugging Face folder",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        type=int,
        const=DEFAULT_STEPS,
        metavar="STEPS",
        help="count the work of each module, trace some steps (%(const)s) and tell "
        "where their time goes; written to WORKDIR/profile",
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Trains; 0 when the run is complete, 130 when it was interrupted."""
    config = override(_base(arguments.config), overrides)
    _say(_headline(config))
    with _profile(arguments) as observer:
        outcome = train(
            config,
            arguments.workdir,
            _say,
            pretrained=arguments.pretrained,
            observer=observer,
        )
    if outcome.interrupted:
        again = shlex.join(["jaxspeed", *sys.argv[1:]])
        _say(
            f"stopped after step {outcome.step} of {config.run.steps}; everything is "
            f"saved in {arguments.workdir}. To go on:\n    {again}"
        )
        return 130
    _summary(outcome, arguments.workdir)
    return 0


def _base(path: str | None) -> Config:
    if path is None:
        return default_config()
    return gin_config.load(path) if path.endswith(".gin") else load(path)


def _profile(
    arguments: argparse.Namespace,
) -> contextlib.AbstractContextManager[Profile | None]:
    if arguments.profile is None:
        return contextlib.nullcontext()
    folder = pathlib.Path(arguments.workdir) / "profile"
    return Profile(folder, arguments.profile, _say)


def _say(line: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(line)


def _headline(config: Config) -> str:
    device = jax.devices()[0]
    mesh = config.mesh.resolve(jax.device_count())
    axes = {a: n for a, n in vars(mesh).items() if n > 1} or {"data": 1}
    split = " x ".join(f"{axis} {size}" for axis, size in axes.items())
    return (
        f"{jax.device_count()} {device.device_kind} devices as {split}, ZeRO stage "
        f"{config.zero.stage}, {config.precision.compute}"
    )


def _summary(outcome: Outcome, workdir: str) -> None:
    held_out = outcome.held_out
    if held_out is not None:
        bits = ""
        if held_out.bits_per_byte is not None:
            bits = (
                f", {held_out.bits_per_byte:.3f} bits per byte (a unigram model: "
                f"{held_out.unigram_bits_per_byte:.3f})"
            )
        _say(
            f"\nheld-out loss {held_out.loss:.3f} nats per token{bits} on "
            f"{held_out.tokens:,} tokens"
        )
    if not isinstance(outcome.tokenizer, BareIds):
        _say(f"\nsample after {PROMPT!r}:\n{sample(outcome)}")
    _say(
        f"\n{workdir}: metrics.jsonl, loss.png, config.json, checkpoints/\n"
        f"generate more:   jaxspeed generate --from={workdir} --prompt='import '"
    )


def sample(outcome: Outcome, tokens: int = 200) -> str:
    """Text that the trained model makes up."""
    engine, tokenizer = outcome.engine, outcome.tokenizer
    params: Any = engine.params(outcome.state)
    model = to_decoder(engine.config.model, params)
    prompt = list(tokenizer.encode(PROMPT))
    drawn = generate(
        model,
        [prompt],
        max_new_tokens=tokens,
        sampling=Sampling(temperature=0.7, top_p=0.95),
        end=tokenizer.end_of_document,
        mesh=engine.mesh,
    )
    text = [int(row[0]) for row in drawn]
    return tokenizer.decode([*prompt, *text])
