"""The search spaces that come with the package, and those in files."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from ..config import nearest
from ..errors import ConfigError
from ..hub.manifest import Preprocessing
from .space import SearchSpace, StageChoices, space_from_toml


def _paper_space(depth: int, unit: int, heads: tuple[tuple[int, ...], ...], widths: tuple[int, ...]) -> SearchSpace:
    """One of the paper's spaces: stages twice as wide as the one before, MLPs in steps of `unit`."""
    stages = (
        StageChoices(
            embed_dim=tuple(width * 2**i for width in widths),
            head_dim=(32, 48, 64)[i],
            num_heads=heads[i],
            mlp_hidden=tuple(unit * 2**i * step for step in range(12, 5, -1)),
            depth=depth,
            removable=(1, 3, 5),
        )
        for i in range(3)
    )
    return SearchSpace(stages=tuple(stages), settings={"patch_head": True})


SPACES: Mapping[str, SearchSpace] = {
    "tiny": _paper_space(6, 64, ((6, 5, 4, 3), (12, 10, 8, 6), (12, 10, 8, 6)), (256, 224, 192, 176, 160)),
    "small": _paper_space(7, 80, ((8, 7, 6, 5), (16, 14, 12, 10), (16, 14, 12, 10)), (320, 280, 240, 220, 200)),
    "small32": SearchSpace(
        stages=tuple(
            StageChoices(
                embed_dim=tuple(width * 2**i for width in (40, 36, 32, 28, 24)),
                head_dim=16,
                num_heads=tuple(heads * 2**i for heads in (3, 2, 1)),
                mlp_hidden=tuple(hidden * 2**i for hidden in (128, 112, 96, 80, 64)),
                depth=4,
                removable=(1, 3),
            )
            for i in range(3)
        ),
        settings={"img_size": 32, "patch_size": 4, "stem_dim": 16, "num_classes": 10},
        preprocessing=Preprocessing(
            resize=32, crop=(32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)
        ),
    ),
}
"""The paper's two spaces for 224-pixel images, and a small one for 32-pixel images, which two CPU cores can search."""


def read_space(source: str | PathLike[str]) -> SearchSpace:
    """A space by its name in `SPACES`, or from a TOML file.

    Raises: ConfigError: there is neither, or `space_from_toml` refuses the file.
    """
    if isinstance(source, str) and source in SPACES:
        return SPACES[source]
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"no search space {str(source)!r}{nearest(str(source), SPACES)}; or name a TOML file")
    try:
        return space_from_toml(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error
