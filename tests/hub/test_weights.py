"""A weights file is sound, of this model and harmless, or it is refused before any tensor is used."""

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hub_protocol import HTML_PAGE
from safetensors.torch import load_file, save_file
from tiny_models import assert_same_state, refusal, tiny_model
from tracing import calls_of

from deit_models import CheckpointError, ConfigError, IntegrityError, SaveError, create_model, from_pretrained
from deit_models.config import override
from deit_models.files import sha256_of
from deit_models.formats.layouts import layouts_of
from deit_models.hub.fetch import Access
from deit_models.hub.weights import read_tensors, unpickle_tensors, verified_state
from deit_models.models.deit import DeiT
from deit_models.registry import meta_model


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def access(tmp_path):
    return Access(cache_dir=tmp_path / "cache")


@pytest.fixture
def state(model):
    return dict(model.state_dict())


def verify(state, model):
    expected = meta_model(DeiT, model.config)
    return verified_state(layouts_of("deit").to_native(state, expected.state_dict(), config=model.config), expected)


def read(path, access, **known):
    return read_tensors(path, access, source="the source", **known)[0]


def write_pth(path, payload, **options):
    torch.save(payload, path, **options)
    return path


# Safetensors


def test_whole_file_is_read_bit_by_bit(state, access, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    assert_same_state(read(path, access), state)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors_is_refused(state, access, tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    message = refusal(CheckpointError, lambda: read(path, access))
    assert str(path) in message
    assert "truncated or damaged" in message
    assert path.exists()  # the user's file, not the cache's


def test_web_page_named_safetensors_is_called_one(access, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\n " + HTML_PAGE)
    assert "a web page" in refusal(CheckpointError, lambda: read(path, access))


def test_wrong_digest_is_refused_and_the_users_own_file_kept(state, access, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    digest = sha256_of(path)
    assert read_tensors(path, access, source="x", digest=digest[:8])[1] == digest
    message = refusal(IntegrityError, lambda: read(path, access, digest="0" * 64))
    assert "the source" in message
    assert digest[:16] in message
    assert path.exists()


# The model it is said to be


def test_sound_state_passes_unchanged(state, model):
    assert_same_state(verify(state, model), state)


def test_all_mismatches_stand_in_one_message(state, model):
    del state["norm.bias"], state["blocks.1.mlp.fc2.weight"]
    state |= {"extra": torch.zeros(1), "head.weight": torch.zeros(3, 16), "cls_token": torch.zeros(1, 1, 16).int()}
    message = refusal(CheckpointError, lambda: verify(state, model))
    assert "2 missing: " in message
    assert "norm.bias" in message
    assert "blocks.1.mlp.fc2.weight" in message
    assert "1 unexpected: extra" in message
    assert "1 wrong shape: head.weight is (3, 16), expected (10, 16)" in message
    assert "1 not floating point: cls_token is torch.int32" in message


def test_other_size_and_classes_are_fitted_before_shapes_are_compared(state, model):
    other = meta_model(DeiT, override(model.config, {"num_classes": 3, "img_size": 48}))
    mapped = layouts_of("deit").to_native(state, other.state_dict(), config=other.config)
    fitted = verified_state(mapped, other, made_for=model.config)
    assert fitted["pos_embed"].shape == (1, 2 + 12 * 12, 16)
    assert not any(name.startswith("head") for name in fitted)
    del mapped.tensors["norm.bias"]
    mapped.missing.append("norm.bias")
    message = refusal(CheckpointError, lambda: verified_state(mapped, other, made_for=model.config))
    assert message == "not the weights of this model: 1 missing: norm.bias"


@pytest.mark.parametrize("shape", [(5,), (1, 60, 16), (2, 66, 16), (1, 66, 8)])
def test_positions_that_cannot_be_fitted_are_refused(state, model, shape):
    other = meta_model(DeiT, override(model.config, {"img_size": 48}))
    state["pos_embed"] = torch.zeros(shape)
    mapped = layouts_of("deit").to_native(state, other.state_dict(), config=other.config)
    with pytest.raises((CheckpointError, ConfigError)):
        verified_state(mapped, other, made_for=model.config)


def test_long_lists_are_cut(state, model):
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.1")}
    message = refusal(CheckpointError, lambda: verify(kept, model))
    assert "12 missing" in message
    assert "and 6 more" in message


def test_another_models_tensors_are_refused(model):
    other = tiny_model("deit_micro_patch4_32", embed_dim=24, depth=3).state_dict()
    message = refusal(CheckpointError, lambda: verify(other, model))
    assert "missing" in message
    assert "dist_token" in message
    assert "unexpected" in message
    assert "wrong shape" in message
    assert "unknown tensor names" in refusal(CheckpointError, lambda: verify({"fc.weight": torch.zeros(2)}, model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_refused_by_name(state, model, value):
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].clone()
    state["blocks.0.attn.qkv.weight"][7, 3] = value
    message = refusal(CheckpointError, lambda: verify(state, model))
    assert "NaN or infinity in: blocks.0.attn.qkv.weight" in message


def test_unevenly_split_projection_is_refused(state, model):
    tensors = layouts_of("deit").from_native(state, naming="transformers", config=model.config)
    tensors["deit.encoder.layer.0.attention.attention.key.weight"] = torch.zeros(16, 9)
    message = refusal(CheckpointError, lambda: verify(tensors, model))
    assert "wrong shape" in message
    assert "key.weight is (16, 9)" in message


# Pickles


class Malice:
    """Unpickling it creates the marker file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_malicious_pickle_does_not_execute(state, access, tmp_path, legacy):
    marker = tmp_path / "executed"
    path = write_pth(
        tmp_path / "model.pth", {"model": state, "args": Malice(marker)}, _use_new_zipfile_serialization=not legacy
    )
    message = refusal(CheckpointError, lambda: read(path, access))
    assert not marker.exists()
    assert "not only tensors" in message
    assert not list(tmp_path.rglob("*.safetensors"))
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file was a loaded gun


def test_malicious_bare_pickle_does_not_execute(access, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "model.pth"
    path.write_bytes(pickle.dumps({"model": Malice(marker)}, protocol=2))
    refusal(CheckpointError, lambda: read(path, access))
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_namespace_optimiser_and_epoch_beside_the_weights_are_passed_over(state, model, access, tmp_path, legacy):
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimiser.step()
    payload = {
        "optimizer": optimiser.state_dict(),
        "model": state,
        "args": argparse.Namespace(lr=5e-4, model="deit", betas=(0.9, 0.999), output_dir="out"),
        "epoch": 299,
        "lr_scheduler": {"t_in_epochs": True, "base_values": [5e-4]},
    }
    path = write_pth(tmp_path / "model.pth", payload, _use_new_zipfile_serialization=not legacy)
    assert_same_state(read(path, access), model.state_dict())


@pytest.mark.parametrize("key", ["model", "state_dict", "state_dict_ema", "model_ema", "net", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_is_found_where_training_scripts_put_it(state, access, tmp_path, key, prefix):
    named = {prefix + name: tensor for name, tensor in state.items()}
    path = write_pth(tmp_path / "model.pth", {key: named, "epoch": 3} if key else named)
    assert_same_state(read(path, access), state)


def test_averaged_weights_come_first_unless_another_key_is_asked_for(state, access, tmp_path):
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    path = write_pth(tmp_path / "model.pth.tar", {"state_dict": state, "state_dict_ema": averaged})
    assert_same_state(read(path, access), averaged)
    assert_same_state(read(path, access, payload="state_dict"), state)
    assert "'model'" in refusal(CheckpointError, lambda: read(path, access, payload="model"))


@pytest.mark.parametrize(("payload", "message"), [({"epoch": 3}, "no tensors"), ([1, 2], "no state dict")])
def test_pickle_without_weights_is_refused(access, tmp_path, payload, message):
    path = write_pth(tmp_path / "model.pth", payload)
    assert message in refusal(CheckpointError, lambda: read(path, access))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_truncated_pickle_is_refused(state, access, tmp_path, legacy):
    path = write_pth(tmp_path / "model.pth", {"model": state}, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for keep in (0, 1, 2, 30, 500, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        assert str(path) in refusal(CheckpointError, lambda: unpickle_tensors(path))
    refusal(CheckpointError, lambda: read(path, access))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_web_page_named_pth_is_refused(access, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(HTML_PAGE)
    assert "a web page, not weights" in refusal(CheckpointError, lambda: read(path, access))


def test_tensors_that_share_memory_or_are_views_are_converted(access, tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    path = write_pth(tmp_path / "model.pth", {"a": base, "b": base, "c": base.t(), "d": base[1:]})
    tensors = read(path, access)
    assert_same_state(tensors, {"a": base, "b": base, "c": base.t(), "d": base[1:]})
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == 4


ODD = {
    "sparse": lambda t: t.to_sparse(),
    "quint8": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
    "meta": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "float8_e5m2": lambda t: t.to(torch.float8_e5m2),
    "complex64": lambda t: t.to(torch.complex64),
    "uint16": lambda t: t.to(torch.uint16),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["norm.weight", "unknown"])
def test_tensor_of_another_kind_is_refused_by_name(state, access, tmp_path, kind, name):
    state[name] = ODD[kind](state["norm.weight"].abs())
    message = refusal(CheckpointError, lambda: read(write_pth(tmp_path / "x.pth", state), access))
    assert name in message
    assert kind in message


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "\x1b[2J", "a\u202eb"])
def test_name_that_cannot_be_shown_is_refused(state, access, tmp_path, name):
    path = write_pth(tmp_path / "x.pth", {"model": {**state, name: torch.ones(1)}})
    assert refusal(CheckpointError, lambda: read(path, access)).isprintable()


@pytest.mark.parametrize("name", ["norm.weight", "unknown", "pos_embed"])
@pytest.mark.parametrize("shape", [(10**5, 10**6), (10**12,), (3, 10**9)])
def test_small_file_of_large_tensors_is_refused_before_they_are_made(state, access, tmp_path, name, shape):
    path = write_pth(tmp_path / "x.pth", {"model": {**state, name: torch.zeros(1).expand(shape)}})
    assert "would take" in refusal(CheckpointError, lambda: read(path, access))


def test_one_tensor_under_many_names_is_refused_where_they_add_up(access, tmp_path):
    shared = torch.zeros(1 << 18)
    path = write_pth(tmp_path / "x.pth", {f"blocks.{index}": shared for index in range(200)})
    assert "would take" in refusal(CheckpointError, lambda: read(path, access))


@pytest.mark.parametrize("suffix", ["", ".ckpt", ".PTH", ".th", ".safetensors", ".weights"])
def test_format_is_told_from_the_content(state, access, tmp_path, suffix):
    assert_same_state(read(write_pth(tmp_path / f"a{suffix}", state), access), state)
    save_file(state, tmp_path / f"b{suffix}")
    assert_same_state(read(tmp_path / f"b{suffix}", access), state)


def test_header_that_names_a_tensor_twice_is_refused(access, tmp_path):
    entry = '"a":{"dtype":"%s","shape":[1],"data_offsets":[0,4]}'
    header = ("{" + entry % "F32" + "," + entry % "I32" + "}").encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "twice" in refusal(CheckpointError, lambda: read(path, access))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x"])
def test_pipe_in_the_place_of_a_file_is_refused_at_once(access, tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert "regular file" in refusal(CheckpointError, lambda: read(tmp_path / name, access))


# Files in several parts


def sharded(folder, state, *, name="model.safetensors", **changes):
    stem, suffix = name.split(".")
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        shard = f"{stem}-{number}.{suffix}"
        (torch.save if suffix == "bin" else save_file)({key: state[key] for key in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map | changes}), encoding="utf-8")
    return index


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def kind(request):
    return request.param


@pytest.mark.parametrize("prefix", ["", "module.", "deit."])
def test_shards_are_read_together(state, access, tmp_path, kind, prefix):
    named = {prefix + name: tensor for name, tensor in state.items()}
    read_state = read(sharded(tmp_path, named, name=kind), access)
    assert_same_state({name.removeprefix(prefix): tensor for name, tensor in read_state.items()}, state)


def test_pickled_shard_runs_no_code_and_holds_tensors_alone(state, access, tmp_path):
    index = sharded(tmp_path, state, name="pytorch_model.bin")
    shard = tmp_path / "pytorch_model-1.bin"
    part = torch.load(shard)
    for other, reason in (({**part, "x": print}, "print"), ([part], "no table"), ({1: part}, "no table")):
        torch.save(other, shard)
        assert reason in refusal(CheckpointError, lambda: read(index, access))
    torch.save({name: torch.zeros(1).expand(10**9) for name in part}, shard)
    assert "would take" in refusal(CheckpointError, lambda: read(index, access))


@pytest.mark.parametrize(
    "place",
    [
        "../x.safetensors",
        "../x.bin",
        "/etc/x.bin",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x.pth",
        "",
        "..",
        "absent.safetensors",
    ],
)
def test_shard_elsewhere_is_refused(state, access, tmp_path, place, kind):
    refusal(CheckpointError, lambda: read(sharded(tmp_path, state, name=kind, cls_token=place), access))


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 3}, {"a": None}, {}])
def test_index_without_a_map_is_refused(state, access, tmp_path, weight_map):
    index = sharded(tmp_path, state)
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    refusal(CheckpointError, lambda: read(index, access))


def test_shards_of_other_tensors_are_refused(state, access, tmp_path):
    sharded(tmp_path, state)
    save_file({"cls_token": state["cls_token"]}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    assert "two models" in refusal(CheckpointError, lambda: read(index, access))


# The converted copy


@pytest.fixture
def pth(state, tmp_path):
    return write_pth(tmp_path / "model.pth", {"model": state})


def converted_copy(tmp_path):
    (copy,) = (tmp_path / "cache").rglob("*.safetensors")
    return copy


def test_conversion_happens_once(pth, state, access, tmp_path):
    first, digest = read_tensors(pth, access, source="the source")
    assert digest == sha256_of(pth)
    facts = json.loads(converted_copy(tmp_path).with_suffix(".json").read_text(encoding="utf-8"))
    copied = sha256_of(converted_copy(tmp_path))
    assert facts == {"source": "the source", "source_sha256": digest, "sha256": copied}
    assert calls_of(unpickle_tensors, lambda: assert_same_state(read(pth, access), first)) == 0
    assert_same_state(first, state)


def test_changed_pickle_is_converted_anew(pth, state, access):
    read(pth, access)
    changed = {name: tensor + 1 for name, tensor in state.items()}
    write_pth(pth, {"model": changed})
    assert_same_state(read(pth, access), changed)


@pytest.mark.parametrize("damage", ["flip", "cut", "record", "no record"])
def test_damaged_copy_is_made_again(pth, state, access, tmp_path, damage, caplog):
    read(pth, access)
    copy = converted_copy(tmp_path)
    whole, record = copy.read_bytes(), copy.with_suffix(".json")
    if damage == "flip":
        copy.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "cut":
        copy.write_bytes(whole[:100])
    elif damage == "record":
        record.write_text("{", encoding="utf-8")
    else:
        record.unlink()
    assert_same_state(read(pth, access), state)
    assert copy.read_bytes() == whole
    assert ("converting" in caplog.text) == (damage != "no record")
    assert_same_state(load_file(copy), state)


def test_conversion_without_space_leaves_no_copy(pth, state, access, tmp_path, full_disk):
    with full_disk(10_000):
        message = refusal(SaveError, lambda: read(pth, access))
    assert "cannot write" in message
    assert "File too large" in message
    assert not list((tmp_path / "cache").rglob("*.*"))
    assert_same_state(read(pth, access), state)


def test_cache_that_cannot_be_made_is_one_line(pth, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    message = refusal(SaveError, lambda: read(pth, Access(cache_dir=tmp_path / "file")))
    assert "cache" in message


# Counters and variances of batch norms


@pytest.fixture
def levit(tmp_path):
    """The folder and tensors of a model with batch norms."""
    model = create_model("levit_micro_cifar10", num_classes=3)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", load_file(tmp_path / "saved" / "model.safetensors")


@pytest.mark.parametrize(
    "written",
    [
        lambda _: {},
        lambda count: {"": count.reshape(1)},
        lambda count: {"": count.half()},
        lambda count: {"": count.to(torch.int32)},
    ],
    ids=["left out", "of one dimension", "cast to half", "of 32 bits"],
)
def test_counters_that_other_programs_write_otherwise_are_read(levit, written):
    folder, tensors = levit
    parts = {
        name + more: value
        for name, tensor in tensors.items()
        for more, value in (written(tensor) if name.endswith("num_batches_tracked") else {"": tensor}).items()
    }
    expected = from_pretrained(folder).state_dict()
    save_file(parts, folder / "model.safetensors")
    assert_same_state(from_pretrained(folder).state_dict(), expected)


@pytest.mark.parametrize(
    "count", [torch.tensor(0.5), torch.tensor(5e-324, dtype=torch.float64), torch.zeros(2), torch.nan]
)
def test_counter_that_counts_nothing_is_refused(levit, count):
    folder, tensors = levit
    tensors["patch_embed.0.bn.num_batches_tracked"] = torch.as_tensor(count)
    save_file(tensors, folder / "model.safetensors")
    refusal(CheckpointError, lambda: from_pretrained(folder))


def test_negative_variance_is_refused(levit):
    folder, tensors = levit
    tensors["patch_embed.2.bn.running_var"][3] = -0.25
    save_file(tensors, folder / "model.safetensors")
    message = refusal(CheckpointError, lambda: from_pretrained(folder))
    assert "1 negative variance in: patch_embed.2.bn.running_var" in message
