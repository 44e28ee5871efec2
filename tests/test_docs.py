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
from collections.abc import Callable, Iterable
from functools import partial
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
FAMILIES = {
    **{"deit": "deit_*", "deit3": "deit3_*", "dino": "dino_*", "cait": "cait_*", "resmlp": "resmlp_*"},
    **{"levit": "levit_*", "t2t_vit": "t2t_vit_*", "vit_resnas": "vit_res*"},
}
"""Page below docs/families/ -> the names of its models."""
FAMILY_PAGES = tuple(f"docs/families/{page}.md" for page in FAMILIES)
GUIDES = ("README.md", *(f"docs/{name}.md" for name in _PAGES), *FAMILY_PAGES)
SPEEDS = ROOT / "benchmarks" / "results" / "family_speed.md"
NOTEBOOKS = [json.loads(path.read_bytes()) for path in (ROOT / "examples").glob("*.ipynb")]
MAX_README_LINES = 120
PART = re.compile(r"(<!-- (models|sources|families|speed):.*?-->\n)(.*?)(<!-- /\2 -->)", re.DOTALL)
# The models people come for, which the README shows
CHOSEN = (
    "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "deit_small_distilled_patch16_224",
    "deit3_base_patch16_224_in21ft1k", "levit_256", "t2t_vit_14", "deit_micro_distilled_patch4_32",
)  # fmt: skip


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a document that are in this language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCS[document], re.DOTALL)


def published(checkpoint: ModelInfo) -> str:
    """Links to the places of publication, under their names there: repositories of the Hub, then the authors' files."""
    places = [(source.repo, f"https://huggingface.co/{source.repo}") for source in checkpoint.sources if source.repo]
    places += [(source.url.rpartition("/")[2], source.url) for source in checkpoint.sources if source.url]
    shipped = ["[the package](../../weights/README.md)" for s in checkpoint.sources if s.file]
    return ", ".join([*shipped, *(f"[{name}]({address})" for name, address in places)])


def markdown_table(heads: Iterable[str], rows: Iterable[Iterable[str]], *, right: Iterable[str]) -> str:
    """A table in Markdown; the columns in `right` are aligned so."""
    heads = list(heads)
    lines = [heads, ["---:" if head in set(right) else "---" for head in heads], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def size_and_accuracy(checkpoint: ModelInfo, accuracies: Iterable[str]) -> list[str]:
    """Cells of a row: name, parameters, MACs, input, and these accuracies."""
    known = checkpoint.accuracies
    figures = [f"{known[name]:.1f}" if name in known else "" for name in accuracies]
    size = [f"{checkpoint.params / 1e6:.1f} M", f"{checkpoint.macs / 1e9:.2f} G", str(checkpoint.input_size)]
    return [f"`{checkpoint.name}`", *size, *figures]


SIZE = ("parameters", "MACs", "input")


def chosen_table() -> str:
    """The models of the README."""
    accuracies, rows = ("top-1", "top-5"), []
    for c in map(load_manifest().__getitem__, CHOSEN):
        data = "shipped, " * any(s.file for s in c.sources) + (c.dataset or "") if c.sources else "none"
        rows.append([*size_and_accuracy(c, accuracies), data])
    return markdown_table(["name", *SIZE, *accuracies, "weights"], rows, right=(*SIZE, *accuracies))


def models_of(page: str) -> list[ModelInfo]:
    """The models of a family's page."""
    return [load_manifest()[name] for name in deit_models.list_models(FAMILIES[page])]


def family_table(page: str) -> str:
    """All models of a family's page, with the accuracies that some of them have."""
    models = models_of(page)
    accuracies = list(dict.fromkeys(name for c in models for name in c.accuracies))
    rows = [[*size_and_accuracy(c, accuracies), c.dataset or ("" if c.licence else "no weights")] for c in models]
    return markdown_table(["name", *SIZE, *accuracies, "trained on"], rows, right=(*SIZE, *accuracies))


def table_of_sources(page: str) -> str:
    """Where the weights of a family are published, under which names and licence."""
    models = models_of(page)
    (licence,) = {c.licence for c in models if c.licence}
    rows = [[f"`{c.name}`", published(c)] for c in models if c.sources]
    table = markdown_table(["name", "repositories of the Hub, then the authors' file"], rows, right=()) if rows else ""
    return f"Licence of the weights: {licence}.\n\n" + table


def table_of_families() -> str:
    """A row a family, with a link to its page."""
    rows = []
    for page in FAMILIES:
        models = models_of(page)
        title = DOCS[f"docs/families/{page}.md"].partition("\n")[0].removeprefix("# ")
        low, high = (pick(c.params for c in models) / 1e6 for pick in (min, max))
        best = max((c.top1 or c.knn_top1 or 0, "" if c.top1 else " k-NN") for c in models if c.dataset == "ImageNet-1k")
        papers = [c.paper for c in models if c.paper]
        paper = f"[{papers[0]}](https://arxiv.org/abs/{papers[0].removeprefix('arXiv:')})"
        licence = next(c.licence for c in models if c.licence)
        counts = [str(len(models)), str(sum(bool(c.sources) for c in models)), f"{low:.1f} to {high:.1f} M"]
        rows.append([f"[{title}](families/{page}.md)", *counts, f"{best[0]:.1f}{best[1]}", paper, licence])
    right = ("models", "with weights", "parameters", "best accuracy")
    return markdown_table(["family", *right, "paper", "licence of the weights"], rows, right=right)


def speed_table(page: str) -> str:
    """What benchmarks/inference.py measured of a family's models."""
    text = SPEEDS.read_text(encoding="utf-8") if SPEEDS.exists() else ""
    rows = [line.strip("| ").split(" | ") for line in re.findall(r"(?m)^\| `.*$", text)]
    found = [row for row in rows if row[0].strip("`") in deit_models.list_models(FAMILIES[page])]
    if not found:
        return "Not measured yet: `python benchmarks/inference.py --families` does.\n"
    where = next(line for line in text.splitlines() if line and line[0] not in "#|")
    heads = ["model", "batch", "images/s as it is", "images/s by `optimize`"]
    return f"{where}\n\n" + markdown_table(heads, found, right=heads[1:])


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"models": chosen_table},
    "docs/models.md": {"families": table_of_families},
    **{
        f"docs/families/{page}.md": {
            "models": partial(family_table, page),
            "sources": partial(table_of_sources, page),
            "speed": partial(speed_table, page),
        }
        for page in FAMILIES
    },
}


