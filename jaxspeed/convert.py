"""Run folders <-> Hugging Face folders, either to quantized weights; models from all.

Which of the two a folder is, its config.json says. A run folder has the run's
configuration and Orbax checkpoints; a Hugging Face folder has the architecture and
safetensors files. A quantized folder is a run folder with one safetensors file in place
of checkpoints.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxspeed import spec
from jaxspeed.checkpoint import Checkpoint, Store, open_store
from jaxspeed.config import Config, from_json, to_json
from jaxspeed.data import ByteTokenizer, Data, HuggingFaceTokenizer, Tokenizer
from jaxspeed.models.hugging_face import from_pretrained, save_pretrained
from jaxspeed.models.parameters import parameters, to_decoder
from jaxspeed.models.quantized import quantize
from jaxspeed.models.quantized_file import load_quantized, save_quantized
from jaxspeed.models.transformer import Decoder
from jaxspeed.parallel import tensor

Path = str | pathlib.Path

CONFIG, CHECKPOINTS, TOKENIZER = "config.json", "checkpoints", "tokenizer.json"
QUANTIZED = "quantized.safetensors"
BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files that describe a tokenizer further."""


def convert(
    source: Path,
    target: Path,
    *,
    mesh: Mesh | None = None,
    format: str | None = None,
    group: int | None = None,
) -> str:
    """Writes a folder of one kind as the other, whichever `source` is, or quantized.

    Of a run, the latest step. A run folder written here has one checkpoint, of step 0,
    with the parameters alone. A Hugging Face tokenizer goes along.

    Args:
        source: either kind of folder.
        target: a new or empty folder.
        mesh: holds the parameters meanwhile; by default the first device does.
        format: writes a quantized folder of this format, as `models.quantize` makes it,
            whatever `source` is.
        group: rows that share a scale, with `format`.

    Returns:
        a line that says what was written.

    Raises:
        FileExistsError: there is something in `target`.
        FileNotFoundError: `source` is not there, or a part of it.
        ValueError: `source` is neither kind or quantized already, or the other kind
            cannot hold its model.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    is_run = _is_run(source)
    if (source / QUANTIZED).is_file():
        raise ValueError(
            f"{source} holds quantized weights; convert the folder it was made from"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and is not an empty folder; name a new one, or remove it"
        )
    if format is not None:
        return _to_quantized(source, target, mesh, format, group)
    write = _to_hugging_face if is_run else _to_run
    return write(source, target, mesh)


def load_model(
    path: Path, mesh: Mesh | None = None, *, dtype: Any = jnp.float32
) -> tuple[Decoder, Tokenizer, Config]:
    """The model of a run folder (its latest step), Hugging Face or quantized folder.

    Only parameters are read, each device its own shards of them unless quantized.

    Args:
        path: either kind of folder.
        mesh: the parameters are split over its axis `tensor`; by default they lie
            whole on the first device.
        dtype: of the parameters in memory that are not quantized.

    Returns:
        the model; its tokenizer (a Hugging Face folder without one gets bytes if its
        vocabulary is theirs, else bare ids); and the run's configuration (for a
        Hugging Face folder the defaults, with its model and tokenizer).

    Raises:
        FileNotFoundError: the folder is not there, or a part of it.
        ImportError: its tokenizer needs the package `tokenizers`.
        ValueError: it is neither kind, is damaged, or the mesh does not divide it.
    """
    folder = pathlib.Path(path)
    is_run = _is_run(folder)
    if (folder / QUANTIZED).is_file():
        config = _read_run_config(folder)
        model = load_quantized(config.model, folder / QUANTIZED, mesh, dtype)
    elif is_run:
        model, config, _ = _load_run(folder, mesh, dtype)
    else:
        model = from_pretrained(folder, mesh=mesh, dtype=dtype)
        config = Config(model=model.config, data=_data_for(folder, model))
    return model, _load_tokenizer(folder, config), config


def _is_run(folder: pathlib.Path) -> bool:
    """Whether it is a run folder; otherwise it is a Hugging Face folder."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; give a run's folder or a local Hugging Face "
            "folder, nothing is downloaded"
        )
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; neither a run's folder nor a Hugging Face "
            "folder, or its writing was interrupted"
        )
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from error
    keys = content if isinstance(content, dict) else {}
    if "model_type" not in keys and "model" not in keys:
        raise ValueError(
            f"{folder / CONFIG} is neither of a run (it would have a key 'model') nor "
            "of a Hugging Face model (a key 'model_type')"
        )
    return "model_type" not in keys


def _to_run(source: pathlib.Path, target: pathlib.Path, mesh: Mesh | None) -> str:
    model = from_pretrained(source, mesh=mesh)
    data = _data_for(source, model)
    if data.tokenizer is not None:
        _copy_tokenizer(source / TOKENIZER, target)
        data = dataclasses.replace(data, tokenizer=str(target.absolute()))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    store = open_store(Checkpoint(directory=str(target / CHECKPOINTS)))
    store.save(0, {"params": params}, {"source": source.name})
    store.close()
    # Last, so that an interrupted conversion is not taken for a run.
    (target / CONFIG).write_text(to_json(Config(model=model.config, data=data)))
    return (
        f"wrote {target}: a run folder with a checkpoint of step 0, "
        f"{_num_params(params)} parameters{_and_tokenizer(target)}"
    )


