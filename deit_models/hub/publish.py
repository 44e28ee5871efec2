"""And back: a model written as a folder that timm, transformers and this package load, and pushed to the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, FetchError
from ..models.layers import ImageClassifier, Layout
from ..registry import Origin, model_spec
from .card import model_card
from .configs import CONFIG_FORMAT, PIL_FILTERS, TIMM_OPTIONS, TRANSFORMERS_FIELDS
from .fetch import CONFIG_NAME, PROCESSOR_NAME, WEIGHTS_NAMES, atomic_write, first_line
from .layouts import Naming, from_native
from .manifest import Preprocessing, load_manifest


def save_pretrained(
    model: ImageClassifier, save_directory: str | os.PathLike[str], *, layout: Layout = "native"
) -> None:
    """Write a model as a folder: config.json, model.safetensors and a model card (an existing README.md is kept).

    Each file is written beside its place and moved there once complete, so that a folder which is being written over,
    even the one the model was loaded from, holds a whole file at any moment.

    Args:
        model: from `create_model` or `from_pretrained`.
        save_directory: made if need be.
        layout: "native" for this package; "timm" for `timm.create_model("local-dir:...")`; "transformers" for
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
    """The model's state dict under a layout's names."""
    state: Mapping[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    naming: Naming = layout
    distilled = bool(getattr(model.config, "distilled", False))
    prefix = ("deit." if distilled else "vit.") if layout == "transformers" else ""
    return from_native(state, family=model.family, naming=naming, distilled=distilled, body_prefix=prefix)


def write_config(model: ImageClassifier, layout: Layout) -> dict[str, dict[str, Any]]:
    """The JSON files that go beside model.safetensors in a layout: contents by file name.

    Raises: ConfigError: an unknown layout, or a model without `origin` (built by hand).
    """
    if model.origin is None:
        raise ConfigError("this model has no origin; build it with create_model or load it with from_pretrained")
    if layout == "native":
        return {CONFIG_NAME: _write_native(model, model.origin)}
    if layout == "timm":
        return {CONFIG_NAME: _write_timm(model, model.origin)}
    if layout == "transformers":
        return {
            CONFIG_NAME: _write_transformers(model, model.origin),
            PROCESSOR_NAME: _write_processor(model.origin.preprocessing),
        }
    raise ConfigError(f"layout={layout!r}; expected 'native', 'timm' or 'transformers'")


def _write_native(model: ImageClassifier, origin: Origin) -> dict[str, Any]:
    data: dict[str, Any] = {
        "deit_models": CONFIG_FORMAT,
        "architecture": origin.name,
        "family": model.family,
        "config": asdict(model.config),
        "preprocessing": origin.preprocessing.to_dict(),
    }
    if origin.class_names is not None:
        data["id2label"] = dict(_id2label(origin.class_names))
    facts = {key: getattr(origin, key) for key in ("dataset", "top1", "top5", "licence", "notes")}
    return data | {key: value for key, value in facts.items() if value is not None}


def _write_timm(model: ImageClassifier, origin: Origin) -> dict[str, Any]:
    config, spec = model.config, origin.preprocessing
    known = load_manifest().get(origin.name)
    in_timm = known is not None and any(source.layout == "timm" for source in known.sources)
    # timm builds shapes it has no name for from a name it has and the options that differ.
    name = origin.name if in_timm else f"deit_tiny{'_distilled' if config.distilled else ''}_patch16_224"
    reference = model_spec(name).config
    differing = {key: getattr(config, key) for key in TIMM_OPTIONS if getattr(config, key) != getattr(reference, key)}
    squash = not isinstance(spec.resize, int)
    resized = spec.resize[0] if isinstance(spec.resize, tuple) else spec.resize
    data: dict[str, Any] = {
        "architecture": name,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "pretrained_cfg": {
            "tag": "deit_models",
            "custom_load": False,
            "input_size": [config.in_chans, *config.image_hw],
            "fixed_input_size": True,
            "interpolation": spec.interpolation,
            "crop_pct": spec.crop[0] / resized if squash else max(spec.crop) / resized,
            "crop_mode": "squash" if squash else "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": config.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.distilled else "head",
        },
    }
    if origin.licence is not None:
        data["pretrained_cfg"]["license"] = origin.licence.lower()
    if origin.class_names is not None:
        data["label_names"] = list(origin.class_names)
    return data | ({"model_args": differing} if differing else {})


def _write_transformers(model: ImageClassifier, origin: Origin) -> dict[str, Any]:
    config = model.config
    names = origin.class_names or tuple(f"LABEL_{index}" for index in range(config.num_classes))
    return {
        "architectures": ["DeiTForImageClassificationWithTeacher" if config.distilled else "ViTForImageClassification"],
        "model_type": "deit" if config.distilled else "vit",
        "hidden_act": "gelu",
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        **{theirs: getattr(config, ours) for ours, theirs in TRANSFORMERS_FIELDS.items()},
        "id2label": dict(_id2label(names)),
        "label2id": {label: int(index) for index, label in _id2label(names)},
    }


def _write_processor(spec: Preprocessing) -> dict[str, Any]:
    squash = not isinstance(spec.resize, int)
    return {
        "image_processor_type": "DeiTImageProcessor",
        "do_resize": True,
        "size": {"height": spec.resize[0], "width": spec.resize[1]}
        if isinstance(spec.resize, tuple)
        else {"shortest_edge": spec.resize},
        "resample": next(number for number, name in PIL_FILTERS.items() if name == spec.interpolation),
        "do_center_crop": not squash or spec.resize != spec.crop,
        "crop_size": {"height": spec.crop[0], "width": spec.crop[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def _id2label(names: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(str(index), name) for index, name in enumerate(names)]
