"""A quantized decoder as one safetensors file: packed weights, the others as arrays.

Tensors have the names of the parameters, `layers/feed_forward/up.data` and so on where
they are quantized, as `kernels_pallas.quant_matmul.to_arrays` describes them.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxspeed import spec
from jaxspeed.models.linear import is_quantized
from jaxspeed.models.parameters import parameters, to_decoder
from jaxspeed.models.quantized import parameter_specs, shape_as_matrices
from jaxspeed.models.transformer import Decoder, DecoderConfig
from kernels_pallas.quant_matmul import QuantizedTensor, from_arrays, to_arrays


def save_quantized(model: Decoder, file: str | Path) -> None:
    """Writes the parameters of a decoder that `quantize` made.

    Args:
        model: the decoder; one process has all of it.
        file: the safetensors file, written anew. It does not hold the architecture:
            keep `model.config` for `load_quantized`.
    """
    arrays: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_quantized):
        name = spec.path_name(path)
        if isinstance(leaf, QuantizedTensor):
            packed, entry = to_arrays(leaf, name)
            arrays |= {key: np.ascontiguousarray(x) for key, x in packed.items()}
            metadata |= entry
        else:
            arrays[name] = np.asarray(leaf)
    save_file(arrays, file, metadata)


def load_quantized(
    config: DecoderConfig,
    file: str | Path,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
) -> Decoder:
    """The decoder that `save_quantized` wrote.

    Args:
        config: its architecture.
        file: the safetensors file.
        mesh: the parameters are split over its axis `tensor`; by default they lie whole
            on the first device.
        dtype: of the parameters that are not quantized.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another model, or the mesh does not
            divide the packed weights.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or not a safetensors file ({error}); write it again"
        ) from error

    def read(leaf: spec.Leaf) -> Any:
        try:
            if leaf.path in metadata:
                value = from_arrays(arrays, metadata, leaf.path)
                expected = shape_as_matrices(leaf.path, leaf.shape)
            else:
                value, expected = arrays[leaf.path].astype(dtype), leaf.shape
        except (KeyError, ValueError) as error:
            raise ValueError(f"{file}: cannot read {leaf.path}: {error}") from error
        if value.shape != expected:
            raise ValueError(
                f"{file}: {leaf.path} is {value.shape}, the model needs {expected}"
            )
        return value

    graph, params = nnx.split(
        to_decoder(config, jax.tree.map(read, parameters(config)))
    )
    if mesh is None:
        return nnx.merge(
            graph, jax.device_put(params, SingleDeviceSharding(jax.devices()[0]))
        )
    places = jax.tree.map(
        lambda each: NamedSharding(mesh, each),
        parameter_specs(config, params, mesh.shape),
    )
    return nnx.merge(graph, jax.device_put(params, places))
