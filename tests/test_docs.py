"""What the documents say is compared with the code: the table of models, the snippets, the options they name."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import deit_models
from deit_models.checkpoint import load_manifest
from deit_models.cli import build_parser
from deit_models.data.datasets import DATASETS
from deit_models.deploy.runtimes import BACKENDS, FORMATS
from deit_models.finetuning.finetune import PRESET_OF
from deit_models.nas.space import space_from_toml
from deit_models.training.presets import PRESETS
from deit_models.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TABLE = re.compile(r"(<!-- models:.*?-->\n)(.*?)(<!-- /models -->)", re.DOTALL)
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def model_table() -> str:
    lines = [
        "| name | parameters | MACs | input | top-1 | top-5 | weights |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for c in load_manifest().values():
        accuracy = ["" if value is None else f"{value:.1f}" for value in (c.top1, c.top5)]
        data = "shipped, " * any(s.file for s in c.sources) + (c.dataset or "") if c.sources else "none"
        row = [f"`{c.name}`", f"{c.params / 1e6:.1f} M", f"{c.macs / 1e9:.2f} G", str(c.input_size), *accuracy, data]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def test_readme_table_equals_the_manifest(request: pytest.FixtureRequest) -> None:
    text = README.read_text(encoding="utf-8")
    if request.config.getoption("--update-docs"):
        README.write_text(TABLE.sub(lambda m: m[1] + model_table() + m[3], text), encoding="utf-8")
        text = README.read_text(encoding="utf-8")
    match = TABLE.search(text)
    assert match is not None
    assert match[2] == model_table(), "run pytest tests/test_docs.py --update-docs"


def test_readme_names_only_models_that_exist() -> None:
    named = set(re.findall(r'"((?:deit3?|t2t_vit)_[a-z0-9_]+)"', README.read_text(encoding="utf-8")))
    assert named
    assert named <= set(deit_models.list_models())


def test_readme_hub_repositories_are_in_the_manifest() -> None:
    published = {source.repo for checkpoint in load_manifest().values() for source in checkpoint.sources}
    named = set(re.findall(r'"((?:timm|facebook)/[^"]+)"', README.read_text(encoding="utf-8")))
    assert named
    assert named <= published


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.strip().splitlines()[0][:40])
def test_readme_snippet_is_python(snippet: str) -> None:
    compile(snippet.replace("...", "pass"), "README.md", "exec")


def test_readme_saving_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippet = next(text for text in SNIPPETS if "save_pretrained" in text)
    lines = [line for line in snippet.splitlines() if "push_to_hub" not in line]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), {"model": deit_models.create_model("deit_micro_patch4_32")})
    assert {path.name for path in tmp_path.iterdir()} == {"out", "for_timm", "for_hf"}


def test_readme_commands_are_known_to_the_command() -> None:
    named = set(re.findall(r"deit-models (\w+)", README.read_text(encoding="utf-8")))
    shown = subprocess.run(
        [sys.executable, "-m", "deit_models", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    assert named
    assert all(command in shown for command in named)


@pytest.mark.parametrize(
    "document", ["README.md", "docs/training.md", "docs/finetuning.md", "docs/search.md", "docs/deployment.md"]
)
def test_command_lines_of_the_documents_are_accepted(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    found = [line for block in blocks for line in re.findall(r"(?:^|-m )deit[-_]models (.*)", block, re.MULTILINE)]
    assert len(found) >= 3
    for line in found:
        build_parser().parse_args(shlex.split(line, comments=True))


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", *(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))],
    ids=str,
)
def test_files_named_in_the_documents_exist(document: str | Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text(encoding="utf-8")):
        assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"


def test_training_guide_names_only_presets_and_settings_that_exist() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:deit3?|levit|t2t|cifar|vit_res|supernet)_[a-z0-9_]+)`", text)) - set(
        deit_models.list_models()
    )
    assert named
    assert named <= PRESETS.keys()
    settings = set(re.findall(r"`(\w+) = ", text)) | set(re.findall(r"`(?:--)?(distill[a-z-]*|alpha|tau)\b[^/]", text))
    assert {name.replace("-", "_") for name in settings} <= {field.name for field in dataclasses.fields(Recipe)}


def test_search_guide_shows_a_space_that_can_be_searched() -> None:
    text = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    (space,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert space_from_toml(space).count() > 1000
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(snippet, "docs/search.md", "exec")


def test_fine_tuning_guide_names_the_preset_of_every_data_set() -> None:
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[a-z].*?) \| `(\w+)` \|", text, re.MULTILINE)
    named = {name.strip("`"): preset for names, preset in rows for name in names.split(", ")}
    assert {name: preset for name, preset in PRESET_OF.items() if not name.startswith("inat")} | {
        "inaturalist-...": PRESET_OF["inaturalist-2018"]
    } == named
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for snippet in snippets:
        compile(snippet, "docs/finetuning.md", "exec")
    assert all(f"`{name}`" in text or name.startswith("inat") for name in DATASETS)


def test_deployment_guide_names_the_backends_and_formats_there_are() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|.*\|.*\|$", text, re.MULTILINE)[: len(BACKENDS)] == list(BACKENDS)
    assert {kind.suffix for kind in FORMATS.values()} == set(re.findall(r"deit-models export \S+ \w+(\.\w+)", text))
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(snippet, "docs/deployment.md", "exec")


def test_public_names_are_importable_and_documented() -> None:
    for name in deit_models.__all__:
        value = getattr(deit_models, name)
        assert name == "__version__" or value.__doc__, f"{name} has no docstring"
