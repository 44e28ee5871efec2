"""House rules that can be read off the source: directions of imports, sizes of folders, names, first words, tests."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import deit_models

PACKAGE = Path(deit_models.__file__).parent
TESTS = Path(__file__).parent
ROWS = [
    ("errors",),
    ("config",),
    ("files", "distributed"),
    ("trackers",),
    ("checkpoint",),
    ("registry",),
    ("formats",),
    ("models",),
    ("hub",),
    ("images",),
    ("data",),
    ("batches",),
    ("scoring.metrics",),
    ("recipes",),
    ("augmentation",),
    ("scoring",),
    ("predict",),
    ("show",),
    ("training",),
    ("finetuning",),
    ("nas",),
    ("deploy",),
    ("__init__",),
    ("cli",),
    ("__main__",),
]
"""DESIGN.md, section 2: a module imports from the rows above its own, and from its own folder."""
MAX_FILES, MAX_LINES = 10, 2500
"""Of a folder; `models/` and `formats/` may have one file a family besides."""
MAX_FILE_LINES, MIN_FILE_LINES = 500, 60
SHORT = {"errors", "config", "__main__"}
FILES = sorted(PACKAGE.rglob("*.py"))
FAMILIES = {path.stem for path in (PACKAGE / "models").glob("*.py")} - {"__init__", "features", "layers", "transformer"}


def module_name(path: Path) -> str:
    """ "hub.load" for hub/load.py, "hub" for hub/__init__.py, "__init__" for the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {module_name(path): path for path in FILES}
SOURCES = {path: path.read_text(encoding="utf-8") for path in FILES}
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}


