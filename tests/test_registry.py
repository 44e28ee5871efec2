"""Names: what is listed, what is built, what is refused; and the manifest's figures against the models themselves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_manifest import put_checkpoints_in_force

import deit_models
from deit_models import (
    ConfigError,
    ManifestError,
    UnknownModelError,
    create_model,
    list_models,
    model_info,
    register_model,
    registry,
)
from deit_models.checkpoint import ModelInfo, load_manifest, parse_manifest
from deit_models.models.deit import DeiT, DeiTConfig

# Counted by the authors' published models.
PUBLISHED_PARAMS = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_base_patch16_384": 86_859_496,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192,
    "deit_base_distilled_patch16_384": 87_630_032,
}
SMALL_IMAGES = [
    "deit_tiny_distilled_patch8_64",
    "deit_tiny_patch4_32",
    "deit_tiny_distilled_patch4_32",
    "deit_micro_patch4_32",
    "deit_micro_distilled_patch4_32",
]
TOY = DeiTConfig(img_size=(32, 64), patch_size=16, in_chans=2, num_classes=4, embed_dim=16, depth=2, num_heads=2)


# Listing


def test_all_deit_models_are_listed() -> None:
    assert set(list_models("deit_*")) == {*PUBLISHED_PARAMS, *SMALL_IMAGES}


def test_list_is_in_manifest_order() -> None:
    assert list_models() == list(load_manifest())


def test_list_takes_a_glob() -> None:
    assert list_models("deit_*distilled*_224") == [name for name in list_models() if "distilled_patch16_224" in name]
    assert len(list_models("deit_*distilled*_224")) == 3
    assert list_models("deit_base_patch16_38[0-9]") == ["deit_base_patch16_384"]
    assert list_models("nothing*") == []


def test_pretrained_filter_keeps_models_with_a_source() -> None:
    listed = list_models(pretrained=True)
    assert listed == [name for name in list_models() if model_info(name).sources]
    assert set(PUBLISHED_PARAMS) <= set(listed)
    assert list_models("deit_base*384", pretrained=True) == ["deit_base_patch16_384", "deit_base_distilled_patch16_384"]


# The manifest's figures


def test_manifest_lists_exactly_what_the_families_register() -> None:
    for name, checkpoint in load_manifest().items():
        assert registry.model_spec(name).name == name
        assert registry.model_spec(name).model_class.__module__ == f"deit_models.models.{checkpoint.family}"
    assert set(registry._specs) == set(load_manifest())


@pytest.mark.parametrize("name", load_manifest())
def test_manifest_row_agrees_with_the_model(name: str) -> None:
    info, spec = model_info(name), registry.model_spec(name)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = spec.model_class(spec.config).eval()
        logits = model(torch.empty(1, 3, info.input_size, info.input_size))
    assert sum(p.numel() for p in model.parameters()) == info.params
    assert counter.get_total_flops() == 2 * info.macs
    assert logits.shape == (1, info.num_classes or model.num_features)
    assert model.num_classes == info.num_classes
    assert getattr(spec.config, "distilled", False) == info.distilled
    assert info.preprocessing.crop == (info.input_size, info.input_size)


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_published_checkpoint_is_described(name: str) -> None:
    info = model_info(name)
    assert info.params == PUBLISHED_PARAMS[name]
    assert info.family == "deit"
    assert info.input_size == int(name[-3:])
    assert info.num_classes == 1000
    assert info.distilled == ("distilled" in name)
    assert info.licence == "Apache-2.0"
    assert info.dataset == "ImageNet-1k"
    assert 70 < info.top1 < info.top5 < 100
    assert {source.layout for source in info.sources} == {"native", "timm", "transformers"}
    authors = next(source for source in info.sources if source.url)
    assert authors.url.startswith(f"https://dl.fbaipublicfiles.com/deit/{name}-{authors.sha256_prefix}.pth")
    # the authors' evaluation: shorter side to int(size / 0.875), bicubic, centre crop
    assert info.preprocessing.resize == int(info.input_size / 0.875)
    assert info.preprocessing.interpolation == "bicubic"


def test_manifest_row_that_no_family_registers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "schema = 1\n[model.ghost]\nfamily = 'deit'\nparams = 1\nmacs = 1\ninput_size = 8\nnum_classes = 1\n"
    rows = parse_manifest(text + "eval = { resize = 8, crop = [8, 8] }\n")
    put_checkpoints_in_force(rows, monkeypatch)
    with pytest.raises(ManifestError, match=r"lists ghost, but models/deit.py does not register it"):
        create_model("ghost")


# Building


def test_created_model_is_in_training_mode_with_random_weights() -> None:
    first, second = create_model("deit_micro_patch4_32"), create_model("deit_micro_patch4_32")
    assert first.training
    assert not torch.equal(first.head.weight, second.head.weight)


def test_options_replace_config_fields() -> None:
    model = create_model("deit_micro_patch4_32", num_classes=3, img_size=(16, 40), drop_path_rate=0.2)
    assert model.num_classes == 3
    assert model.config.grid == (4, 10)
    assert model.blocks[-1].drop_path.rate == 0.2
    assert model(torch.randn(2, 3, 16, 40)).shape == (2, 3)
    assert registry.model_spec("deit_micro_patch4_32").config.num_classes == 10


def test_device_and_dtype_are_applied() -> None:
    model = create_model("deit_micro_patch4_32", device="meta", dtype=torch.bfloat16)
    assert {(p.is_meta, p.dtype) for p in model.parameters()} == {(True, torch.bfloat16)}


def test_origin_names_the_model_and_its_transform() -> None:
    origin = create_model("deit_tiny_patch16_224", img_size=384, depth=1).origin
    assert origin.name == "deit_tiny_patch16_224"
    assert origin.preprocessing.crop == (384, 384)
    assert origin.preprocessing.resize == 438
    assert origin.source is None


# Refusals


@pytest.mark.parametrize("call", [create_model, model_info], ids=["create_model", "model_info"])
def test_unknown_name_gives_the_three_nearest(call: type) -> None:
    with pytest.raises(UnknownModelError) as caught:
        call("deit_tiny_patch16_225")
    given, nearest = str(caught.value).split("; nearest: ")
    assert given == "unknown model 'deit_tiny_patch16_225'"
    assert len(nearest.split(", ")) == 3
    assert nearest.startswith("deit_tiny_patch16_224, ")
    assert set(nearest.split(", ")) <= set(list_models())


def test_name_like_no_other_still_gets_three_suggestions() -> None:
    with pytest.raises(UnknownModelError, match=r"^unknown model 'zzzzzzzz'; nearest: \w+, \w+, \w+$"):
        create_model("zzzzzzzz")


def test_unknown_option_gives_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'num_class' for DeiTConfig; nearest: num_classes"):
        create_model("deit_micro_patch4_32", num_class=3)


def test_pretrained_is_answered_with_from_pretrained() -> None:
    with pytest.raises(ConfigError, match=r"random weights; use deit_models\.from_pretrained"):
        create_model("deit_micro_patch4_32", pretrained=True)


def test_package_has_no_other_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'from_pretraned'"):
        _ = deit_models.from_pretraned


# Registering


@pytest.mark.usefixtures("own_registry")
def test_model_registered_at_run_time_is_like_any_other() -> None:
    register_model("toy", DeiT, TOY, depth=3, distilled=True)
    assert list_models()[-1] == "toy"
    assert "toy" not in list_models(pretrained=True)
    model = create_model("toy", num_classes=5).eval()
    assert model.config.depth == 3
    assert model(torch.randn(1, 2, 32, 64)).shape == (1, 5)
    assert model.origin.preprocessing.crop == (32, 64)

    info = model_info("toy")
    assert isinstance(info, ModelInfo)
    assert (info.name, info.family, info.num_classes, info.distilled) == ("toy", "deit", 4, True)
    assert info.params == sum(p.numel() for p in create_model("toy").parameters())
    assert info.sources == ()
    # 8 patches of 16 x 16 x 2 values; per block 12 D^2 a token and 2 D N^2 for attention; two heads
    tokens, width = 2 + 8, 16
    block = 12 * width**2 * tokens + 2 * width * tokens**2
    assert info.macs == 8 * 512 * width + 3 * block + 2 * width * 4


def test_names_registered_by_another_test_are_gone() -> None:
    assert "toy" not in list_models()


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("name", ["toy", "deit_tiny_patch16_224"])
def test_second_registration_of_a_name_is_refused(name: str) -> None:
    if name == "toy":
        register_model(name, DeiT, TOY)
    before = registry.model_spec(name)
    with pytest.raises(ConfigError, match=f"model '{name}' is already registered"):
        register_model(name, DeiT, TOY, depth=1)
    assert registry.model_spec(name) is before


def test_registration_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'depht'.*nearest: depth"):
        register_model("toy", DeiT, TOY, depht=1)
    assert "toy" not in list_models()


# What an import costs


def run(code: str) -> str:
    root = Path(deit_models.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_listing_and_describing_import_no_heavy_package() -> None:
    code = (
        "import sys, deit_models\n"
        "deit_models.list_models('deit_*', pretrained=True), deit_models.model_info('deit_tiny_patch16_224')\n"
        "print([m for m in ('torch', 'torchvision', 'huggingface_hub', 'safetensors', 'PIL', 'numpy')"
        " if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_building_a_model_imports_neither_torchvision_nor_the_hub_client() -> None:
    code = (
        "import sys, deit_models\n"
        "deit_models.create_model('deit_micro_patch4_32')\n"
        "print([m for m in ('torch', 'torchvision', 'huggingface_hub') if m in sys.modules])"
    )
    assert run(code) == "['torch']"


def test_manifest_name_is_taken_before_its_family_is_loaded() -> None:
    code = (
        "import deit_models\n"
        "try: deit_models.register_model('deit_tiny_patch16_224', None, None)\n"
        "except deit_models.ConfigError as error: print(error)\n"
        "print(type(deit_models.create_model('deit_micro_patch4_32')).__name__)"
    )
    assert run(code) == "model 'deit_tiny_patch16_224' is already registered; choose another name\nDeiT"
