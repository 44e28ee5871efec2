"""A teacher is frozen, sees its own normalisation and size, and comes from any of the places it may be named by."""

import copy
import re
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import randomise, refusal, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models as torchvision_models

from deit_models import CheckpointError, ConfigError, FetchError, UnknownModelError, create_model
from deit_models.checkpoint import DEFAULT_TEACHER, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from deit_models.errors import TrainingError
from deit_models.models.layers import HeadLogits
from deit_models.training.losses import soft_distillation
from deit_models.training.teacher import Teacher, load_teacher

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
STUDENT = Preprocessing(resize=32, crop=(32, 32), mean=MEAN, std=STD)
SMALL = "squeezenet1_1"
"""The smallest of torchvision's classification models."""


def channel_means(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


def images(count: int = 3, *, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Pictures of different colours, with noise, normalised; by default as the student sees them."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.rand(count, 3, 1, 1, generator=generator) + 0.1 * torch.rand(count, 3, 32, 32, generator=generator)
    return (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


class Network(nn.Module):
    """Everything that depends on the mode or could be trained: convolution, batch norm, dropout, linear layer."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x))).mean(dim=(2, 3))))


def network(num_classes: int = 10) -> Network:
    return randomise(Network(num_classes))


def load(spec: object, **options: object) -> Teacher:
    return load_teacher(spec, **{"num_classes": 10, "student": STUDENT, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def torchvision_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A torchvision model with 10 classes, in eval mode, and its state dict on disk."""
    model = torchvision_models.get_model(SMALL, weights=None, num_classes=10).eval()
    nn.init.normal_(model.classifier[1].weight)  # torchvision's own gives logits near 0
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(model.state_dict(), path)
    return model, path


# Frozen


def test_teacher_stays_frozen_and_in_eval_mode():
    teacher = Teacher(network().train(), student=STUDENT)
    x, statistics = images(), teacher.network.norm.running_mean.clone()
    before = teacher(x)
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher(x), before)  # dropout would have changed it
    assert torch.equal(teacher.network.norm.running_mean, statistics)


def test_no_gradient_goes_through_the_teacher():
    x = images().requires_grad_()
    logits = Teacher(network(), student=STUDENT)(x)
    assert not logits.requires_grad
    assert not load(lambda x: x.flatten(1)[:, :10])(x).requires_grad  # nor through a callable that cannot be frozen


def test_a_module_that_is_passed_is_not_changed():
    mine = network().train()
    state = copy.deepcopy(mine.state_dict())
    teacher = load(mine, precision="bf16")
    assert teacher.network is not mine
    assert mine.training
    assert all(parameter.requires_grad for parameter in mine.parameters())
    for name, tensor in mine.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert tensor.stride() == state[name].stride()
        assert torch.equal(tensor, state[name])


def test_loading_leaves_the_random_numbers_of_the_student_alone(torchvision_file: tuple[nn.Module, Path]):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load(SMALL, weights=torchvision_file[1])
    assert torch.equal(torch.rand(3), expected)


def test_logits_made_in_inference_mode_can_be_learned_from():
    answers = torch.inference_mode()(lambda x: channel_means(x))
    logits = load(answers, num_classes=3)(images())
    assert not logits.is_inference()
    student = torch.zeros(3, 3, requires_grad=True)
    (soft_distillation(student, logits, 1.0) + (student * logits).sum()).backward()
    assert student.grad.abs().sum() > 0


# Normalisation and size


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0)}, {"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0)}),
        ({"mean": (0.1, 0.2, 0.3)}, {"mean": (0.1, 0.2, 0.3), "std": STD}),
        ({"std": (0.5, 1.0, 2.0)}, {"mean": MEAN, "std": (0.5, 1.0, 2.0)}),
    ],
)
def test_teacher_sees_its_own_normalisation(given: dict, expected: dict):
    seen = load(channel_means, num_classes=3, **given)(images())
    torch.testing.assert_close(seen, channel_means(images(**expected)), atol=1e-5, rtol=0)


