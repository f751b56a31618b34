"""Writes a decoder as a Hugging Face folder that `transformers` loads."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxspeed import spec
from jaxspeed.models.hugging_face.config import family_of, to_json
from jaxspeed.models.hugging_face.folder import (
    CONFIG,
    DTYPES,
    INDEX,
    TensorInfo,
    replacing_model,
    split_files,
    write_json,
    write_tensors,
)
from jaxspeed.models.hugging_face.layout import Stored
from jaxspeed.models.hugging_face.parameters import (
    layer_numbers,
    letters,
    parameters,
    stored_sizes,
)
from jaxspeed.models.transformer import Decoder, DecoderConfig

Source = tuple[spec.Leaf, Stored, int | None]
"""A parameter, where it is stored, and the layer."""


def save_pretrained(
    model: Decoder | Any,
    path: str | Path,
    config: DecoderConfig | None = None,
    *,
    max_shard_bytes: float = 5e9,
    dtype: Any = None,
) -> None:
    """Writes a model as a Hugging Face folder, replacing the model that is there.

    The family is the one whose architecture the configuration is. Arrays may be split
    over any mesh; every process must call this, and the first one writes. Others may
    return before the files are complete.

    Args:
        model: a decoder, or its parameters as nested dicts (an engine's state has
            them), which need `config`.
        path: the folder; created if needed. Files other than the model's stay.
        config: the architecture, where `model` is only parameters.
        max_shard_bytes: largest size of one file.
        dtype: float32, bfloat16 or float16; by default that of each parameter.

    Raises:
        ValueError: no family has this architecture, `config` is missing or does not
            describe the parameters, or the dtype cannot be written.
        OSError: the folder cannot be written. The old model is then still whole, or
            the folder has no config.json.
    """
    if isinstance(model, Decoder):
        config = model.config
        model = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if config is None:
        raise ValueError(
            "parameters alone do not tell the architecture: pass config=DecoderConfig"
        )
    raw = to_json(config)
    params = _by_path(model, config)
    sources, tensors = _plan(family_of(raw).tensors, params, config, dtype)
    files = split_files(tensors, max_shard_bytes)
    is_writer = jax.process_index() == 0
    with replacing_model(Path(path)) if is_writer else contextlib.nullcontext() as new:
        for name, members in files.items():
            values = (
                _assemble(tensor, sources[tensor.name], params, config)
                for tensor in members
            )
            if new is None:
                for _ in values:  # takes part in the gathers
                    pass
            else:
                write_tensors(new / name, members, values)
        if new is not None:
            _write_descriptions(new, raw, files)


def _by_path(params: Any, config: DecoderConfig) -> dict[str, tuple[spec.Leaf, Any]]:
    """Path -> description and array; they must be exactly those of `config`."""
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    wanted = {leaf.path: leaf for leaf in jax.tree.leaves(parameters(config))}
    given = {
        spec.path_name(path): array
        for path, array in jax.tree_util.tree_leaves_with_path(params)
    }
    different = sorted(
        path
        for path in set(wanted) | set(given)
        if path not in wanted
        or path not in given
        or tuple(given[path].shape) != wanted[path].shape
    )
    if different:
        shapes = {
            path: (
                tuple(given[path].shape) if path in given else None,
                wanted[path].shape if path in wanted else None,
            )
            for path in different[:4]
        }
        raise ValueError(
            "config does not describe these parameters; (shape given, shape of "
            f"config): {shapes}"
        )
    return {path: (leaf, given[path]) for path, leaf in wanted.items()}
