"""The corpus that every machine has: the text of Python's own standard library.

About ten megabytes of source and docstrings. What is large and unlike ordinary source
is left out: tests, generated tables of characters, bundled applications. Whether a
file is held out depends on a hash of its own name only, so it is the same on every
machine and in every version of Python.
"""

import hashlib
import os
import sysconfig

_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "ensurepip",
    "__phello__",
    "__pycache__",
}


def standard_library(
    held_out_fraction: float, root: str | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the source files of the standard library: for training, and held out.

    Args:
        held_out_fraction: about this share of the files is held out.
        root: the folder of the library; by default the one of the running Python.

    Raises:
        FileNotFoundError: this Python comes without source.
    """
    root = root or sysconfig.get_path("stdlib")
    split: tuple[list[str], list[str]] = ([], [])
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in names:
            path = os.path.join(folder, name)
            if _is_ordinary_source(path):
                split[_share(os.path.relpath(path, root)) < held_out_fraction].append(
                    path
                )
    if not split[0]:
        raise FileNotFoundError(
            f"no source of Python's standard library under {root!r}: this Python "
            "comes without it (zipped or compiled). Use source='text' with paths to "
            "text files of your own"
        )
    return tuple(sorted(split[0])), tuple(sorted(split[1]))


def _is_ordinary_source(path: str) -> bool:
    # The files of build settings differ from machine to machine, and links lead out
    # of the library.
    settings = os.path.basename(path).startswith("_sysconfigdata")
    return (
        path.endswith(".py")
        and not settings
        and not os.path.islink(path)
        and os.path.getsize(path) > 0
    )


def _share(name: str) -> float:
    """A number in [0, 1) that the name of a file alone decides."""
    digest = hashlib.sha256(name.replace(os.sep, "/").encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32
