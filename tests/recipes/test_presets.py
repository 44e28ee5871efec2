"""The presets: figures of the papers and the authors' scripts."""

import dataclasses
import math
from typing import Any

import pytest

from deit_models.recipes.presets import PRESETS
from deit_models.recipes.recipe import recipe_named
from deit_models.registry import meta_model, model_spec
from deit_models.training.optim import learning_rate, parameter_groups


def test_distilling_changes_only_the_loss():
    assert changes("deit_distill_300e", "deit_300e") == {"distillation": "hard"}
    recipe = recipe_named("deit_distill_300e")
    assert (recipe.alpha, recipe.distill_on, recipe.tau) == (0.5, "token", 1.0)


def test_soft_distillation_is_the_papers():
    expected = {"distillation": "soft", "alpha": 0.1, "tau": 3.0}
    assert changes("deit_distill_soft_300e", "deit_300e") == expected


def test_fine_tuning_on_other_data_is_as_the_authors_answered():
    r = recipe_named("finetune_inaturalist")
    assert (r.peak_lr, r.epochs, r.batch_size, r.erase, r.optimizer) == (pytest.approx(7.5e-5), 360, 768, 0.1, "adamw")
    assert (r.weight_decay, r.warmup_epochs, r.drop_path_rate, r.repeats) == (0.05, 5, 0.1, 3)
    assert (r.label_smoothing, r.mixup, r.cutmix, r.augment) == (0.1, 0.8, 1.0, "rand-m9-mstd0.5-inc1")
    r = recipe_named("finetune_sgd")
    assert (r.optimizer, r.beta1, r.peak_lr, r.batch_size, r.epochs) == ("nesterov", 0.9, 0.01, 768, 1000)
    assert (r.weight_decay, r.erase, r.drop_path_rate) == (1e-4, 0.0, 0.0)


def test_token_labelling_has_the_settings_of_lv_vit() -> None:
    r = recipe_named("token_labels_300e")
    assert (r.peak_lr, r.batch_size, r.weight_decay, r.min_lr, r.warmup_epochs) == (1.6e-3, 1024, 0.05, 1e-5, 5)
    assert (r.total_epochs, r.schedule, r.ema_decay, r.best_of, r.drop_path_rate) == (310, "epoch", 0.99992, "ema", 0.1)
    assert (r.mixup, r.cutmix, r.label_smoothing, r.erase, r.repeats) == (0, 0, 0.1, 0.25, 1)
    assert (r.augment, r.interpolation) == ("rand-m9-mstd0.5-inc1", "random")
    assert (r.token_labels, r.mix_token, r.class_target) == (0.5, True, "map")
    assert recipe_named("token_labels_300e", batch_size=512).peak_lr == 8e-4


def test_fine_tuning_at_384_is_the_authors():
    expected = {
        "epochs": 30, "batch_size": 512, "lr": 5e-6, "min_lr": 5e-6, "weight_decay": 1e-8, "img_size": 384,
        "train_mode": False,
    }  # fmt: skip
    assert changes("deit_finetune_384", "deit_300e") == expected
    assert recipe_named("deit_finetune_384").peak_lr == 5e-6
    assert changes("deit_finetune_384_distill", "deit_finetune_384") == {"distillation": "hard"}


def test_levit_is_trained_as_its_authors_did():
    expected = {
        "epochs": 1000, "batch_size": 8192, "weight_decay": 0.025, "clip_grad": 0.01, "clip_mode": "agc",
        "drop_path_rate": 0.0, "precision": "float32", "distillation": "hard", "eval_every": 20,
    }  # fmt: skip
    assert changes("levit_1000e", "deit_300e") == expected
    assert recipe_named("levit_1000e").peak_lr == 8e-3
    assert recipe_named("levit_1000e", batch_size=2048).peak_lr == 2e-3
    assert changes("levit_384_1000e", "levit_1000e") == {"drop_path_rate": 0.1}


def test_small_images_have_the_same_recipe_with_and_without_a_teacher():
    assert changes("cifar_distill", "cifar_scratch") == {"distillation": "hard"}
    recipe = recipe_named("cifar_scratch")
    assert (recipe.peak_lr, recipe.crop, recipe.augment) == (1e-3, "pad", "none")


