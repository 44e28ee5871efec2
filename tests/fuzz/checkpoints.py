"""Fuzz the loading of checkpoints: `python tests/fuzz/checkpoints.py --seed 0 --count 1000`.

Tiny models of DeiT, LeViT and T2T-ViT, saved in all layouts, as safetensors and as both kinds of `.pth`, are damaged or
written in an unusual way, and loaded. Outcomes:

    refused        a `DeitModelsError`, in one short line
    same           the very model that was saved
    as told        another model, as a changed config.json or options ask for
    other numbers  under the same names and shapes: no digest exists to tell; counted
    FAULT          anything else, for instance a changed file that loads although a checksum in it tells

The last column of a welcome file (one that others write) is "same": its refusal is a fault.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import pathlib
import random
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1")

import PIL.Image
import torch
from damage import BYTES, change_archive, change_header, change_json, json_bytes, strange_json
from fuzzing import WrongError, main, run_cases
from safetensors.torch import load, save
from torch import Tensor

import deit_models
from deit_models import DeitModelsError, IntegrityError
from deit_models.hub.fetch import Access
from deit_models.hub.weights import read_tensors

__all__ = ["case", "run_cases"]

OPTIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "deit": (
        "deit_micro_patch4_32",
        {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3},
        ("native", "timm", "transformers"),
    ),
    "distilled": (
        "deit_micro_distilled_patch4_32",
        {"img_size": (16, 16), "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 3},
        ("native", "timm", "transformers"),
    ),
    "levit": (
        "levit_128s",
        {"img_size": 32, "embed_dim": (16, 24), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 8, "num_classes": 3},
        ("native", "timm", "timm-conv", "transformers"),
    ),
    "t2t_vit": (
        "t2t_vit_7",
        {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2, "token_dim": 8, "num_classes": 3},
        ("native",),
    ),
    "cait": (
        "cait_micro_patch4_32",
        {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3},
        ("native", "timm"),
    ),
    "resmlp": ("resmlp_12", {"img_size": 32, "depth": 1, "embed_dim": 16, "num_classes": 3}, ("native",)),
}
WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
PICTURE = PIL.Image.linear_gradient("L").resize((41, 30)).convert("RGB")


@dataclass(frozen=True)
class Saved:
    """A model that was saved: its files, and what every loading of them gives."""

    label: str
    files: dict[str, bytes]
    state: dict[str, Tensor]
    config: Any
    facts: Any

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Under the layout's names."""
        return load(self.files[WEIGHTS])

    def beside(self) -> dict[str, bytes]:
        return {name: content for name, content in self.files.items() if name != WEIGHTS}


@cache
def saved_models() -> tuple[Saved, ...]:
    torch.set_num_threads(1)
    return tuple(_save(label, layout) for label, (_, _, layouts) in OPTIONS.items() for layout in layouts)


def _save(label: str, layout: str) -> Saved:
    name, options, _ = OPTIONS[label]
    model = deit_models.create_model(name, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    with tempfile_folder() as folder:
        model.save_pretrained(folder, layout=layout)  # type: ignore[arg-type]
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
        loaded = deit_models.from_pretrained(folder)
    state = {key: value.clone() for key, value in loaded.state_dict().items()}
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), f"{label} {layout}: {key} does not come back"
    return Saved(f"{label} {layout}", files, state, loaded.config, facts_of(loaded))


def tempfile_folder() -> Any:
    import contextlib
    import tempfile

    @contextlib.contextmanager
    def folder() -> Any:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)

    return folder()


def facts_of(model: Any) -> Any:
    return (model.origin.name, model.origin.preprocessing, model.origin.class_names, model.origin.licence)


# Cases