def test_equal_normalisation_passes_the_very_numbers():
    seen = []
    teacher = load(lambda x: seen.append(x) or channel_means(x), num_classes=3, mean=list(MEAN), std=list(STD))
    x = images()
    teacher(x)
    assert torch.equal(seen[-1], x)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mean": (0.5,)}, "expected 3 numbers"),
        ({"std": (1.0, 1.0)}, "expected 3 numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"precision": "int8"}, "expected float32, bf16 or fp16"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, told: str):
    assert told in refusal(ConfigError, lambda: load(channel_means, num_classes=3, **options))


def test_our_model_gets_its_own_size_and_normalisation():
    teacher_model = tiny_model(img_size=48, num_classes=10)
    own = teacher_model.origin.preprocessing
    teacher = load(teacher_model, channels_last=False)
    assert (tuple(own.mean), tuple(own.std)) != (MEAN, STD)
    theirs = F.interpolate(
        images(mean=own.mean, std=own.std), size=(48, 48), mode="bicubic", align_corners=False, antialias=True
    )
    with torch.no_grad():
        torch.testing.assert_close(teacher(images()), teacher_model(theirs), atol=1e-4, rtol=0)


def test_sizes_that_the_network_sees():
    seen = []

    def watched(network: nn.Module) -> nn.Module:
        network.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
        return network

    load(watched(tiny_model(img_size=48, num_classes=10, dynamic_img_size=True)))
    load(watched(torchvision_models.VisionTransformer(48, 16, 1, 2, 16, 32, num_classes=10)))
    load(watched(network()))
    load(watched(network()), img_size=(16, 24))
    assert seen == [(2, 3, 32, 32), (2, 3, 48, 48), (2, 3, 32, 32), (2, 3, 16, 24)]


# Output


def test_outputs_that_hold_the_logits():
    for wrapped in (
        lambda x: torchvision_models.inception.InceptionOutputs(channel_means(x), None),
        lambda x: HeadLogits(channel_means(x), None),
        lambda x: HeadLogits(channel_means(x) + 2, channel_means(x) - 2),
    ):
        torch.testing.assert_close(load(wrapped, num_classes=3)(images()), channel_means(images()))


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (lambda x: (channel_means(x), channel_means(x)), "gives tuple; wrap it"),
        (lambda x: {"out": x}, "gives dict; wrap it"),
        (lambda x: x.mean(dim=3), "gives (2, 3, 32) for 2 images"),
        (lambda x: channel_means(x)[:1], "gives (1, 3) for 2 images"),
        (lambda x: channel_means(x) / 0, "NaN or infinity"),
        (nn.Conv2d(4, 3, 1), "fails on images of shape (2, 3, 32, 32)"),
        (network(7), "has 7 classes, the student's data 3"),
    ],
)
def test_what_is_no_teacher_is_refused(answers: object, told: str):
    assert told in refusal(TrainingError, lambda: load(answers, num_classes=3))


# Precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_agrees_with_float32(precision: str):
    x, model = images(64), network()
    full, half = load(model)(x), load(model, precision=precision)(x)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert full.argmax(1).unique().numel() > 1
    best = full.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.05 * full.std()
    assert clear.float().mean() > 0.5
    assert torch.equal(half.argmax(1)[clear], full.argmax(1)[clear])


def test_half_precision_keeps_statistics_in_float32():
    teacher = load(network(), precision="bf16")
    assert teacher.network.conv.weight.dtype == teacher.network.head.weight.dtype == torch.bfloat16
    assert teacher.network.norm.running_var.dtype == teacher.network.norm.weight.dtype == torch.float32


def test_a_transformer_teaches_in_half_precision():
    model, x = tiny_model(num_classes=10), images(16)
    torch.testing.assert_close(load(model, precision="bf16")(x), load(model)(x), atol=0.3, rtol=0)


def test_callers_autocast_does_not_reach_the_teacher():
    x, teacher = images(), load(network())
    with torch.autocast("cpu", torch.bfloat16):
        inside = teacher(x)
    assert torch.equal(inside, teacher(x))


def test_memory_format_is_the_callers_choice():
    for channels_last in (True, False):
        weight = load(network(), channels_last=channels_last).network.conv.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


# Torchvision


