"""Loads a Hugging Face folder into a `Decoder`, straight into shards.

Each process reads the slices of its own devices, one layer of one parameter at a time,
so the model need not fit in the memory of a host.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from jaxspeed import spec
from jaxspeed.models.hugging_face.config import family_of, from_json
from jaxspeed.models.hugging_face.family import Family
from jaxspeed.models.hugging_face.folder import (
    Weights,
    open_weights,
    read_config_json,
)
from jaxspeed.models.hugging_face.layout import Range
from jaxspeed.models.hugging_face.parameters import (
    layer_numbers,
    letters,
    stored_sizes,
)
from jaxspeed.models.parameters import parameters, to_decoder
from jaxspeed.models.transformer import Decoder, DecoderConfig
from jaxspeed.parallel import tensor
from jaxspeed.parallel import zero as zero_state

EMBEDDING, OUTPUT = "embedding/tokens", "lm_head.weight"
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of the names of tensors that old files have beside the weights."""
READABLE = ("F64", "F32", "F16", "BF16")


def read_config(path: str | Path) -> DecoderConfig:
    """The configuration of the model in a local Hugging Face folder.

    Raises:
        FileNotFoundError: no folder, or no config.json in it.
        ValueError: malformed, or a family or feature that is not supported.
    """
    raw = read_config_json(Path(path))
    try:
        return from_json(raw)
    except ValueError as error:
        raise ValueError(f"{Path(path) / 'config.json'}: {error}") from error


def from_pretrained(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    zero: zero_state.Zero | None = None,
    dtype: Any = jnp.float32,
) -> Decoder:
    """A decoder with the weights of a local Hugging Face folder.

    Args:
        path: a folder with config.json and model.safetensors, or several such files
            and their index; Llama, Mistral, Qwen2, Qwen3, GPT-2 or BLOOM.
        mesh: split the weights over its axis `tensor`; by default they lie whole on
            the first device.
        zero: split them over ZeRO's axes as well, whatever the stage.
        dtype: dtype of the weights in memory.

    Returns:
        a module whose call on tokens int [batch, seq] gives logits
        [batch, seq, vocab_size].

    Raises:
        FileNotFoundError: the folder or one of its files is not there.
        ValueError: a file is malformed, the model has a feature that is not supported,
            tensors are missing, unknown or of the wrong shape, or the mesh does not
            divide the model.
    """
    config = read_config(path)
    if mesh is None:
        whole = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: whole, parameters(config))
    else:
        multiple = math.lcm(config.vocab_multiple, mesh.shape[tensor.AXIS])
        config = dataclasses.replace(config, vocab_multiple=multiple)
        rule = tensor.rule(mesh.shape)
        if zero is not None:
            rule = spec.chain(rule, zero_state.rule(zero, mesh.shape))
        shardings = jax.tree.map(
            lambda each: NamedSharding(mesh, each),
            spec.assign(rule, parameters(config)),
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )
    return to_decoder(config, load_params(path, config, shardings, dtype=dtype))


