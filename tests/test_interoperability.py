"""Other libraries train, explain and save our models; what they leave loads here. Skipped where one is missing."""

import importlib
import io
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from families import KINDS, TINY
from torch import Tensor, nn
from torch.nn import functional as F

import deit_models
from deit_models import ConfigError, WithLoss, create_model, from_pretrained, model_info
from deit_models.models.layers import ImageClassifier
from deit_models.registry import own_model

SHAPES = {name: model_info(name).family for kind, name in KINDS.items() if kind not in ("deit", "token head")}
"""One name for each kind of model, with its family."""
IMAGES = torch.randn(8, 3, 112, 112, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 5


@pytest.fixture(params=SHAPES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> ImageClassifier:
    torch.manual_seed(0)
    return create_model(name, num_classes=5, img_size=112, **TINY[SHAPES[name]]).eval()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Others' deprecations are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peer(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(module.partition(".")[0], reason=f"needs {module.partition('.')[0]}", exc_type=ImportError)
        return importlib.import_module(module)


def loss_of(output: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    heads = [output] if isinstance(output, Tensor) else list(output)
    return torch.stack([F.cross_entropy(head, labels) for head in heads]).mean()


def rows(labels: Tensor = LABELS) -> list[dict[str, Tensor]]:
    return [{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, labels, strict=True)]


@torch.no_grad()
def assert_loads(weights: Path, model: ImageClassifier) -> None:
    """Files that do not say what they are of, beside a config.json, which does."""
    folder = weights if weights.is_dir() else weights.parent
    deit_models.save_pretrained(model, folder / "config_of")
    (folder / "config_of" / "config.json").rename(folder / "config.json")
    assert torch.equal(from_pretrained(weights, cache_dir=folder / "cache")(IMAGES), model.eval()(IMAGES))


@torch.no_grad()
def assert_saved_as_it_answers(model: ImageClassifier, folder: Path, *, atol: float = 0.0) -> None:
    expected = model.eval()(IMAGES)
    model.save_pretrained(folder)
    torch.testing.assert_close(from_pretrained(folder)(IMAGES), expected, atol=atol, rtol=0)


# Trainers


def test_trainer_of_transformers_trains_and_saves(model: ImageClassifier, tmp_path: Path) -> None:
    transformers = peer("transformers")
    peer("accelerate")
    before = model(IMAGES)
    settings = transformers.TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=1, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    trainer = transformers.Trainer(WithLoss(model), settings, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    measured = trainer.evaluate()["eval_loss"]
    found = WithLoss(model.eval())(IMAGES, LABELS)
    assert measured == pytest.approx(found["loss"].item(), rel=1e-4)
    assert not torch.allclose(model(IMAGES), before)
    trainer.save_model(str(tmp_path / "end"))
    assert_loads(tmp_path / "end", model)
    assert_loads(tmp_path / "run" / "checkpoint-2", model)
    assert_saved_as_it_answers(trainer.model.model, tmp_path / "whole")


def test_trainer_of_transformers_learns_several_labels(tmp_path: Path) -> None:
    transformers = peer("transformers")
    peer("accelerate")
    torch.manual_seed(0)
    model = create_model("deit_micro_distilled_patch4_32", num_classes=3, embed_dim=16, depth=1, num_heads=2)
    model.origin = replace(model.origin, class_names=("cat", "dog", "bird"), problem_type="multi_label_classification")
    labels = torch.randint(0, 2, (8, 3)).float()
    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": row} for row in labels]
    settings = transformers.TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=2, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = transformers.Trainer(WithLoss(model), settings, train_dataset=images, eval_dataset=images)
    trainer.train()
    pixels = torch.stack([row["pixel_values"] for row in images])
    expected = [F.binary_cross_entropy_with_logits(head, labels) for head in model.eval().forward_heads(pixels)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    model.save_pretrained(tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(pixels), model(pixels))
    assert loaded.origin.problem_type == "multi_label_classification"


def test_lightning_trains_and_its_checkpoint_loads(model: ImageClassifier, tmp_path: Path) -> None:
    lightning = peer("lightning")

    class Lit(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return loss_of(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Lit(), data)
    (tmp_path / "run").mkdir()
    trainer.save_checkpoint(tmp_path / "run" / "last.ckpt")
    assert_loads(tmp_path / "run" / "last.ckpt", model)


def test_accelerate_trains_and_its_folders_load(model: ImageClassifier, tmp_path: Path) -> None:
    accelerator = peer("accelerate").Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prepared, optimizer = accelerator.prepare(model.train(), optimizer)
    accelerator.backward(loss_of(prepared(IMAGES), LABELS))
    optimizer.step()
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(prepared, str(tmp_path / "model"))
    trained = accelerator.unwrap_model(prepared)
    assert_loads(tmp_path / "state", trained)
    assert_loads(tmp_path / "model", trained)
    assert_saved_as_it_answers(trained, tmp_path / "whole")


@pytest.mark.parametrize("targets", ["all-linear", "blocks"])
def test_peft_trains_adapters_that_merge(model: ImageClassifier, targets: str, tmp_path: Path) -> None:
    peft = peer("peft")
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks" in key]
    chosen = {"target_modules": targets} if targets == "all-linear" else {"target_modules": linear}
    whole = None if targets == "all-linear" else [model.head_names[0]]
    config = peft.LoraConfig(r=2, modules_to_save=whole, **chosen)
    before = model(IMAGES)
    adapted = peft.get_peft_model(model, config)
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(adapted.eval()(IMAGES), LABELS).backward()
        optimizer.step()
    expected = adapted(IMAGES)
    assert not torch.allclose(expected, before)
    with pytest.raises(ConfigError, match=r"merge_and_unload"):
        adapted.base_model.model.save_pretrained(tmp_path / "no")
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IMAGES), expected, atol=1e-5, rtol=0)
    assert_saved_as_it_answers(merged, tmp_path / "merged")


ATTENTION = {
    "deit": ["qkv"],
    "t2t_vit": ["qkv", "kqv"],
    # of LeViT's layers with a BatchNorm the linear layer inside, which is called c
    "levit": r"blocks\..*\.(qkv|q\.1|kv)\.c",
    "vit_resnas": ["qkv"],
    "cait": r"blocks.*\.attn\.(qkv|q|k|v)",
    "resmlp": ["attn", "fc1"],
}


def test_peft_trains_adapters_of_attention_and_heads(name: str, model: ImageClassifier, tmp_path: Path) -> None:
    """As the documentation says it for each family, in training mode, with running statistics of BatchNorms."""
    peft = peer("peft")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):  # random weights begin with branches that are zero
            nn.init.ones_(module.weight)
    heads = [key for key in model.head_names if getattr(model, key) is not None and key != "patch_head"]
    config = peft.LoraConfig(r=2, target_modules=ATTENTION[SHAPES[name]], modules_to_save=heads)
    adapted = peft.get_peft_model(model, config).train()
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.01)
    before = {key: parameter.detach().clone() for key, parameter in adapted.named_parameters() if "lora_B" in key}
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(adapted(IMAGES), LABELS).backward()
        optimizer.step()
    assert before
    assert all(not torch.equal(p, before[key]) for key, p in adapted.named_parameters() if key in before)
    expected = adapted.eval()(IMAGES)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IMAGES), expected, atol=1e-5, rtol=1e-5)
    assert_saved_as_it_answers(merged, tmp_path)