def internal_imports(tree: ast.Module, path: Path) -> Iterator[str]:
    """The package's own modules that a file imports, e.g. "hub.load": at once, later, or for type checkers only."""
    folder = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*folder[: len(folder) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if whole in NAMES else ".".join(base) or "__init__"


def absolute_imports(tree: ast.Module) -> Iterator[str]:
    """Modules imported by their full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def row(module: str) -> int:
    """Number of a module's row: its own entry if it has one, else its folder's."""
    for name in (module, module.split(".")[0]):
        for number, entries in enumerate(ROWS):
            if name in entries:
                return number
    raise AssertionError(f"{module} has no row in DESIGN.md's table; place it there and in ROWS")


def wrong_imports(tree: ast.Module, path: Path) -> list[str]:
    """Imports of a file that point down the table."""
    module = module_name(path)
    return [
        target
        for target in internal_imports(tree, path)
        if not (row(target) < row(module) or (row(target) == row(module) and _folder(target) == _folder(module)))
    ]


def _folder(module: str) -> str:
    return module.split(".")[0]


@pytest.fixture(params=FILES, ids=module_name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_imports_point_up_the_table(path: Path) -> None:
    assert wrong_imports(TREES[path], path) == []


def test_families_share_through_layers_only(path: Path) -> None:
    if path.parent == PACKAGE / "models" and path.stem in FAMILIES:
        targets = {target for target in internal_imports(TREES[path], path) if target.startswith("models.")}
        assert targets <= {"models.features", "models.layers", "models.transformer"}


def test_imports_inside_the_package_are_relative(path: Path) -> None:
    # torch.hub loads a checkout under whatever name it likes, beside another installed version
    assert "deit_models" not in {name.split(".")[0] for name in absolute_imports(TREES[path])}


def test_modules_are_not_imported_by_a_string(path: Path) -> None:
    # which the tests above could not follow; the registry (a family) and the package (its lazy names) may
    if module_name(path) in ("registry", "__init__"):
        return
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"line {node.lineno}: a computed import"
            assert not str(name.value).startswith((".", "deit_models")), f"line {node.lineno}: an import of our own"


def test_no_import_cycle_not_even_for_type_checkers() -> None:
    graph = {module: set(internal_imports(TREES[path], path)) - {module} for module, path in NAMES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(NAMES)


def test_private_names_stay_in_their_module() -> None:
    taken = [
        f"{module_name(path)} takes {alias.name} of {node.module}"
        for path in FILES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert taken == []


def test_package_is_within_its_budget() -> None:
    lines = sum(len(source.splitlines()) for source in SOURCES.values())
    assert len(FILES) <= 116
    assert lines <= 27_600  # the aim is 15,500


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda path: path.name)
def test_folder_is_within_its_budget(folder: Path) -> None:
    files = [path for path in FILES if path.parent == folder]
    if folder.name in ("models", "formats"):
        files = [path for path in files if path.stem not in FAMILIES]
    lines = sum(len(SOURCES[path].splitlines()) for path in files)
    assert len(files) <= MAX_FILES, "STYLE.md: merge files that are always opened together"
    assert lines <= MAX_LINES, "STYLE.md: simplify, or find what belongs elsewhere"


def test_file_has_a_fitting_length(path: Path) -> None:
    lines = len(SOURCES[path].splitlines())
    assert lines <= MAX_FILE_LINES, "split or cut it"
    if path.stem not in ("__init__", "__main__") and module_name(path) not in SHORT:
        assert lines >= MIN_FILE_LINES, "too short for a file of its own"


def test_file_is_named_for_what_it_holds(path: Path) -> None:
    dependencies = {"torch", "torchvision", "timm", "transformers", "huggingface_hub", "safetensors", "PIL", "tqdm"}
    assert path.stem not in {"utils", "util", "helpers", "helper", "misc", "common"} | dependencies


def test_no_two_modules_have_one_name() -> None:
    # a family has one file for its network and one for its layouts elsewhere
    stems = Counter(path.stem for path in FILES if path.stem not in ("__init__", "__main__"))
    folders = {path.parent.name for path in FILES} - {PACKAGE.name}
    twice = {stem for stem, count in stems.items() if count > 1} - FAMILIES
    assert twice == set()
    assert folders & set(stems) == set()


def test_no_two_public_classes_functions_or_types_have_one_name() -> None:
    places = defaultdict(set)
    for path, tree in TREES.items():
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                if not name.startswith("_") and name != "logger" and not name.isupper():
                    places[name].add(module_name(path))
    assert {name: found for name, found in places.items() if len(found) > 1 and name != "main"} == {}


FIRST_WORDS = ("What", "How", "Which", "All that", "Whether it")


def test_docstrings_say_the_thing_by_its_name(path: Path) -> None:
    # STYLE.md, section 5
    texts = [
        ast.get_docstring(node) or ""
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    texts += [
        str(node.value.value)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    assert [text.splitlines()[0] for text in texts if re.match(rf"\s*({'|'.join(FIRST_WORDS)})\b", text)] == []


def test_every_module_has_a_test_file_of_its_own() -> None:
    tested = [path.stem for path in TESTS.rglob("test_*.py")]
    untested = [
        module_name(path)
        for path in FILES
        if path.stem not in ("__init__", "__main__") and not any(_is_test_of(path.stem, name) for name in tested)
    ]
    assert untested == []


def _is_test_of(stem: str, test: str) -> bool:
    """test_load.py, test_cli_train.py and test_transformers_config_fields.py fit load, train, transformers_config."""
    return re.fullmatch(rf"test_(\w+_)?{re.escape(stem)}(_\w+)?", test) is not None


def test_few_tests_exchange_parts_of_the_package() -> None:
    calls = sum(
        isinstance(node, ast.Attribute) and node.attr == "setattr"
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
    assert calls < 40
    assert not [
        path for path in TESTS.rglob("*.py") if re.search(r"^from unittest.mock|^import mock", path.read_text())
    ]


def test_no_test_is_skipped_for_a_module_that_its_package_never_had() -> None:
    names = {
        name
        for path in TESTS.rglob("*.py")
        for name in re.findall(r"importorskip\(\s*\"([\w.]+)\"", path.read_text(encoding="utf-8"))
    }
    installed = {name for name in names if find_spec(name.partition(".")[0])}
    assert "timm.data.transforms" in names
    assert {name for name in installed if find_spec(name) is None} == set()


def test_lazy_names_of_the_package_lead_somewhere() -> None:
    for name, module in deit_models._LAZY.items():
        assert name in deit_models.__all__
        tree = TREES[NAMES[module.strip(".")]]
        assert name in {getattr(node, "name", None) for node in tree.body}, f"{module} does not define {name}"
        # the import of a module sets it on the package, over the lazy name
        assert name not in NAMES


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("errors.py", "from .registry import create_model", ["registry"]),
        ("checkpoint.py", "def f():\n    from .registry import create_model", ["registry"]),
        ("hub/load.py", "from . import load, fetch", []),
        ("registry.py", "if TYPE_CHECKING:\n    from .models.layers import ImageClassifier", ["models.layers"]),
        ("models/layers.py", "def f():\n    from ..hub.load import from_pretrained", ["hub.load"]),
        ("models/layers.py", "def f():\n    from ..formats.publish import save_pretrained", []),
        ("models/deit.py", "from ..registry import register_model\nfrom .layers import DropPath", []),
        ("augmentation/augment.py", "from ..recipes.recipe import Recipe", []),
        ("augmentation/augment.py", "from ..training.run import train", ["training.run"]),
        ("predict.py", "from .scoring.evaluation import evaluate", []),
        ("predict.py", "from . import create_model", ["__init__"]),
        ("nas/space.py", "from ..deploy.bench import bench", ["deploy.bench"]),
        ("__init__.py", "def f():\n    from .cli import main", ["cli"]),
    ],
)
def test_checker_finds_wrong_directions(file: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(ast.parse(source), PACKAGE / file) == wrong
