"""Imports point one way, those inside of functions too: docs/design.md, "The shape of the code"."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    "_extension columns double errors span units", "files offload page", "ops plan", "backends sharded stream",
    "contrastive doctor hf parallel proof", "nn", "apply config data logprobs objectives", "planner", "memory", "longtrain", "train",
    "report tasks", "commands", "cli", "__main__",
)  # fmt: skip
"""From the bottom up; `longtrain` is what `import longtrain` gives."""


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Of each module, the modules of the package that it names."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in ROOT.glob("longtrain/**/*.py")}
    named = {module: set() for module in files}
    for module, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}:{node.lineno} is relative"
                named[module] |= {name if (name := f"{node.module}.{a.name}") in files else node.module for a in node.names}
            elif isinstance(node, ast.Import):
                named[module] |= {a.name for a in node.names}
    return {module: names & files.keys() for module, names in named.items()}


def test_a_part_imports_only_those_below(imports):
    layer = {part: number for number, parts in enumerate(LAYERS) for part in parts.split()}
    part = {module: module.split(".")[min(1, module.count("."))] for module in imports}
    pairs = [(module, other) for module in imports for other in imports[module] if part[module] != part[other]]
    assert not [pair for pair in pairs if layer[part[pair[0]]] <= layer[part[pair[1]]]]


def test_no_modules_import_each_other_in_a_circle(imports):
    TopologicalSorter(imports).prepare()  # raises CycleError
