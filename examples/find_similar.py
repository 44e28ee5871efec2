"""Find the photos most like some others, and draw them as a contact sheet.

    python examples/find_similar.py path/to/photos --out similar.png [--queries 6] [--count 8] [--model MODEL]

Each row begins with a query in a blue frame; the photos follow whose embeddings are nearest to its own, by cosine. The
embeddings are kept beside the sheet, in similar.npz, and used again as long as photos and model are the same. Where the
photos lie in a folder for each class, photos of another class than the query's have a red frame.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from deit_models import Classifier, ConfigError
from deit_models.images.decoding import load_image
from deit_models.registry import DEFAULT_MODEL
from deit_models.scoring.embeddings import load_features, nearest_neighbours

SIDE, GAP = 96, 8


def framed(path: str, colour: str | None) -> Image.Image:
    """A photo as a square with a frame."""
    photo = load_image(path)
    scale = SIDE / max(photo.size)
    photo = photo.resize((max(round(photo.width * scale), 1), max(round(photo.height * scale), 1)))
    square = Image.new("RGB", (SIDE + GAP, SIDE + GAP), colour or "white")
    square.paste(photo, ((SIDE + GAP - photo.width) // 2, (SIDE + GAP - photo.height) // 2))
    return square


def contact_sheet(rows: list[list[tuple[str, str | None]]]) -> Image.Image:
    """A picture of paths and the colours of their frames, row by row."""
    step = SIDE + 2 * GAP
    sheet = Image.new("RGB", (step * len(rows[0]) + GAP, step * len(rows) + GAP), "white")
    for y, row in enumerate(rows):
        for x, (path, colour) in enumerate(row):
            sheet.paste(framed(path, colour), (GAP + x * step, GAP + y * step))
    line = GAP + step - GAP // 2
    ImageDraw.Draw(sheet).line((line, 0, line, sheet.height), fill="grey")  # between the queries and what was found
    return sheet


def main() -> None:
    """Embed the photos, find the neighbours of some, draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photos, perhaps in a folder for each class")
    parser.add_argument("--out", type=Path, required=True, help="the sheet to draw, a .png or .jpg file")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: the small one that comes with the package")
    parser.add_argument("--queries", type=int, default=6, help="rows, spread over all photos, default 6")
    parser.add_argument("--count", type=int, default=8, help="photos to find for each, default 8")
    args = parser.parse_args()
    file = args.out.with_suffix(".npz")
    classifier = Classifier(args.model, num_classes=0)
    try:
        classifier.embed_files(args.photos, file, resume=True)
    except ConfigError:  # of other photos, or by another model
        classifier.embed_files(args.photos, file, overwrite=True)
    features = load_features(file)
    queries = torch.linspace(0, len(features.paths) - 1, min(args.queries, len(features.paths))).long()
    found = nearest_neighbours(features.embeddings, k=args.count)[1][queries]
    rows = []
    for query, numbers in zip(queries.tolist(), found.tolist(), strict=True):
        group = Path(features.paths[query]).parent
        rows.append([(features.paths[query], "royalblue")])
        rows[-1] += [
            (path, None if Path(path).parent == group else "red") for path in map(features.paths.__getitem__, numbers)
        ]
    contact_sheet(rows).save(args.out)
    right = sum(colour is None for row in rows for _, colour in row)
    print(f"{args.out}: {len(rows)} queries; {right} of {found.numel()} photos found lie in the query's folder")


if __name__ == "__main__":
    main()
