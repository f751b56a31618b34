"""The layers of DESIGN: every module imports only what lies below it."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = [
    {"kernels_pallas"},
    {"jaxspeed.chips"},
    {f"jaxspeed.{name}" for name in ("mesh", "torus", "comm", "rings", "spec")},
    {f"jaxspeed.{name}" for name in ("parallel", "optim", "checkpoint", "data")},
    {"jaxspeed.models"},
    {
        "jaxspeed.config",
        "jaxspeed.config_values",
        "jaxspeed.ds_config",
        "jaxspeed.gin_config",
    },
    {f"jaxspeed.{name}" for name in ("train", "serve", "plan", "profiler")},
    {f"jaxspeed.{name}" for name in ("bench", "convert", "environment", "commands")},
    {"jaxspeed.cli"},
    {"jaxspeed", "jaxspeed.__main__"},
]
# Same-layer imports that are meant: (importer, imported).
SIBLINGS = {
    ("jaxspeed.comm", "jaxspeed.mesh"),
    ("jaxspeed.comm", "jaxspeed.rings"),
    ("jaxspeed.mesh", "jaxspeed.torus"),
    ("jaxspeed.torus", "jaxspeed.rings"),
    ("jaxspeed.spec", "jaxspeed.mesh"),
    ("jaxspeed.config", "jaxspeed.config_values"),
    ("jaxspeed.ds_config", "jaxspeed.config"),
    ("jaxspeed.ds_config", "jaxspeed.config_values"),
    ("jaxspeed.gin_config", "jaxspeed.config"),
    ("jaxspeed.plan", "jaxspeed.train"),
    ("jaxspeed.bench", "jaxspeed.convert"),
    ("jaxspeed.commands", "jaxspeed.bench"),
    ("jaxspeed.commands", "jaxspeed.convert"),
    ("jaxspeed.commands", "jaxspeed.environment"),
}
FILES = sorted([*ROOT.glob("jaxspeed/**/*.py"), *ROOT.glob("kernels_pallas/**/*.py")])


def part_of(module):
    """The unit of the layer table that a module belongs to."""
    known = set().union(*LAYERS)
    while module not in known:
        assert "." in module, f"{module} is in no layer: add it to the table"
        module = module.rpartition(".")[0]
    return module


def layer_of(part):
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


def module_of(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / full.replace(".", "/")).is_dir() or (
                    ROOT / (full.replace(".", "/") + ".py")
                ).is_file()
                yield (full if is_module else node.module), node


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_lower_layers(path):
    mine = part_of(module_of(path))
    for name, _ in imports_of(path):
        if name.split(".")[0] not in ("jaxspeed", "kernels_pallas"):
            continue
        other = part_of(name)
        if other == mine or (mine, other) in SIBLINGS:
            continue
        assert layer_of(other) < layer_of(mine), f"{mine} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_and_public_jax_only(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is"
    assert "jax._src" not in text
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
            assert node.module != "__future__"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_models_name_no_strategy_switch():
    """Axes of size 1 do the work: models do not ask which strategies are on."""
    for path in ROOT.glob("jaxspeed/models/*.py"):
        for word in ("zero_stage", "stage ==", "use_tensor", "sequence_parallel="):
            assert word not in path.read_text(), f"{path}: {word}"
