"""By the README alone, as a new user: from a folder of images to a model on the (local) Hub, in three commands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import deit_models

ROOT = Path(__file__).resolve().parents[2]


def readme_commands() -> list[list[str]]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("From a folder of images to a model on the Hub")[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    return [shlex.split(line) for line in block[1].splitlines()]


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for label, name in enumerate(("pansy", "rose")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = generator.integers(0, 100, (40, 48, 3), dtype=np.uint8)
            pixels[..., label] += 150
            PIL.Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.jpg")
    return tmp_path / "photos"


def test_three_commands_of_the_readme_push_a_model(hub_server, hub_env, photos, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the command draws pictures")
    install, login, finetune = readme_commands()
    assert install[:2] == ["pip", "install"]
    assert login == ["hf", "auth", "login"]
    assert finetune[:3] == ["deit-models", "finetune", "photos/"]
    hub_env.login()  # what the second command leaves: a token
    # the model on the Hub that the README names is too large for a test; the local Hub has a small one
    torch.manual_seed(0)
    small = deit_models.create_model("deit_micro_patch4_32", depth=1, embed_dim=32, num_heads=2)
    small.push_to_hub("tester/small")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["tester/small" if word == "deit_small_patch16_224" else word for word in finetune[1:]]
    command = [sys.executable, "-m", "deit_models", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub_server.url}/me/my-photos" in done.stdout
    model = deit_models.from_pretrained("me/my-photos")
    assert model.origin.class_names == ("pansy", "rose")
    answer = deit_models.Classifier(model)(photos / "rose" / "3.jpg", top_k=1).predictions[0]
    assert answer.label == "rose"
    card = hub_server.files("me/my-photos")["README.md"].decode()
    assert "## Fine-tuning" in card
    assert "photos, 2 classes: 16 images for training, 4 for validation" in card
    assert "from_pretrained('me/my-photos')" in card
    assert {"mistakes.png", "confusion.png", "metrics.json"} <= {
        path.name for path in (tmp_path / "runs/photos").iterdir()
    }


@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_other_layouts_can_be_pushed(hub_env, photos, tmp_path, layout):
    hub_env.login()
    torch.manual_seed(0)
    small = deit_models.create_model("deit_micro_patch4_32", depth=1, embed_dim=32, num_heads=2)
    result = deit_models.finetune(
        small, train=photos, out=tmp_path / "out", mode="head", push_to_hub="me/pushed", layout=layout, workers=0
    )
    assert result.address.endswith("me/pushed")
    loaded = deit_models.from_pretrained("me/pushed")
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(loaded(x), result.model(x), atol=1e-6)
