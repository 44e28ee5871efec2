"""`torch.hub` entry points: one for each registered model, made from the registry.

    model = torch.hub.load("owner/deit-models", "deit_tiny_patch16_224", pretrained=True)

The checkout has its own copy of the package. If another `deit_models` is installed, the copy is imported under a name
of its own, so that the two stay apart.
"""

# whole modules: torch.hub.list takes every callable without an underscore for an entry point
import functools
import importlib.util
import inspect
import pathlib
import sys

dependencies = ["torch", "torchvision", "huggingface_hub", "safetensors", "PIL"]
if sys.version_info < (3, 11):
    dependencies.append("tomli")  # the standard library's tomllib of later versions

_ROOT = pathlib.Path(__file__).resolve().parent
_PACKAGE = _ROOT / "deit_models"


def _load_package():
    """The `deit_models` of this checkout, whatever else is installed or imported."""
    loaded = sys.modules.get("deit_models")
    if loaded is not None and _is_ours(loaded.__file__):
        return loaded
    name = "deit_models"
    if loaded is not None or _another_is_installed():
        name = f"_deit_models_hub_{abs(hash(str(_PACKAGE))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        name, _PACKAGE / "__init__.py", submodule_search_locations=[str(_PACKAGE)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: its submodules import it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_ours(file):
    return file is not None and pathlib.Path(file).resolve().parent == _PACKAGE


def _another_is_installed():
    path = sys.path[:]
    try:
        # torch.hub puts this checkout in front of what is installed while it loads this file
        sys.path[:] = [entry for entry in path if pathlib.Path(entry).resolve() != _ROOT]
        found = importlib.util.find_spec("deit_models")
    finally:
        sys.path[:] = path
    # a plain folder of that name, without __init__.py, has no origin and is no package
    return found is not None and found.origin is not None and not _is_ours(found.origin)


_package = _load_package()


def _entry_point(name, pretrained=False, **options):
    if pretrained:
        known = list(inspect.signature(_package.from_pretrained).parameters)[1:]
        for option in options:
            if option not in known:
                near = _package.config.nearest(option, known)
                raise _package.ConfigError(f"unknown option {option!r} for pretrained weights{near}")
        return _package.from_pretrained(name, **options)
    return _package.create_model(name, **options)


def _document(info):
    accuracy = "".join(f", {value} % {kind} on {info.dataset}" for kind, value in list(info.accuracies.items())[:1])
    return f"""{info.name}: {info.params:,} parameters, {info.input_size} pixels{accuracy}.

    Args:
        pretrained: load the published weights (`deit_models.from_pretrained`, in eval mode) instead of random ones
            (`deit_models.create_model`, in training mode).
        **options: what that function takes, e.g. num_classes=10, img_size=384.
    """


for _name in _package.list_models():
    _entry = functools.partial(_entry_point, _name)
    _entry.__doc__ = _document(_package.model_info(_name))
    globals()[_name] = _entry
