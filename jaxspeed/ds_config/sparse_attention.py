"""The block `sparse_attention` of ds_config: a layout for the decoder."""

from collections.abc import Mapping
from typing import Any

from jaxspeed.ds_config.verdicts import Translation, is_auto
from jaxspeed.models.sparse_attention import fields_of
from kernels_pallas.block_sparse_attention import LAYOUTS

BLOCK = "sparse_attention"
FIELD = "model.attention.sparse"
MODES = {**{name: name for name in LAYOUTS}, "local_sliding_window": "local"}
"""Those of DeepSpeed's reader, and its sliding window, which it can only construct."""
DEFAULT_MODE = "fixed"
READ_ATTENTION = ("fixed", "variable", "local")
"""Modes for which DeepSpeed reads `attention`; elsewhere it is bidirectional."""


def translate_sparse_attention(given: Mapping[str, Any], out: Translation) -> None:
    """The mode, then each key that the mode reads.

    Raises:
        ValueError: an unknown mode.
    """
    keys = {key: value for key, value in given.items() if key.startswith(f"{BLOCK}.")}
    if given.get(BLOCK, "") is None:
        out.refuse(
            BLOCK,
            f"an empty block has the mode {DEFAULT_MODE} in DeepSpeed; write the mode, "
            "or remove the block",
        )
    if not keys:
        return
    mode = _mode(keys, out)
    if mode is None:
        return
    read = [name for name in fields_of(mode) if _reads(mode, name)]
    for key, value in keys.items():
        name = key.removeprefix(f"{BLOCK}.")
        if name == "mode" or is_auto(key, value, out):
            continue
        if mode == "dense":
            out.ignore(key, "mode dense has no layout")
        elif name not in read:
            out.ignore(key, f"mode {mode} does not read it; it reads {', '.join(read)}")
        elif value is None:
            out.ignore(key, "not set")
        else:
            out.set(key, f"{FIELD}.{name}", value)
    if mode != "dense":
        _note(mode, keys, out)


def _note(mode: str, keys: Mapping[str, Any], out: Translation) -> None:
    """What the file does not say."""
    if mode == "bigbird" and keys.get(f"{BLOCK}.num_random_blocks") is None:
        out.fields[f"{FIELD}.num_random_blocks"] = 0
        out.notes.append(
            f"{BLOCK}.num_random_blocks is not set: no random blocks, as in DeepSpeed"
        )
    out.notes.append(
        f"{BLOCK}: no token sees a later one, whatever the layout lists; DeepSpeed "
        "leaves that to a mask of the caller's"
    )


def _mode(keys: Mapping[str, Any], out: Translation) -> str | None:
    """Sets the mode; None if it is refused."""
    key = f"{BLOCK}.mode"
    given = keys.get(key)
    if is_auto(key, given, out):
        return None
    if given is None:
        out.notes.append(f"{key} is not set: {DEFAULT_MODE}, as in DeepSpeed")
    name = DEFAULT_MODE if given is None else given
    if name not in MODES:
        raise ValueError(f"{key} is {name!r}; it must be one of {', '.join(MODES)}")
    mode = MODES[name]
    out.fields[f"{FIELD}.mode"] = mode
    if given is not None and mode == "dense":
        out.honour(key, "off: all blocks, by the ordinary attention")
    elif given is not None:
        out.honour(
            key,
            f"{FIELD}.mode = {mode!r}: the decoder computes the blocks of the layout "
            "alone; a model of your own calls kernels_pallas.block_sparse_attention",
        )
    return mode


def _reads(mode: str, name: str) -> bool:
    return name != "seed" and (name != "attention" or mode in READ_ATTENTION)