def test_peft_says_which_layers_of_levit_it_does_not_know() -> None:
    peft = peer("peft")
    model = create_model("levit_128s", num_classes=5, img_size=112, **TINY["levit"])
    with pytest.raises(ValueError, match=r"Target module LinearNorm"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"]))


# timm's surface, beside its own tests of models, which run through `timm_registry`

IN_TIMM = {key: family for key, family in SHAPES.items() if family in ("deit", "levit", "cait")}


@torch.no_grad()
@pytest.mark.parametrize("name", IN_TIMM)
def test_features_heads_and_maps_are_timms(name: str, model: ImageClassifier, tmp_path: Path) -> None:
    timm = peer("timm")
    model.save_pretrained(tmp_path, layout="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    for entry, other in zip(model.feature_info, theirs.feature_info, strict=True):
        assert (entry["num_chs"], entry["reduction"]) == (other["num_chs"], other["reduction"])
    assert (model.num_features, model.head_hidden_size) == (theirs.num_features, theirs.head_hidden_size)
    features = model.forward_features(IMAGES)
    for pre_logits in (False, True):
        expected = theirs.forward_head(theirs.forward_features(IMAGES), pre_logits=pre_logits)
        torch.testing.assert_close(model.forward_head(features, pre_logits=pre_logits), expected, atol=1e-4, rtol=1e-4)
    formats = ["NCHW", "NLC"] if IN_TIMM[name] == "deit" else ["NCHW"]
    count = len(model.feature_info)
    for options in (
        {"output_fmt": formats[-1], "stop_early": True, "indices": [0]},
        {"indices": 1, "norm": IN_TIMM[name] == "deit"},
        {"indices": [count - 1, 0], "stop_early": True},
        {},
    ):
        ours, other = (m.forward_intermediates(IMAGES, **options) for m in (model, theirs))
        torch.testing.assert_close(ours[0], other[0], atol=1e-4, rtol=1e-4)
        assert len(ours[1]) == len(other[1])
        for own, their in zip(ours[1], other[1], strict=True):
            torch.testing.assert_close(own, their, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_timm_extracts_features_of_every_family() -> None:
    timm = peer("timm")
    names = peer("timm_registry")
    for name in ("deit_tiny_distilled_patch16_224", "t2t_vit_7", "levit_128s", "vit_resnas_tiny"):
        sizes = {"img_size": 112, **TINY[SHAPES[name]]}
        features = timm.create_model(names.PREFIX + name, features_only=True, out_indices=2, **sizes).eval()
        maps, channels = features(IMAGES[:2]), features.feature_info.channels()
        assert [map_.shape[1] for map_ in maps] == channels
        assert [map_.shape[2] for map_ in maps] == [-(-112 // step) for step in features.feature_info.reduction()]


# Explanations


def test_captum_attributes_the_whole_difference(model: ImageClassifier) -> None:
    gradients = peer("captum.attr").IntegratedGradients(model)
    x = IMAGES[:1]
    shares, gap = gradients.attribute(x, target=1, n_steps=64, return_convergence_delta=True)
    difference = (model(x) - model(torch.zeros_like(x)))[0, 1]
    assert abs(gap.item()) < 0.05 * abs(difference.item()) + 1e-4
    assert shares.shape == x.shape


def test_grad_cam_draws_a_map_of_patches(model: ImageClassifier) -> None:
    cam = peer("pytorch_grad_cam")
    target = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    height, width = model.config.grids[-1] if hasattr(model.config, "grids") else model.config.grid
    last = model.blocks[-1]

    def on_grid(tokens: Tensor) -> Tensor:
        return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))

    draw = cam.GradCAM(model, [getattr(last, "norm1", last)], reshape_transform=on_grid)
    maps = [draw(IMAGES[:2], [target(k)] * 2) for k in range(5)]
    assert all(map_.shape == (2, 112, 112) for map_ in maps)
    assert max(float(map_.max()) for map_ in maps) > 0.5


# Saving what other tools changed


def test_torchao_weights_are_saved_as_they_answer(model: ImageClassifier, tmp_path: Path) -> None:
    quantization = peer("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert_saved_as_it_answers(model, tmp_path, atol=1e-4)


def test_distributed_checkpoint_becomes_a_file_that_loads(model: ImageClassifier, tmp_path: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    checkpoint.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "parts", no_dist=True)
    (tmp_path / "one").mkdir()
    dcp_to_torch_save(tmp_path / "parts", tmp_path / "one" / "model.pth")
    assert_loads(tmp_path / "one" / "model.pth", model)


def test_parametrized_weights_are_refused_until_they_are_removed(model: ImageClassifier, tmp_path: Path) -> None:
    from torch.nn.utils import parametrize
    from torch.nn.utils.parametrizations import weight_norm

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        weight_norm(layer)
    with pytest.raises(ConfigError, match=r"parametrizations.*remove_parametrizations"):
        model.save_pretrained(tmp_path / "no")
    with pytest.raises(ConfigError, match=r"cannot be folded .*without adapters, parametrizations"):
        deit_models.export(model, tmp_path / "m.pt2", format="torch-export")
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    assert_saved_as_it_answers(model, tmp_path / "yes")


# Wrapped models

WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "with loss": WithLoss,
    "compiled, parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("deit_micro_distilled_patch4_32", embed_dim=16, depth=1, num_heads=2)
    model.origin = replace(model.origin, class_names=tuple("jihgfedcba"))
    return WRAPPERS[request.param](model.eval())


def test_wrapped_models_are_saved_and_used_as_what_they_wrap(wrapped: nn.Module, tmp_path: Path) -> None:
    inner = own_model(wrapped)
    photos = [PIL.Image.effect_noise((32, 32), 90).convert("RGB") for _ in range(3)]
    assert deit_models.Classifier(wrapped)(photos) == deit_models.Classifier(inner)(photos)
    deit_models.save_pretrained(wrapped, tmp_path / "saved")
    assert from_pretrained(tmp_path / "saved").origin.class_names == tuple("jihgfedcba")
    deit_models.export(wrapped, tmp_path / "m.pt2", format="torch-export")
    deit_models.adapt_head(wrapped, num_classes=3)
    assert inner.num_classes == 3


def test_wrapped_models_are_scored_by_class_name(wrapped: nn.Module, tmp_path: Path) -> None:
    """The folders are in another order than the model's classes, and fewer."""
    for name in "abc":
        (tmp_path / name).mkdir()
        for number in range(3):
            PIL.Image.effect_noise((32, 32), 90).convert("RGB").save(tmp_path / name / f"{number}.png")
    options = {"device": "cpu", "workers": 0, "precision": "float32"}
    found, expected = (deit_models.evaluate(m, tmp_path, **options) for m in (wrapped, own_model(wrapped)))
    assert found == expected


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), nn.Sequential(nn.Identity())])
def test_modules_of_others_are_refused_by_name(module: nn.Module, tmp_path: Path) -> None:
    for act in (
        lambda: deit_models.save_pretrained(module, tmp_path),
        lambda: deit_models.Classifier(module),
        lambda: deit_models.export(module, tmp_path / "m.pt2", format="torch-export"),
        lambda: deit_models.transform_for(module),
        lambda: deit_models.adapt_head(module, num_classes=3),
    ):
        with pytest.raises(ConfigError, match=rf"a {type(module).__name__} is no model of this package"):
            act()


# torch's own tools


@torch.no_grad()
def test_pickled_models_answer_alike(model: ImageClassifier) -> None:
    expected, buffer = model(IMAGES), io.BytesIO()
    assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), expected)
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(IMAGES), expected)


