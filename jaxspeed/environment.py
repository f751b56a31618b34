"""What there is to run on: versions, devices and what links them, and what is missing.

Nothing here fails when something is missing; that is what it is there to report.
"""

import collections
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax

PACKAGES = (
    "jaxspeed",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "libtpu",
    "tokenizers",
    "gin-config",
)
GPU_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin")
DEVICE_FILES = {
    "gpu": ("nvidia[0-9]*", "kfd"),
    "tpu": ("accel[0-9]*", "vfio/[0-9]*"),
}
"""Files in /dev by which the hardware shows itself, used by JAX or not."""


def environment() -> dict[str, Any]:
    """Facts about this process, its devices and its host, as JSON values.

    Keys: `python`, `platform`, `packages` (name -> version or None), `backend`,
    `backend_error`, `processes`, `devices` (a list with `kind`, `count` over all
    processes and `memory_bytes` of one), `simulated_devices`, `interconnect`, and
    `host` with `cores` and `memory_bytes`. What cannot be found out is None.
    """
    packages = {name: _version(name) for name in (*PACKAGES, *GPU_PLUGINS)}
    try:
        devices, error = jax.devices(), None
    # A backend that does not start may raise anything, an AssertionError for one.
    except Exception as problem:
        devices, error = [], f"{type(problem).__name__} {problem}".strip()
    backend = devices[0].platform if devices else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "backend": backend,
        "backend_error": error,
        "processes": jax.process_count() if devices else None,
        "devices": _kinds(devices),
        "simulated_devices": len(devices) if backend == "cpu" else 0,
        "interconnect": _interconnect(devices),
        "host": {"cores": _cores(), "memory_bytes": _memory()},
    }


def report(
    facts: dict[str, Any] | None = None, *, device_folder: str = "/dev"
) -> tuple[dict[str, Any], list[str]]:
    """The environment, and the same as text with advice on what is missing.

    Args:
        facts: what `environment` returned; by default it is called.
        device_folder: where device files are looked for.

    Returns:
        the facts, with the key `missing` (a list of what is missing and what for), and
        lines for the user.
    """
    facts = environment() if facts is None else facts
    missing = _missing(facts, _visible_hardware(pathlib.Path(device_folder)))
    versions = facts["packages"].items()
    named = [f"{name} {version}" for name, version in versions if version]
    lines = [
        f"python        {facts['python']} on {facts['platform']}",
        f"packages      {', '.join(named)}",
        f"devices       {_devices_line(facts)}",
        f"interconnect  {facts['interconnect']['links']}",
        f"host          {_host_line(facts['host'])}",
    ]
    lines += [f"missing       {line}" for line in missing]
    return {**facts, "missing": missing}, lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kinds(devices: Sequence[Any]) -> list[dict[str, Any]]:
    """Devices of each kind."""
    counts = collections.Counter(device.device_kind for device in devices)
    first = {device.device_kind: device for device in reversed(devices)}
    return [
        {"kind": kind, "count": count, "memory_bytes": _device_memory(first[kind])}
        for kind, count in counts.items()
    ]


def _device_memory(device: Any) -> int | None:
    """Bytes that JAX may use on one device; None where the backend does not say."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (RuntimeError, NotImplementedError):  # a device of another process
        return None


def _interconnect(devices: Sequence[Any]) -> dict[str, Any]:
    """What links the devices, as far as they tell; `links` is a sentence."""
    if len(devices) < 2:
        return {"links": "none, fewer than two devices"}
    backend = devices[0].platform
    if backend == "tpu":
        return _torus(devices)
    # Which of the two a GPU has, JAX does not know.
    links = {"cpu": "shared memory", "gpu": "NVLink or PCIe"}.get(backend, "unknown")
    processes = len({device.process_index for device in devices})
    if processes > 1:
        links += f" within each of {processes} processes, the network between them"
    return {"links": links}


def _torus(devices: Sequence[Any]) -> dict[str, Any]:
    """Extent of the chips' coordinates, and the number of slices."""
    coordinates = [getattr(device, "coords", None) for device in devices]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    cores = 1 + max(getattr(device, "core_on_chip", 0) or 0 for device in devices)
    if None in coordinates:
        return {"links": "ICI, coordinates unknown", "slices": slices}
    axes = list(zip(*coordinates, strict=True))
    topology = "x".join(str(max(axis) - min(axis) + 1) for axis in axes)
    links = f"ICI, chips {topology}"
    if cores > 1:
        links += f" with {cores} cores each"
    if slices > 1:
        links += f", in each of {slices} slices; the network between them"
    return {"links": links, "topology": topology, "cores": cores, "slices": slices}


def _cores() -> int | None:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return None


def _visible_hardware(folder: pathlib.Path) -> dict[str, str]:
    """The kinds of DEVICE_FILES that are there, each with a file that shows it."""
    found = {}
    for kind, patterns in DEVICE_FILES.items():
        files = sorted(file for pattern in patterns for file in folder.glob(pattern))
        if files:
            found[kind] = str(files[0])
    return found


def _missing(facts: dict[str, Any], hardware: dict[str, str]) -> list[str]:
    """What is not there, what it would be for, and how to get it."""
    packages, backend = facts["packages"], facts["backend"]
    missing = []
    if backend is None:
        missing.append(
            f"devices: JAX did not start ({facts['backend_error']}); see "
            "JAX_PLATFORMS, with =cpu everything runs on simulated devices"
        )
    plugins = {
        "gpu": any(packages[name] for name in GPU_PLUGINS),
        "tpu": packages["libtpu"] is not None,
    }
    for kind, file in hardware.items():
        if backend == kind:
            continue
        problem = (
            "its plugin is installed but not in use: unset JAX_PLATFORMS and see the "
            "driver's messages"
            if plugins[kind]
            else f"pip install 'jaxspeed[{kind}]'"
        )
        missing.append(f"{kind.upper()}: {file} shows one; {problem}")
    if backend == "cpu" and not hardware:
        missing.append(
            "accelerator: everything runs on simulated CPU devices, as many as "
            "--cpu-devices says"
        )
    for package, extra, purpose in (
        ("libtpu", "plan", "`jaxspeed plan` for TPU topologies"),
        ("tokenizers", "hf", "tokenizers of Hugging Face folders"),
        ("gin-config", "gin", "configuration files in gin"),
    ):
        if packages[package] is None:
            missing.append(f"{package}: {purpose}; pip install 'jaxspeed[{extra}]'")
    return missing


def _devices_line(facts: dict[str, Any]) -> str:
    if not facts["devices"]:
        return "none"
    named = []
    for each in facts["devices"]:
        text = f"{each['count']} x {each['kind']}"
        if facts["simulated_devices"] > 1:
            text += " (simulated)"
        if each["memory_bytes"]:
            text += f", {_gibibytes(each['memory_bytes'])} each"
        named.append(text)
    processes = facts["processes"]
    return "; ".join(named) + (f"; in {processes} processes" if processes > 1 else "")


def _host_line(host: dict[str, Any]) -> str:
    memory = host["memory_bytes"]
    size = _gibibytes(memory) if memory else "memory unknown"
    return f"{host['cores'] or 'unknown number of'} cores, {size}"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
