"""Shifted patch-token mixup: boxes, targets of images and patches, and the loss that reads them."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deit_models import ConfigError, DataError, create_model
from deit_models.augmentation.mixing import Mixing
from deit_models.batches.loading import DamageCount
from deit_models.data.records import ArrayRecords
from deit_models.distributed import Process
from deit_models.models.vit_resnas import PatchLogits, PatchTraining
from deit_models.recipes.recipe import Recipe
from deit_models.training.engine import train_epoch
from deit_models.training.learner import _has_idle_head, extra_heads_of, make_learner
from deit_models.training.losses import DistillationLoss

K, SIDE = 5, 4
STAGES = (
    {"embed_dim": 16, "head_dim": 8, "num_heads": (2,), "mlp_hidden": (20,)},
    {"embed_dim": 24, "head_dim": 8, "num_heads": (2,), "mlp_hidden": (20,)},
)


def recipe(**changes: object) -> Recipe:
    return Recipe(**{"mix_mode": "patch", "epochs": 2, "warmup_epochs": 0, **changes})  # type: ignore[arg-type]


def mixing(**changes: object) -> Mixing:
    settings = recipe(**{"label_smoothing": 0.0, **changes})
    own = PatchTraining((SIDE, SIDE), mix_mode="patch", mixup=settings.mixup, cutmix=settings.cutmix)
    return Mixing(settings, K, own=own.mix)


def batch(count: int) -> tuple[Tensor, Tensor]:
    """Each image is full of its own number, so that every pixel tells where it is from."""
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).clone()
    return images, torch.arange(count) % K


@pytest.mark.parametrize("side", [1, 2, 4, 7])
def test_boxes_lie_in_the_grid_and_follow_the_authors_rule(side: int) -> None:
    torch.manual_seed(0)
    mix = PatchTraining((side, side), mix_mode="patch", mixup=0.8, cutmix=1.0)
    sizes = set()
    for _ in range(500):
        top, bottom, left, right = mix.draw_box()
        assert 0 <= top <= bottom <= side
        assert 0 <= left <= right <= side
        # a box that does not fill its axis never touches the end of it
        assert bottom < side or bottom - top == side or top == 0
        sizes.add((bottom - top) * (right - left))
    assert len(sizes) == 1 if side == 1 else len(sizes) > side


def test_first_half_is_pasted_cell_by_cell_with_targets_to_match() -> None:
    torch.manual_seed(1)
    mix, partial = mixing(), 0
    for _ in range(30):
        images, labels = batch(8)
        mixed, targets = mix(images, labels)
        assert mixed is images
        for i in range(4):
            cells = mixed[i, 0].unfold(0, 4, 4).unfold(1, 4, 4)
            assert (cells.amax((2, 3)) == cells.amin((2, 3))).all()  # cells are whole
            whose = cells[..., 0, 0].long()
            assert set(whose.flatten().tolist()) <= {0, 1, 2, 3}
            assert torch.equal(targets[1][i].argmax(1), whose.flatten() % K)
            torch.testing.assert_close(targets[0][i], targets[1][i].mean(0))  # lambda is the area
            partial += len(whose.unique()) == 2
    assert partial > 20


def test_second_half_is_mixed_as_a_whole() -> None:
    torch.manual_seed(2)
    images, labels = batch(8)
    mixed, targets = mixing()(images, labels)
    for i in range(4, 8):
        value = float(mixed[i].flatten()[0])
        assert (mixed[i] == value).all()
        assert targets[0][i].sum() == pytest.approx(1)
        assert (targets[1][i] == targets[0][i]).all()
        share = targets[0][i][i % K] if targets[0][i].max() < 1 else torch.tensor(1.0)
        assert 0 <= share <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_small_and_odd_batches_keep_their_size(count: int) -> None:
    torch.manual_seed(3)
    images, labels = batch(count)
    mixed, targets = mixing()(images, labels)
    assert mixed.shape == (count, 3, 16, 16)
    assert targets[0].shape == (count, K)
    assert targets[1].shape == (count, SIDE**2, K)
    torch.testing.assert_close(targets[1].sum(2), torch.ones(count, SIDE**2))


def test_targets_are_smoothed() -> None:
    torch.manual_seed(4)
    _, targets = mixing(label_smoothing=0.1)(*batch(4))
    assert targets[0].min() == pytest.approx(0.1 / K)
    assert targets[1].min() == pytest.approx(0.1 / K)


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(ConfigError, match="mixup and cutmix must be more than 0"):
        mixing(cutmix=0.0)
    with pytest.raises(DataError, match="expected one label each"):
        mixing()(batch(4)[0], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="needs a model with a patch head"):
        extra_heads_of(create_model("deit_micro_patch4_32"), recipe())
    wide = create_model("vit_resnas_tiny", stages=STAGES, patch_size=4, img_size=(16, 24), device="meta")
    with pytest.raises(ConfigError, match="patches are 2x3"):
        extra_heads_of(wide, recipe())


def test_patches_learn_from_their_own_targets_or_the_images() -> None:
    torch.manual_seed(5)
    logits = PatchLogits(torch.randn(2, K), None, torch.randn(2, 3, K))
    image, patches = torch.rand(2, K).softmax(1), torch.rand(2, 3, K).softmax(2)
    loss = DistillationLoss(
        recipe(), teacher=None, extra=PatchTraining((1, 3), mix_mode="batch", mixup=0.8, cutmix=1.0)
    )
    cls = F.cross_entropy(logits.cls, image)
    own = -(patches * logits.patches.log_softmax(2)).sum(2).mean()
    shared = -(image[:, None] * logits.patches.log_softmax(2)).sum(2).mean()
    torch.testing.assert_close(loss(logits, (image, patches)), cls + own)
    torch.testing.assert_close(loss(logits, image), cls + shared)


def test_training_step_changes_every_parameter() -> None:
    torch.manual_seed(6)
    model = create_model("vit_resnas_tiny", stages=STAGES, patch_size=4, img_size=16, num_classes=K, stem_dim=4)
    settings = recipe(batch_size=8, repeats=1, precision="float32", schedule="step", lr=0.01, ema_decay=0.0)
    process = Process(0, 1, torch.device("cpu"))
    assert model.origin is not None
    learner = make_learner(model, settings, num_classes=K, process=process, preprocessing=model.origin.preprocessing)
    before = copy.deepcopy(model.state_dict())
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % K
    damage = DamageCount(ArrayRecords("noise", [], [], list("abcde")), limit=1.0)
    train_epoch(learner, [(images, labels, torch.full((8,), -1))] * 2, steps=2, epoch=0, damage=damage)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_heads_without_a_loss_are_known_to_the_processes() -> None:
    # DDP must be told of parameters that take no part
    distilled = create_model("vit_resnas_tiny", distilled=True, patch_head=False, device="meta")
    with_patches = create_model("vit_resnas_tiny", device="meta")
    batchwise = Recipe()
    assert _has_idle_head(distilled, batchwise)
    assert not _has_idle_head(distilled, Recipe(label_heads="both"))
    assert not _has_idle_head(distilled, Recipe(distillation="hard"))
    assert not _has_idle_head(with_patches, batchwise)
    assert _has_idle_head(with_patches, Recipe(train_mode=False))
    assert not _has_idle_head(torch.nn.Linear(2, 2), batchwise)