def load_params(
    path: str | Path, config: DecoderConfig, shardings: Any, *, dtype: Any = jnp.float32
) -> Any:
    """The parameters alone, for an engine that places them by its own rules.

    Args:
        path: as for `from_pretrained`.
        config: what `read_config` gave; `vocab_multiple` may differ.
        shardings: a `NamedSharding` or `SingleDeviceSharding` for each parameter.
        dtype: dtype of the weights in memory.

    Returns:
        nested dicts like `nnx.to_pure_dict(nnx.state(decoder, nnx.Param))`.

    Raises:
        FileNotFoundError, ValueError: as `from_pretrained`.
    """
    path, leaves = Path(path), parameters(config)
    family, sizes = family_of(read_config_json(path)), stored_sizes(config)

    def load(leaf: spec.Leaf, sharding: Any) -> Array:
        stored, dims = family.tensors[leaf.path], letters(leaf)

        def read(layer: int | None, ranges: tuple[Range, ...]) -> np.ndarray:
            source = weights[stored.name.format(layer)]
            index = dict(zip(dims, ranges, strict=True))
            return stored.take(source, dims, index, sizes).astype(dtype, copy=False)

        return _load(leaf, sharding, read, dtype)

    with open_weights(path) as found:
        try:
            weights = _checked(found, family, leaves, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return jax.tree.map(load, leaves, shardings)


def _checked(
    found: Weights, family: Family, leaves: Any, config: DecoderConfig
) -> Weights:
    """The weights under the family's full names, if they are those of `config`."""
    weights: Weights = {}
    for name, handle in found.items():
        full = (
            name if name == OUTPUT else family.prefix + name.removeprefix(family.prefix)
        )
        if full in weights:
            raise ValueError(f"{full!r} is there with and without {family.prefix!r}")
        weights[full] = handle
    if config.tied:
        _resolve_tied(weights, family.tensors[EMBEDDING].name)
    expected = _expected(family, leaves, config)
    missing = sorted(set(expected) - set(weights))
    if missing:
        hint = ""
        if OUTPUT in missing:
            hint = "; without an output projection, set tie_word_embeddings to true"
        raise ValueError(f"{len(missing)} tensors are missing: {missing[:4]}{hint}")
    unknown = sorted(
        name for name in set(weights) - set(expected) if not name.endswith(BUFFERS)
    )
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors are not part of the model that config.json "
            f"describes: {unknown[:4]}"
        )
    for name, shape in expected.items():
        stored = tuple(weights[name].get_shape())
        if stored != shape:
            raise ValueError(
                f"{name!r} has shape {stored}, but config.json makes it {shape}"
            )
        if weights[name].get_dtype() not in READABLE:
            raise ValueError(
                f"{name!r} has dtype {weights[name].get_dtype()}; {READABLE} can be "
                "read, quantized files cannot"
            )
    return weights


def _expected(
    family: Family, leaves: Any, config: DecoderConfig
) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, for every tensor that holds a parameter."""
    sizes = stored_sizes(config)
    expected: dict[str, tuple[int, ...]] = {}
    for leaf in jax.tree.leaves(leaves):
        stored = family.tensors.get(leaf.path)
        if stored is None:
            raise ValueError(
                f"{family.architecture} has no parameter {leaf.path!r}; the config "
                "must be the folder's own, as read_config gives it"
            )
        for layer in layer_numbers(leaf):
            expected[stored.name.format(layer)] = stored.shape(sizes)
    return expected


def _resolve_tied(weights: Weights, embedding: str) -> None:
    """Leaves one of two copies of a tied table, which must be the same."""
    output = weights.pop(OUTPUT, None)
    if output is None:
        return
    if not _equal(weights.setdefault(embedding, output), output):
        raise ValueError(
            f"config.json ties the output projection to the embedding, but {OUTPUT!r} "
            f"differs from {embedding!r}; set tie_word_embeddings to false"
        )


def _equal(a: Any, b: Any) -> bool:
    """Whether two stored tensors are the same, comparing a block of rows at a time."""
    shape = a.get_shape()
    if shape != b.get_shape():
        return False
    ends = range(1024, shape[0] + 1024, 1024)
    blocks = [slice(end - 1024, min(end, shape[0])) for end in ends]
    return all(np.array_equal(a[block], b[block]) for block in blocks)


def _load(
    leaf: spec.Leaf,
    sharding: Any,
    read: Callable[[int | None, tuple[Range, ...]], np.ndarray],
    dtype: Any,
) -> Array:
    """One parameter; the layers of a stack are read and placed one after another."""

    def place(layer: int | None, shape: tuple[int, ...], sharding: Any) -> Array:
        once = functools.cache(functools.partial(read, layer))

        def callback(index: Any) -> np.ndarray:
            sizes = zip(index, shape, strict=True)
            return once(tuple(each.indices(size)[:2] for each, size in sizes))

        return jax.make_array_from_callback(shape, sharding, callback)

    if leaf.dims[0] != zero_state.SCANNED:
        return place(None, leaf.shape, sharding)
    layer_sharding = sharding
    if isinstance(sharding, NamedSharding):
        layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    put = jax.jit(_put_layer, donate_argnums=0, out_shardings=sharding)
    stack = jnp.zeros(leaf.shape, dtype, device=sharding)
    for layer in range(leaf.shape[0]):
        part = place(layer, leaf.shape[1:], layer_sharding)
        # Otherwise reading runs ahead of the transfers and fills the host's memory.
        part.block_until_ready()
        stack = put(stack, part, np.int32(layer))
    return stack


def _put_layer(
    stack: Float[Array, "L ..."], part: Float[Array, "..."], layer: Int[Array, ""]
) -> Float[Array, "L ..."]:
    return lax.dynamic_update_index_in_dim(stack, part, layer, axis=0)
