"""Checkpoints on Orbax: global arrays, so any mesh and any ZeRO stage can load them.

A checkpoint holds the logical arrays, never a device's view of them. Restoring reads,
on each host, the parts that its devices need under the layout asked for.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run saves itself.

    Attributes:
        directory: the folder (any path Orbax takes), or None: nothing is saved.
        every: steps between two saves of a run; 0 saves at the end only.
        keep: how many of the latest checkpoints stay; None keeps all.
    """

    directory: str | None = None
    every: int = 0
    keep: int | None = 3

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"checkpoint.every is {self.every}; give 0 or more steps")
        if self.keep is not None and self.keep < 1:
            raise ValueError(
                f"checkpoint.keep is {self.keep}; give at least 1, or None to keep all"
            )


@dataclasses.dataclass(frozen=True)
class Store:
    """The checkpoints of one run: functions over a folder.

    A checkpoint has named parts, each a pytree, so that a reader can take only one
    (the parameters, say), and notes, a JSON object.

    Attributes:
        save: (step, parts, notes) -> None. Returns when device arrays are copied;
            files are written in the background and committed as a whole.
        restore: (step, like) -> (parts, notes); `like` has a tree of
            `jax.ShapeDtypeStruct` with the shardings wanted for each part wanted.
        parts: (step) -> the names of the parts of a checkpoint.
        steps: () -> the committed steps, ascending.
        wait: () -> None, returns when every save is committed (or raises its error).
        close: () -> None, waits and frees the threads.
    """

    save: Callable[..., None]
    restore: Callable[..., tuple[Any, dict[str, Any]]]
    parts: Callable[[int], set[str]]
    steps: Callable[[], list[int]]
    wait: Callable[[], None]
    close: Callable[[], None]


def open_store(config: Checkpoint) -> Store:
    """Opens (and creates) the folder of `config`.

    Raises:
        ValueError: there is no directory in `config`.
    """
    if config.directory is None:
        raise ValueError(
            "there is no checkpoint directory; set "
            "Config(checkpoint=dict(directory='...'))"
        )
    folder = _absolute(config.directory)
    manager = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True),
    )

    def save_step(
        step: int, parts: dict[str, Any], notes: dict[str, Any] | None = None
    ) -> None:
        later = [saved for saved in sorted(manager.all_steps()) if saved >= step]
        if later:
            raise FileExistsError(
                f"{config.directory} holds checkpoints of steps {later}; step {step} "
                "would be lost among them. Remove them, or save to another directory"
            )
        trees = {name: ocp.args.StandardSave(tree) for name, tree in parts.items()}
        args = ocp.args.Composite(**trees, notes=ocp.args.JsonSave(notes or {}))
        manager.save(step, args=args)

    def restore_step(step: int, like: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        steps = sorted(manager.all_steps())
        if step not in steps:
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {config.directory}; "
                f"{'there are ' + str(steps) if steps else 'there is none'}"
            )
        trees = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        args = ocp.args.Composite(**trees, notes=ocp.args.JsonRestore())
        restored = manager.restore(step, args=args)
        return {name: restored[name] for name in like}, restored["notes"]

    return Store(
        save=save_step,
        restore=restore_step,
        parts=lambda step: (
            {part.name for part in (folder / str(step)).iterdir() if part.is_dir()}
            - {"notes"}
        ),
        steps=lambda: sorted(manager.all_steps()),
        wait=manager.wait_until_finished,
        close=manager.close,
    )


def save(path: Path, tree: Any) -> None:
    """Writes a pytree of arrays to the new folder `path`; returns when committed."""
    save_async(path, tree)()


def save_async(path: Path, tree: Any) -> Callable[[], None]:
    """Starts writing a pytree to the new folder `path`.

    Returns:
        A function that waits until the checkpoint is committed, or raises the error
        that kept it from being. Until then the folder is not a checkpoint.

    Raises:
        FileExistsError: there is something at `path` already.
    """
    target = _absolute(path)
    if target.exists():
        raise FileExistsError(f"{path} exists; give a new folder or remove it first")
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(target, tree)

    def wait() -> None:
        checkpointer.wait_until_finished()
        checkpointer.close()

    return wait


def restore(path: Path, like: Any = None) -> Any:
    """Reads a pytree written by `save`.

    Args:
        path: the folder.
        like: a tree of arrays or `jax.ShapeDtypeStruct` with the shardings wanted;
            None gives the arrays as they were saved.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
    """
    target = _absolute(path)
    if not target.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(target, like)


def _absolute(path: Path) -> epath.Path:
    """Local paths in full; `gs://` and the like as they are."""
    return epath.Path(path) if "://" in str(path) else epath.Path(path).absolute()
