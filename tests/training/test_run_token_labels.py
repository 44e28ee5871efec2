"""Token labelling in a run: the loss by hand, MixToken by hand, the extra head, resuming, and what is refused."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from small_sets import distributions, write_maps
from torch import Tensor, nn
from torch.nn import functional as F

import deit_models
from deit_models import from_pretrained
from deit_models.augmentation.label_maps import LabelMaps
from deit_models.augmentation.mixing import TokenTargets
from deit_models.data.datasets import open_dataset
from deit_models.errors import ConfigError, DataError, TrainingError
from deit_models.training.engine import forward_backward
from deit_models.training.learner import Learner, TokenHeads, make_learner

LABELLED: dict[str, Any] = {"token_labels": 0.5, "mixup": 0.0, "cutmix": 0.0}
PICTURES = tiny.Pictures(24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_maps(tmp_path / "maps", PICTURES, distributions(24, 3, 4, 4))


def learner(folder: Path | None, network: nn.Module | None = None, **changes: Any) -> Learner:
    return make_learner(
        tiny.model() if network is None else network,
        tiny.recipe(**{**LABELLED, **changes}),
        num_classes=3,
        process=tiny.ALONE,
        preprocessing=tiny.PREPROCESSING,
        label_maps=None if folder is None else LabelMaps(folder, PICTURES),
    )


def batch() -> tuple[Tensor, ...]:
    """Whole images, none mirrored."""
    numbers, generator = torch.tensor([3, 7, 7, 20]), torch.Generator().manual_seed(5)
    places = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 0.0]]).repeat(4, 1).double()
    places[:, 0] = numbers
    images = torch.randn(4, 3, tiny.SIZE, tiny.SIZE, generator=generator)
    return images, PICTURES.labels[numbers], torch.full((4,), -1), places


# The loss


def whole_labels(folder: Path) -> Tensor:
    """The labels of the batch's patches, a patch being 2x2 cells: (B, 4, K)."""
    maps = LabelMaps(folder, PICTURES).dense(torch.tensor([3, 7, 7, 20]), torch.device("cpu"))
    cells = F.avg_pool2d(maps, 2)
    return (cells / cells.sum(1, keepdim=True)).flatten(2).mT


@pytest.mark.parametrize("distilled", [False, True])
def test_loss_is_that_of_the_class_head_and_half_that_of_each_patch(folder: Path, distilled: bool) -> None:
    taught = learner(folder, tiny.model(distilled=distilled), label_heads="both", label_smoothing=0.1)
    assert isinstance(taught.bare, TokenHeads)
    model, images, wanted = taught.bare.model, batch()[0], whole_labels(folder)
    found = forward_backward(taught, tuple(tensor.clone() for tensor in batch()), exchange=True)
    features = model.forward_features(images)
    smoothed = 0.9 * wanted + 0.1 / 3
    patches = taught.bare.extra(features[:, 1 + distilled :]).log_softmax(dim=2)
    each = [-(smoothed[i, j] * patches[i, j]).sum() for i in range(4) for j in range(4)]
    of_patches = 0.5 * sum(each) / 16
    of_heads = [
        -(smoothed.mean(dim=1) * logits.log_softmax(dim=1)).sum() / 4
        for logits in model.classify(features)
        if logits is not None
    ]
    expected = (of_heads[0] + of_patches + of_heads[1]) / 2 if distilled else of_heads[0] + of_patches
    torch.testing.assert_close(found, expected.detach())
    assert all(parameter.grad is not None for parameter in taught.bare.parameters())


