"""Tensors of tiny DeiTs under other libraries' names."""

import re

from deit_models.formats.layouts import FAMILIES

DEIT = FAMILIES["deit"]


def renamed(model, naming, prefix=""):
    tensors = DEIT.from_native(model.state_dict(), naming=naming, config=model.config)
    bare = {re.sub(r"^(vit|deit)\.", "", name): tensor for name, tensor in tensors.items()}
    heads = ("classifier", "cls_classifier", "distillation_classifier")
    return {name if name.startswith(heads) else prefix + name: tensor for name, tensor in bare.items()}


def read(model, tensors, naming=None):
    return DEIT.to_native(tensors, model.state_dict(), naming=naming, config=model.config)
