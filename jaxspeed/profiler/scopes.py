"""Which module an equation belongs to: `jax.named_scope`, and scopes for nnx modules.

flax.nnx modules enter no scope when they run. `module_scopes` makes them, for as long
as a function is traced: every public method enters a scope that holds the whole
attribute path of its module, so scopes that a model has of its own are not doubled.
"""

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

RECOMPUTED = "rematted_computation"
"""Scope that `jax.checkpoint` gives to what it computes again."""
MODULE = "nnx:"
"""Starts the name of a scope that holds a module's path, `nnx:layers.attention`."""


@dataclasses.dataclass(frozen=True)
class Scope:
    """A place in the tree of modules.

    Attributes:
        path: names of the scopes, the outermost first.
        backward: part of a backward pass, recomputed activations included.
        absolute: the path starts at the root, whatever the scopes around it.
    """

    path: tuple[str, ...] = ()
    backward: bool = False
    absolute: bool = False

    def __truediv__(self, inner: "Scope") -> "Scope":
        path = inner.path if inner.absolute else self.path + inner.path
        return Scope(path, self.backward or inner.backward)

    @property
    def label(self) -> str:
        """The path as text."""
        return "/".join(self.path) or "no module"


def scope_of(equation: Any) -> Scope:
    """The scopes around an equation within its own jaxpr.

    JAX keeps them as text, `jvp(block)/attention`, `transpose(jvp(block))/attention`.
    The text is reached through `source_info`, which is documented nowhere; only this
    function knows.
    """
    text = str(equation.source_info.name_stack)
    path = _names(text)
    modules = [i for i, name in enumerate(path) if name.startswith(MODULE)]
    if modules:
        last = modules[-1]
        module = path[last].removeprefix(MODULE).split(".")
        path = [*filter(None, module), *path[last + 1 :]]
    backward = "transpose(" in text or RECOMPUTED in text
    return Scope(tuple(path), backward, bool(modules))


def _names(text: str) -> list[str]:
    """Names of scopes, without the transformations that JAX writes around them.

    A transposed equation can repeat them, `transpose(jvp(block))/jvp(block)`.
    """
    runs: list[list[str]] = [[]]
    for segment in text.split("/"):
        if "(" in segment:
            runs.append([])
        name = re.sub(r"\w+\(|\)", "", segment)
        # `jnp.einsum` names its scope by the equation, `ab,bc->ac`.
        if name and name != RECOMPUTED and "->" not in name:
            runs[-1].append(name)
    names, last = runs[0], []
    for run in runs[1:]:
        repeats = run[: len(last)] == last
        names = names + (run[len(last) :] if repeats else run)
        last = run
    return names


@contextlib.contextmanager
def module_scopes(roots: dict[str, nnx.Module]) -> Iterator[None]:
    """While open, methods of these modules and of their parts enter a named scope.

    Args:
        roots: modules by name; "" for the only one.
    """
    running: list[_Running] = []
    classes = {
        kind
        for root in roots.values()
        for _, module in nnx.iter_modules(root)
        for kind in type(module).__mro__
        if issubclass(kind, nnx.Module) and kind is not nnx.Module
    }
    before = [
        (kind, name, method)
        for kind in classes
        for name, method in vars(kind).items()
        if inspect.isfunction(method)
        and (name == "__call__" or not name.startswith("_"))
    ]
    try:
        for kind, name, method in before:
            setattr(kind, name, _scoped(method, roots, running))
        yield
    finally:
        for kind, name, method in before:
            setattr(kind, name, method)


_Running = tuple[tuple[str, ...], nnx.Module]
"""A module that is in one of its methods, and its path."""


def _scoped(
    method: Callable[..., Any], roots: dict[str, nnx.Module], running: list[_Running]
) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        if running and running[-1][1] is self:
            return method(self, *args, **kwargs)
        path = _path(self, roots, running)
        running.append((path, self))
        try:
            with jax.named_scope(MODULE + ".".join(path)):
                return method(self, *args, **kwargs)
        finally:
            running.pop()

    return call


def _path(
    module: nnx.Module, roots: dict[str, nnx.Module], running: list[_Running]
) -> tuple[str, ...]:
    """The path of a module that is part of a running one, or of a root.

    A copy (a scan's slice of stacked layers, gathered weights) is part of nothing. It
    is taken for the nearest part of its class, and if there are several, of its shapes.
    """
    owners = running[::-1] or [
        ((name,) if name else (), root) for name, root in roots.items()
    ]
    parts = [
        ((*prefix, *map(str, path)), part)
        for prefix, owner in owners
        for path, part in nnx.iter_modules(owner)
    ]
    same = [path for path, part in parts if part is module]
    if same:
        return same[0]
    alike = [(path, part) for path, part in parts if type(part) is type(module)]
    depth = min((len(path) for path, _ in alike), default=0)
    near = [(path, part) for path, part in alike if len(path) == depth]
    shaped = [each for each in near if _shapes(each[1]) == _shapes(module)]
    for candidates in (near, shaped):
        if len({path for path, _ in candidates}) == 1:
            return candidates[0][0]
    return (*owners[0][0], type(module).__name__)


def _shapes(module: nnx.Module) -> list[Any]:
    leaves = jax.tree.leaves(nnx.state(module))
    return [getattr(leaf, "shape", None) for leaf in leaves]
