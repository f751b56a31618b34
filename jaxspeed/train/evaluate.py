"""Held-out loss, in bits per byte, beside what a unigram model would reach."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxspeed.data import (
    BareIds,
    Batch,
    ByteTokenizer,
    Data,
    Tokenizer,
    held_out_batches,
)
from jaxspeed.mesh import make_mesh, settle
from jaxspeed.models.quantized import parameter_specs
from jaxspeed.models.transformer import Decoder, DecoderConfig
from jaxspeed.parallel.data import Loss
from jaxspeed.train.engine import Engine, place_batch
from jaxspeed.train.state import TrainState
from jaxspeed.train.step import all_reduced, batch_specs, same_off_batch


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Averages over held-out text.

    Attributes:
        loss: nats per token.
        bits_per_byte: of the text, so it compares across tokenizers; None where the
            tokenizer has no text.
        unigram_bits_per_byte: the best that a model of token frequencies can do, its
            frequencies taken from this very text; None likewise.
        tokens: how many tokens were predicted.
    """

    loss: float
    bits_per_byte: float | None
    unigram_bits_per_byte: float | None
    tokens: int


def evaluate(
    engine: Engine,
    state: TrainState,
    data: Data,
    *,
    batch_size: int,
    num_batches: int,
    tokenizer: Tokenizer,
) -> HeldOut:
    """The loss on the first `num_batches` of held-out text.

    Raises:
        ValueError: nothing is held out.
    """
    loss_of = functools.partial(engine.evaluate, state)
    return _held_out(loss_of, data, batch_size, num_batches, tokenizer)


def evaluate_model(
    model: Decoder,
    data: Data,
    *,
    batch_size: int,
    num_batches: int,
    tokenizer: Tokenizer,
    mesh: Mesh | None = None,
) -> HeldOut:
    """The same of a decoder without an engine, whose weights may be quantized.

    Args:
        model: its parameters may lie anywhere; they are brought to where tensor
            parallelism has them on `mesh`.
        data: held-out text is taken from it.
        batch_size: sequences in a batch; the axes that split the batch divide it.
        num_batches: how many to take at most.
        tokenizer: of the data.
        mesh: all six axes; by default one device, the first.

    Raises:
        ValueError: nothing is held out, or the mesh does not divide the model.
    """
    if mesh is None:
        mesh = make_mesh(devices=jax.local_devices()[:1])
    graph, params = nnx.split(model)
    places = jax.tree.map(
        lambda each: NamedSharding(mesh, each),
        parameter_specs(model.config, params, mesh.shape),
    )
    params = jax.device_put(params, places)

    def loss_of(batch: Batch) -> Loss:
        placed = place_batch(batch, mesh, 1)
        return settle(_loss(graph, model.config, mesh, params, placed), mesh)

    return _held_out(loss_of, data, batch_size, num_batches, tokenizer)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _loss(
    graph: nnx.GraphDef,
    config: DecoderConfig,
    mesh: Mesh,
    params: nnx.State,
    batch: Batch,
) -> Loss:
    """The loss of a batch, summed over all devices."""

    def local(params: nnx.State, batch: Batch) -> Loss:
        loss = nnx.merge(graph, params).loss(batch)
        return all_reduced(jax.tree.map(same_off_batch, loss))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            parameter_specs(config, params, mesh.shape),
            batch_specs(batch, mesh),
        ),
        out_specs=PartitionSpec(),
    )(params, batch)


def _held_out(
    loss_of: Callable[[Batch], Loss],
    data: Data,
    batch_size: int,
    num_batches: int,
    tokenizer: Tokenizer,
) -> HeldOut:
    losses: list[Any] = []
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    num_bytes = 0
    batches = held_out_batches(data, batch_size)
    for batch in itertools.islice(batches, num_batches):
        losses.append(loss_of(batch))
        kept = batch["targets"][batch["weights"] > 0]
        counts += np.bincount(kept, minlength=tokenizer.vocab_size)
        num_bytes += _num_bytes(tokenizer, kept)
    batches.close()
    total = sum(float(loss.total) for loss in losses)
    tokens = int(counts.sum())
    frequency = counts[counts > 0] / tokens
    unigram = -float((frequency * np.log2(frequency)).sum()) * tokens
    return HeldOut(
        loss=total / tokens,
        bits_per_byte=total / math.log(2) / num_bytes if num_bytes else None,
        unigram_bits_per_byte=unigram / num_bytes if num_bytes else None,
        tokens=tokens,
    )


def _num_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Bytes of text that the ids stand for; exact for bytes, 0 for bare ids."""
    if isinstance(tokenizer, BareIds):
        return 0
    if isinstance(tokenizer, ByteTokenizer):
        return int((ids < 256).sum())
    return len(tokenizer.decode(ids.tolist()).encode())
