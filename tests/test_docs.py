"""What the documents say is compared with the code: the table of models, the commands, the options they name; links.

`test_snippets.py` runs their Python, `test_site.py` builds them as a site.
"""

import dataclasses
import json
import pkgutil
import re
import shlex
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import deit_models
from deit_models.checkpoint import ModelInfo, load_manifest
from deit_models.cli import build_parser
from deit_models.data.datasets import DATASETS
from deit_models.deploy.runtimes import BACKENDS, EXPORT_FORMATS
from deit_models.finetuning.finetune import PRESET_OF
from deit_models.nas.space import space_from_toml
from deit_models.recipes.presets import PRESETS
from deit_models.recipes.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
DOCS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in ("*.md", "docs/**/*.md", "weights/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in sorted(ROOT.glob(pattern))
}
_PAGES = ("data", "loading", "finetuning", "training", "deployment", "search", "labels", "scale", "demo", "heat_maps")
GUIDES = ("README.md", *(f"docs/{name}.md" for name in _PAGES))
NOTEBOOKS = [json.loads(path.read_bytes()) for path in (ROOT / "examples").glob("*.ipynb")]
MAX_README_LINES = 120
TABLE = re.compile(r"(<!-- models:.*?-->\n)(.*?)(<!-- /models -->)", re.DOTALL)
# The models people come for, which the README shows
CHOSEN = (
    "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "deit_small_distilled_patch16_224",
    "deit3_base_patch16_224_in21ft1k", "levit_256", "t2t_vit_14", "deit_micro_distilled_patch4_32",
)  # fmt: skip


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a document that are in this language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCS[document], re.DOTALL)


def published(checkpoint: ModelInfo) -> str:
    """Links to the places of publication: `timm`, `facebook`, `authors`; a second place of one owner has a number."""
    places = [(s.repo.partition("/")[0], f"https://huggingface.co/{s.repo}") for s in checkpoint.sources if s.repo]
    places += [("authors", s.url) for s in checkpoint.sources if s.url]
    seen: Counter[str] = Counter()
    links = []
    for owner, address in places:
        seen[owner] += 1
        links.append(f"[{owner}{f' {seen[owner]}' * (seen[owner] > 1)}]({address})")
    return ": " * bool(links) + ", ".join(links)


def model_table(names: Iterable[str], *, links: bool) -> str:
    lines = [
        "| name | parameters | MACs | input | top-1 | top-5 | weights |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    manifest = load_manifest()
    for c in map(manifest.__getitem__, names):
        accuracy = ["" if value is None else f"{value:.1f}" for value in (c.top1, c.top5)]
        data = "shipped, " * any(s.file for s in c.sources) + (c.dataset or "") if c.sources else "none"
        data += published(c) * links
        row = [f"`{c.name}`", f"{c.params / 1e6:.1f} M", f"{c.macs / 1e9:.2f} G", str(c.input_size), *accuracy, data]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("document", "names"), [("README.md", CHOSEN), ("docs/models.md", None)])
def test_table_of_models_equals_the_manifest(
    document: str, names: tuple[str, ...] | None, request: pytest.FixtureRequest
) -> None:
    table, path = model_table(names or load_manifest(), links=names is None), ROOT / document
    if request.config.getoption("--update-docs"):
        path.write_text(TABLE.sub(lambda m: m[1] + table + m[3], DOCS[document]), encoding="utf-8")
    match = TABLE.search(path.read_text(encoding="utf-8"))
    assert match is not None
    assert match[2] == table, "run pytest tests/test_docs.py --update-docs"


def test_readme_fits_on_two_screens() -> None:
    assert len(DOCS["README.md"].splitlines()) <= MAX_README_LINES


def test_first_two_shell_blocks_of_the_readme_are_those_that_ci_runs() -> None:
    first, second, *_ = blocks("README.md", "sh")
    assert "examples/classify_photo.py" in first
    assert "-m pytest" in second


@pytest.mark.parametrize("document", GUIDES)
def test_documents_name_only_models_and_presets_that_exist(document: str) -> None:
    named = set(re.findall(r'"((?:deit3?|levit|t2t_vit|vit_res)_[a-z0-9_]+)"', DOCS[document]))
    assert named or document == "docs/search.md"
    assert named <= {*deit_models.list_models(), *PRESETS}


def test_hub_repositories_of_the_documents_are_in_the_manifest() -> None:
    published = {source.repo for checkpoint in load_manifest().values() for source in checkpoint.sources}
    named = {repo for document in GUIDES for repo in re.findall(r'"((?:timm|facebook)/[^"]+)"', DOCS[document])}
    assert named
    assert named <= published


