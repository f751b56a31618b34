"""Text generation with a cache of keys and values, one token of every row at a time.

Prompts of different lengths are padded on the left, so that the next token of every
row has the same slot of the cache; padding is segment 0 and tokens do not see it. A
prompt's padded length is a power of two, so few lengths are ever compiled.

Weights are split over mesh axis `tensor` as in training; rows over all other axes,
which have nothing else to hold here. Each row draws from a random key of its own: what
is drawn for it depends on the seed, its place among the prompts and its own tokens.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, Key, UInt32

from jaxspeed import comm, spec
from jaxspeed.mesh import AXES, make_mesh, settle
from jaxspeed.models.attention import Places
from jaxspeed.models.quantized import parameter_specs
from jaxspeed.models.transformer import Cache, Decoder, DecoderConfig
from jaxspeed.parallel import tensor
from jaxspeed.serve.sampling import Sampling, sample

ROWS = tuple(axis for axis in AXES if axis != tensor.AXIS)
"""The axes over which rows are split."""

MIN_LENGTH = 16
"""Shorter prompts are padded to this length."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Waiting:
    """What each row has beside its cache.

    Attributes:
        tokens: int32 [B@rows, S], those that are not in the cache yet: the prompts at
            first, then the last token of each row.
        places: where they stand.
        ended: bool [B@rows], the row's end was drawn.
        keys: uint32 [B@rows, W], data of the random key of each row.
    """

    tokens: Any
    places: Places
    ended: Any
    keys: Any


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays the same while rows are generated; static under jit.

    Attributes:
        graph: the decoder without its parameters.
        config: of the decoder.
        mesh: all six axes.
        sampling: how tokens are drawn.
        end: the id that ends a row, or None.
    """

    graph: nnx.GraphDef
    config: DecoderConfig
    mesh: Mesh
    sampling: Sampling
    end: int | None

    @property
    def rows(self) -> PartitionSpec:
        """Spec of an array whose first dim is B."""
        axes = tuple(axis for axis in ROWS if self.mesh.shape[axis] > 1)
        return spec.from_axes([axes])

    @property
    def row_shards(self) -> int:
        """How many devices hold different rows."""
        return math.prod(self.mesh.shape[axis] for axis in ROWS)

    @property
    def cache(self) -> Cache:
        """Specs of a `Cache`."""
        heads = (tensor.AXIS,) if self.mesh.shape[tensor.AXIS] > 1 else ()
        rows: Any = self.rows
        keys: Any = spec.from_axes([(), spec.axes_of(rows, 0), (), heads])
        length: Any = PartitionSpec()
        return Cache(keys, keys, rows, length)

    def params(self, params: nnx.State) -> nnx.State:
        """A spec for each parameter."""
        return parameter_specs(self.config, params, self.mesh.shape)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    end: int | None = None,
    mesh: Mesh | None = None,
) -> Iterator[Int32[np.ndarray, " B"]]:
    """Continues all prompts at once, giving out tokens as they are drawn.

    Args:
        model: its parameters may lie anywhere; they are brought to where tensor
            parallelism has them on `mesh`, which moves nothing if they are there.
        prompts: token ids of each row, of any lengths of at least 1.
        max_new_tokens: number of steps at most.
        sampling: how tokens are drawn.
        end: the id that ends a row: a row repeats it once it was drawn, and nothing
            more is given out when all rows have ended.
        mesh: all six axes; by default one device, the first.

    Returns:
        an iterator of int32 [B], one token for each prompt.

    Raises:
        ValueError: an empty prompt, an id that is not in the vocabulary, more tokens
            than the model has positions, or a mesh that does not divide the model.
    """
    _check(model, prompts, max_new_tokens, end)
    if mesh is None:
        mesh = make_mesh(devices=jax.local_devices()[:1])
    graph, params = nnx.split(model)
    # The seed is data: another one needs no other program.
    drawing = dataclasses.replace(sampling, seed=0)
    setup = Setup(graph, model.config, mesh, drawing, end)
    places = jax.tree.map(lambda each: NamedSharding(mesh, each), setup.params(params))
    params = jax.device_put(params, places)
    num_rows = -(-len(prompts) // setup.row_shards) * setup.row_shards
    keys = jax.random.key_data(_row_keys(np.uint32(sampling.seed), num_rows))
    waiting = _pad(prompts, np.asarray(keys))
    return _stream(setup, params, waiting, len(prompts), max_new_tokens)


def complete(
    model: Decoder, prompts: Sequence[Sequence[int]], **options: Any
) -> list[list[int]]:
    """The whole continuation of each prompt, its end id (if drawn) included.

    Args:
        model: as for `generate`.
        prompts: as for `generate`.
        options: as for `generate`.
    """
    rows = np.stack(list(generate(model, prompts, **options)), axis=1).tolist()
    end = options.get("end")
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def _check(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end: int | None,
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give at least 1")
    if not prompts:
        raise ValueError("there are no prompts; give at least one list of token ids")
    vocab_size, position = model.config.vocab_size, model.config.position
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"prompt {row} is empty; start it with a token, for example the "
                "tokenizer's end_of_document"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"prompt {row} has ids from {low} to {high}, but the model's "
                f"vocabulary is 0 to {vocab_size - 1}; was it encoded with the "
                "model's tokenizer?"
            )
        length = len(prompt) + max_new_tokens
        if position.kind == "learned" and length > position.max_length:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens and max_new_tokens is "
                f"{max_new_tokens}, together {length}; the model's table of learned "
                f"positions has {position.max_length}. Shorten one of them"
            )
    if end is not None and not 0 <= end < vocab_size:
        raise ValueError(f"end is {end}; the model's ids are 0 to {vocab_size - 1}")


def _pad(prompts: Sequence[Sequence[int]], keys: UInt32[np.ndarray, "B W"]) -> Waiting:
    """The prompts, padded on the left; rows beyond them are padding and have ended."""
    longest = max(map(len, prompts))
    length = max(MIN_LENGTH, 2 ** math.ceil(math.log2(longest)))
    tokens: Any = np.zeros((len(keys), length), np.int32)
    positions: Any = np.zeros_like(tokens)
    segments: Any = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :] = prompt
        positions[row, -len(prompt) :] = np.arange(len(prompt))
        segments[row, -len(prompt) :] = 1
    ended = np.arange(len(keys)) >= len(prompts)
    return Waiting(tokens, Places(positions, segments), ended, keys)


def _stream(
    setup: Setup,
    params: nnx.State,
    waiting: Waiting,
    num_prompts: int,
    max_new_tokens: int,
) -> Iterator[Int32[np.ndarray, " B"]]:
    num_rows, length = waiting.tokens.shape
    slots = length + max_new_tokens - 1  # the last token needs none
    cache = _empty_cache(setup, params, num_rows, slots)
    ended = waiting.ended
    step = settle(_advance(setup, params, waiting, cache), setup.mesh)
    for remaining in reversed(range(max_new_tokens)):
        waiting, drawn, cache = step
        row = np.asarray(drawn)
        if remaining:
            # Runs while the caller uses the tokens of this step.
            step = settle(_advance(setup, params, waiting, cache), setup.mesh)
        yield row[:num_prompts]
        ended = ended | (row == setup.end)
        if ended.all():
            return


@partial(jax.jit, static_argnums=(0, 2, 3))
def _empty_cache(setup: Setup, params: nnx.State, num_rows: int, slots: int) -> Cache:
    def local(params: nnx.State) -> Cache:
        return nnx.merge(setup.graph, params).empty_cache(
            num_rows // setup.row_shards, slots
        )

    return jax.shard_map(
        local,
        mesh=setup.mesh,
        in_specs=(setup.params(params),),
        out_specs=setup.cache,
    )(params)


@partial(jax.jit, static_argnums=1)
def _row_keys(seed: np.uint32, num_rows: int) -> Key[Array, " B"]:
    key = jax.random.key(seed)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(num_rows))


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _advance(
    setup: Setup, params: nnx.State, waiting: Waiting, cache: Cache
) -> tuple[Waiting, Int32[Array, " B"], Cache]:
    """Moves the waiting tokens into the cache and draws the next one of each row.

    Returns:
        what waits now, its tokens on every device, and the cache.
    """

    def local(params: nnx.State, waiting: Waiting, cache: Cache) -> Any:
        model = nnx.merge(setup.graph, params)
        logits, cache = model.decode(waiting.tokens, waiting.places, cache)
        positions = waiting.places.positions[:, -1:] + 1
        keys = jax.random.wrap_key_data(waiting.keys)
        keys = jax.vmap(jax.random.fold_in)(keys, positions[:, 0])
        drawn = jax.vmap(lambda row, key: sample(row[None], key, setup.sampling)[0])(
            logits, keys
        )
        # Devices along `tensor` drew the same; the maximum makes that known.
        drawn = comm.all_max(drawn, tensor.AXIS)
        ended = waiting.ended
        if setup.end is not None:
            drawn = jnp.where(ended, setup.end, drawn)
            ended = ended | (drawn == setup.end)
        places = Places(positions, waiting.places.segments[:, -1:])
        following = Waiting(drawn[:, None], places, ended, waiting.keys)
        # [B@rows] -> [B]
        return following, comm.all_gather_same(drawn, ROWS, dim=0), cache

    return jax.shard_map(
        local,
        mesh=setup.mesh,
        in_specs=(setup.params(params), setup.rows, setup.cache),
        out_specs=(setup.rows, PartitionSpec(), setup.cache),
    )(params, waiting, cache)
