"""And back: a model written as a folder that timm, transformers and this package load, and pushed to the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import Layout
from ..errors import ConfigError, FetchError, first_line
from ..files import atomic_write
from ..hub.fetch import WEIGHTS_NAMES
from ..hub.weights import meta_model
from ..models.layers import ImageClassifier
from .card import model_card
from .configs import write_config
from .layouts import from_native


def save_pretrained(
    model: ImageClassifier, save_directory: str | os.PathLike[str], *, layout: Layout = "native"
) -> None:
    """Write a model as a folder: config.json, model.safetensors and a model card (an existing README.md is kept).

    Each file is written beside its place and moved there once complete, so that a folder which is being written over,
    even the one the model was loaded from, holds a whole file at any moment.

    Args:
        model: from `create_model` or `from_pretrained`.
        save_directory: made if need be.
        layout: "native" for this package; "timm" for `timm.create_model("local-dir:...")` (of
            LeViT also "timm-conv", the form with convolutions); "transformers" for
            `AutoModelForImageClassification`, with a preprocessor_config.json for `AutoImageProcessor`. This package
            loads all three. dtypes are written as they are.

    Raises: ConfigError: an unknown layout, a path that is a file, or a model without `origin` (built by hand).
    """
    folder = Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a directory to write to")
    files = write_config(model, layout)
    tensors = layout_tensors(model, layout)
    with atomic_write(folder / WEIGHTS_NAMES[0]) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    for name, data in files.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not (folder / "README.md").exists():
        with atomic_write(folder / "README.md") as temporary:
            temporary.write_text(model_card(model, layout), encoding="utf-8")


def push_to_hub(
    model: ImageClassifier,
    repo_id: str,
    *,
    layout: Layout = "native",
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload with deit-models",
) -> str:
    """Upload the folder `save_pretrained` writes; the repository is created if need be. Gives its address.

    Raises: ConfigError: see `save_pretrained`. FetchError: the Hub refused, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    api = HfApi(token=token, library_name="deit_models")
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, layout=layout)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            has_card = api.file_exists(repo.repo_id, "README.md")
            Path(folder, "README.md").write_text(model_card(model, layout, repo_id=repo.repo_id), encoding="utf-8")
            api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=folder,
                commit_message=commit_message,
                ignore_patterns=["README.md"] if has_card else None,
            )
        except (hub_errors.HTTPError, ValueError, OSError, RuntimeError) as error:  # type: ignore[attr-defined]
            raise FetchError(
                f"could not push to {repo_id}: {first_line(error)}; is the token right, and may it write?"
            ) from error
    return str(repo)


def layout_tensors(model: ImageClassifier, layout: Layout) -> dict[str, Tensor]:
    """The model's state dict under a layout's names.

    Raises: ConfigError: the family has no such layout, or the tensors are not those of the config (a fused model).
    """
    state: Mapping[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if state.keys() != meta_model(type(model), model.config).state_dict().keys():
        raise ConfigError("the tensors are not those of the config (was the model fused?); save the model it came from")
    return from_native(state, family=model.family, config=model.config, naming=layout)
