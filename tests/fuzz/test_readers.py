"""Each reader, whatever it is given: the right model, image or manifest, or a `DeitModelsError` in one line."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import pytest
import torch
from checkpoints import (
    CONFIG,
    PROCESSOR,
    WEIGHTS,
    Saved,
    compare_config,
    compare_numbers,
    compare_safetensors,
    fetch,
    saved_models,
    torch_file,
    write,
)
from damage import header_of, safetensors
from fuzzing import attempt, limits, message_fault
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from images import read, read_object, written

from deit_models import ManifestError
from deit_models.checkpoint import Preprocessing, Source, parse_manifest
from deit_models.files import parse_toml

PLAIN = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
often, seldom = settings(max_examples=80, **PLAIN), settings(max_examples=40, **PLAIN)

NUMBERS = st.one_of(st.integers(-3, 70), st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 10**400, 1e308]))
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["\ud800", "a\nb", "bicubic", "float16", "x" * 5000]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
SAVED = st.sampled_from(saved_models())
HAS_PROCESSOR = [saved for saved in saved_models() if PROCESSOR in saved.files]


def judged(act: Callable[[Path], str]) -> str:
    """The outcome of a reading in an empty folder; "refused" for an error of ours in one short line."""
    with tempfile.TemporaryDirectory() as name, limits():
        outcome, problem = attempt(lambda: act(Path(name)), Path(name))
    return problem or outcome


def replaced(data: Any, path: list[int], value: Any) -> Any:
    """JSON with the value at a path exchanged; the numbers choose a key of each table on the way."""
    data = json.loads(json.dumps(data))
    table = data
    for step in path:
        key = list(table)[step % len(table)] if isinstance(table, dict) else step % len(table)
        if not isinstance(table[key], dict | list) or not table[key]:
            break
        table, last = table[key], (table, key)
    else:
        table, key = last
    table[key] = value
    return data


PATHS = st.lists(st.integers(0, 30), min_size=1, max_size=3)


@often
@given(SAVED, st.binary(max_size=300))
def test_bytes_are_no_safetensors(saved: Saved, data: bytes) -> None:
    def act(place: Path) -> str:
        write(place, {**saved.files, WEIGHTS: data})
        return compare_safetensors(fetch(place), saved, data)

    assert judged(act) == "refused"


@often
@given(SAVED, PATHS, JSON)
def test_safetensors_with_any_header(saved: Saved, path: list[int], value: Any) -> None:
    header, body = header_of(saved.files[WEIGHTS])
    data = safetensors(replaced(header, path, value), body)

    def act(place: Path) -> str:
        write(place, {**saved.files, WEIGHTS: data})
        return compare_safetensors(fetch(place), saved, data)

    assert judged(act) in ("same", "other numbers", "refused")


DTYPES = [torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2, torch.uint16]
OBJECTS = st.recursive(
    st.one_of(
        SCALARS.filter(lambda v: v != "\ud800"),
        st.binary(max_size=5),
        st.sampled_from([torch.float32, torch.Size([2])]),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@often
@given(SAVED, OBJECTS, st.sampled_from(DTYPES), st.integers(0, 200), st.booleans())
def test_pickles_of_plain_objects(saved: Saved, other: Any, dtype: torch.dtype, at: int, legacy: bool) -> None:
    tensors: dict[str, Any] = dict(saved.tensors)
    name = sorted(tensors)[at % len(tensors)]
    candidates = [
        {"model": tensors, "other": other},
        {"model": other, "weights": tensors},
        {**tensors, name: other},
        {**tensors, name: tensors[name].to(dtype)},
        other,
    ]
    data = torch_file(candidates[at % len(candidates)], legacy=legacy)

    def act(place: Path) -> str:
        write(place, {**saved.beside(), "weights.pth": data})
        return compare_numbers(fetch(place / "weights.pth", cache_dir=place / "cache"), saved)

    outcome = judged(act)
    assert outcome in ("same", "other numbers", "refused")
    if at % len(candidates) == 0:
        assert outcome == "same"  # objects beside the tensors are no reason to refuse


@often
@given(
    SAVED,
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."]),
)
def test_bytes_are_no_torch_file(saved: Saved, data: bytes, magic: bytes) -> None:
    def act(place: Path) -> str:
        write(place, {**saved.beside(), "weights.pth": magic + data})
        return compare_numbers(fetch(place / "weights.pth", cache_dir=place / "cache"), saved)

    assert judged(act) == "refused"


@often
@given(SAVED, PATHS, JSON)
def test_config_with_any_value(saved: Saved, path: list[int], value: Any) -> None:
    data = replaced(json.loads(saved.files[CONFIG]), path, value)

    def act(place: Path) -> str:
        write(place, {**saved.files, CONFIG: json.dumps(data).encode()})
        return compare_config(fetch(place), saved, data if "deit_models" in data else None)

    assert judged(act) in ("same", "as told", "refused")


@seldom
@given(SAVED, st.one_of(st.binary(max_size=100), JSON.map(lambda v: json.dumps(v).encode())))
def test_config_of_any_bytes(saved: Saved, data: bytes) -> None:
    def act(place: Path) -> str:
        write(place, {**saved.files, CONFIG: data})
        return compare_config(fetch(place), saved, None)

    assert judged(act) in ("same", "refused")


FIELDS = ("size", "crop_size", "image_mean", "image_std", "resample", "do_resize", "do_rescale", "do_normalize")
FIELDS += ("do_center_crop", "rescale_factor", "crop_pct", "do_pad", "image_processor_type")


@often
@given(st.sampled_from(HAS_PROCESSOR), st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=2))
def test_processor_with_any_values(saved: Saved, changes: dict[str, Any]) -> None:
    data = {**json.loads(saved.files[PROCESSOR]), **changes}

    def act(place: Path) -> str:
        write(place, {**saved.files, PROCESSOR: json.dumps(data).encode()})
        return compare_config(fetch(place), saved, None)

    assert judged(act) in ("same", "as told", "refused")


@often
@given(st.sampled_from(written()), st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_image_with_other_bytes_somewhere(entry: tuple[str, bytes], at: int, other: bytes) -> None:
    label, data = entry
    at %= len(data)
    damaged = data[:at] + other + data[at + len(other) :]
    assert judged(lambda place: read(label, damaged, place / "a")) in ("decoded", "refused")


@seldom
@given(st.binary(max_size=60), st.sampled_from([data[:size] for _, data in written() for size in (0, 4, 30)]))
def test_image_of_any_bytes(data: bytes, start: bytes) -> None:
    assert judged(lambda place: read("bytes", start + data, place / "a")) in ("decoded", "refused")


SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@often
@given(arrays.arrays(arrays.scalar_dtypes() | st.just(numpy.dtype(object)), SHAPES))
def test_image_of_any_array(array: Any) -> None:
    assert judged(lambda _: read_object(array)) in ("decoded", "refused")


@seldom
@given(
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "F", "I", "I;16"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.data(),
)
def test_image_of_any_pixels(mode: str, width: int, height: int, data: st.DataObject) -> None:
    size = len(PIL.Image.new(mode, (width, height)).tobytes())
    image = PIL.Image.frombytes(mode, (width, height), data.draw(st.binary(min_size=size, max_size=size)))
    assert judged(lambda _: read_object(image)) in ("decoded", "refused")


MANIFEST: dict[str, Any] = {
    "family": "deit",
    "params": 10,
    "macs": 20,
    "input_size": 32,
    "num_classes": 2,
    "class_names": ["cat", "dog"],
    "licence": "MIT",
    "top1": 80.5,
    "eval": {"resize": 36, "crop": [32, 32]},
    "source": [{"repo": "me/toy", "layout": "timm", "sha256": "0" * 64}],
}


def toml(value: Any) -> str:
    """TOML of plain values on one line; what TOML has not becomes text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool | int | str) and not isinstance(value, float):
        return json.dumps(value)
    return repr(value) if isinstance(value, float) else json.dumps(str(value))


@often
@given(PATHS, JSON)
def test_manifest_with_any_value(path: list[int], value: Any) -> None:
    changed = replaced(MANIFEST, path, value)
    text = "schema = 1\n[model.toy]\n" + "".join(f"{json.dumps(key)} = {toml(item)}\n" for key, item in changed.items())

    def act(_: Path) -> str:
        toy = parse_manifest(text)["toy"]
        assert isinstance(toy.params, int)
        assert isinstance(toy.preprocessing, Preprocessing)
        assert all(isinstance(source, Source) for source in toy.sources)
        assert toy.class_names is None or list(toy.class_names) == parse_toml(text)["model"]["toy"]["class_names"]
        return "read"

    assert judged(act) in ("read", "refused")


@often
@given(st.text(max_size=80))
def test_manifest_of_any_text(text: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text)
    assert message_fault(caught.value, Path("-")) is None
