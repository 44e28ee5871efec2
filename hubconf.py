"""`torch.hub` entry points: one for each registered model, made from the registry.

    model = torch.hub.load("owner/deit-models", "deit_tiny_patch16_224", pretrained=True)

The checkout brings its own copy of the package. It is imported under a name of its own where another `deit_models` is
installed, so that neither sees the other.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

dependencies = ["torch", "torchvision", "huggingface_hub", "safetensors", "PIL"]

_PACKAGE = Path(__file__).resolve().parent / "deit_models"


def _load_package():
    """The `deit_models` of this checkout, whatever else is installed or imported."""
    loaded = sys.modules.get("deit_models")
    if loaded is not None and Path(loaded.__file__).resolve().parent == _PACKAGE:
        return loaded
    found = importlib.util.find_spec("deit_models")
    taken = loaded is not None or (found is not None and Path(found.origin).resolve().parent != _PACKAGE)
    name = f"_deit_models_hub_{abs(hash(str(_PACKAGE))):x}" if taken else "deit_models"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        name, _PACKAGE / "__init__.py", submodule_search_locations=[str(_PACKAGE)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: its submodules import it
    spec.loader.exec_module(module)
    return module


_package = _load_package()


def _entry_point(name, pretrained=False, **options):
    if pretrained:
        return _package.from_pretrained(name, **options)
    return _package.create_model(name, **options)


def _document(info):
    accuracy = "" if info.top1 is None else f", {info.top1} % top-1 on {info.dataset}"
    return f"""{info.name}: {info.params:,} parameters, {info.input_size} pixels{accuracy}.

    Args:
        pretrained: load the published weights (`deit_models.from_pretrained`, in eval mode) instead of random ones
            (`deit_models.create_model`, in training mode).
        **options: what that function takes, e.g. num_classes=10, img_size=384.
    """


for _name in _package.list_models():
    _entry = partial(_entry_point, _name)
    _entry.__doc__ = _document(_package.model_info(_name))
    globals()[_name] = _entry
