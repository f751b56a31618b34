"""What rounding the weights costs a trained model, format by format.

The table of the FP6 papers (Xia et al., 2024; Wu et al., 2023, ZeroQuant(4+2)) on
models that are trained here: bits per weight with scales, the error of the products on
real activations, and held-out text. Weights are rounded to the nearest code and nothing
is calibrated; activations stay float32.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array

from jaxspeed import spec
from jaxspeed.config import Config
from jaxspeed.convert import load_model
from jaxspeed.data import Tokenizer, held_out_batches
from jaxspeed.models.attention import Places
from jaxspeed.models.linear import is_quantized
from jaxspeed.models.parameters import with_params
from jaxspeed.models.quantized import SUMMED, quantize, shape_as_matrices
from jaxspeed.models.transformer import Decoder
from jaxspeed.parallel import tensor
from jaxspeed.train import evaluate_model
from jaxspeed.train.default import default_config
from jaxspeed.train.loop import train
from kernels_pallas.quant_matmul import dequantize

FORMATS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "bfloat16": None,
    "int8": {"format": "int8"},
    "fp8_e4m3": {"format": "fp8_e4m3"},
    "fp6_e3m2": {"format": "fp6_e3m2"},
    "fp6_e2m3": {"format": "fp6_e2m3"},
    "int4 g128": {"format": "int4", "group": 128},
    "int4 g256": {"format": "int4", "group": 256},
    "mxfp4": {"format": "mxfp4"},
    "nvfp4": {"format": "nvfp4"},
}
"""Arguments of `quantize` by the name of a row; None: arrays of that dtype."""
FOLDER = "runs/formats"
"""Where the models are trained; a run that is complete there is used again."""


def run(source: str | None = None) -> list[dict[str, Any]]:
    """A row per model and format.

    Args:
        source: the folder of a run, or a Hugging Face folder whose tokenizer is bytes;
            None: the default run and one of twice its width, trained if need be.
    """
    if source is not None:
        return measure(source, source)
    rows = []
    for name, config in configurations().items():
        folder = f"{FOLDER}/{name}"
        if train(config, folder, _progress).interrupted:
            raise KeyboardInterrupt
        rows += measure(name, folder)
    return rows


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def configurations() -> dict[str, Config]:
    """The default run, and one of twice its width with as many steps."""
    config = default_config()
    model = config.model
    wide = dataclasses.replace(
        model,
        dim=2 * model.dim,
        attention=dataclasses.replace(
            model.attention, head_dim=2 * model.attention.head_dim
        ),
        feed_forward=dataclasses.replace(
            model.feed_forward, hidden_dim=2 * model.feed_forward.hidden_dim
        ),
    )
    return {"default": config, "wide": dataclasses.replace(config, model=wide)}


def measure(
    name: str, folder: str, labels: Sequence[str] = tuple(FORMATS)
) -> list[dict[str, Any]]:
    """Rows of one model."""
    model, tokenizer, config = load_model(folder)
    batch = next(held_out_batches(config.data, config.batch.size))
    inputs = matrix_inputs(model, batch)
    rows, best = [], None
    for label in labels:
        _progress(f"{name}: {label}")
        rounded = _rounded(model, label)
        found = _bits_per_byte(rounded, config, tokenizer)
        best = found if best is None else best
        rows.append(
            {
                "model": name,
                "dim": model.config.dim,
                "format": label,
                "bits_per_weight": bits_per_weight(model, rounded, label),
                "gemm_error": gemm_error(model, rounded, inputs),
                "bits_per_byte": found,
                "more_than_float32": found - best,
            }
        )
    return rows


def _rounded(model: Decoder, label: str) -> Decoder:
    """The model with the matrices of its layers in a format."""
    options = FORMATS[label]
    if options is not None:
        return quantize(model, **options)

    def convert(path: Any, x: Array) -> Array:
        chosen = spec.path_name(path) in SUMMED
        return x.astype(label).astype(x.dtype) if chosen else x

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return with_params(model, jax.tree_util.tree_map_with_path(convert, params))


def _bits_per_byte(model: Decoder, config: Config, tokenizer: Tokenizer) -> float:
    found = evaluate_model(
        model,
        config.data,
        batch_size=config.batch.size,
        num_batches=config.run.evaluate_batches,
        tokenizer=tokenizer,
    )
    if found.bits_per_byte is None:
        raise ValueError("bench formats needs text, not files of token ids")
    return found.bits_per_byte


def bits_per_weight(model: Decoder, rounded: Decoder, label: str) -> float:
    """Of the matrices of the layers, scales and padding included."""
    packed = _matrices(rounded)
    if FORMATS[label] is None:  # its arrays are float32, whatever they hold
        return 8.0 * jnp.dtype(label).itemsize
    size = sum(weight.size for weight in _matrices(model).values())
    return 8 * sum(weight.nbytes for weight in packed.values()) / size


def gemm_error(
    model: Decoder, rounded: Decoder, inputs: Mapping[str, list[Array]]
) -> float:
    """||X W - X Wq|| / ||X W||, the mean over all matrices of all layers."""
    errors = []
    packed = _matrices(rounded)
    for name, weight in _matrices(model).items():
        shape = shape_as_matrices(name, weight.shape)
        other = packed[name]
        other = dequantize(other) if is_quantized(other) else other
        stacks = weight.reshape(shape), other.reshape(shape)
        for x, w, q in zip(inputs[name], *stacks, strict=True):
            errors.append(_relative_error(x, w, q))
    return float(np.mean(errors))


@jax.jit
def _relative_error(x: Array, w: Array, q: Array) -> Array:
    multiply = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return jnp.linalg.norm(multiply(x, w - q)) / jnp.linalg.norm(multiply(x, w))


def matrix_inputs(model: Decoder, batch: Mapping[str, Any]) -> dict[str, list[Array]]:
    """What each matrix of each layer is multiplied with, [tokens, K], for a batch."""
    places = Places(jnp.asarray(batch["positions"]), jnp.asarray(batch["segments"]))
    windows = model.windows()
    found: dict[str, list[Array]] = {name: [] for name in SUMMED}

    @jax.jit
    def layer_inputs(layer: Any, x: Array, window: Any) -> tuple[Array, Any]:
        whole = tensor.Region(split=False)
        normed = layer.attention_norm(x)
        q, k, v = layer.attention.project(normed, places.positions)
        slopes = layer.attention.slopes()
        attended = model.attend(q, k, v, places, places, window, slopes)
        after = x + layer.attention.output(attended, whole)
        second = layer.feed_forward_norm(after)
        hidden = layer.feed_forward.hidden(second)
        kinds = {"query": normed, "key": normed, "value": normed, "out": attended}
        kinds |= {"gate": second, "up": second, "down": hidden}
        flat = {kind: y.reshape(places.positions.size, -1) for kind, y in kinds.items()}
        return layer.finish(x, attended, whole), flat

    tokens = jnp.asarray(batch["tokens"])
    whole = tensor.Region(split=False)
    x = model.embedding(tokens, places.positions, whole)
    for index in range(model.config.num_layers):
        layer = jax.tree.map(lambda w, index=index: w[index], model.layers)
        x, flat = layer_inputs(layer, x, None if windows is None else windows[index])
        for name in found:
            found[name].append(flat[name.rpartition("/")[2]])
    return found


def _matrices(model: Decoder) -> dict[str, Any]:
    """The weights that are quantized, by name."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    named = {spec.path_name(path): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if name in SUMMED}
