"""A verified model from any place it is published: locate, check the bytes, map the names, compare, assign.

Each step is one function, in this order, and each refuses rather than guesses: models from `from_pretrained` are
complete, finite and of the described shape. No random weights are allocated: the model is built on the meta device and
takes over the memory-mapped tensors of the file.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import ModelInfo, Source, find_repo, load_manifest, weights_dir
from ..config import override
from ..errors import (
    CheckpointError,
    ConfigError,
    DeitModelsError,
    FetchError,
    UnknownModelError,
    first_line,
    shown,
)
from ..files import read_json
from ..formats.family import Description, Mapped
from ..formats.layouts import CONFIG_NAME, PROCESSOR_NAME, WEIGHTS_NAMES, layouts_of, read_config
from ..formats.timm_config import timm_run
from ..models.layers import ImageClassifier, check_device, float_type
from ..registry import family_spec, meta_model, model_info, model_spec, unknown_model
from . import fetch
from .fetch import Access, url_file
from .payload import Expected
from .weights import INDEX_SUFFIX, check_range, check_reference, read_tensors, shard_names, verified_state

logger = logging.getLogger(__name__)

WEIGHTS_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt"}
_INDEX_NAMES = tuple(name + INDEX_SUFFIX for name in WEIGHTS_NAMES)
# What timm's train.py leaves: the epoch it reports, and the last one.
_TIMM_NAMES = ("model_best.pth.tar", "last.pth.tar")
# What accelerate and Lightning put beside weights, with suffixes of weights.
_STATES = re.compile(r"(?:optimizer|scheduler|scaler|sampler|random_state|rng_state|custom_check|training_args).*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A weights file on this machine: the model it is said to be, and the known facts about its bytes."""

    weights: Path
    description: Description
    source: str
    digest: str | None = None
    payload: str | None = None
    revision: str | None = None
    reference_logits: tuple[float, ...] | None = None


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    model: str | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    payload: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> ImageClassifier:
    """Load published or own weights into a model, verified, in eval mode.

    Args:
        source: a registered name (its sources in the manifest are tried in turn), a directory with config.json and
            weights, a weights file, or a Hub repository "owner/name" in timm's, transformers' or this package's layout.
        model: the registered model that weights without a config.json are of.
        num_classes: another number of classes than the checkpoint's; the heads are then new. 0: no heads, features.
        img_size: another input size in pixels, one number or (height, width); positions are interpolated. Weights
            without a config.json that were made for this size need it where it is no square.
        in_chans: another number of input channels; the first layer is summed for one, repeated for more.
        payload: the key of the state dict in a training checkpoint, such as "model_ema" or "state_dict.model"; by
            default the one that its own project evaluates, or the only one that fits.
        revision: branch, tag or commit of a Hub repository.
        token: Hub token for private repositories; by default the one `hf auth login` stored.
        cache_dir: where to keep downloads; by default the Hub's cache.
        local_files_only: use only what is on this machine, as HF_HUB_OFFLINE=1 does.
        device: where to put the model; by default the CPU.
        dtype: floating-point type of its parameters, or its name; by default float32, also for files of another type.

    Raises: UnknownModelError: no such name or path. FetchError: no source could be reached. CheckpointError: a file is
        damaged, unsafe, or another model; IntegrityError: of another SHA-256. ConfigError: options that do not fit.
        SaveError: a download or converted copy cannot be written.
    """
    access = Access(
        revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only, payload=payload
    )
    check_device(device)
    fields = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans}
    changes = {key: value for key, value in fields.items() if value is not None}
    wanted = float_type(dtype) or torch.float32
    loaded = load(source, access, model=model, changes=changes)
    check_range(loaded, wanted)
    return loaded.to(device=device, dtype=wanted).eval()