def case(rng: random.Random, place: Path) -> tuple[str, Callable[[], str]]:
    saved = rng.choice(saved_models())
    kind, build = rng.choices(
        [
            ("safetensors bytes", _safetensors_bytes),
            ("safetensors header", _safetensors_header),
            ("safetensors tensors", _safetensors_tensors),
            ("safetensors, digest known", _digest),
            ("zip bytes", _zip_bytes),
            ("zip entries", _zip_entries),
            ("legacy pth bytes", _legacy_bytes),
            ("pickles", _pickles),
            ("welcome", _welcome),
            ("config fields", _config_fields),
            ("config bytes", _config_bytes),
            ("folders", _folders),
            ("options", _options),
        ],
        weights=(8, 8, 6, 2, 8, 6, 5, 4, 6, 20, 5, 3, 4),
    )[0]
    return kind, build(rng, place, saved)


Act = Callable[[], str]


def _safetensors_bytes(rng: random.Random, place: Path, saved: Saved) -> Act:
    data = rng.choice(BYTES)(rng, saved.files[WEIGHTS])
    write(place, {**saved.files, WEIGHTS: data})
    return lambda: compare_safetensors(fetch(place), saved, data)


def _safetensors_header(rng: random.Random, place: Path, saved: Saved) -> Act:
    data = change_header(rng, saved.files[WEIGHTS])
    write(place, {**saved.files, WEIGHTS: data})
    return lambda: compare_safetensors(fetch(place), saved, data)


def _safetensors_tensors(rng: random.Random, place: Path, saved: Saved) -> Act:
    data = save(changed_tensors(rng, saved.tensors, for_safetensors=True))
    write(place, {**saved.files, WEIGHTS: data})
    return lambda: compare_safetensors(fetch(place), saved, data)


def _digest(rng: random.Random, place: Path, saved: Saved) -> Act:
    """Where a digest is known, nothing that was changed is read."""
    import hashlib

    original = saved.files[WEIGHTS]
    data = rng.choice(BYTES)(rng, original)
    write(place, {WEIGHTS: data})
    digest = hashlib.sha256(original).hexdigest()[: rng.choice((8, 64))]

    def act() -> str:
        try:
            read_tensors(place / WEIGHTS, Access(), source="the file", digest=digest)
        except IntegrityError:
            if data == original:
                raise WrongError("the very file is refused") from None
            raise
        if data != original:
            raise WrongError("a changed file is read although its digest is known")
        return "same"

    return act


def _zip_bytes(rng: random.Random, place: Path, saved: Saved) -> Act:
    original = torch_file(wrapped(rng, saved.tensors), protocol=rng.choice((2, 2, 4)))
    data = rng.choice(BYTES)(rng, original)
    write(place, {**saved.beside(), "weights.pth": data})
    return lambda: compare_zip(fetch(place / "weights.pth", cache_dir=place / "cache"), saved, data, rewritten=False)


def _zip_entries(rng: random.Random, place: Path, saved: Saved) -> Act:
    data = change_archive(rng, torch_file(wrapped(rng, saved.tensors), protocol=rng.choice((2, 2, 5))))
    write(place, {**saved.beside(), "weights.pth": data})
    return lambda: compare_zip(fetch(place / "weights.pth", cache_dir=place / "cache"), saved, data, rewritten=True)


def _legacy_bytes(rng: random.Random, place: Path, saved: Saved) -> Act:
    protocol = rng.choice((2, 2, 4))
    data = rng.choice(BYTES)(rng, torch_file(wrapped(rng, saved.tensors), legacy=True, protocol=protocol))
    name = rng.choice(("weights.pth", "pytorch_model.bin"))
    write(place, {**saved.beside(), name: data})
    return lambda: compare_numbers(fetch(place / name, cache_dir=place / "cache"), saved)


