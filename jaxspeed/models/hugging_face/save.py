"""Writes a decoder as a Hugging Face folder that `transformers` loads."""

import contextlib
import dataclasses
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
from jaxspeed.models.hugging_face.layout import Sizes, Stored
from jaxspeed.models.hugging_face.parameters import (
    layer_numbers,
    letters,
    stored_sizes,
)
from jaxspeed.models.linear import is_quantized
from jaxspeed.models.parameters import parameters
from jaxspeed.models.transformer import Decoder, DecoderConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """What a parameter gives to a stored tensor: all of it, or one of its layers."""

    leaf: spec.Leaf
    array: Any
    layer: int | None
    stored: Stored


def save_pretrained(
    model: Decoder | Any,
    path: str | Path,
    config: DecoderConfig | None = None,
    *,
    max_shard_bytes: float = 5e9,
    dtype: Any = None,
) -> None:
    """Writes a model as a Hugging Face folder, replacing the model that is there.

    The family is the first whose architecture this is. The arrays may be split over
    any mesh; one tensor at a time is whole. Every process must call it; the first one
    writes, and the others may return before the files are complete.

    Args:
        model: a decoder; or its parameters as nested dicts, with `config`.
        path: the folder, created if needed. Its other files stay.
        config: the architecture, where `model` is only parameters.
        max_shard_bytes: largest size of one file.
        dtype: float32, bfloat16 or float16; by default that of each parameter.

    Raises:
        ValueError: no family has this architecture, `config` is missing or does not
            describe the parameters, they are quantized, or the dtype cannot be written.
        OSError: the folder cannot be written. It then holds the old model, or has no
            config.json and is refused.
    """
    if isinstance(model, Decoder):
        config, model = model.config, nnx.state(model, nnx.Param)
    if config is None:
        raise ValueError("parameters do not tell their architecture: pass config=")
    params = nnx.to_pure_dict(model) if isinstance(model, nnx.State) else model
    if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        raise ValueError(
            "the model is quantized, which a Hugging Face folder cannot hold; save it "
            "with jaxspeed.models.save_quantized, or save the original"
        )
    raw, sizes = to_json(config), stored_sizes(config)
    parts = _parts(params, config)
    files = split_files(
        [_info(name, parts[name], sizes, dtype) for name in parts], max_shard_bytes
    )
    is_writer = jax.process_index() == 0
    with replacing_model(Path(path)) if is_writer else contextlib.nullcontext() as new:
        for file, infos in files.items():
            values = (_assemble(info, parts[info.name], sizes) for info in infos)
            if new is None:
                for _ in values:  # takes part in the gathers
                    pass
            else:
                write_tensors(new / file, infos, values)
        if new is not None:
            _write_descriptions(new, raw, files)


def _parts(params: Any, config: DecoderConfig) -> dict[str, list[Part]]:
    """Tensor name -> the parameters that it holds, after checking them."""
    leaves = {leaf.path: leaf for leaf in jax.tree.leaves(parameters(config))}
    given = {
        spec.path_name(path): array
        for path, array in jax.tree_util.tree_leaves_with_path(params)
    }
    wanted = {path: leaf.shape for path, leaf in leaves.items()}
    shapes = {path: tuple(array.shape) for path, array in given.items()}
    different = sorted(dict(wanted.items() ^ shapes.items()))
    if different:
        path = different[0]
        raise ValueError(
            f"config does not describe these parameters ({len(different)} differ): "
            f"{path!r} has shape {shapes.get(path)}, config makes it {wanted.get(path)}"
        )
    table = family_of(to_json(config)).tensors
    parts: dict[str, list[Part]] = {}
    for path, leaf in leaves.items():
        for layer in layer_numbers(leaf):
            part = Part(leaf, given[path], layer, table[path])
            parts.setdefault(part.stored.name.format(layer), []).append(part)
    return parts


def _info(name: str, parts: list[Part], sizes: Sizes, dtype: Any) -> TensorInfo:
    dtype = jnp.dtype(parts[0].array.dtype if dtype is None else dtype)
    if dtype.name not in DTYPES:
        raise ValueError(
            f"cannot write {name!r} as {dtype.name}; pass dtype= one of {list(DTYPES)}"
        )
    return TensorInfo(name, parts[0].stored.shape(sizes), dtype)


def _assemble(info: TensorInfo, parts: list[Part], sizes: Sizes) -> np.ndarray:
    """A whole tensor in host memory, as it is stored."""
    tensor = np.empty(info.shape, info.dtype)
    for part in parts:
        value = _whole(part.array, part.layer).astype(info.dtype)
        part.stored.put(tensor, letters(part.leaf), value, sizes)
    return tensor


def _whole(array: Any, layer: int | None) -> np.ndarray:
    """An array, or one layer of a stack, gathered from all devices and processes."""
    part = array if layer is None else array[layer]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
        part = jax.jit(_same, out_shardings=everywhere)(part)
    return np.asarray(part)


def _same(x: Array) -> Array:
    return x


def _write_descriptions(
    folder: Path, raw: dict[str, Any], files: dict[str, list[TensorInfo]]
) -> None:
    infos = [info for members in files.values() for info in members]
    if len(files) > 1:
        where = {info.name: file for file, members in files.items() for info in members}
        total = {"total_size": sum(info.nbytes for info in infos)}
        write_json(folder / INDEX, {"metadata": total, "weight_map": where})
    # Version 4 of transformers reads `torch_dtype`, version 5 `dtype`.
    name = infos[0].dtype.name
    write_json(folder / CONFIG, raw | {"torch_dtype": name, "dtype": name})
