"""Agreement of half precision and float32 on photographs.

    python benchmarks/precision.py PHOTOS [--models GLOB] [--device cuda] [--write]

Random weights give every photograph the same class, so their own head would prove nothing. Here each model gets a head
with one class for each photograph; its logits are the similarity of an image's embedding to that of the photograph, all
in float32. In float32 every photograph is then its own class; under autocast it should stay so.
The same is measured with inputs ten times as large.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import deit_models
from deit_models.images.decoding import decode_image
from deit_models.images.transforms import transform_for
from deit_models.models.layers import ImageClassifier

SUFFIXES = {".jpg", ".jpeg", ".png"}
RESULTS = Path(__file__).parent / "results" / "precision.md"


@torch.inference_mode()
def embeddings(model: ImageClassifier, images: Tensor) -> Tensor:
    """(B, D), in the precision in force."""
    return torch.cat([model.embed(batch) for batch in images.split(20)]).float()


def photograph_head(known: Tensor) -> nn.Linear:
    """Nearest photograph, as a linear layer: -|x - k|^2 / 2 up to a term that all classes share."""
    centred = known.double()
    head = nn.Linear(known.shape[1], len(known), device=known.device).double()
    head.weight.data, head.bias.data = centred, -centred.square().sum(1) / 2
    return head


def agreement(model: ImageClassifier, images: Tensor, dtype: torch.dtype) -> tuple[bool, float]:
    """Whether every logit under autocast is finite, and the share of photographs that stay their own class."""
    known = embeddings(model, images)
    with torch.autocast(images.device.type, dtype):
        rounded = embeddings(model, images)
    logits = photograph_head(known)(rounded.double())
    own = torch.arange(len(images), device=images.device)
    if not torch.equal(photograph_head(known)(known.double()).argmax(1), own):
        raise SystemExit("two photographs look alike in float32: leave one out")
    return bool(logits.isfinite().all()), float((logits.argmax(1) == own).double().mean())


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--models", nargs="+", default=["t2t_vit_7", "deit3_small_patch16_224"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    files = sorted(path for path in args.photos.iterdir() if path.suffix.lower() in SUFFIXES)
    lines = [
        f"{len(files)} photographs, random weights, {args.device}, torch {torch.__version__}: photographs whose top-1 "
        "is that of float32, and whether every logit is finite.",
        "",
        "| model | input | bf16 | finite | fp16 | finite |",
        "| --- | --- | ---: | --- | ---: | --- |",
    ]
    for name in args.models:
        torch.manual_seed(0)
        model = deit_models.create_model(name, device=args.device).eval()
        transform = transform_for(model)
        images = torch.stack([transform(decode_image(path)) for path in files]).to(args.device)
        for factor in (1, 10):
            cells = []
            for dtype in (torch.bfloat16, torch.float16):
                finite, share = agreement(model, images * factor, dtype)
                cells += [f"{100 * share:.0f} %", "yes" if finite else "no"]
            lines.append(f"| `{name}` | x {factor} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    if args.write:
        RESULTS.write_text("# Precision\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
