"""Imports point one way: packages down, no wing of evaluations to another wing, no module back to itself."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "clearhead"
LAYERS = (
    {"registry", "extras"},
    {"core", "data"},
    {"positions", "engines", "kernels", "functional", "analysis"},
    {"variants", "integrations", "runs"},
    {"nn"},
    {"models", "testing"},
    {"evals"},
    {"convert", "lm_eval_tasks"},
    {"train"},
    {"look"},
    {"report"},
    {"bench"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Entry points: they belong to no layer and are imported by none.
ENTRIES = {"__init__", "__main__", "vllm_plugin"}
FILES = sorted(SOURCE.rglob("*.py"))


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Dotted names of all modules imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    """The unit of the layout that a file belongs to."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def test_every_file_has_a_layer() -> None:
    assert FILES
    assert {part(path) for path in FILES} <= {*LEVEL, *ENTRIES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    package = ["clearhead", *path.relative_to(SOURCE).parent.parts]
    for name in imported(ast.parse(path.read_text(encoding="utf-8")), package):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if own in ENTRIES or top != "clearhead" or target in ("", "__version__"):
            continue
        assert target in LEVEL, f"{path}: {name} is in no layer"
        assert target == own or LEVEL[target] < LEVEL[own], f"{own} imports {name}, which is not below it"


# The rooms of `evals` that all wings share, and what is made of several evaluations and may know them.
SHARED = {"asking", "probing", "subjects"}
ABOVE = {"composed"}
WINGS = (
    {path.name for path in (SOURCE / "evals").iterdir() if (path / "__init__.py").exists()} - SHARED - ABOVE
)


def rooms(name: str) -> str:
    """The room of `evals` that a module belongs to, or its own name where it stands in none."""
    return name.split(".")[2] if name.startswith("clearhead.evals.") else ""


def test_a_wing_imports_no_other_wing() -> None:
    assert {"text", "retrieval", "in_context", "faithfulness", "internals", "external"} == WINGS
    for name, targets in graph().items():
        for target in targets:
            own, other = rooms(name), rooms(target)
            if own in WINGS:
                assert other not in (WINGS | ABOVE) - {own}, f"{name} imports {target}, of another wing"
            elif own in SHARED:
                assert other not in WINGS | ABOVE, f"{name}, which all wings share, imports {target}"


def test_few_modules_stand_in_no_room() -> None:
    assert len(list((SOURCE / "evals").glob("*.py"))) <= 8


def test_an_evaluation_is_found_under_its_name() -> None:
    from clearhead import registry

    for name, target in registry.EVALUATIONS.items():
        assert name in target.partition(":")[0].split("."), f"{name} is in {target}"


def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports, inside functions too, but not for types alone."""
    known = {
        ".".join(["clearhead", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): path
        for path in FILES
    }
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = []
        package = ["clearhead", *path.relative_to(SOURCE).parent.parts]
        names = set(imported(tree, package))
        found[name] = {
            target for one in names for target in (one, one.rpartition(".")[0]) if target in known
        } - {name}
        # A name taken from a package's module counts for the module, not for the packages it lies in.
        found[name] -= {
            target for target in found[name] if any(t.startswith(f"{target}.") for t in found[name])
        }
    return found


def test_no_module_imports_itself_by_a_detour() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()
    TopologicalSorter(graph()).prepare()
