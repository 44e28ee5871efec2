"""The families and kinds of models that tests go through: a new family is named here, once."""

from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "deit": {"embed_dim": 24, "depth": 2, "num_heads": 3},
    "t2t_vit": {"embed_dim": 24, "depth": 2, "num_heads": 3, "token_dim": 16},
    "levit": {"embed_dim": (16, 24), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 8},
    "vit_resnas": {
        "stages": (
            {"embed_dim": 16, "head_dim": 8, "num_heads": (3, 1), "mlp_hidden": (20, 28)},
            {"embed_dim": 24, "head_dim": 6, "num_heads": (2,), "mlp_hidden": (30,)},
        ),
        "stem_dim": 4,
    },
    "cait": {"embed_dim": 24, "depth": 2, "depth_token_only": 2, "num_heads": 3, "layer_scale": 0.1},
    "resmlp": {"embed_dim": 24, "depth": 2, "layer_scale": 0.1},
}
"""By family: the options that make a model small."""

KINDS = {
    "deit": "deit_tiny_patch16_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "deit3": "deit3_small_patch16_224",
    "t2t_vit": "t2t_vit_7",
    "token head": "t2t_vit_24_token_labeling",
    "levit": "levit_128s",
    "vit_resnas": "vit_resnas_tiny",
    "cait": "cait_xxs24_224",
    "resmlp": "resmlp_12",
}
"""A registered name for each kind of model that some code tells apart."""