def load(
    source: str | os.PathLike[str], access: Access, *, model: str | None = None, changes: Mapping[str, Any]
) -> ImageClassifier:
    """A model on the CPU, of the file's dtype, loaded as `from_pretrained` does; `changes` are fields of its config."""
    name, path = os.fspath(source), Path(source)
    if isinstance(source, str) and name in load_manifest() and model in (None, name):
        return _from_manifest(load_manifest()[name], access, changes)
    try:
        found = path.exists()
    except OSError as error:  # a name of 5,000 characters, a folder that may not be read
        raise UnknownModelError(f"{shown(name)} cannot be looked up here: {error.strerror}") from error
    if found and name:  # Path("") is the current folder
        return _build(_locate_path(path, model), changes, access)
    if name in load_manifest():
        raise ConfigError(f"model={shown(model)} is for a weights file or repository; {name} is a model by itself")
    is_file = path.suffix.lower() in WEIGHTS_SUFFIXES
    if isinstance(source, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not is_file:
        return _build(_locate_repo(name, access, model), changes, access)
    if os.sep in name or path.suffix:
        raise UnknownModelError(f"{name!r} is neither a file or directory here nor a Hub repository (owner/name)")
    raise unknown_model(name)


def _from_manifest(info: ModelInfo, access: Access, changes: Mapping[str, Any]) -> ImageClassifier:
    """The sources of a model, tried in turn until one is sound; failures are logged."""
    sources = [source for source in info.sources if access.revision is None or source.repo is not None]
    if not sources:
        wanted = f" at revision {access.revision}" if info.sources else ""
        advice = f"create_model({info.name!r}) builds it with random weights"
        raise FetchError(f"no weights of {info.name} are published{wanted}; {advice}")
    return fetch.first_sound(
        info.name, sources, access, lambda source, at: _build(_locate_source(info, source, at), changes, access)
    )


def load_source(info: ModelInfo, source: Source, access: Access) -> tuple[Located, ImageClassifier]:
    """One particular copy of a model's weights, without falling back to others. Raises: as `from_pretrained`."""
    located = _locate_source(info, source, access)
    return located, _build(located, {}, access)


def _locate_source(info: ModelInfo, source: Source, access: Access) -> Located:
    # with the layout named, the file must be exactly this model: no other number of classes, no other size
    description = replace(_describe_registered(info.name), layout=source.layout)
    weights, digest = source_file(source, access)
    return Located(
        weights=weights,
        description=description,
        source=str(source),
        digest=digest,
        payload=source.payload,
        revision=fetch.commit_of(weights),
        reference_logits=None if source.sha256 else info.reference_logits,
    )


def source_file(source: Source, access: Access) -> tuple[Path, str | None]:
    """The weights file of a source, fetched if need be, and the digits of its SHA-256 that are known."""
    if source.repo is not None:
        at = access.at(source.revision)
        weights = _hub_weights(source.repo, at)
        # a digest belongs to the recorded revision, not to one the caller chose
        digest = source.digest if access.revision is None else None
    elif source.url is not None:
        weights, digest = url_file(source.url, access, digest=source.digest), source.digest
    else:
        weights, digest = weights_dir() / str(source.file), source.digest
        if not weights.is_file():
            raise FetchError(f"{weights} is missing; the installation is incomplete, reinstall it")
    return weights, digest or fetch.etag_digest(weights)


def _locate_repo(repo_id: str, access: Access, model: str | None) -> Located:
    """A Hub repository; if it is in the manifest, with the authors' transform, labels and recorded digest."""
    known = find_repo(repo_id)
    if known is not None and model in (None, known[0].name):
        return _locate_source(*known, access)
    if model is not None:
        description = _describe_bare(model)
    else:
        config = fetch.hub_file(repo_id, CONFIG_NAME, access)
        # the rest from the same commit, also if the branch moves in between
        access = replace(access, revision=fetch.commit_of(config) or access.revision)
        data = _hub_json(config, access)
        processor = fetch.optional_hub_file(repo_id, PROCESSOR_NAME, access) if "model_type" in data else None
        description = _described(repo_id, data, None if processor is None else _hub_json(processor, access))
    weights = _hub_weights(repo_id, access)
    digest, revision = fetch.etag_digest(weights), fetch.commit_of(weights)
    return Located(weights=weights, description=description, source=repo_id, digest=digest, revision=revision)


def _hub_json(path: Path, access: Access) -> Mapping[str, Any]:
    """A JSON file of the cache, which forgets it if it is damaged: not every cache says what it should hold."""
    try:
        return read_json(path)
    except CheckpointError:
        fetch.forget(path, access)
        raise


def _described(source: str, config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Description:
    """`read_config`, with the place of the file in errors."""
    try:
        return read_config(config, processor)
    except (CheckpointError, ConfigError, UnknownModelError) as error:
        raise type(error)(f"{source}: {error}") from error


def _hub_weights(repo_id: str, access: Access) -> Path:
    refused: FetchError | None = None
    for name in (*WEIGHTS_NAMES, *_INDEX_NAMES):
        try:
            weights = fetch.hub_file(repo_id, name, access)
            for shard in shard_names(weights) if name in _INDEX_NAMES else ():
                fetch.hub_file(repo_id, shard, access)
            return weights
        except fetch.NoSuchFileError:
            continue
        except FetchError as error:
            # without the Hub, the cache cannot tell "not there" from "not fetched": another name may be cached
            if not access.offline and not isinstance(error, fetch.HubUnreachableError):
                raise
            refused, access = refused or error, replace(access, local_files_only=True)
    raise refused or FetchError(f"{repo_id} has no {' or '.join(WEIGHTS_NAMES)}")


def _locate_path(path: Path, model: str | None) -> Located:
    folder = path if path.is_dir() else path.parent
    path = _weights_in(path) if path.is_dir() else path
    config, processor, run = folder / CONFIG_NAME, folder / PROCESSOR_NAME, _timm_run(folder, model)
    if run is not None:
        description = run
    elif model is not None:
        description = _describe_bare(model)
        if config.is_file():
            logger.warning("%s is not read, nor its preprocessing and classes, as model=%r is given", config, model)
    elif config.is_file():
        description = _described(str(folder), read_json(config), read_json(processor) if processor.is_file() else None)
    else:
        raise ConfigError(f"{path} has no config.json beside it; say which model it is: model='deit_...'")
    return Located(weights=path, description=description, source=str(path))


def _weights_in(folder: Path) -> Path:
    """The weights of a folder, as this package, transformers, timm's train.py, Lightning or accelerate leave it."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} has an adapter of peft; save the model that its merge_and_unload() gives")
    for name in (*WEIGHTS_NAMES, *_INDEX_NAMES, *_TIMM_NAMES):
        if (folder / name).is_file():
            if name == _TIMM_NAMES[0] and (folder / _TIMM_NAMES[1]).is_file():
                logger.warning("%s: loading %s, the best epoch; pass the path of another", folder, name)
            return folder / name
    for place in (folder, folder / "checkpoints"):
        found = sorted(
            path
            for path in (place.iterdir() if place.is_dir() else ())
            if path.suffix.lower() in WEIGHTS_SUFFIXES and path.is_file() and not _STATES.fullmatch(path.name)
        )
        best = [path for path in found if path.stem != "last"] or found
        if len(best) == 1:
            if len(found) > 1:
                logger.warning("%s: loading %s, not the last epoch; pass the path of another", place, best[0].name)
            return best[0]
        if found:
            names = ", ".join(path.name for path in found[:6])
            raise CheckpointError(f"{place} has {len(found)} weights files ({names}); pass the path of one")
    raise CheckpointError(f"{folder} has no {' or '.join(WEIGHTS_NAMES)}")


def _timm_run(folder: Path, model: str | None) -> Description | None:
    """The model of the args.yaml of timm's train.py, where there is no config.json, and no other model is asked for."""
    place = folder / "args.yaml"
    if (folder / CONFIG_NAME).exists() or not place.is_file():
        return None
    import yaml  # type: ignore[import-untyped]  # the Hub's client needs it, too

    try:
        with place.open("rb") as file:
            settings = yaml.safe_load(file.read(1 << 16))
        name = settings["model"].rpartition("/")[2].partition(".")[0]
        started = Path(settings["model"].removeprefix("local-dir:"), CONFIG_NAME)
    except Exception as error:  # whatever a parser makes of any bytes, or of another program's file of that name
        if model is not None:
            return None
        raise CheckpointError(f"{place} names no model ({first_line(error)}); pass model='deit_...'") from error
    if model not in (None, name):
        return None
    logger.warning("%s: a %s, with the input that args.yaml says; model='...' takes another", folder, name)
    base = None
    if settings["model"].startswith("local-dir:"):
        if not started.is_file():
            raise ConfigError(f"{place} names the model of {started}, which is not there; pass model='deit_...'")
        base = read_json(started)
    try:
        names = _class_map(folder, settings.get("class_map"))
        return _described(str(place), timm_run(settings, names, base=base), None)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DeitModelsError):
            raise
        raise CheckpointError(f"{place} misuses a setting ({first_line(error)})") from error


def _class_map(folder: Path, said: str | None) -> list[str] | None:
    """The class names of a class map of timm's, a line each, which is looked for beside the weights alone."""
    if not said:
        return None
    place = folder / Path(said).name
    if not place.is_file() or place.suffix != ".txt":
        raise ConfigError(
            f"args.yaml sets class_map={said!r}; put that file into {folder}, as .txt with a class a line"
        )
    with place.open(encoding="utf-8") as file:
        return [line.strip() for line in file.read(1 << 24).splitlines()]


def _describe_registered(name: str) -> Description:
    """The description of a registered model's published weights. Raises: UnknownModelError: no such name."""
    spec = model_spec(name)
    headless = not spec.config.num_classes
    return Description(config=spec.config, origin=model_info(name).origin, family=spec.family, backbone=headless)


def _describe_bare(name: str) -> Description:
    """Other weights of a registered model; their number of classes and size may differ."""
    known = _describe_registered(name)
    return replace(known, origin=known.origin.unknown())


def _build(located: Located, changes: Mapping[str, Any], access: Access) -> ImageClassifier:
    """A model with the tensors of a file; `changes` are fields of the config."""
    given, payload = located.description, access.payload or located.payload
    wanted = override(given.config, changes)
    try:
        model = meta_model(_class_of(given.family), wanted)
    except ConfigError as error:
        raise CheckpointError(f"{located.source}: {error}") from error
    expected = Expected(model, layouts_of(given.family), given.config)
    tensors, sha256 = read_tensors(
        located.weights, access, source=located.source, digest=located.digest, payload=payload, expected=expected
    )
    try:
        said, mapped = _told(given, tensors, changes, model)
        wanted = override(said.config, {**_tokens(given, tensors), **changes})
        model = model if model.config == wanted else meta_model(type(model), wanted)
        state = verified_state(mapped, model, made_for=said.config)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{located.source}: {error}{_advice(given, tensors, changes)}") from error
    _log_changes(located, said.config, wanted, changes)
    remade = model.num_classes != said.config.num_classes
    model.load_state_dict(state, strict=not remade, assign=True)
    if remade:
        model.reset_heads()
    if said.origin.non_commercial:
        logger.warning("%s: licensed %s, for non-commercial use only", located.source, said.origin.licence)
    origin = said.origin.loaded(located.source, revision=located.revision, sha256=sha256)
    if wanted != said.config:
        class_names = None if remade else origin.class_names
        dataset = None if remade and not said.config.num_classes else origin.dataset  # else it would name new classes
        origin = origin.adapted(wanted.image_hw, class_names=class_names, dataset=dataset, new_heads=remade)
    elif located.reference_logits is not None and payload == located.payload:
        check_reference(model.float(), located.reference_logits)
    model.origin = replace(origin, preprocessing=origin.preprocessing.for_channels(wanted.in_chans))
    return model


def _told(
    said: Description, tensors: Mapping[str, Tensor], changes: Mapping[str, Any], model: ImageClassifier
) -> tuple[Description, Mapped]:
    """The description of a file after a look at its tensors, and these under native names.

    `model` is built for the changes; where it has the names of the file's model, no other one is built. The tensors
    tell the heads of a transformers file, and of a bare file also the classes, the size and the channels. A file
    without any head is a backbone where its config promises no classifier, or `num_classes` is asked for.
    """
    model_class, layouts, config, bare = type(model), layouts_of(said.family), said.config, not said.layout
    if said.layout in (None, "transformers"):
        config = layouts.read_heads(tensors, config, bare=bare)
    if bare and not config.num_classes:  # a backbone, to which somebody may have given a head
        config = replace(config, num_classes=1)
    if said.new_heads is not None:  # timm's name of the norm behind another pooling
        tensors = {name.replace("fc_norm.", "norm."): tensor for name, tensor in tensors.items()}

    def mapped_for(config: Any) -> Mapped:
        free = {name: getattr(model.config, name) for name in ("num_classes", "img_size", "in_chans")}
        same = bool(config.num_classes) == bool(model.num_classes) and replace(config, **free) == model.config
        names = (model if same else meta_model(model_class, config)).state_dict()
        return layouts.to_native(tensors, names, config=config)

    mapped = mapped_for(config)
    heads = {name for name in mapped.tensors if name.partition(".")[0] in model_class.head_names}
    if said.new_heads is not None:
        if not changes.get("num_classes"):
            raise ConfigError(f"{said.new_heads}; pass num_classes=N for a new head on the class token")
        mapped = mapped._replace(tensors={name: mapped.tensors[name] for name in mapped.tensors.keys() - heads})
        config = replace(config, num_classes=0)
    elif not heads and config.num_classes and (said.backbone or "num_classes" in changes):
        config = replace(config, num_classes=0)
        mapped = mapped_for(config)
    if bare:
        asked = {key: value for key, value in changes.items() if key == "img_size"}
        config = model_class.describe_state(mapped.tensors, override(config, asked))
        mapped = mapped_for(config) if mapped.missing else mapped
    if config == said.config:
        return said, mapped
    kept = not bare and config.num_classes == said.config.num_classes
    names, data = (said.origin.class_names if kept else None), (None if bare else said.origin.dataset)
    origin = said.origin.adapted(config.image_hw, class_names=names, dataset=data, new_heads=not (kept or bare))
    return replace(said, config=config, origin=origin), mapped


def _tokens(given: Description, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The distillation token of the named model, where a bare file of it differs."""
    if given.layout is not None:
        return {}
    told = layouts_of(given.family).read_heads(tensors, given.config, bare=True)
    wanted = getattr(given.config, "distilled", None)
    return {} if bool(getattr(told, "distilled", None)) == bool(wanted) else {"distilled": wanted}


def _log_changes(located: Located, said: Any, wanted: Any, changes: Mapping[str, Any]) -> None:
    """One line for each guess, and for each change of the model that the caller did not name."""
    lines = []
    if not said.num_classes and located.description.config.num_classes:
        made = f"new heads with {wanted.num_classes} classes" if wanted.num_classes else "model(x) gives features"
        lines.append(
            f"no classification head in the file: {made}"
            + ("" if changes.get("num_classes") is not None else "; pass num_classes=N for new heads")
        )
    had, has = (bool(getattr(config, "distilled", False)) for config in (said, wanted))
    if had != has:
        new = "new, as copies of those of the class token" if has else "left out"
        lines.append(f"dist_token, its position and head_dist are {new}: the answers are not quite the file's")
    height, width = said.image_hw
    if height != width and changes.get("img_size") == (height, width) and located.description.layout is None:
        lines.append(f"positions taken as those of {height}x{width} pixels")
    for line in lines:
        logger.warning("%s: %s", located.source, line)


def _advice(given: Description, tensors: Mapping[str, Tensor], changes: Mapping[str, Any]) -> str:
    """End of an error message: the options with which the tensors load, or the registered model that they fit."""
    if "num_classes" not in changes and _fits(given, tensors, {**changes, "num_classes": 0}):
        return "; it has no head: pass num_classes=N for a new one, or num_classes=0 for features"
    # building each registered model takes seconds: only those of about as many parameters
    body = sum(tensor.numel() for name, tensor in tensors.items() if not re.search("head|classifier", name))
    for name, info in load_manifest().items():
        near = info.family == given.family and 0.7 * info.params < body < 1.3 * info.params
        if near and _fits(_describe_bare(name), tensors, {}):
            return f"; the tensors are those of model={name!r}"
    return ""


def _fits(given: Description, tensors: Mapping[str, Tensor], changes: Mapping[str, Any]) -> bool:
    """Whether the tensors are of a model without a change of its tokens."""
    try:
        model = meta_model(_class_of(given.family), override(given.config, changes))
        said, mapped = _told(given, tensors, changes, model)
        verified_state(mapped, meta_model(type(model), said.config), made_for=said.config)
    except (CheckpointError, ConfigError):
        return False
    return not _tokens(given, tensors)


def _class_of(family: str) -> type[ImageClassifier]:
    model_class = family_spec(family).model_class
    if not issubclass(model_class, ImageClassifier):
        raise ConfigError(f"family {family!r} is registered with {model_class.__name__}, which is no ImageClassifier")
    return model_class