def _to_hugging_face(
    source: pathlib.Path, target: pathlib.Path, mesh: Mesh | None
) -> str:
    model, config, step = _load_run(source, mesh, jnp.float32)
    save_pretrained(model, target)
    tokenizer = _tokenizer_file(source, config)
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, target)
    params = nnx.state(model, nnx.Param)
    return (
        f"wrote {target}: a Hugging Face folder with step {step} of {source}, "
        f"{_num_params(params)} parameters{_and_tokenizer(target)}"
    )


def _to_quantized(
    source: pathlib.Path,
    target: pathlib.Path,
    mesh: Mesh | None,
    format: str,
    group: int | None,
) -> str:
    model, _, config = load_model(source, mesh)
    quantized = quantize(model, format, group=group)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer_file(source, config)
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, target)
        data = dataclasses.replace(config.data, tokenizer=str(target.absolute()))
        config = dataclasses.replace(config, data=data)
    save_quantized(quantized, target / QUANTIZED)
    # The checkpoints are not this folder's.
    config = dataclasses.replace(config, model=model.config, checkpoint=Checkpoint())
    (target / CONFIG).write_text(to_json(config))
    size = (target / QUANTIZED).stat().st_size
    whole = nnx.state(model, nnx.Param)
    return (
        f"wrote {target}: {_num_params(whole)} parameters of {source} in {format}, "
        f"{size:,} bytes{_and_tokenizer(target)}"
    )


def _load_run(
    folder: pathlib.Path, mesh: Mesh | None, dtype: Any
) -> tuple[Decoder, Config, int]:
    """The model at the latest step of a run, its configuration, and that step."""
    config = _read_run_config(folder)
    store = _open_checkpoints(folder, config)
    try:
        steps = store.steps()
        if not steps:
            raise FileNotFoundError(f"the run in {folder} has saved no checkpoint yet")
        like = _placed(config, mesh, dtype)
        parts, _ = store.restore(steps[-1], {"params": like})
    finally:
        store.close()
    return to_decoder(config.model, parts["params"]), config, steps[-1]


def _read_run_config(folder: pathlib.Path) -> Config:
    try:
        return from_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def _open_checkpoints(folder: pathlib.Path, config: Config) -> Store:
    """The run's checkpoints, beside its config.json even if both were moved."""
    own, written = folder / CHECKPOINTS, config.checkpoint.directory
    directory = str(own) if own.is_dir() or written is None else written
    if "://" not in directory and not pathlib.Path(directory).is_dir():
        raise FileNotFoundError(
            f"the run in {folder} has no checkpoints; {directory} is not there"
        )
    return open_store(Checkpoint(directory=directory, keep=None))


def _placed(config: Config, mesh: Mesh | None, dtype: Any) -> Any:
    """Shape, dtype and place of every parameter."""
    leaves = parameters(config.model)
    if mesh is None:
        first = SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda leaf: first, leaves)
    else:
        places = jax.tree.map(
            lambda each: NamedSharding(mesh, each),
            spec.assign(tensor.rule(mesh.shape), leaves),
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
        leaves,
        places,
    )


def _data_for(folder: pathlib.Path, model: Decoder) -> Data:
    """The tokenizer of a Hugging Face folder, as a run states it."""
    if (folder / TOKENIZER).is_file():
        return Data(tokenizer=str(folder))
    vocab_size = model.config.vocab_size
    if vocab_size == ByteTokenizer.vocab_size:
        return Data()
    # Only files of ids could train it, and a run has to name them.
    return Data(source="tokenized", paths=("tokens.bin",), vocab_size=vocab_size)


def _load_tokenizer(folder: pathlib.Path, config: Config) -> Tokenizer:
    file = _tokenizer_file(folder, config)
    if file is None:
        return config.data.load_tokenizer()
    return HuggingFaceTokenizer(file, config.data.end_of_document)


def _tokenizer_file(folder: pathlib.Path, config: Config) -> pathlib.Path | None:
    """The Hugging Face tokenizer in the folder, else the one that the run names."""
    if (folder / TOKENIZER).is_file():
        return folder / TOKENIZER
    if config.data.tokenizer is None:
        return None
    named = pathlib.Path(config.data.tokenizer)
    return named / TOKENIZER if named.is_dir() else named


def _copy_tokenizer(file: pathlib.Path, target: pathlib.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target / TOKENIZER)
    for name in BESIDE_TOKENIZER:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, target / name)


def _num_params(params: Any) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"


def _and_tokenizer(folder: pathlib.Path) -> str:
    return " and its tokenizer" if (folder / TOKENIZER).is_file() else ""
