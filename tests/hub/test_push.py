"""push_to_hub to a local Hub and back, and what is refused in one line."""

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import CLASSES, LAYOUTS, assert_same_answer, named, published_files, refusal
from tiny_models import tiny_model as make

from deit_models import ConfigError, FetchError, create_model, from_pretrained
from deit_models.deploy.runtimes import open_onnx
from deit_models.formats import publish


@pytest.fixture
def tiny():
    return named(make(num_classes=7))


@pytest.fixture
def hub(hub_server, hub_env):
    hub_env.login()
    return hub_server


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pushed_model_comes_back_equal(hub, tiny, layout):
    address = tiny.push_to_hub("tester/new", layout=layout)
    assert address.endswith("tester/new")
    loaded = from_pretrained("tester/new")
    assert_same_answer(tiny, loaded)
    assert loaded.origin.class_names == CLASSES
    assert loaded.origin.revision == hub.repos["tester/new"].branches["main"]


def test_second_push_replaces_the_weights_and_keeps_the_card(hub, tiny):
    tiny.push_to_hub("tester/new")
    hub.commit("tester/new", {"README.md": b"my own words"})
    other = make(seed=1, num_classes=7)
    other.push_to_hub("tester/new")
    assert hub.files("tester/new")["README.md"] == b"my own words"
    assert_same_answer(other, from_pretrained("tester/new"))


def test_private_push_is_private(hub, hub_env, tiny):
    tiny.push_to_hub("tester/secret", private=True)
    assert_same_answer(tiny, from_pretrained("tester/secret"))
    hub_env.logout()
    assert hub.repos["tester/secret"].private_token == hub.token
    message = refusal(FetchError, lambda: from_pretrained("tester/secret", cache_dir=hub_env.home / "empty"))
    assert "token" in message


def test_push_without_right_is_one_line(hub, hub_env, tiny):
    message = refusal(FetchError, lambda: tiny.push_to_hub("tester/new", token="hf_wrong"))
    assert "tester/new" in message
    assert "token" in message
    hub_env.logout()
    refusal(FetchError, lambda: tiny.push_to_hub("tester/new"))
    assert "tester/new" not in hub.repos


@pytest.mark.parametrize("repo_id", ["a/b/c", "spaces are not fine", ""])
def test_push_to_an_impossible_name_is_one_line(hub, tiny, repo_id):
    before = set(hub.repos)
    refusal(FetchError, lambda: tiny.push_to_hub(repo_id))
    assert set(hub.repos) == before


def test_push_to_a_broken_server_is_one_line(hub, tiny):
    hub.fail("/upload/", status=500, times=None)
    assert "could not push" in refusal(FetchError, lambda: tiny.push_to_hub("tester/new"))
    hub._httpd.server_close()
    refusal(FetchError, lambda: tiny.push_to_hub("tester/new"))


def test_push_offline_is_one_line(hub, hub_env, tiny):
    hub_env.go_offline()
    refusal(FetchError, lambda: tiny.push_to_hub("tester/new"))
    assert hub.requests == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_card_of_adapted_weights_names_what_they_come_from(hub, tiny, layout):
    hub.add_repo("me/base", published_files(tiny))
    adapted = from_pretrained("me/base", num_classes=3)
    card = ModelCard(publish.model_card(adapted, layout))
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "me/base"
    assert data["pipeline_tag"] == "image-classification"
    assert data["library_name"] == ("deit-models" if layout == "native" else layout)
    assert {"image-classification", "deit"} <= set(data["tags"])
    assert data["datasets"] == ["uoft-cs/cifar10"]
    assert "3 classes" in card.text
    assert "32x32" in card.text


def test_pushed_card_names_the_repository(hub, tiny):
    tiny.push_to_hub("tester/named")
    assert "from_pretrained('tester/named')" in hub.files("tester/named")["README.md"].decode()


def test_push_with_onnx_adds_the_files_of_transformers_js(hub):
    pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    model = from_pretrained("deit_micro_distilled_patch4_32")
    model.push_to_hub("tester/web", layout="transformers", onnx=True)
    files = hub.files("tester/web")
    assert {"onnx/model.onnx", "onnx/model_quantized.onnx", "model.safetensors", "config.json"} <= set(files)
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(open_onnx(files["onnx/model.onnx"])(x), model(x), atol=1e-4, rtol=0)
    assert_same_answer(model, from_pretrained("tester/web"))


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("deit_micro_distilled_patch4_32", "timm", "onnx=True, layout='timm': transformers.js reads"),
        ("levit_128s", "transformers", "onnx=True: transformers.js has no 'levit'"),
    ],
)
def test_push_with_onnx_of_what_transformers_js_cannot_read_is_refused(hub, name, layout, message):
    model = create_model(name, num_classes=7)
    assert message in refusal(ConfigError, lambda: model.push_to_hub("tester/web", layout=layout, onnx=True))
    assert "tester/web" not in hub.repos
