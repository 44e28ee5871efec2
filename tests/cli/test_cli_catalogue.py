"""`deit-models list`, `info` and `convert`: what they print and write."""

import json

import pytest
import torch
from command_line import NAMES, failure
from safetensors.torch import load_file

import deit_models
from deit_models.cli import main

# list and info


def test_list_prints_every_name_on_a_line_and_beside_them_those_without_a_head(capsys):
    assert main(["list"]) == 0
    out, err = capsys.readouterr()
    assert out == "\n".join(deit_models.list_models()) + "\n"
    headless = ", ".join(deit_models.list_models("dino_*"))
    assert err == f"deit-models: without a head or classes, for features: {headless}\n"
    assert main(["list", "deit_*"]) == 0
    assert capsys.readouterr().err == ""


def test_list_takes_a_pattern_and_json(capsys):
    assert main(["list", "deit_*distilled*", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert names == deit_models.list_models("deit_*distilled*")
    assert names


def test_list_can_leave_out_models_without_weights(capsys):
    assert main(["list", "--pretrained"]) == 0
    names = capsys.readouterr().out.split()
    assert names == deit_models.list_models(pretrained=True)
    assert "deit_tiny_patch4_32" not in names


def test_list_of_nothing_has_status_1_and_says_so(capsys):
    assert "no model matches 'vgg*'" in failure(capsys, "list", "vgg*")
    assert main(["list", "vgg*", "--json"]) == 1
    assert capsys.readouterr() == ("[]\n", "")


def test_info_shows_what_is_known(capsys):
    assert main(["info", "deit_base_distilled_patch16_384"]) == 0
    out = capsys.readouterr().out
    for fact in (
        "deit, distilled", "87,630,032", "55.59 G", "384x384", "85.2 % top-1, 97.2 % top-5", "Apache-2.0",
        "shorter side to 438 (bicubic), centre crop 384x384", "facebook/deit-base-distilled-patch16-384", "https://",
    ):  # fmt: skip
        assert fact in out


def test_info_of_a_model_without_weights_says_so(capsys):
    assert main(["info", "deit_tiny_patch4_32"]) == 0
    out = capsys.readouterr().out
    assert "none published" in out
    assert "None" not in out


def test_info_of_a_backbone_says_that_it_has_no_classes_and_what_its_figures_are(capsys):
    assert main(["info", "dino_vits8"]) == 0
    out = capsys.readouterr().out
    assert "classes     none: it gives features; finetune, or num_classes=N, gives it a head" in out
    assert "78.3 % k-NN top-1, 79.7 % linear-probe top-1" in out
    assert "timm/vit_small_patch8_224.dino" in out


def test_info_as_json_is_the_whole_record(capsys):
    assert main(["info", "deit_tiny_patch16_224", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    info = deit_models.model_info("deit_tiny_patch16_224")
    assert (data["params"], data["top1"], data["preprocessing"]["crop"]) == (info.params, info.top1, [224, 224])
    assert [source["layout"] for source in data["sources"]] == [source.layout for source in info.sources]


def test_info_of_an_unknown_name_is_one_line_with_the_nearest(capsys):
    line = failure(capsys, "info", "deit_tiny_patch16_225")
    assert "unknown model 'deit_tiny_patch16_225'" in line
    assert "deit_tiny_patch16_224" in line


# convert


@pytest.mark.parametrize("layout", ["native", "timm", "transformers"])
def test_convert_to_a_layout_and_back_keeps_every_bit(tiny, tmp_path, layout, capsys):
    assert main(["convert", str(tiny), str(tmp_path / layout), "--layout", layout]) == 0
    assert capsys.readouterr() == (f"wrote {tmp_path / layout} ({layout}, float32)\n", "")
    assert main(["convert", str(tmp_path / layout), str(tmp_path / "back")]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert deit_models.from_pretrained(tmp_path / "back").origin.class_names == NAMES


def test_convert_to_half_precision_halves_the_file(tiny, tmp_path):
    assert main(["convert", str(tiny), str(tmp_path), "--dtype", "float16"]) == 0
    whole, half = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path))
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in whole.items())


def test_convert_reads_an_authors_pth_when_told_the_model(tmp_path, capsys):
    model = deit_models.create_model("deit_micro_patch4_32")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "authors.pth")
    source, cache = tmp_path / "authors.pth", ["--cache-dir", tmp_path / "cache"]
    assert "say which model it is" in failure(capsys, "convert", source, tmp_path / "out", *cache)
    assert not (tmp_path / "out").exists()
    options = ["--model", "deit_micro_patch4_32", *map(str, cache)]
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())


def test_convert_refuses_a_file_as_destination(tiny, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert "is a file; expected a directory" in failure(capsys, "convert", tiny, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