@pytest.mark.parametrize("document", PARTS)
def test_tables_of_models_equal_the_manifest(document: str, request: pytest.FixtureRequest) -> None:
    path, parts = ROOT / document, PARTS[document]
    if request.config.getoption("--update-docs"):
        path.write_text(PART.sub(lambda m: m[1] + parts[m[2]]() + m[4], DOCS[document]), encoding="utf-8")
    found = {match[2]: match[3] for match in PART.finditer(path.read_text(encoding="utf-8"))}
    assert found.keys() == parts.keys()
    for name, write in parts.items():
        assert found[name] == write(), "run pytest tests/test_docs.py --update-docs"


def test_every_model_is_on_one_page_of_a_family() -> None:
    listed = [name for pattern in FAMILIES.values() for name in deit_models.list_models(pattern)]
    assert sorted(listed) == sorted(load_manifest())
    assert {path.stem for path in (ROOT / "docs" / "families").glob("*.md")} == set(FAMILIES)


@pytest.mark.parametrize("document", FAMILY_PAGES)
def test_page_of_a_family_names_recipes_that_exist_and_its_paper(document: str) -> None:
    text = DOCS[document]
    recipes = text.partition("## Recipes")[2].partition("## Speed here")[0]
    named = {name for name in re.findall(r"`([a-z0-9]+_[a-z0-9_]+)`", recipes) if name not in deit_models.list_models()}
    assert named | {"finetune"} <= {*PRESETS}
    paper = next(c.paper for c in models_of(Path(document).stem) if c.paper)
    assert f"https://arxiv.org/abs/{paper.removeprefix('arXiv:')}" in text


def test_readme_fits_on_two_screens() -> None:
    assert len(DOCS["README.md"].splitlines()) <= MAX_README_LINES


def test_first_two_shell_blocks_of_the_readme_are_those_that_ci_runs() -> None:
    first, second, *_ = blocks("README.md", "sh")
    assert "examples/classify_photo.py" in first
    assert "-m pytest" in second


@pytest.mark.parametrize("document", GUIDES)
def test_documents_name_only_models_and_presets_that_exist(document: str) -> None:
    named = set(re.findall(r'"((?:deit3?|levit|t2t_vit|vit_res(?:nas)?|cait|resmlp|dino)_[a-z0-9_]+)"', DOCS[document]))
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
