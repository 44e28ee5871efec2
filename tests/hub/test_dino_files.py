"""DINO's backbones from a Hub: repositories in timm's and transformers' layout, and by the name of the manifest."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hub.conftest import HubEnv
from tiny_models import assert_same_state, published_files, tiny_model
from toy_manifest import put_checkpoints_in_force

import deit_models
from deit_models import from_pretrained, model_info

FACTS = {"timm": "timm/vit_small_patch16_224.dino", "transformers": "facebook/dino-vits16"}


@pytest.mark.parametrize("layout", FACTS)
def test_copy_of_a_repository_is_read_by_its_config(layout: str, hub_env: HubEnv) -> None:
    model = tiny_model("dino_vits16", img_size=64)
    hub_env.server.add_repo("someone/copy", published_files(model, layout))
    loaded = from_pretrained("someone/copy")
    assert (loaded.num_classes, loaded.config.image_hw, loaded.origin.source) == (0, (64, 64), "someone/copy")
    assert_same_state(loaded.state_dict(), model.state_dict())
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(from_pretrained("someone/copy", num_classes=3).embed(x), model(x))


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("layout", FACTS)
def test_name_gives_features_or_a_new_head_and_says_nothing_of_classes(
    layout: str, hub_env: HubEnv, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, info = tiny_model("dino_vits16", img_size=32), model_info("dino_vits16")
    deit_models.register_model("short_dino", type(model), model.config)
    sources = tuple(source for source in info.sources if source.repo == FACTS[layout])
    made = replace(info, name="short_dino", sources=sources, preprocessing=info.preprocessing.at_size((32, 32)))
    put_checkpoints_in_force({"short_dino": made}, monkeypatch)
    files = published_files(model, layout)
    assert json.loads(files["config.json"]).get("num_classes", 0) == 0
    hub_env.server.add_repo(FACTS[layout], files)
    loaded = from_pretrained("short_dino")
    assert (loaded.num_classes, loaded.origin.dataset, loaded.origin.licence) == (0, "ImageNet-1k", "Apache-2.0")
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert from_pretrained("short_dino", num_classes=9)(torch.rand(1, 3, 32, 32)).shape == (1, 9)
    assert caplog.records == []
