"""Compiled points kept on disk: what a compiler said once need not be asked again.

One JSON file per point in `JAXSPEED_CACHE`, or the user's cache folder. The key covers
all that the answer depends on: the configuration of the step, the topology, the
versions of the compiler's packages and the source of this library.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from jaxspeed.config import Config

PACKAGES = (
    *("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt"),
    *("flax", "optax"),
)
"""Packages that shape a compiled program."""

SOURCES = ("jaxspeed", "kernels_pallas")
NOT_COMPILED = ("data", "checkpoint", "run")
"""Parts of a configuration that no compiled step depends on, the sequence length
apart."""


def folder() -> pathlib.Path:
    """Where compiled points are kept: `JAXSPEED_CACHE`, or the platform's place."""
    given = os.environ.get("JAXSPEED_CACHE")
    if given:
        return pathlib.Path(given)
    if sys.platform == "darwin":
        base = pathlib.Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        local = pathlib.Path.home() / "AppData" / "Local"
        base = pathlib.Path(os.environ.get("LOCALAPPDATA", local))
    else:
        base = pathlib.Path(
            os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        )
    return base / "jaxspeed"


def read(config: Config, topology: str) -> dict[str, Any] | None:
    """What was written for this step, or None: never, or not readable."""
    try:
        found = json.loads(_path(config, topology).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write(config: Config, topology: str, found: dict[str, Any]) -> None:
    """Keeps `found`, JSON values, for this step.

    The file appears whole or not at all, whoever else writes it.

    Raises:
        OSError: the folder cannot be written.
    """
    path = _path(config, topology)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(found, file, indent=2)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _path(config: Config, topology: str) -> pathlib.Path:
    step = dataclasses.asdict(config)
    step["sequence_length"] = config.data.sequence_length
    for part in NOT_COMPILED:
        step.pop(part)
    key = {"step": step, "topology": topology, "versions": _versions()}
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return folder() / "plan" / f"{digest}.json"


@functools.cache
def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["source"] = _source_digest()
    return versions


def _source_digest() -> str:
    """One digest of all Python files and tables of this library."""
    digest = hashlib.sha256()
    for package in SOURCES:
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            root = pathlib.Path(place)
            for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
