"""torch.hub on this checkout, in processes where the package is not installed, or another version of it is."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import deit_models
from deit_models.checkpoint import load_manifest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = [name for name, c in load_manifest().items() if any(source.file for source in c.sources)]
START = f"""
import json, sys, torch
CHECKOUT = {str(ROOT)!r}
def load(name, **options):
    return torch.hub.load(CHECKOUT, name, source="local", **options)
"""
# Given by PYTHONPATH to a process that starts without `site`: an editable installation of this checkout stays unseen.
LIBRARIES = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
INSTALLED = any((folder / "deit_models").exists() for folder in LIBRARIES)
FAKE = """
__version__ = "0.0.0"
def create_model(*args, **options):
    raise AssertionError("the other package was used")
from_pretrained = create_model
"""


def run(code: str, cwd: Path, *path: Path) -> object:
    """What the code prints, as JSON; `path` is what the process can import beside the installed libraries."""
    found = os.pathsep.join(map(str, [*path, *LIBRARIES]))
    environment = {**os.environ, "PYTHONPATH": found, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-W", "error", "-c", START + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def fake(tmp_path):
    """A folder with another `deit_models`, to put on the path."""
    package = tmp_path / "site" / "deit_models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    return package.parent


@pytest.fixture
def elsewhere(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def test_every_registered_model_and_nothing_else_is_an_entry_point(elsewhere):
    code = """
        sys.path.insert(0, CHECKOUT)
        import hubconf  # torch.hub.list does as much, but for checkouts it downloaded itself
        found = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and name[0] != "_"]
        print(json.dumps([found, hubconf.dependencies]))
    """
    names, dependencies = run(code, elsewhere)
    assert sorted(names) == sorted(deit_models.list_models())
    backport = ["tomli"] if sys.version_info < (3, 11) else []
    assert dependencies == ["torch", "torchvision", "huggingface_hub", "safetensors", "PIL", *backport]


def test_help_names_the_parameters(elsewhere):
    code = """
        sys.path.insert(0, CHECKOUT)
        import hubconf
        print(json.dumps(hubconf.deit_tiny_patch16_224.__doc__))
    """
    text = run(code, elsewhere)
    for word in (
        "deit_tiny_patch16_224",
        "5,717,416 parameters",
        "72.2 % top-1",
        "pretrained:",
        "**options:",
        "num_classes",
    ):
        assert word in text


@pytest.mark.skipif(INSTALLED, reason="deit-models is installed here, and not as an editable one")
def test_model_loads_where_the_package_is_not_installed(elsewhere):
    code = """
        import importlib.util
        assert importlib.util.find_spec("deit_models") is None
        model = load("deit_micro_distilled_patch4_32", num_classes=7, img_size=48, depth=1)
        assert model.training
        assert model.eval()(torch.zeros(1, 3, 48, 48)).shape == (1, 7)
        model.save_pretrained("saved")
        assert CHECKOUT not in sys.path
        print(json.dumps([sys.modules["deit_models"].__file__, type(model).__module__]))
    """
    assert run(code, elsewhere) == [str(ROOT / "deit_models" / "__init__.py"), "deit_models.models.deit"]
    loaded = deit_models.from_pretrained(elsewhere / "saved")
    assert (loaded.num_classes, loaded.config.img_size) == (7, 48)


@pytest.mark.skipif(not SHIPPED, reason="no checkpoint is shipped in weights/ yet")
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_checkpoint_loads_offline(elsewhere, name):
    code = f"""
        model = load({name!r}, pretrained=True)
        assert not model.training
        print(json.dumps(model.origin.sha256))
    """
    assert run(code, elsewhere) == deit_models.model_info(name).sources[0].sha256


@pytest.mark.parametrize("imported", ["before", "after", "as a namespace"])
def test_another_installed_version_and_this_one_do_not_meet(elsewhere, fake, imported):
    if imported == "as a namespace":
        (fake / "deit_models" / "__init__.py").unlink()
    code = f"""
        if {imported!r} != "after":
            import deit_models as other
        model = load("deit_micro_patch4_32", depth=1)
        again = load("deit_micro_patch4_32", depth=1)
        assert type(model) is type(again)
        import deit_models as other
        assert getattr(other, "__version__", "0.0.0") == "0.0.0", other.__version__
        model.save_pretrained("saved")
        assert not [name for name in sys.modules if name.startswith("deit_models.")]
        package = sys.modules[type(model).__module__.partition(".")[0]]
        loaded = package.from_pretrained("saved", dtype=torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
        print(json.dumps([package.__file__, package.__version__, package.__name__]))
    """
    file, version, name = run(code, elsewhere, fake)
    assert (file, version) == (str(ROOT / "deit_models" / "__init__.py"), deit_models.__version__)
    assert name != "deit_models"


@pytest.mark.skipif(INSTALLED, reason="deit-models is installed here, and not as an editable one")
def test_plain_folder_of_the_packages_name_is_no_other_version(elsewhere):
    (elsewhere / "deit_models").mkdir()
    assert (
        run("print(json.dumps(type(load('deit_micro_patch4_32')).__module__))", elsewhere) == "deit_models.models.deit"
    )


def test_checkout_on_the_path_is_shared(elsewhere):
    code = """
        import deit_models
        model = load("deit_micro_patch4_32")
        print(json.dumps(type(model) is type(deit_models.create_model("deit_micro_patch4_32"))))
    """
    assert run(code, elsewhere, ROOT) is True


@pytest.mark.parametrize("pretrained", [False, True])
def test_unknown_option_is_refused_with_the_nearest(elsewhere, pretrained):
    code = f"""
        try:
            load("deit_micro_patch4_32", pretrained={pretrained}, num_clases=7)
        except ValueError as error:
            print(json.dumps([type(error).__name__, str(error)]))
    """
    kind, message = run(code, elsewhere)
    assert kind == "ConfigError"
    assert message.startswith("unknown option 'num_clases' for ")
    assert "; nearest: num_classes" in message


@pytest.mark.skipif(INSTALLED, reason="deit-models is installed here, and not as an editable one")
def test_import_that_failed_can_be_tried_again(elsewhere, tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "hubconf.py").write_bytes((ROOT / "hubconf.py").read_bytes())
    (checkout / "deit_models").mkdir()
    (checkout / "deit_models" / "__init__.py").write_text("import module_that_is_not_there")
    code = f"""
        for attempt in range(2):
            try:
                torch.hub.load({str(checkout)!r}, "deit_micro_patch4_32", source="local")
            except ImportError as error:
                reason = str(error)
        print(json.dumps(["deit_models" in sys.modules, reason]))
    """
    assert run(code, elsewhere) == [False, "No module named 'module_that_is_not_there'"]
