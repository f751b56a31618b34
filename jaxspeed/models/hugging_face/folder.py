"""A Hugging Face folder on disk: config.json and safetensors files, whole or in parts.

A safetensors file is the length of a JSON header in 8 bytes, the header (dtype, shape
and byte range of each tensor), and the bytes. Reading goes through the memory map of
the safetensors library; nothing is ever unpickled. Writing streams one tensor at a
time, so that no more than one is in memory.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Dtypes that are written -> their names in the header; they and F64 are read."""

Weights = dict[str, Any]
"""Tensor name -> a handle with `get_shape()`, `get_dtype()` and slicing."""


def read_config_json(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: not a JSON object.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder. Give a local Hugging Face folder with {CONFIG} "
            "and safetensors files; nothing is downloaded (`hf download NAME "
            "--local-dir FOLDER` does that)"
        )
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; it is not a Hugging Face model folder, or its "
            "writing was interrupted"
        )
    return _read_json(folder / CONFIG)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """All tensors of a folder, mapped but not read.

    Raises:
        FileNotFoundError: there are no safetensors files, or one of the index is gone.
        ValueError: a file is damaged, or the index does not describe the files.
    """
    with contextlib.ExitStack() as opened:

        def handle(name: str) -> Any:
            try:
                return opened.enter_context(safe_open(folder / name, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(
                    f"{folder / name} is damaged or not a safetensors file ({error}); "
                    "copy it again"
                ) from error

        if (folder / SINGLE).is_file():
            single = handle(SINGLE)
            yield {name: single.get_slice(name) for name in single.keys()}
        else:
            where = _read_index(folder)
            files = {name: handle(name) for name in sorted(set(where.values()))}
            held = {name: set(files[name].keys()) for name in files}
            for tensor, name in where.items():
                if tensor not in held[name]:
                    raise ValueError(
                        f"{folder / INDEX} says that {tensor!r} is in {name}, which "
                        "does not hold it; the files are not of one model"
                    )
            yield {
                tensor: files[name].get_slice(tensor) for tensor, name in where.items()
            }


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, all of them files of this folder."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(_no_weights(folder))
    where = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(name, str) for name in where.values()
    ):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files")
    for name in sorted(set(where.values())):
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX} names {name!r}; it may only name safetensors files "
                "of its own folder"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / INDEX} names {name}, which is not there; the download or "
                "copy is incomplete"
            )
    return where


def _no_weights(folder: Path) -> str:
    pickles = [
        file.name
        for file in sorted(folder.iterdir())
        if file.suffix in (".bin", ".pt", ".pth", ".ckpt")
    ]
    if not pickles:
        return f"{folder} has neither {SINGLE} nor {INDEX}"
    return (
        f"{folder} has only pickled weights ({', '.join(pickles[:3])}), which can run "
        "code when they are opened and are never read. Convert them where you trust "
        "them: transformers.AutoModelForCausalLM.from_pretrained(FOLDER)"
        ".save_pretrained(NEW_FOLDER)"
    )


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def split_files(
    tensors: list[TensorInfo], max_bytes: float
) -> dict[str, list[TensorInfo]]:
    """File name -> its tensors, in order, at most `max_bytes` a file.

    A tensor larger than that has a file to itself.
    """
    groups: list[list[TensorInfo]] = [[]]
    for tensor in tensors:
        size = sum(each.nbytes for each in groups[-1])
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


def write_tensors(
    file: Path, tensors: list[TensorInfo], values: Iterable[np.ndarray]
) -> None:
    """Writes a safetensors file, taking one value at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for value in values:
            out.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        _sync(out)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes an object as JSON."""
    with file.open("w", encoding="utf-8") as out:
        json.dump(content, out, indent=2)
        out.write("\n")
        _sync(out)


def _sync(out: Any) -> None:
    out.flush()
    os.fsync(out.fileno())


@contextlib.contextmanager
def replacing_model(folder: Path) -> Iterator[Path]:
    """A place to write the files of a model that then becomes that of `folder`.

    Other files of the folder (a tokenizer, say) stay. At every moment, a crash
    included, the folder holds the old model, or has no config.json and is refused, or
    holds the new model.
    """
    incoming = folder / ".incoming"
    if incoming.exists():  # left by a crash
        shutil.rmtree(incoming)
    incoming.mkdir(parents=True)
    try:
        yield incoming
        (folder / CONFIG).unlink(missing_ok=True)
        _sync_folder(folder)
        for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
            old.unlink(missing_ok=True)
        for new in incoming.iterdir():
            if new.name != CONFIG:
                new.rename(folder / new.name)
        _sync_folder(folder)
        (incoming / CONFIG).rename(folder / CONFIG)
        _sync_folder(folder)
    finally:
        shutil.rmtree(incoming)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