def test_a_t2t_vit_trains_its_own_head_on_patches_and_its_class_head_alone(folder: Path) -> None:
    options = {"img_size": 16, "token_dim": 8, "token_head": True, "embed_dim": 16, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = deit_models.create_model("t2t_vit_micro_cifar10", num_classes=3, token_drop_rate=0.0, **options)
    taught = make_learner(
        model,
        tiny.recipe(**LABELLED, label_smoothing=0.0),
        num_classes=3,
        process=tiny.ALONE,
        preprocessing=tiny.PREPROCESSING,
        label_maps=LabelMaps(folder, PICTURES),
    )
    assert taught.bare.extra is None
    images, labels, failed, places = batch()
    images = F.interpolate(images, size=16)
    found = forward_backward(taught, (images.clone(), labels, failed, places), exchange=True)
    features, wanted = model.forward_features(images), whole_labels(folder).mean(dim=1)
    heads = (model.head, model.aux_head)
    expected = [(wanted * head(features[:, i]).log_softmax(dim=1)).sum() / -4 for i, head in enumerate(heads)]
    torch.testing.assert_close(found, (expected[0] + 0.5 * expected[1]).detach())


@torch.no_grad()
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_mixtoken_pastes_tokens_of_the_partner_in_front_of_the_first_block(
    folder: Path, grad_checkpointing: bool
) -> None:
    taught = learner(folder, grad_checkpointing=grad_checkpointing, mix_token=True)
    heads, model, images = taught.bare.train(), taught.bare.model, batch()[0]
    exchanged = torch.tensor([False, True, False, True])
    tokens = model.forward_tokens(images)
    for image in range(4):
        for place in (1, 3):
            tokens[image, 1 + place] = model.forward_tokens(images)[3 - image, 1 + place]
    with torch.enable_grad():
        logits, _, patches = heads(images, exchanged)
    features = model.norm(model.blocks(tokens))
    torch.testing.assert_close(logits.detach(), model.head(features[:, 0]))
    torch.testing.assert_close(patches.detach(), heads.extra(features[:, 1:]))
    assert len(heads.eval()(images)) == 2


def test_engine_hands_the_box_to_the_model(folder: Path) -> None:
    taught = learner(folder, mix_token=True, label_smoothing=0.0)
    seen: list[Any] = []
    taught.heads.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    targets: list[TokenTargets] = []
    mixing = taught.mixing

    def noted(*given: Any) -> Any:
        images, wanted = mixing(*given)
        targets.append(wanted)
        return images, wanted

    taught.mixing = noted  # type: ignore[assignment]
    for seed in range(8):
        torch.manual_seed(seed)
        forward_backward(taught, tuple(tensor.clone() for tensor in batch()), exchange=True)
        assert torch.equal(seen[-1][1], targets[-1].exchanged)
    assert {int(inputs[1].sum()) for inputs in seen} >= {0}
    assert seen[0][1].shape == (4,)


# Runs


def train(out: Path, folder: Path | None, **options: Any) -> Any:
    changes = {"recipe": tiny.recipe(tiny.LIVELY, **{**LABELLED, "mix_token": True, **options.pop("fields", {})})}
    defaults = {"train": PICTURES, "val": tiny.Pictures(9, seed=1), "workers": 0, "device": "cpu"}
    return deit_models.train(tiny.model(), out=out, label_maps=folder, **{**defaults, **changes, **options})


def test_extra_head_learns_is_averaged_and_saved_and_no_part_of_what_is_exported(tmp_path: Path, folder: Path) -> None:
    train(tmp_path / "run", folder)
    saved = tiny.state(tmp_path / "run")
    head, average = saved["patch_head"], saved["ema_patch_head"]
    start = learner(folder).bare.extra
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {"weight": (3, 16), "bias": (3,)}
    assert not torch.equal(head["weight"], start.weight)
    assert not torch.equal(head["weight"], average["weight"])
    groups = saved["optimizer"]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(list(tiny.model().parameters())) + 2
    for name in ("model", "best", "ema"):
        exported = from_pretrained(tmp_path / "run" / name)
        assert exported.state_dict().keys() == tiny.model().state_dict().keys()


def test_resumed_run_has_the_bits_of_a_whole_one_and_needs_the_same_maps(tmp_path: Path, folder: Path) -> None:
    train(tmp_path / "whole", folder)

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", folder, on_epoch=stop)
    other = write_maps(tmp_path / "other", PICTURES, distributions(24, 3, 4, 4, seed=1), weights="1")
    with pytest.raises(TrainingError, match=r"was saved with label_maps='a teacher \(0\)' \(now 'a teacher \(1\)'\)"):
        train(tmp_path / "cut", other)
    train(tmp_path / "cut", folder)
    tiny.same_bits(tiny.state(tmp_path / "whole"), tiny.state(tmp_path / "cut"))


def test_memory_files_workers_and_parts_of_a_step_give_the_same_weights(tmp_path: Path) -> None:
    for number in range(24):
        path = tmp_path / "data" / f"kind {number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PICTURES[number][0].save(path)
    records = open_dataset(tmp_path / "data", "train", own_folder=True)
    maps = write_maps(tmp_path / "maps", records, distributions(24, 3, 4, 4))
    plain = {"mix_token": False, "crop": "pad", "hflip": 0.5}
    ways: dict[str, dict[str, Any]] = {
        "memory": {},
        "files": {"cache": "none"},
        "a worker": {"workers": 1, "cache": "none"},
        "parts": {"fields": {**plain, "accumulate": 2}},
    }
    found = {}
    for name, options in ways.items():
        train(tmp_path / name, maps, **{"fields": plain, "train": records, "val": None, **options})
        found[name] = tiny.state(tmp_path / name)["model"]
    tiny.same_bits(found["memory"], found["files"])
    tiny.same_bits(found["memory"], found["a worker"])
    assert max(difference for _, difference in tiny.differences(found["memory"], found["parts"])) < 1e-4


def test_labels_of_patches_are_learned(tmp_path: Path) -> None:
    """Maps say of each patch whether it is bright; the class of each image is drawn at random."""
    bright = PICTURES.levels.float().mean(dim=3).unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(3, 4)) > 127.5
    maps = torch.stack([bright, ~bright, torch.zeros_like(bright)], dim=1).float()
    folder = write_maps(tmp_path / "maps", PICTURES, maps)
    fields = {
        "epochs": 40,
        "mix_token": False,
        "crop": "none",
        "hflip": 0.0,
        "label_smoothing": 0.0,
        "lr": 0.003,
        "erase": 0.0,
    }
    losses: list[float] = [row["loss"] for row in train(tmp_path / "run", folder, val=None, fields=fields).log]
    assert losses[-1] < 0.8 * losses[0]


# Refusals


def fsdp(folder: Path) -> Iterable[Learner]:
    yield make_learner(
        tiny.model(),
        tiny.recipe(**LABELLED),
        num_classes=3,
        process=tiny.ALONE,
        preprocessing=tiny.PREPROCESSING,
        shard="fsdp",
        label_maps=LabelMaps(folder, PICTURES),
    )


def test_what_does_not_go_together_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"token_labels=0.5 needs label maps .*\(--label-maps\)"):
        learner(None)
    with pytest.raises(ConfigError, match="label maps are given, but token_labels=0 would not use them"):
        learner(folder, token_labels=0)
    with pytest.raises(ConfigError, match="token_labels need a model of this package, this is a Linear"):
        learner(folder, nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="shard='fsdp' does not divide; use 'ddp'"):
        next(iter(fsdp(folder)))
    with pytest.raises(DataError, match="has maps of 24 images, expected 9"):
        train(tmp_path / "run", folder, train=tiny.Pictures(9))
    assert not (tmp_path / "run").exists()
