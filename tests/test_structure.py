"""House rules that can be read off the source: which way imports point, how long a file may be, what it is called."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import deit_models

PACKAGE = Path(deit_models.__file__).parent
ROWS = [
    ("errors",),
    ("config",),
    ("hub.manifest",),
    ("architecture",),
    ("registry",),
    ("models",),
    ("macs",),
    ("decoding",),
    ("transforms",),
    ("hub",),
    ("results",),
    ("batches",),
    ("predict",),
    ("training",),
    ("finetuning",),
    ("nas",),
    ("deploy",),
    ("__init__",),
    ("cli",),
    ("__main__",),
]
"""DESIGN.md, section 2: a module imports from the rows above its own, and from its own folder."""
LAZY_UPWARD = {("registry", "models.layers"), ("models.layers", "hub.publish")}
"""The two exceptions, at call time or for type checkers only; the registry's import of a family goes by its name."""
BUDGETS = {
    "errors": 60,
    "config": 100,
    "architecture": 120,
    "registry": 230,
    "models.layers": 250,
    "models": 450,
    "macs": 250,
    "decoding": 250,
    "transforms": 250,
    "hub": 250,
    "results": 250,
    "batches": 250,
    "predict": 300,
    "training": 300,
    "finetuning": 250,
    "deploy": 300,
    "nas": 300,
    "cli": 300,
    "__init__": 100,
    "__main__": 20,
}
FILES = sorted(PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    target: str
    eager: bool
    """Carried out when the module is imported: not inside a function, not under TYPE_CHECKING."""


def module_name(path: Path) -> str:
    """ "hub.load" for hub/load.py, "hub" for hub/__init__.py, "__init__" for the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {module_name(path): path for path in FILES}


def _statements(node: ast.AST, *, eager: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, eager
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        )
        yield from _statements(child, eager=eager and not deferred)


def internal_imports(source: str, path: Path) -> list[Import]:
    """The package's own modules that a file imports, e.g. "hub.load"."""
    folder = path.relative_to(PACKAGE).parent.parts
    found = []
    for node, eager in _statements(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*folder[: len(folder) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.append(Import(whole if whole in NAMES else ".".join(base) or "__init__", eager))
    return found


def absolute_imports(source: str) -> list[str]:
    """Modules imported by their full name."""
    found = []
    for node, _ in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append(node.module or "")
    return found


def row(module: str) -> int:
    """Where a module stands in the table: its own entry if it has one, else its folder's."""
    for name in (module, module.split(".")[0]):
        for number, entries in enumerate(ROWS):
            if name in entries:
                return number
    raise AssertionError(f"{module} has no row in DESIGN.md's table; place it there and in ROWS")


def wrong_imports(source: str, path: Path) -> list[str]:
    """Imports of a file that point down the table."""
    module = module_name(path)
    if module == "__init__":  # what users import: the light rows at once, the others when asked for
        return [i.target for i in internal_imports(source, path) if i.eager and row(i.target) > row("registry")]
    wrong = []
    for target, eager in internal_imports(source, path):
        same_folder = row(target) == row(module) and target.split(".")[0] == module.split(".")[0]
        allowed = not eager and (module, target) in LAZY_UPWARD
        if not (allowed or same_folder or row(target) < row(module)):
            wrong.append(target)
    return wrong


@pytest.fixture(params=FILES, ids=module_name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_imports_point_up_the_table(path: Path) -> None:
    assert wrong_imports(path.read_text(encoding="utf-8"), path) == []


def test_families_share_through_layers_only(path: Path) -> None:
    folder = PACKAGE / "models"
    if path.parent == folder and path.stem not in ("__init__", "layers"):
        targets = {i.target for i in internal_imports(path.read_text(encoding="utf-8"), path)}
        shared = {"models.layers", "models.transformer"}
        assert {target for target in targets if target.startswith("models.")} <= shared


def test_imports_inside_the_package_are_relative(path: Path) -> None:
    # torch.hub loads a checkout under whatever name it likes, beside another installed version
    roots = {name.split(".")[0] for name in absolute_imports(path.read_text(encoding="utf-8"))}
    assert "deit_models" not in roots


def test_modules_are_not_imported_by_a_string(path: Path) -> None:
    # which the tests above could not follow; the registry (a family) and the package (its lazy names) may
    if module_name(path) in ("registry", "__init__"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"line {node.lineno}: a computed import"
            assert not str(name.value).startswith((".", "deit_models")), f"line {node.lineno}: an import of our own"


def test_no_import_cycle() -> None:
    graph = {
        module: {i.target for i in internal_imports(path.read_text(encoding="utf-8"), path) if i.eager} - {module}
        for module, path in NAMES.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) >= len(NAMES)


def test_file_is_within_its_budget(path: Path) -> None:
    module = module_name(path)
    allowed = BUDGETS.get(module) or BUDGETS[module.split(".")[0]]
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= allowed, f"{module} has {lines} lines, STYLE.md allows {allowed}: split or cut it"


def test_file_is_named_for_what_it_holds(path: Path) -> None:
    dependencies = {"torch", "torchvision", "timm", "transformers", "huggingface_hub", "safetensors", "PIL", "tqdm"}
    assert path.stem not in {"utils", "util", "helpers", "helper", "misc", "common"} | dependencies


def test_lazy_names_of_the_package_lead_somewhere() -> None:
    for name, module in deit_models._LAZY.items():
        assert name in deit_models.__all__
        if module.strip(".") in NAMES:
            tree = ast.parse(NAMES[module.strip(".")].read_text(encoding="utf-8"))
            assert name in {getattr(node, "name", None) for node in tree.body}, f"{module} does not define {name}"


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("errors.py", "from .registry import create_model", ["registry"]),
        ("hub/manifest.py", "def f():\n    from ..registry import create_model", ["registry"]),
        ("hub/manifest.py", "from . import manifest, layouts", ["hub"]),
        ("registry.py", "from .models.layers import ImageClassifier", ["models.layers"]),
        ("registry.py", "if TYPE_CHECKING:\n    from .models.layers import ImageClassifier", []),
        ("models/layers.py", "from ..hub.publish import save_pretrained", ["hub.publish"]),
        ("models/layers.py", "def f():\n    from ..hub.publish import save_pretrained", []),
        ("models/deit.py", "def f():\n    from ..hub.publish import save_pretrained", ["hub.publish"]),
        ("models/deit.py", "from ..registry import register_model\nfrom .layers import DropPath", []),
        ("transforms.py", "from .predict import Classifier", ["predict"]),
        ("transforms.py", "from .hub.manifest import Preprocessing", []),
        ("transforms.py", "from . import create_model", ["__init__"]),
        ("__init__.py", "from .transforms import transform_for", ["transforms"]),
        ("__init__.py", "if TYPE_CHECKING:\n    from .transforms import transform_for", []),
    ],
)
def test_checker_finds_wrong_directions(
    file: str, source: str, wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hub.publish", "predict", "transforms"):  # whether or not it is written yet
        monkeypatch.setitem(NAMES, name, PACKAGE)
    monkeypatch.delitem(NAMES, "hub.layouts", raising=False)
    assert wrong_imports(source, PACKAGE / file) == wrong
