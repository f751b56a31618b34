"""FLOPs, multiply-adds, bytes and parameters of every module of a JAX program.

What DeepSpeed's flops profiler reports, counted from the jaxpr: nothing is compiled or
run, no device is needed, and loops count with their trip counts.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxspeed import spec
from jaxspeed.profiler.operations import Figures
from jaxspeed.profiler.program import walk
from jaxspeed.profiler.scopes import Scope, module_scopes


@dataclasses.dataclass(frozen=True)
class ModuleCount:
    """Work of one module, parts included, on all devices together.

    Attributes:
        name: attribute path or scope below the module around it; "" is the whole.
        forward: work outside of a backward pass; an optimizer's too.
        backward: work of a backward pass, recomputed activations included.
        params: number of parameters.
        children: its parts, in the order in which they run.
        unknown: work that could not be counted, in words; of the whole only.
    """

    name: str
    forward: Figures
    backward: Figures
    params: int
    children: tuple["ModuleCount", ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> Figures:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def flops(self) -> int:
        """FLOPs of matmuls and convolutions, two per multiply-add."""
        return self.total.flops

    @property
    def macs(self) -> int:
        """Multiply-adds of matmuls and convolutions."""
        return self.total.macs

    @property
    def elementwise(self) -> int:
        """Operations on single elements: additions, exponentials, reductions, ..."""
        return self.total.elementwise

    @property
    def bytes(self) -> int:
        """Bytes read and written where elementwise operations are fused."""
        return self.total.bytes

    def __getitem__(self, path: str) -> "ModuleCount":
        """The part at `path`, `layers/attention`; KeyError if there is none."""
        found = self
        for name in path.split("/"):
            found = {child.name: child for child in found.children}[name]
        return found

    def as_json(self) -> dict[str, Any]:
        """The tree in plain types; figures of a module include those of its parts."""
        return {
            "name": self.name,
            "params": self.params,
            "forward": dataclasses.asdict(self.forward),
            "backward": dataclasses.asdict(self.backward),
            "children": [child.as_json() for child in self.children],
            "unknown": list(self.unknown),
        }


def count(function: Callable[..., Any], *args: Any, model: Any = None) -> ModuleCount:
    """Counts the work of `function(*args)` by module.

    A module is a `jax.named_scope`, or a flax.nnx module by its attribute path: one
    among `args`, or `function` itself, or the one that `function` is a method of.

    Rules. `flops` are those of matmuls and convolutions, two per multiply-add: the work
    of a matrix unit, and what DeepSpeed's profiler counts but for a bias after a
    convolution, pooling, softmax and norms. All arithmetic on single elements is in
    `elementwise`, one for each element of the result, of the operand in reductions, of
    the windows in pooling. `bytes` are what operations read and write when elementwise
    ones are fused with their neighbours.

    A scan counts as often as it runs, `jax.checkpoint` with what it computes again,
    `shard_map` on every device that runs it; what the compiler splits itself counts
    once. So figures are of all devices together. `walk` in `profiler.program` has the
    rest: conditionals, while loops and Pallas kernels.

    Args:
        function: traced, not run. An inner function that was compiled before keeps the
            scopes of its first trace.
        args: pytrees of arrays or of `jax.ShapeDtypeStruct`, or nnx modules.
        model: the nnx module that `function` makes or keeps inside (shapes suffice); or
            a pytree of parameters, nested by the names of scopes.
    """
    function, args = _unbound(function, args)
    modules = [arg for arg in args if isinstance(arg, nnx.Module)]
    names = _root_names(modules)
    trees = {name: _parameters(m) for name, m in zip(names, modules, strict=True)}
    if model is not None:
        trees[""] = _parameters(model)
    tree = _Tree()
    hidden = {"": model} if isinstance(model, nnx.Module) else {}
    jaxpr = _trace(function, args, names, hidden)
    notes: dict[str, None] = {}
    walk(jaxpr, tree.add, lambda note: notes.setdefault(note))
    for name, parameters in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
            keys = [name] * bool(name) + spec.path_name(path[:-1]).split("/")
            tree.add_params(tuple(filter(None, keys)), math.prod(leaf.shape))
    return tree.freeze("", tuple(notes))


def _root_names(modules: list[nnx.Module]) -> list[str]:
    """The only module is the whole; several have the names of their classes."""
    if len(modules) <= 1:
        return [""] * len(modules)
    kinds = [type(module).__name__ for module in modules]
    return [
        kind if kinds.count(kind) == 1 else f"{kind}_{kinds[:i].count(kind)}"
        for i, kind in enumerate(kinds)
    ]


def _parameters(model: Any) -> Any:
    if not isinstance(model, nnx.Module):
        return model
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _unbound(
    function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A module, or its method, as a function that takes the module."""
    if isinstance(function, nnx.Module):
        return type(function).__call__, (function, *args)
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nnx.Module):
        name = getattr(function, "__name__", "__call__")
        return lambda self, *rest: getattr(self, name)(*rest), (owner, *args)
    return function, args


def _trace(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    names: list[str],
    hidden: dict[str, nnx.Module],
) -> Any:
    """The jaxpr of a run in which modules enter scopes; their arrays are traced too."""
    split = [
        nnx.split(arg) if isinstance(arg, nnx.Module) else (None, arg) for arg in args
    ]

    def run(*states: Any) -> list[Any]:
        merged = [
            state if graph is None else nnx.merge(graph, state)
            for (graph, _), state in zip(split, states, strict=True)
        ]
        modules = [arg for arg in merged if isinstance(arg, nnx.Module)]
        with module_scopes(dict(zip(names, modules, strict=True)) | hidden):
            result = function(*merged)
        return [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]

    return jax.make_jaxpr(run)(*(state for _, state in split))


class _Tree:
    """A module's own work and parameters, and those of its parts, while counting."""

    def __init__(self) -> None:
        self.forward, self.backward, self.params = Figures(), Figures(), 0
        self.children: dict[str, _Tree] = {}

    def at(self, path: tuple[str, ...]) -> "_Tree":
        node = self
        for name in path:
            node = node.children.setdefault(name, _Tree())
        return node

    def add(self, scope: Scope, work: Figures) -> None:
        node = self.at(scope.path)
        if scope.backward:
            node.backward += work
        else:
            node.forward += work

    def add_params(self, path: tuple[str, ...], number: int) -> None:
        self.at(path).params += number

    def freeze(self, name: str, unknown: tuple[str, ...] = ()) -> ModuleCount:
        children = tuple(child.freeze(part) for part, child in self.children.items())
        own = ModuleCount(name, self.forward, self.backward, self.params)
        every = (own, *children)
        return ModuleCount(
            name,
            sum((each.forward for each in every), Figures()),
            sum((each.backward for each in every), Figures()),
            sum(each.params for each in every),
            children,
            unknown,
        )