DEIT3_TABLE = {  # preset: batch, epochs, weight decay, pixels, drop path, repeats
    "deit3_small_800e": (2048, 800, 0.05, 224, 0.05, 3),
    "deit3_base_800e": (2048, 800, 0.05, 192, 0.2, 3),
    "deit3_large_800e": (2048, 800, 0.05, 192, 0.45, 3),
    "deit3_huge_800e": (2048, 800, 0.05, 154, 0.6, 3),
    "deit3_base_finetune_224": (512, 20, 0.1, 224, 0.2, 1),
    "deit3_large_finetune_224": (512, 20, 0.1, 224, 0.45, 1),
    "deit3_huge_finetune_224": (512, 20, 0.1, 224, 0.55, 1),
    "deit3_small_finetune_384": (512, 20, 0.1, 384, 0.0, 1),
    "deit3_base_finetune_384": (512, 20, 0.1, 384, 0.15, 1),
    "deit3_large_finetune_384": (512, 20, 0.1, 384, 0.4, 1),
    "deit3_small_21k": (2048, 240, 0.02, 224, 0.05, 1),
    "deit3_base_21k": (2048, 240, 0.02, 224, 0.1, 1),
    "deit3_large_21k": (2048, 240, 0.02, 224, 0.3, 1),
    "deit3_huge_21k": (2048, 90, 0.02, 126, 0.5, 1),
    "deit3_small_21k_to_1k": (2048, 50, 0.02, 224, 0.05, 1),
    "deit3_base_21k_to_1k": (2048, 50, 0.02, 224, 0.15, 1),
    "deit3_large_21k_to_1k": (2048, 50, 0.02, 224, 0.4, 1),
    "deit3_huge_21k_to_1k": (2048, 50, 0.02, 224, 0.45, 1),
}


def test_deit3_presets_are_all_in_the_table():
    assert set(DEIT3_TABLE) == {name for name in PRESETS if name.startswith("deit3")}


@pytest.mark.parametrize("name", DEIT3_TABLE)
def test_deit3_preset_is_the_authors(name):
    r = recipe_named(name)
    assert DEIT3_TABLE[name] == (
        r.batch_size, r.epochs, r.weight_decay, r.img_size, r.drop_path_rate, r.repeats
    )  # fmt: skip
    scratch, finetune, from_21k = "800e" in name, "finetune" in name, "21k" in name
    assert (r.loss, r.label_smoothing) == (("bce", 0.0) if scratch else ("ce", 0.1))
    assert (r.mixup, r.cutmix) == ((0.0, 1.0) if from_21k else (0.8, 1.0))
    assert r.augment == ("rand-m9-mstd0.5-inc1" if finetune else "3-augment")
    assert r.crop == ("simple" if from_21k else "random_resized")
    assert (r.erase, r.color_jitter, r.warmup_epochs, r.ema_decay, r.train_mode) == (0.0, 0.3, 5, 0.99996, True)
    rate = 1e-5 if finetune else 3e-4 if "to_1k" in name else 1e-3 if from_21k else 4e-3 if "small" in name else 3e-3
    assert (r.optimizer, r.peak_lr, r.eps) == ("adamw" if finetune else "lamb", rate, 1e-8)
    assert (r.clip_grad, r.warmup_lr, r.min_lr) == (0.0, 1e-6, 1e-5)


def test_deit3_sizes_are_multiples_of_the_patch():
    for name in DEIT3_TABLE:
        assert recipe_named(name).img_size % (14 if "huge" in name else 16) == 0


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay"),
    [("t2t_lite_300e", 1e-3, 0.03), ("t2t_14_300e", 5e-4, 0.05), ("t2t_24_300e", 5e-4, 0.065)],
)
def test_t2t_presets_are_the_authors(name, lr, weight_decay):
    r = recipe_named(name)
    assert (r.peak_lr, r.weight_decay, r.batch_size) == (lr, weight_decay, 512)
    assert (r.epochs, r.total_epochs, r.warmup_epochs, r.schedule) == (300, 310, 10, "epoch")
    assert (r.interpolation, r.repeats, r.drop_path_rate, r.min_lr) == ("random", 1, 0.1, 1e-5)
    assert (r.erase, r.erase_after_mixing, r.best_of) == (0.25, True, "ema")


def test_vit_resnas_is_chosen_by_its_average_as_its_authors_did():
    chosen = {name: recipe_named(name).best_of for name in PRESETS if name.startswith(("vit_resnas", "supernet"))}
    assert chosen == {name: "model" if name.startswith("supernet") else "ema" for name in chosen}