@torch.no_grad()
def test_torch_jit_traces(model: ImageClassifier) -> None:
    traced = torch.jit.trace(model, IMAGES[:2])
    torch.testing.assert_close(traced(IMAGES), model(IMAGES))


@torch.no_grad()
def test_channels_last_answers_alike_and_is_saved(model: ImageClassifier, tmp_path: Path) -> None:
    expected = model(IMAGES)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(IMAGES.to(memory_format=torch.channels_last)), expected)
    assert_saved_as_it_answers(model, tmp_path, atol=1e-5)


def test_ensembles_and_gradients_of_each_image_by_vmap(model: ImageClassifier) -> None:
    params, buffers = torch.func.stack_module_state([model, model])

    def call(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, (params, buffers), (x,))

    both = torch.func.vmap(call, in_dims=(0, 0, None))(params, buffers, IMAGES[:2])
    torch.testing.assert_close(both[1], model(IMAGES[:2]), atol=1e-5, rtol=1e-4)

    def loss(params: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(call(params, dict(model.named_buffers()), x[None]), label[None])

    learned = {key: p.detach() for key, p in model.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(learned, IMAGES[:2], LABELS[:2])
    F.cross_entropy(model(IMAGES[:2]), LABELS[:2]).backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(each[key].mean(dim=0), parameter.grad, atol=1e-5, rtol=1e-3)
