"""A model written as a folder that timm, transformers and this package load, with a card, and pushed to the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from torch import Tensor

from ..checkpoint import Layout, ModelLike, Origin, load_manifest
from ..errors import ConfigError, FetchError, SaveError, first_line
from ..files import markdown, write_json, write_tensors, write_text
from ..registry import add_web_networks, meta_model, own_model
from .layouts import CARD_NAME, WEIGHTS_NAMES, known_origin, layouts_of, write_config

_USE = {
    "native": "import deit_models\n\nmodel = deit_models.from_pretrained({repo!r})",
    "timm": "import timm\n\nmodel = timm.create_model({timm_repo!r}, pretrained=True)",
    "transformers": "from transformers import pipeline\n\nclassify = pipeline('image-classification', {repo!r})",
    "backbone": "from transformers import AutoModel\n\nbackbone = AutoModel.from_pretrained({repo!r})",
}


def save_pretrained(model: ModelLike, save_directory: str | os.PathLike[str], *, layout: Layout = "native") -> None:
    """Write a model as a folder: config.json, model.safetensors and a model card (an existing README.md is kept).

    Each file is moved to its place once it is complete. So the folder may be the one that the model was loaded from.

    Args:
        model: from `create_model` or `from_pretrained`.
        save_directory: made if need be.
        layout: "native" for this package; "timm" for `timm.create_model("local-dir:...")` (of
            LeViT also "timm-conv", the form with convolutions); "transformers" for
            `AutoModelForImageClassification`, with a preprocessor_config.json for `AutoImageProcessor`. This package
            loads all three. dtypes are written as they are.

    Raises: ConfigError: an unknown layout, a path that is a file, or a model without `origin` (built by hand).
        SaveError: no space, no permission.
    """
    model, folder = own_model(model), Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a directory to write to")
    files = write_config(model, layout)
    write_tensors(folder / WEIGHTS_NAMES[0], layout_tensors(model, layout))
    for name, data in files.items():
        write_json(folder / name, data)
    if not (folder / CARD_NAME).exists():
        write_text(folder / CARD_NAME, model_card(model, layout))


def push_to_hub(
    model: ModelLike,
    repo_id: str,
    *,
    layout: Layout = "native",
    token: str | None = None,
    private: bool | None = None,
    onnx: bool = False,
    commit_message: str = "Upload with deit-models",
) -> str:
    """Upload the folder `save_pretrained` writes; the repository is created if need be. Gives its address.

    `onnx` adds onnx/model.onnx and onnx/model_quantized.onnx for transformers.js, beside the layout "transformers".

    Raises: ConfigError, SaveError: see `save_pretrained`; `onnx` with another layout, or a model that transformers.js
        cannot serve. MissingExtraError, AgreementError: of `onnx`, see `deploy.export`. FetchError: the Hub refused, or
        cannot be reached.
    """
    if onnx and layout != "transformers":
        raise ConfigError(f"onnx=True, layout={layout!r}: transformers.js reads layout='transformers' alone; pass that")
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    model, api = own_model(model), HfApi(token=token, library_name="deit_models")
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, layout=layout)
        if onnx:
            add_web_networks(model, Path(folder))
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            has_card = api.file_exists(repo.repo_id, CARD_NAME)
            write_text(Path(folder, CARD_NAME), model_card(model, layout, repo_id=repo.repo_id))
            api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=folder,
                commit_message=commit_message,
                ignore_patterns=[CARD_NAME] if has_card else None,
            )
        except SaveError:
            raise
        except (hub_errors.HTTPError, ValueError, OSError, RuntimeError) as error:  # type: ignore[attr-defined]
            raise FetchError(
                f"could not push to {repo_id}: {first_line(error)}; is the token right, and may it write?"
            ) from error
    return str(repo)


def layout_tensors(model: ModelLike, layout: Layout) -> dict[str, Tensor]:
    """The model's state dict under a layout's names; tensors that share memory are copied.

    Raises: ConfigError: the family has no such layout, or the tensors are not those of the config (a fused model).
    """
    state = model.state_dict()
    differing = state.keys() ^ meta_model(type(model), model.config).state_dict().keys()
    if differing:
        raise ConfigError(
            f"{min(differing)}: the tensors are not those of the config (was the model fused or quantised, or has it "
            "adapters or parametrizations?); save the model it came from, or what peft's merge_and_unload() or torch's "
            "remove_parametrizations() leaves"
        )
    plain = {name: _plain(name, tensor) for name, tensor in state.items()}
    named = layouts_of(model.family).from_native(plain, config=model.config, naming=layout)
    end = 0
    for name in sorted(named, key=lambda name: named[name].data_ptr()):
        start, size = named[name].data_ptr(), named[name].nbytes
        if start < end:  # tied: safetensors refuses that
            named[name] = named[name].clone()
        end = max(end, start + size)
    return named


def _plain(name: str, tensor: Any) -> Tensor:
    """A tensor of a state dict as plain numbers: shards of all processes joined, a quantised one multiplied out.

    Raises: ConfigError: it has no numbers here, or they cannot be given.
    """
    try:
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        tensor = tensor.dequantize() if tensor.is_quantized or type(tensor) is not Tensor else tensor
    except Exception as error:  # of whatever library made it
        raise ConfigError(f"{name} is a {type(tensor).__name__}, which cannot be saved: {first_line(error)}") from error
    if type(tensor) is not Tensor or tensor.is_meta or tensor.layout != torch.strided:
        where = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__}, {tensor.layout}"
        raise ConfigError(f"{name} is {where}; only plain tensors with values can be saved")
    return tensor


def model_card(model: ModelLike, layout: Layout, *, repo_id: str = "owner/name") -> str:
    """A README.md for the Hub: front matter with licence, tags, metrics and base model, facts, and a line to load it.

    Raises: ConfigError: a model without `origin` (built by hand).
    """
    origin = known_origin(model)
    (height, width), spec = model.config.image_hw, origin.preprocessing
    known = load_manifest().get(origin.name)
    digest = f" (SHA-256 {origin.sha256})" if origin.sha256 else ""
    accuracies = [f"{value} % {name}" for name, value in (("top-1", origin.top1), ("top-5", origin.top5)) if value]
    # weights trained here have data and no source
    made = "random, not trained" if origin.dataset is None else "trained with deit-models"
    facts = {
        "Weights": f"{markdown(origin.source or made)}{digest}",
        "Trained on": markdown(origin.dataset or "not recorded"),
        "Accuracy": ", ".join(accuracies) or "not recorded",
        "Evaluation transform": f"{spec}, mean {list(spec.mean)}, std {list(spec.std)}",
        "Paper": known.paper if known is not None else None,
    }
    kind = f"An image classifier with {model.num_classes} classes" if model.num_classes else "A backbone without a head"
    program = "backbone" if layout == "transformers" and not model.num_classes else layout.removesuffix("-conv")
    use = _USE[program].format(repo=repo_id, timm_repo=f"hf_hub:{repo_id}")
    parts = [
        f"---\n{_front_matter(model, origin, layout).to_yaml()}\n---",
        f"# {markdown(origin.name)}",
        f"{kind}, of the {model.family} family, for images of "
        f"{height}x{width} pixels; {sum(p.numel() for p in model.parameters()):,} parameters.",
        "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None),
        *([origin.notes] if origin.notes else []),
        f"## Use\n\n```python\n{use}\n```\n",
    ]
    return "\n\n".join(parts)


_HUB_DATASETS = {
    **{"imagenet-1k": "ILSVRC/imagenet-1k", "imagenet": "ILSVRC/imagenet-1k"},
    **{"cifar-10": "uoft-cs/cifar10", "cifar10": "uoft-cs/cifar10"},
    **{"cifar-100": "uoft-cs/cifar100", "cifar100": "uoft-cs/cifar100"},
}
"""The Hub's names of data sets; of other data, such as a folder here, it would make a link that leads nowhere."""


def _front_matter(model: ModelLike, origin: Origin, layout: Layout) -> ModelCardData:
    known = _HUB_DATASETS.get((origin.dataset or "").lower())
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=known or "imagefolder",
            dataset_name=origin.dataset,
            metric_type="accuracy",
            metric_name=name,
            metric_value=value,
        )
        for name, value in (("top-1", origin.top1), ("top-5", origin.top5))
        if value is not None and origin.dataset is not None
    ]
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    return ModelCardData(
        license=None if origin.licence is None else origin.licence.lower(),
        library_name="deit-models" if layout == "native" else layout.removesuffix("-conv"),
        pipeline_tag=task,
        tags=[task, model.family, "deit-models"],
        datasets=None if known is None else [known],
        # of the Hub's repositories only: a file here or a plain address is none
        base_model=origin.source if origin.revision is not None else origin.base,
        model_name=origin.name,
        eval_results=results or None,
        ignore_metadata_errors=True,
    )
