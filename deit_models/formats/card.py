"""The model card that goes beside published weights: front matter for the Hub, then what is known of them."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCardData

from ..checkpoint import Layout, Origin, load_manifest
from ..errors import ConfigError
from ..models.layers import ImageClassifier

_USE = {
    "native": "import deit_models\n\nmodel = deit_models.from_pretrained({repo!r})",
    "timm": "import timm\n\nmodel = timm.create_model({timm_repo!r}, pretrained=True)",
    "transformers": "from transformers import pipeline\n\nclassify = pipeline('image-classification', {repo!r})",
}


def model_card(model: ImageClassifier, layout: Layout, *, repo_id: str = "owner/name") -> str:
    """A README.md for the Hub: front matter with licence, tags, metrics and base model, facts, and a line to load it.

    Raises: ConfigError: a model without `origin` (built by hand).
    """
    origin = model.origin
    if origin is None:
        raise ConfigError("this model has no origin; build it with create_model or load it with from_pretrained")
    (height, width), spec = model.config.image_hw, origin.preprocessing
    known = load_manifest().get(origin.name)
    digest = f" (SHA-256 {origin.sha256})" if origin.sha256 else ""
    accuracies = [f"{value} % {name}" for name, value in (("top-1", origin.top1), ("top-5", origin.top5)) if value]
    # weights that training changed have data, but no source any more
    made = "random, not trained" if origin.dataset is None else "trained with deit-models"
    facts = {
        "Weights": f"{origin.source or made}{digest}",
        "Trained on": origin.dataset or "not recorded",
        "Accuracy": ", ".join(accuracies) or "not recorded",
        "Evaluation transform": f"{spec}, mean {list(spec.mean)}, std {list(spec.std)}",
        "Paper": known.paper if known is not None else None,
    }
    return "\n".join(
        [
            "---",
            _front_matter(model, origin, layout).to_yaml(),
            "---",
            "",
            f"# {origin.name}",
            "",
            f"An image classifier of the {model.family} family with {model.num_classes} classes, for images of "
            f"{height}x{width} pixels; {sum(p.numel() for p in model.parameters()):,} parameters.",
            "",
            *(f"- {name}: {value}" for name, value in facts.items() if value is not None),
            "",
            *([origin.notes, ""] if origin.notes else []),
            "## Use",
            "",
            "```python",
            _USE[layout.removesuffix("-conv")].format(repo=repo_id, timm_repo=f"hf_hub:{repo_id}"),
            "```",
            "",
        ]
    )


def _front_matter(model: ImageClassifier, origin: Origin, layout: Layout) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=origin.dataset.lower(),
            dataset_name=origin.dataset,
            metric_type="accuracy",
            metric_name=name,
            metric_value=value,
        )
        for name, value in (("top-1", origin.top1), ("top-5", origin.top5))
        if value is not None and origin.dataset is not None
    ]
    return ModelCardData(
        license=None if origin.licence is None else origin.licence.lower(),
        library_name="deit-models" if layout == "native" else layout.removesuffix("-conv"),
        pipeline_tag="image-classification",
        tags=["image-classification", model.family, "deit-models"],
        datasets=None if origin.dataset is None else [origin.dataset.lower()],
        # of the Hub's repositories only: a file here or a plain address is none
        base_model=origin.source if origin.revision is not None else None,
        model_name=origin.name,
        eval_results=results or None,
        ignore_metadata_errors=True,
    )