class _Call:
    """Unpickling would call a function: it makes a file, which no case may leave behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _pickles(rng: random.Random, place: Path, saved: Saved) -> Act:
    tensors = changed_tensors(rng, saved.tensors, for_safetensors=False)
    trap = place / "executed"
    hostile = rng.random() < 0.4
    extra: Any = (
        rng.choice((_Call(trap), [_Call(trap)], {_Hashable(trap): 1})) if hostile else rng.choice((None, 1, ()))
    )
    payload = {"model": tensors, "extra": extra} if rng.random() < 0.7 else {**tensors, "extra": extra}
    raw = rng.random() < 0.15
    data = (
        __import__("pickle").dumps(payload if hostile else {"a": 1})
        if raw
        else torch_file(payload, legacy=rng.random() < 0.3)
    )
    write(place, {**saved.beside(), "weights.pth": data})

    def act() -> str:
        try:
            outcome = compare_numbers(fetch(place / "weights.pth", cache_dir=place / "cache"), saved)
        finally:
            if trap.exists():
                trap.rmdir()
                raise WrongError("code of the file was run")
        return outcome

    return act


class _Hashable(_Call):
    def __hash__(self) -> int:
        return 1


def _welcome(rng: random.Random, place: Path, saved: Saved) -> Act:
    """Files that other programs write; they load, and are the very model."""
    tensors = saved.tensors
    how = rng.choice(sorted(WELCOME))
    files = WELCOME[how](rng, tensors)
    write(place, {**saved.beside(), **files})
    target = place / next(iter(files)) if len(files) == 1 else place
    exact = how != "cast"

    def act() -> str:
        try:
            model = fetch(target, cache_dir=place / "cache")
        except DeitModelsError as error:
            raise WrongError(f"{how}: refused: {str(error).replace(str(place), '')[:120]}") from error
        if exact and not equal(model, saved):
            raise WrongError(f"{how}: loads as another model")
        if not exact and not all(
            torch.allclose(v, saved.state[k], rtol=0.02, atol=1e-2) for k, v in model.state_dict().items()
        ):
            raise WrongError(f"{how}: loads as another model")
        return "same"

    return act


def _with_prefix(rng: random.Random, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = rng.choice(("module.", "_orig_mod.", "model.", "net.", "backbone.", "module._orig_mod.", "student.model."))
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _beside_tensors(rng: random.Random, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    values: list[Any] = [
        torch.tensor(1.0).numpy().astype("float64").item(),
        3,
        None,
        "text",
        (1, 2),
        [1.5],
        {"a": {"b": 1}},
    ]
    values += [
        argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath("a/b")),
        pathlib.PurePosixPath("a/b"),
        pathlib.Path("x"),
    ]
    values += [
        OrderedDict(a=1),
        defaultdict(list, a=[1]),
        datetime.datetime(2024, 1, 2),
        datetime.timedelta(1),
        b"bytes",
        {1, 2},
    ]
    values += [
        __import__("numpy").float64(0.5),
        torch.float32,
        torch.Size([1]),
        torch.device("cpu"),
        {"state": {0: {"step": torch.tensor(1.0)}}},
    ]
    return {
        "model": dict(tensors),
        "optimizer": rng.choice(values),
        "args": rng.choice(values),
        "epoch": rng.choice(values),
    }


WELCOME: dict[str, Callable[[random.Random, Mapping[str, Tensor]], dict[str, bytes]]] = {
    "prefix, safetensors": lambda rng, t: {WEIGHTS: save(_with_prefix(rng, t))},
    "prefix, pickle": lambda rng, t: {"weights.pth": torch_file(_with_prefix(rng, t), legacy=rng.random() < 0.3)},
    "objects beside": lambda rng, t: {"weights.pth": torch_file(_beside_tensors(rng, t))},
    "suffix": lambda rng, t: {
        rng.choice(("weights.PTH", "last.ckpt", "weights", "weights.pth.tar", "w.pt", "pytorch_model.bin")): torch_file(
            dict(t)
        )
    },
    "safetensors by another name": lambda rng, t: {rng.choice(("w.SAFETENSORS", "w.bin", "w", "w.pth")): save(dict(t))},
    "cast": lambda rng, t: {
        WEIGHTS: save(
            {
                n: v.to(rng.choice((torch.float16, torch.bfloat16, torch.float64))) if v.is_floating_point() else v
                for n, v in t.items()
            }
        )
    },
    "payload": lambda rng, t: {
        "weights.pth": torch_file(
            {rng.choice(("model", "state_dict", "model_state_dict", "net", "model_ema", "state_dict_ema")): dict(t)}
        )
    },
    "parameters": lambda _, t: {
        "weights.pth": torch_file({n: torch.nn.Parameter(v) if v.is_floating_point() else v for n, v in t.items()})
    },
    "strides": lambda _, t: {
        "weights.pth": torch_file({n: v.t().contiguous().t() if v.ndim == 2 else v for n, v in t.items()})
    },
    "order": lambda rng, t: {WEIGHTS: save({n: t[n] for n in rng.sample(sorted(t), len(t))})},
    "protocol": lambda rng, t: {
        "weights.pth": torch_file({"model": dict(t)}, legacy=rng.random() < 0.5, protocol=rng.choice((3, 4, 5)))
    },
    "shards": lambda rng, t: shards(rng, t),
    "shards of pickles": lambda rng, t: shards(rng, t, whole="pytorch_model.bin"),
}


def shards(rng: random.Random, tensors: Mapping[str, Tensor], *, whole: str = WEIGHTS) -> dict[str, bytes]:
    names, write_one = [f"{n}-{whole}" for n in (1, 2)], save if whole == WEIGHTS else torch_file
    places = {name: rng.choice(names) for name in tensors}
    places.update(zip(list(tensors)[:2], names, strict=False))
    files = {name: write_one({key: tensors[key] for key in tensors if places[key] == name}) for name in names}
    return {**files, whole + ".index.json": json_bytes({"metadata": {"total_size": 1}, "weight_map": places})}


def _config_fields(rng: random.Random, place: Path, saved: Saved) -> Act:
    name = PROCESSOR if PROCESSOR in saved.files and rng.random() < 0.5 else CONFIG
    data = json.loads(saved.files[name])
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = change_json(rng, data)
    write(place, {**saved.files, name: json_bytes(data)})
    return lambda: compare_config(fetch(place), saved, data if "deit_models" in data else None)


def _config_bytes(rng: random.Random, place: Path, saved: Saved) -> Act:
    name = PROCESSOR if PROCESSOR in saved.files and rng.random() < 0.5 else CONFIG
    damage = rng.choice((*BYTES, strange_json, strange_json, strange_json))
    write(place, {**saved.files, name: damage(rng, saved.files[name])})
    return lambda: compare_config(fetch(place), saved, None)


def _folders(rng: random.Random, place: Path, saved: Saved) -> Act:
    """Odd things in the place of files."""
    write(place, saved.files)
    name = rng.choice(sorted(saved.files))
    target = place / name
    how = rng.randrange(8)
    target.unlink()
    if how == 0:
        os.mkfifo(target)
    elif how == 1:
        target.mkdir()
    elif how == 2:
        target.symlink_to(target)
    elif how == 3:
        target.symlink_to("/dev/" + rng.choice(("zero", "full", "tty", "null")))
    elif how == 4:
        (place / WEIGHTS).unlink(missing_ok=True)
        files = shards(rng, saved.tensors)
        index = change_json(rng, json.loads(files[WEIGHTS + ".index.json"]))
        outside = rng.choice(
            ("../model.safetensors", "/etc/passwd", "a/../../x.safetensors", "1-model.safetensors", "", ".")
        )
        if isinstance(index.get("weight_map"), dict) and rng.random() < 0.5:
            index["weight_map"][rng.choice(sorted(saved.tensors))] = outside
        write(place, {**saved.beside(), **files, WEIGHTS + ".index.json": json_bytes(index)})
    elif how == 5:
        target.write_bytes(saved.files[rng.choice(sorted(saved.files))])
    elif how == 6:
        (place / "pytorch_model.bin").write_bytes(rng.randbytes(100))
    path = place if rng.random() < 0.8 else place / WEIGHTS
    return lambda: compare_config(fetch(path, cache_dir=place / "cache"), saved, None)


def _options(rng: random.Random, place: Path, saved: Saved) -> Act:
    """Options from outside, with a file that is sound."""
    write(place, saved.files)
    key = rng.choice(("num_classes", "img_size", "dtype", "device", "model", "revision"))
    values: list[Any] = [
        None,
        0,
        1,
        5,
        -1,
        2.5,
        True,
        "3",
        "x",
        2**31,
        2**63,
        10**9,
        [],
        (32, 48),
        [32, 32],
        float("nan"),
    ]
    values += [
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.complex64,
        "cpu",
        "nope",
        "float16",
        "deit_tiny_patch16_224",
    ]
    options = {key: rng.choice(values)}
    if rng.random() < 0.2:
        options["num_classes"] = rng.choice((0, 2, 5))

    def act() -> str:
        model = fetch(place, **options)
        if (
            "num_classes" in options
            and options["num_classes"] is not None
            and model.num_classes != options["num_classes"]
        ):
            raise WrongError(f"{options} gives {model.num_classes} classes")
        return "same" if equal(model, saved) else "as told"

    return act


# The judge


def fetch(path: Path, **options: Any) -> Any:
    """The model, used once: a file that is refused at the first image only is a fault."""
    model = deit_models.from_pretrained(path, local_files_only=True, **options)
    try:
        use(model)
    except DeitModelsError as error:
        raise WrongError(f"it loads, and is refused when it is used: {str(error)[:120]}") from error
    return model


@torch.inference_mode()
def use(model: Any) -> None:
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or not parameter.is_floating_point():
        raise WrongError(f"it loads on {parameter.device} as {parameter.dtype}")
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values() if tensor.is_floating_point()):
        raise WrongError("it loads with NaN or infinity inside")
    image = deit_models.transform_for(model)(PICTURE)
    if image.shape[1:] != torch.Size(model.config.image_hw) or not bool(image.isfinite().all()):
        raise WrongError(f"its transform gives {tuple(image.shape)}, finite: {bool(image.isfinite().all())}")
    if model.config.in_chans == len(image):
        logits = model(image[None].to(parameter))
        if model.num_classes and logits.shape != (1, model.num_classes):
            raise WrongError(f"its logits are {tuple(logits.shape)}")


def equal(model: Any, saved: Saved) -> bool:
    return same_tensors(model, saved) and model.config == saved.config and facts_of(model) == saved.facts


def same_tensors(model: Any, saved: Saved) -> bool:
    state = model.state_dict()
    return state.keys() == saved.state.keys() and all(same_bits(state[key], saved.state[key]) for key in state)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        if a.ndim
        else torch.equal(a, b)
    )


def compare_numbers(model: Any, saved: Saved) -> str:
    """Only the tensors may differ, by their numbers."""
    if equal(model, saved):
        return "same"
    if model.config != saved.config or facts_of(model) != saved.facts:
        raise WrongError("damaged weights changed the config")
    return "other numbers"


def compare_safetensors(model: Any, saved: Saved, data: bytes) -> str:
    """A loaded file against a plain reading of its bytes: the format's own rules, then the tensors."""
    outcome = compare_numbers(model, saved)
    if outcome == "same":
        return outcome
    found, original = table(data), table(saved.files[WEIGHTS])
    assert original is not None
    if found is None:
        raise WrongError("a file that breaks the format's rules loads as another model")
    if found == original:
        raise WrongError("the same tensors load as another model")
    if {name: entry[:2] for name, entry in found.items()} != {name: entry[:2] for name, entry in original.items()}:
        raise WrongError("other names, types or shapes load as another model")
    if saved.label.endswith("native"):
        state = model.state_dict()
        if any(state[name].numpy().tobytes() != entry[2] for name, entry in found.items() if name in state):
            raise WrongError("the model has other numbers than its file")
    return outcome