def test_cait_and_resmlp_are_trained_as_the_authors_answered():
    assert changes("cait_400e", "deit_300e") == {"epochs": 400}
    r = recipe_named("cait_finetune_448")
    assert (r.batch_size, r.lr, r.epochs, r.weight_decay, r.warmup_epochs) == (256, 5e-6, 60, 0.05, 5)
    assert (r.drop_path_rate, r.label_smoothing, r.mixup, r.cutmix, r.repeats) == (0.3, 0.1, 0.8, 1.0, 3)
    for name, drop_path in (("resmlp_12_400e", 0.05), ("resmlp_24_400e", 0.1)):
        r = recipe_named(name)
        assert (r.optimizer, r.peak_lr, r.weight_decay, r.batch_size, r.epochs) == ("lamb", 5e-3, 0.2, 2048, 400)
        assert (r.drop_path_rate, r.precision, r.warmup_epochs, r.repeats, r.erase) == (
            drop_path,
            "float32",
            5,
            3,
            0.25,
        )
    r = recipe_named("resmlp_finetune_cifar")
    assert (r.lr, r.min_lr, r.warmup_lr, r.batch_size, r.epochs, r.weight_decay) == (5e-6, 1e-5, 1e-6, 768, 1000, 0.05)


def changes(name: str, base: str) -> dict[str, Any]:
    """The fields in which one preset differs from another, but for its name."""
    one, other = (dataclasses.asdict(recipe_named(preset)) for preset in (name, base))
    return {key: value for key, value in one.items() if value != other[key] and key != "preset"}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_says_what_it_is_and_keeps_its_name(name):
    source, overrides = PRESETS[name]
    recipe = recipe_named(name)
    assert source
    assert recipe.preset == name
    assert {key: getattr(recipe, key) for key in overrides} == overrides


# ---- the audit: every preset at every epoch, every family by name


def rate_of(recipe, epoch):
    """The rate of timm's cosine at an epoch, from the authors' scripts' settings, without this package's code."""
    peak = recipe.lr * recipe.batch_size / recipe.lr_batch if recipe.lr_batch else recipe.lr
    moment = {"epoch": epoch, "epoch_delayed": max(epoch - 1, 0), "step": epoch, "constant": epoch}[recipe.schedule]
    if moment < recipe.warmup_epochs:
        return recipe.warmup_lr + moment * (peak - recipe.warmup_lr) / recipe.warmup_epochs
    if recipe.schedule == "constant":
        return peak
    if moment >= recipe.epochs:
        return recipe.min_lr
    return recipe.min_lr + 0.5 * (peak - recipe.min_lr) * (1 + math.cos(math.pi * moment / recipe.epochs))


@pytest.mark.parametrize("name", PRESETS)
def test_rate_of_every_epoch_of_every_preset(name):
    recipe = recipe_named(name)
    for epoch in range(recipe.epochs + recipe.cooldown_epochs + 1):
        assert learning_rate(recipe, epoch) == pytest.approx(rate_of(recipe, epoch), rel=1e-12), epoch


UNDECAYED = {  # the facts, section 2: what the authors list besides vectors and biases
    "deit_tiny_distilled_patch16_224": {"pos_embed", "cls_token"},
    "deit3_small_patch16_224": {"pos_embed", "cls_token"},
    "levit_128s": "attention_biases",
    "t2t_vit_7": {"cls_token"},
    "vit_resnas_tiny": {"tokens"},
    "cait_xxs24_224": {"pos_embed", "cls_token"},
    "resmlp_12": set(),
}


@pytest.mark.parametrize("name", UNDECAYED)
def test_every_parameter_of_a_family_is_decayed_as_by_timm_0_3_2(name):
    spec, listed = model_spec(name), UNDECAYED[name]
    model = meta_model(spec.model_class, spec.config)
    decayed, plain = parameter_groups(model, 0.05)
    names = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in plain["params"]}

    def is_listed(parameter_name):
        return listed in parameter_name if isinstance(listed, str) else parameter_name in listed

    expected = {
        parameter_name
        for parameter_name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (len(parameter.shape) == 1 or parameter_name.endswith(".bias") or is_listed(parameter_name))
    }
    assert found == expected
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        n for n, p in model.named_parameters() if p.requires_grad
    } - expected
    counted = {"deit3_small_patch16_224": (50, 176), "resmlp_12": (38, 150)}  # in the authors' models
    if name in counted:
        assert (len(decayed["params"]), len(names)) == counted[name]
