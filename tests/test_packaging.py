"""What is installed: metadata in setup.cfg, and with -m slow the wheel and the source distribution themselves."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import deit_models
from deit_models.checkpoint import load_manifest, weights_dir

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {path.name for path in weights_dir().glob("*.safetensors")}


@pytest.fixture(scope="module")
def config():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text: str) -> list[str]:
    return [line for line in text.strip().splitlines() if line and not line.startswith("#")]


def project_names(text: str) -> set[str]:
    """The distributions a list of requirements names."""
    return {re.match(r"[\w.-]+", line)[0].lower() for line in lines(text) if not line.startswith("%")}


def test_every_package_folder_is_listed(config):
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "deit_models").rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders}
    assert set(lines(config["options"]["packages"])) == names | {"deit_models.weights"}


def test_weights_travel_inside_the_package(config):
    assert lines(config["options"]["package_dir"]) == ["deit_models.weights = weights"]
    patterns = lines(config["options.package_data"]["deit_models.weights"])
    assert {path.name for path in weights_dir().iterdir()} == {
        path.name for pattern in patterns for path in weights_dir().glob(pattern)
    }
    assert config["options.package_data"]["deit_models"] == "py.typed"
    assert (ROOT / "deit_models" / "py.typed").is_file()


def test_version_is_read_from_the_package(config):
    assert config["metadata"]["name"] == "deit-models"
    assert config["metadata"]["version"] == "attr: deit_models.__version__"
    # a plain string, which setuptools reads without importing the package and its dependencies
    text = (ROOT / "deit_models" / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'(?m)^__version__ = "(\d+\.\d+\.\d+)"$', text)[1] == deit_models.__version__


def test_runtime_needs_five_projects_and_a_backport(config):
    assert project_names(config["options"]["install_requires"]) == {
        "torch", "torchvision", "huggingface-hub", "safetensors", "pillow", "tomli"
    }  # fmt: skip
    (backport,) = (line for line in lines(config["options"]["install_requires"]) if line.startswith("tomli"))
    assert backport.endswith('python_version < "3.11"')


@pytest.mark.parametrize(
    ("extra", "needed"),
    [
        ("train", {"tensorboard"}),
        ("plot", {"matplotlib"}),
        ("export", {"nncf", "onnx", "onnxruntime", "onnxscript", "openvino"}),
        ("notebook", {"ipykernel"}),
        ("test", {"pytest", "timm", "transformers", "hypothesis"}),
        ("docs", {"mkdocs-material", "mkdocstrings"}),
        ("dev", {"ruff", "mypy", "build", "pre-commit"}),
    ],
)
def test_extra_is_there(config, extra, needed):
    assert needed <= project_names(config["options.extras_require"][extra])


def test_command_leads_to_the_function(config):
    (entry,) = lines(config["options.entry_points"]["console_scripts"])
    assert entry == "deit-models = deit_models.cli:main"


# The built files


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the source distribution, built from a copy of what git would carry."""
    pytest.importorskip("build", reason="needs the extra [dev]")
    source, out = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, source, ignore=left_out)
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    if int(version("setuptools").partition(".")[0]) >= 77:  # as pyproject.toml asks: no network is needed then
        command.append("--no-isolation")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_wheel_holds_the_package_its_weights_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"deit_models-{deit_models.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"deit_models-{deit_models.__version__}.dist-info/METADATA").decode()
    assert {name.partition("/")[0] for name in names} == {
        "deit_models", f"deit_models-{deit_models.__version__}.dist-info"
    }  # fmt: skip
    modules = {str(path.relative_to(ROOT).as_posix()) for path in (ROOT / "deit_models").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"deit_models/py.typed", "deit_models/weights/manifest.toml"} <= names
    assert {name.rpartition("/")[2] for name in names if name.endswith(".safetensors")} == SHIPPED
    assert any(name.endswith("/LICENSE") for name in names)
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata
    assert re.search(r"(?m)^License(-Expression)?: Apache-2.0$", metadata)


@pytest.mark.slow
def test_wheel_works_without_the_checkout(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    names = [name for name, c in load_manifest().items() if any(source.file for source in c.sources)]
    code = f"""
import json, deit_models
from deit_models.checkpoint import weights_dir
loaded = [deit_models.from_pretrained(name).origin.source for name in {names}]
print(json.dumps([deit_models.__file__, str(weights_dir()), deit_models.list_models(), loaded]))
"""
    libraries = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    found = os.pathsep.join([str(tmp_path / "site"), *libraries])
    environment = {**os.environ, "PYTHONPATH": found, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-W", "error"]  # -S: an editable installation of the checkout stays unseen
    options = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path, "check": False}
    done = subprocess.run([*command, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    file, weights, models, loaded = json.loads(done.stdout)
    assert Path(file).is_relative_to(tmp_path / "site")
    assert Path(weights) == tmp_path / "site" / "deit_models" / "weights"
    assert models == deit_models.list_models()
    assert len(loaded) == len(names)
    done = subprocess.run([*command, "-m", "deit_models", "list"], **options)
    assert done.stdout.split() == models


@pytest.mark.slow
def test_source_distribution_is_the_checkout(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in (
            "tests/**/*.py",
            "tests/**/*.json",
            "examples/*.*",
            "deit_models/**/*.py",
            "weights/*",
            "*.md",
            "*.yml",
        )
        for path in ROOT.glob(pattern)
    }
    assert expected <= names
    assert {"hubconf.py", "LICENSE", "setup.cfg", "pyproject.toml", "MODEL_CARD.md", "weights/manifest.toml"} <= names
    assert not [name for name in names if "__pycache__" in name]