def table(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Type, shape and bytes of each tensor of a safetensors file; None if the file breaks the format's rules."""
    try:
        size = int.from_bytes(data[:8], "little")
        pairs = json.loads(data[8 : 8 + size].decode("utf-8"), object_pairs_hook=list)
        entries = [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"]
        spans = sorted(entry["data_offsets"] for _, entry in entries)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    whole = [0, *(end for _, end in spans)] == [*(start for start, _ in spans), len(data) - 8 - size]
    if not whole or len({name for name, _ in entries}) != len(entries):
        return None
    body = data[8 + size :]
    return {name: (e["dtype"], tuple(e["shape"]), body[slice(*e["data_offsets"])]) for name, e in entries}


def compare_zip(model: Any, saved: Saved, data: bytes, *, rewritten: bool) -> str:
    """Every entry of a zip archive has a checksum: other numbers load only from an archive written anew."""
    outcome = compare_numbers(model, saved)
    if outcome == "same" or rewritten:
        return outcome
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            bad = archive.testzip()
    except Exception as error:  # noqa: BLE001 (whatever the damage raises)
        bad = f"{type(error).__name__}: {error}"
    raise WrongError(f"a damaged archive loads as another model; its first bad entry: {bad}")


def compare_config(model: Any, saved: Saved, native: Mapping[str, Any] | None) -> str:
    """Another config.json gives no other tensors; a native one gives exactly the config it says."""
    if equal(model, saved):
        return "same"
    if not same_tensors(model, saved):
        raise WrongError("a changed config changes the tensors")
    if native is not None:
        said, has = native["config"], json.loads(json.dumps(asdict(model.config)))
        if said != has or any(type(said[key]) is not type(has[key]) for key in said):
            raise WrongError(f"the config says {said}, the model has {has}"[:300])
    return "as told"


# Writing


def write(place: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (place / name).write_bytes(content)


def torch_file(data: Any, *, legacy: bool = False, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    torch.save(data, out, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def wrapped(rng: random.Random, tensors: Mapping[str, Tensor]) -> Any:
    return rng.choice((dict(tensors), {"model": dict(tensors)}, {"state_dict": OrderedDict(tensors), "epoch": 3}))


def changed_tensors(rng: random.Random, tensors: Mapping[str, Tensor], *, for_safetensors: bool) -> dict[str, Any]:
    """One tensor is of another kind, shape or type, or has numbers that no model has."""
    out: dict[str, Any] = dict(tensors)
    name = rng.choice(sorted(out))
    old = out[name]
    floats = old.to(torch.float32)
    choices: list[Callable[[], Any]] = [
        lambda: old.view(torch.int32) if old.dtype == torch.float32 else old + 1,
        lambda: floats.round().to(rng.choice((torch.int8, torch.int64, torch.bool, torch.uint8))),
        lambda: floats.to(rng.choice((torch.float8_e4m3fn, torch.float8_e5m2))),
        lambda: floats.double() * 1e300,
        lambda: torch.full_like(floats, rng.choice((float("nan"), float("inf"), -float("inf")))),
        lambda: torch.cat([floats, floats]) if floats.ndim else floats[None],
        lambda: floats[:0] if floats.ndim else floats[None],
        lambda: floats[None],
        lambda: floats.t().contiguous() if floats.ndim == 2 else floats.flatten()[None],
        lambda: floats.to(torch.complex64),
        lambda: floats * 3.0e38,
    ]
    if not for_safetensors:
        choices += [
            lambda: floats.to_sparse(),
            lambda: torch.quantize_per_tensor(floats, 0.1, 0, torch.qint8),
            lambda: floats.to("meta"),
            lambda: torch.nested.nested_tensor([floats]),
            lambda: torch.zeros(1).expand(10**5, 10**5),
            lambda: torch.zeros(1).expand(10**9),
            lambda: torch.zeros((), dtype=floats.dtype).expand(floats.shape),
            lambda: floats.tolist(),
            lambda: floats.numpy(),
            lambda: None,
            lambda: floats.t().contiguous().t() if floats.ndim == 2 else floats,
        ]
    how = rng.randrange(10)
    if how < 7:
        out[name] = rng.choice(choices)()
    elif how == 7:
        out[rng.choice(("extra", name + ".x", "module." + name, "head.scale", "\u00e9"))] = rng.choice(
            (old, torch.zeros(1))
        )
    elif how == 8:
        del out[name]
    elif not for_safetensors:
        out[rng.choice((1, ("a",), None, "\ud800", "a\nb", "x" * 5000))] = old
    return {key: value.clone() if for_safetensors else value for key, value in out.items()}


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], case))
