"""Pages of the site that no file of docs/ holds: the reference, and documents from other places of the repository.

mkdocs calls `on_files` and `on_page_markdown` (`hooks` in mkdocs.yml), mkdocstrings uses `RaisesByName` (`extensions`).
The package must be importable: the tables come from its parsers and presets.
"""

from __future__ import annotations

import argparse
import html
import posixpath
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from deit_models.cli import build_parser
from deit_models.recipes.presets import PRESETS
from deit_models.recipes.recipe import Recipe, recipe_named

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "MODEL_CARD.md", "RELEASING.md", "SECURITY.md"),
    *("*/README.md", "examples/*/README.md", "benchmarks/results/*.md"),
)
FIGURES = ("benchmarks/results/*.png", "examples/*.jpg", "examples/*.py", "examples/*.ipynb")

PYTHON = {
    "loading": ("Load and save", ("from_pretrained", "create_model", "save_pretrained", "push_to_hub")),
    "classifying": (
        "Classify and score",
        (
            *("Classifier", "transform_for", "evaluate"),
            *("scoring.embeddings.load_features", "scoring.embeddings.nearest_neighbours"),
            *("scoring.embeddings.knn_accuracy", "scoring.embeddings.evaluate_knn"),
        ),
    ),
    "training": (
        "Fine-tune and train",
        ("finetune", "adapt_head", "train", "make_label_maps", "recipe_named", "recipes.recipe.Recipe", "WithLoss"),
    ),
    "data": ("Data", ("wrap", "data.datasets.open_dataset", "data.sources.image_sources")),
    "deployment": (
        "Deploy",
        (
            *("optimize", "export", "deploy.adaptive.AdaptiveClassifier"),
            *("deploy.runtimes.open_exported", "deploy.runtimes.read_metadata", "deploy.network.decreasing"),
        ),
    ),
    "search": (
        "Search",
        (
            *("nas.space.read_space", "nas.search.split_images", "nas.search.train_supernet", "nas.search.search"),
            *("nas.settings.Evolution", "training.run.Computing"),
        ),
    ),
    "seeing": (
        "See",
        ("heat_maps", "attention_maps", "show.pictures.view", "show.pictures.overlay", "show.demo.launch"),
    ),
    "names": ("Names of models", ("list_models", "model_info", "count_macs", "register_model")),
    "errors": (
        "Errors",
        (
            *("DeitModelsError", "AgreementError", "CheckpointError", "ConfigError", "DataError", "FetchError"),
            *("ImageError", "IntegrityError", "ManifestError", "MissingExtraError", "SaveError", "TrainingError"),
            "UnknownModelError",
        ),
    ),
}
"""Page of the reference -> its title, and the names below `deit_models` that it describes."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are generated, and those that stand outside docs/."""
    pages = {f"reference/{name}.md": python_page(*page) for name, page in PYTHON.items()}
    pages |= {"reference/command.md": command_page(), "reference/recipes.md": recipes_page()}
    for address, text in pages.items():
        files.append(File.generated(config, address, content=text))
    for path in sorted(path for pattern in COPIED + FIGURES for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Lead links of the repository to pages of the site: docs/ is the site's top."""
    here = page.file.src_uri
    on_disk = Path(page.file.abs_src_path or ROOT / "docs" / here).relative_to(ROOT).parent.as_posix()

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(on_disk, match[1])).removeprefix("docs/")
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{match[2]})"

    return re.sub(r"\]\(([\w./-]+)((?:#[\w-]*)?)\)", moved, markdown)


def python_page(title: str, names: tuple[str, ...]) -> str:
    """A page that mkdocstrings fills from docstrings."""
    return "\n\n".join([f"# {title}", *(f"::: deit_models.{name}" for name in names)]) + "\n"


def command_page() -> str:
    """All commands with their options, as their parsers have them."""
    return "\n".join(["# The command `deit-models`", "", *_command(build_parser(), level=1)]) + "\n"


def _command(parser: argparse.ArgumentParser, *, level: int) -> Iterator[str]:
    """A parser's description, usage and options, then those of its subcommands."""
    if level > 1:
        yield from (f"{'#' * level} {parser.prog.partition(' ')[2]}", "")
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    usage = textwrap.fill(usage, 80, subsequent_indent="    ", break_on_hyphens=False)
    yield from (_plain(parser.description), "", "```text", usage, "```", "")
    if parser.epilog:
        yield from ("```sh", *parser.epilog.replace("example: ", "").splitlines(), "```", "")
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    explained = [action for action in shown if action.help]
    if explained:
        yield from ("| argument | meaning |", "| --- | --- |")
        for action in explained:
            meaning = _plain(str(action.help) % {**vars(action), "prog": parser.prog})
            meaning = re.sub(r"docs/(\w+\.md)", r"[docs/\1](../\1)", meaning)
            yield f"| {_spelling(action)} | {meaning} |"
        yield ""
    fields_of_recipe = [_spelling(action) for action in shown if action.option_strings and not action.help]
    if fields_of_recipe:
        yield from ("Fields of the [recipe](recipes.md#fields): " + ", ".join(fields_of_recipe) + ".", "")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _command(command, level=level + 1)


def _spelling(action: argparse.Action) -> str:
    """An argument as it is typed: its spellings, then its value."""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    if not action.option_strings or action.nargs == 0:
        return names
    value = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    return f"{names} `{value}`"


def recipes_page() -> str:
    """The presets beside each other, and every field of a recipe."""
    columns = ("epochs", "batch_size", "optimizer", "lr", "weight_decay", "img_size", "augment", "distillation")
    text = [
        "# Recipes",
        "",
        "A recipe holds all settings of a training run. `--recipe NAME` and `recipe_named(NAME)` give a preset.",
        "Each field can be changed: `--epochs 100`, `recipe_named(NAME, epochs=100)`. [The guide](../training.md) says",
        "what is surprising in them.",
        "",
        "## Presets",
        "",
        f"| preset | what it is, and its source | {' | '.join(columns)} |",
        "| --- | --- |" + " --- |" * len(columns),
    ]
    for name, (source, _) in PRESETS.items():
        recipe = recipe_named(name)
        text.append(f"| `{name}` | {_plain(source)} | {' | '.join(str(getattr(recipe, c)) for c in columns)} |")
    text += ["", "## Fields", "", "| field | default | meaning |", "| --- | --- | --- |"]
    text += [f"| `{f.name}` | `{f.default!r}` | {_plain(f.metadata['help'])} |" for f in fields(Recipe)]
    return "\n".join(text) + "\n"


def _plain(text: Any) -> str:
    """Words that Markdown shows as they are, on one line."""
    return re.sub(r"([\\*_|\[\]])", r"\\\1", html.escape(" ".join(str(text or "").split()), quote=False))


class RaisesByName(griffe.Extension):
    """Docstrings of this package list errors in one paragraph; Griffe expects a line for each."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the paragraph of one object."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?ms)^Raises: (.*?)(?=\n\n|\Z)", _one_a_line, obj.docstring.value)


def _one_a_line(paragraph: re.Match[str]) -> str:
    """`Raises: A: this. B, C: that.` with a line for each of A, B and C."""
    found = re.split(r"(?:^|(?<=\.) )((?:[A-Z]\w+, )*[A-Z]\w+): ", " ".join(paragraph[1].split()))[1:]
    pairs = zip(found[::2], found[1::2], strict=True)
    return "\n    ".join(["Raises:", *(f"{name}: {why}" for names, why in pairs for name in names.split(", "))])