@pytest.mark.parametrize("spec", [SMALL, f"torchvision:{SMALL}"])
@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
def test_torchvision_model_from_a_file(spec: str, kind: str, torchvision_file: tuple[nn.Module, Path], tmp_path: Path):
    model, path = torchvision_file
    if kind == ".safetensors":
        path = tmp_path / "teacher.safetensors"
        save_file(model.state_dict(), path)
    teacher = load(spec, weights=path, channels_last=False)
    with torch.no_grad():
        expected = model(images(mean=IMAGENET_MEAN, std=IMAGENET_STD))
        assert (expected - model(images())).abs().max() > 1e-2  # what forgetting to normalise would give
    torch.testing.assert_close(teacher(images()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mnasnet0_5", "shufflenet_v2_x0_5"])
def test_batch_statistics_come_from_the_file(name: str, tmp_path: Path):
    model = torchvision_models.get_model(name, weights=None, num_classes=10)
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "t.pth")
    loaded = load(name, weights=tmp_path / "t.pth").network.state_dict()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(loaded[key], value), key


def test_foreign_and_damaged_files_are_refused(torchvision_file: tuple[nn.Module, Path], tmp_path: Path):
    model, path = torchvision_file
    message = refusal(TrainingError, lambda: load(SMALL, weights=path, num_classes=37))
    assert "has 10 classes, the student's data 37" in message
    message = refusal(CheckpointError, lambda: load("squeezenet1_0", weights=path))
    assert str(path) in message
    assert "missing" in message
    assert re.search(r"is \([\d, ]+\), expected \([\d, ]+\)", message)
    state = dict(model.state_dict())
    state["classifier.1.bias"] = state["classifier.1.bias"] * float("nan")
    torch.save(state, tmp_path / "nan.pth")
    assert "NaN" in refusal(CheckpointError, lambda: load(SMALL, weights=tmp_path / "nan.pth"))
    del state["classifier.1.bias"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    message = refusal(CheckpointError, lambda: load(SMALL, weights=tmp_path / "other.pth"))
    assert "missing: classifier.1.bias" in message
    assert "unexpected: extra" in message
    torch.save({"code": Network()}, tmp_path / "pickle.pth")
    assert "refused" in refusal(CheckpointError, lambda: load(SMALL, weights=tmp_path / "pickle.pth"))
    assert "no such weights file" in refusal(FetchError, lambda: load(SMALL, weights=tmp_path / "none.pth"))


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which torchvision keeps weights; it can fetch no others, for want of a way out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "")
    with socket.create_server(("127.0.0.1", 0)) as closed_again:
        port = closed_again.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    # urllib reads the environment once, for the opener that all requests share
    urllib.request.install_opener(urllib.request.build_opener())
    yield tmp_path
    monkeypatch.undo()
    urllib.request.install_opener(urllib.request.build_opener())


@pytest.mark.parametrize("weights", [None, "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"])
def test_published_weights_bring_their_normalisation(weights: str | None, torch_home: Path):
    published = torchvision_models.get_model(SMALL, weights=None).state_dict()
    address = torchvision_models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url
    (torch_home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(published, torch_home / "hub" / "checkpoints" / address.rpartition("/")[2])
    teacher = load(SMALL, weights=weights, num_classes=1000)
    assert torch.equal(teacher.network.classifier[1].weight, published["classifier.1.weight"])
    # (0 * student's std + student's mean - ImageNet's mean) / ImageNet's std
    expected = [(ours - theirs) / std for ours, theirs, std in zip(MEAN, IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    torch.testing.assert_close(teacher.shift.flatten(), torch.tensor(expected))


def test_backbone_without_a_head_is_no_teacher():
    body = create_model("dino_vits16", img_size=32, embed_dim=24, num_heads=3, depth=1)
    assert "num_classes=0, no head" in refusal(ConfigError, lambda: load(body))


@pytest.mark.usefixtures("torch_home")
def test_published_weights_of_other_classes_are_refused_before_the_download():
    assert "has 1000 classes" in refusal(TrainingError, lambda: load("torchvision:regnet_y_16gf"))


@pytest.mark.usefixtures("torch_home")
def test_a_failed_download_and_an_unknown_one_are_explained():
    message = refusal(FetchError, lambda: load(SMALL, num_classes=1000))
    assert torchvision_models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url in message
    assert "Connection refused" in message
    assert "IMAGENET1K_V1" in refusal(ConfigError, lambda: load(SMALL, weights="IMAGENET1K_V7", num_classes=1000))


# Our own models


def test_folder_of_our_own(tmp_path: Path):
    model = tiny_model(num_classes=10)
    model.save_pretrained(tmp_path)
    own = model.origin.preprocessing
    for spec in (tmp_path, str(tmp_path)):
        teacher = load(spec)
        assert torch.equal(teacher(images()), load(model)(images()))
        expected = [ours / theirs for ours, theirs in zip(STD, own.std, strict=True)]
        torch.testing.assert_close(teacher.scale.flatten(), torch.tensor(expected))


def test_registered_name_with_shipped_weights():
    assert load("deit_micro_patch4_32")(images()).shape == (3, 10)


def test_registered_name_with_a_file(tmp_path: Path):
    model = randomise(create_model("deit_micro_distilled_patch4_32"))
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    teacher = load("deit_micro_distilled_patch4_32", weights=tmp_path / "mine.safetensors")
    assert torch.equal(teacher.network.head_dist.weight.cpu(), model.head_dist.weight)


@pytest.mark.usefixtures("own_registry")
def test_registered_name_without_weights_asks_for_a_file():
    from deit_models import register_model
    from deit_models.models.deit import DeiT, DeiTConfig

    register_model("mine", DeiT, DeiTConfig(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=1))
    assert "pass weights=FILE" in refusal(TrainingError, lambda: load("mine"))


# Factories


FACTORY = """
from __future__ import annotations
import dataclasses
import torch

@dataclasses.dataclass
class Options:
    width: int = 10

def make():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, Options().width))

def function():
    return lambda x: x.mean(dim=(2, 3)) + Options().width

def makes_a_number():
    return number

number = 3
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    path = tmp_path / "my_teacher.py"
    path.write_text(FACTORY)
    return path


def test_factory_in_a_file_or_a_module(factory: Path, monkeypatch: pytest.MonkeyPatch):
    assert load(f"{factory}:make")(images()).shape == (3, 10)
    monkeypatch.syspath_prepend(factory.parent)
    for place in (factory, "my_teacher"):
        x = images()
        torch.testing.assert_close(load(f"{place}:function", num_classes=3)(x), channel_means(x) + 10)


def test_factory_with_weights(factory: Path, tmp_path: Path):
    state = {"1.weight": torch.randn(10, 3072), "1.bias": torch.randn(10)}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    teacher = load(f"{factory}:make", weights=tmp_path / "w.pt")
    torch.testing.assert_close(teacher(images()), F.linear(images().flatten(1), *state.values()), atol=1e-4, rtol=1e-4)
    told = refusal(ConfigError, lambda: load(f"{factory}:function", weights=tmp_path / "w.pt", num_classes=3))
    assert "cannot be loaded into function" in told


def test_factories_that_are_none(factory: Path):
    assert "KeyError: 'nothing'" in refusal(UnknownModelError, lambda: load(f"{factory}:nothing"))
    assert "number is int" in refusal(ConfigError, lambda: load(f"{factory}:number"))
    assert "int is no teacher" in refusal(ConfigError, lambda: load(f"{factory}:makes_a_number"))
    assert "no_such.py" in refusal(UnknownModelError, lambda: load("no_such.py:make"))
    assert "no_such_package" in refusal(UnknownModelError, lambda: load("no_such_package.teachers:make"))
    assert "my_teacher.py:NAME" in refusal(ConfigError, lambda: load(str(factory)))


# Other specifications


def test_a_teacher_is_used_as_it_is():
    teacher = Teacher(channel_means, student=STUDENT)
    assert load(teacher, num_classes=3) is teacher
    assert "has 3 classes" in refusal(TrainingError, lambda: load(teacher))


def test_unknown_names_get_the_nearest_of_both_kinds():
    assert "regnet_y_16gf" in refusal(UnknownModelError, lambda: load("regnety_16gf"))
    assert "regnet_y_16gf" in refusal(UnknownModelError, lambda: load("torchvision:regnety_16gf"))
    assert "deit_micro_patch4_32" in refusal(UnknownModelError, lambda: load("deit_micro_patch4_23"))


def test_what_cannot_be_used_is_refused(tmp_path: Path):
    tiny_model(num_classes=10).save_pretrained(tmp_path)
    for spec in (network(), tmp_path):
        assert "weights" in refusal(ConfigError, lambda spec=spec: load(spec, weights="w.pth"))
    assert "dict is no teacher" in refusal(ConfigError, lambda: load({}))


def test_a_regression_model_is_no_teacher() -> None:
    model = tiny_model("deit_micro_patch4_32")
    model.origin = replace(model.origin, problem_type="regression")
    assert "a teacher needs one class" in refusal(
        ConfigError, lambda: load_teacher(model, num_classes=model.num_classes, student=STUDENT)
    )


# The papers' teacher

TINY_REGNET = "regnet_y_400mf"


def timm_names(model: nn.Module) -> dict[str, Tensor]:
    """The state of torchvision's RegNet under timm's names, written out a second time."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        words = name.split(".")
        if words[0] == "trunk_output":
            stage, block = words[2].removeprefix("block").split("-")
            rest = ".".join(words[3:])
            for ours, theirs in (
                *((f"f.{letter}.0", f"conv{number}.conv") for number, letter in enumerate("abc", start=1)),
                *((f"f.{letter}.1", f"conv{number}.bn") for number, letter in enumerate("abc", start=1)),
                *(("f.se", "se"), ("proj.0", "downsample.conv"), ("proj.1", "downsample.bn")),
            ):
                rest = theirs + rest.removeprefix(ours) if rest.startswith(f"{ours}.") else rest
            renamed[f"s{stage}.b{int(block) + 1}.{rest}"] = tensor
        elif words[0] == "stem":
            renamed[".".join(["stem", ("conv", "bn")[int(words[1])], *words[2:]])] = tensor
        else:
            renamed[f"head.{name}"] = tensor
    return renamed


def filled_regnet(num_classes: int, *, name: str = TINY_REGNET) -> nn.Module:
    """A RegNet of torchvision's in eval mode, with weights and statistics that make logits of about 1."""
    torch.manual_seed(0)
    model = torchvision_models.get_model(name, weights=None, num_classes=num_classes).eval()
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        model.fc.weight.normal_()
    return model


def test_papers_teacher_has_the_names_of_timm() -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("regnety_160").state_dict()
    ours = timm_names(torchvision_models.get_model("regnet_y_16gf", weights=None))
    assert {name: tensor.shape for name, tensor in theirs.items()} == {name: t.shape for name, t in ours.items()}
    assert len(ours) == 428


def test_file_with_timms_names_fills_torchvisions_network(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = filled_regnet(10)
    theirs = timm.create_model("regnety_004", num_classes=10).eval()
    theirs.load_state_dict(timm_names(model))
    torch.save(
        {"model": {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}}, tmp_path / "r.pth"
    )
    teacher = load(TINY_REGNET, weights=tmp_path / "r.pth", channels_last=False)
    with torch.no_grad():
        expected = theirs(images(mean=IMAGENET_MEAN, std=IMAGENET_STD))
    assert expected.std() > 0.1
    torch.testing.assert_close(teacher(images()), expected, atol=1e-4, rtol=1e-4)
    state = timm_names(model)
    del state["s2.b1.downsample.conv.weight"]
    torch.save(state, tmp_path / "part.pth")
    message = refusal(CheckpointError, lambda: load(TINY_REGNET, weights=tmp_path / "part.pth"))
    assert "missing: s2.b1.downsample.conv.weight" in message
    assert "has 10 classes" in refusal(
        TrainingError, lambda: load(TINY_REGNET, weights=tmp_path / "r.pth", num_classes=7)
    )


def test_papers_teacher_of_other_classes_is_refused_before_the_download() -> None:
    assert "the teacher has 1000 classes, the student's data 10" in refusal(
        TrainingError, lambda: load(DEFAULT_TEACHER)
    )