def test_modules_that_documents_and_notebooks_import_from_exist() -> None:
    texts = [*DOCS.values(), *("".join(cell["source"]) for notebook in NOTEBOOKS for cell in notebook["cells"])]
    imports = {line for text in texts for line in re.findall(r"(?m)^from deit_models[\w.]* import .*$", text)}
    assert imports
    for line in imports:
        exec(line, {})


def test_modules_that_documents_name_exist() -> None:
    named = {
        name
        for document, text in DOCS.items()
        if document != "CHANGELOG.md"
        for name in re.findall(r"`deit_models((?:\.\w+)+)", text)
    }
    assert named
    for name in named:
        pkgutil.resolve_name(f"deit_models{name}")


def test_commands_of_the_documents_are_known_to_the_command() -> None:
    named = {name for document in GUIDES for name in re.findall(r"deit-models ([a-z]\w+)", DOCS[document])}
    shown = subprocess.run(
        [sys.executable, "-m", "deit_models", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    assert named
    assert all(command in shown for command in named)


@pytest.mark.parametrize(
    "document", [document for document in DOCS if "deit-models " in "".join(blocks(document, "sh"))]
)
def test_command_lines_of_the_documents_are_accepted(document: str) -> None:
    text = "".join(blocks(document, "sh")).replace("\\\n", " ")
    found = re.findall(r"(?:^|-m )deit[-_]models (.*)", text, re.MULTILINE)
    assert len(found) == text.count("deit-models ") + text.count("-m deit_models ") - text.count("/deit-models ")
    for line in found:
        build_parser().parse_args(shlex.split(line, comments=True))


@pytest.mark.parametrize("document", sorted(DOCS))
def test_links_of_the_documents_lead_somewhere(document: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", DOCS[document]):
        file = ((ROOT / document).parent / target).resolve() if target else ROOT / document
        assert file.exists(), f"{document} links to {target}"
        titles = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8")) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, f"{document} links to {target}#{anchor}"


LINKS = sorted({link for text in DOCS.values() for link in re.findall(r"https?://[^\s)>\"'`|]+", text)})


def test_links_to_other_hosts_are_well_formed() -> None:
    assert len(LINKS) > 50
    for link in LINKS:
        address = urlsplit(link)
        assert address.scheme == "https" or address.hostname in ("127.0.0.1", "localhost"), link
        assert re.fullmatch(r"[\w.-]+\.[a-z]+|127\.0\.0\.1|localhost", address.hostname or ""), link
        assert not link.endswith((".", ",", ";")), link


@pytest.mark.online
def test_links_to_other_hosts_are_there() -> None:
    gone = []
    for link in LINKS:
        request = urllib.request.Request(link, method="HEAD", headers={"User-Agent": "Mozilla/5.0"})
        try:
            urllib.request.urlopen(request, timeout=20).close()
        except OSError as error:
            gone.append(f"{link}: {error}")
    assert gone == []


def test_training_guide_names_only_presets_and_settings_that_exist() -> None:
    text = DOCS["docs/training.md"]
    named = set(re.findall(r"`((?:deit3?|levit|t2t|cifar|vit_res|supernet)_[a-z0-9_]+)`", text)) - set(
        deit_models.list_models()
    )
    assert named
    assert named <= PRESETS.keys()
    settings = set(re.findall(r"`(\w+) = ", text)) | set(re.findall(r"`(?:--)?(distill[a-z-]*|alpha|tau)\b[^/]", text))
    assert {name.replace("-", "_") for name in settings} <= {field.name for field in dataclasses.fields(Recipe)}


def test_search_guide_shows_a_space_that_can_be_searched() -> None:
    (space,) = blocks("docs/search.md", "toml")
    assert space_from_toml(space).count() > 1000


def test_fine_tuning_guide_names_the_preset_of_every_data_set() -> None:
    text = DOCS["docs/finetuning.md"]
    rows = re.findall(r"^\| (`[a-z].*?) \| `(\w+)` \|", text, re.MULTILINE)
    named = {name.strip("`"): preset for names, preset in rows for name in names.split(", ")}
    assert {name: preset for name, preset in PRESET_OF.items() if not name.startswith("inat")} | {
        "inaturalist-...": PRESET_OF["inaturalist-2018"]
    } == named
    assert all(f"`{name}`" in text or name.startswith("inat") for name in DATASETS)


def test_deployment_guide_names_the_backends_and_formats_there_are() -> None:
    text = DOCS["docs/deployment.md"]
    assert re.findall(r"^\| `(\w+)` \|.*\|.*\|$", text, re.MULTILINE)[: len(BACKENDS)] == list(BACKENDS)
    assert {kind.suffix for kind in EXPORT_FORMATS.values()} == set(
        re.findall(r"deit-models export \S+ \w+(\.\w+)", text)
    )


def test_public_names_are_importable_and_documented() -> None:
    for name in deit_models.__all__:
        value = getattr(deit_models, name)
        assert name == "__version__" or value.__doc__, f"{name} has no docstring"
