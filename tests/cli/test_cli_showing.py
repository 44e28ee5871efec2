"""`deit-models explain` and `demo`, and the heat maps of `predict`: files, names, refusals."""

import socket
from argparse import Namespace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from command_line import NAMES, failure, run, usage_error

import deit_models
from deit_models.cli import build_parser, main
from deit_models.cli.showing import class_number, draw_heat_maps, picture_name, run_demo
from deit_models.data.sources import image_sources
from deit_models.distributed import Process
from deit_models.errors import ConfigError
from deit_models.registry import DEFAULT_MODEL
from deit_models.show.pictures import overlay, view


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as picture:
        return np.asarray(picture, dtype=float)


def maps_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_explain_writes_one_row_a_method(tiny, photos, tmp_path, capsys):
    photo, sizes = photos / "001.png", []
    for number, methods in enumerate(([], ["--method", "last"], ["--method", "gradient", "last", "gradient"])):
        output = tmp_path / f"{number}.png"
        assert main(["explain", str(photo), "--model", str(tiny), "--output", str(output), *methods]) == 0
        sizes.append(pixels(output).shape[1::-1])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"wrote {tmp_path / '0.png'}: rollout, last, gradient; ")
    assert out[2].split(": ")[1].startswith("gradient, last; ")
    row = sizes[2][1] - sizes[1][1]
    assert sizes[0][1] == sizes[1][1] + 2 * row
    assert len({width for width, _ in sizes}) == 1


def test_explain_shows_the_class_that_is_asked_for(tiny, photos, tmp_path):
    photo, pictures = photos / "001.png", {}
    model = deit_models.from_pretrained(tiny)
    order = model(deit_models.transform_for(model)(photo)[None])[0].argsort(descending=True).tolist()
    for target in (None, NAMES[order[0]], str(order[0]), NAMES[order[-1]]):
        output = tmp_path / f"{target}.png"
        chosen = [] if target is None else ["--target", target]
        arguments = ["explain", photo, "--model", tiny, "--output", output, "--method", "gradient", *chosen]
        assert main([str(argument) for argument in arguments]) == 0
        pictures[target] = pixels(output)
    same = [pictures[name] for name in (None, NAMES[order[0]], str(order[0]))]
    assert all(np.array_equal(same[0], other) for other in same)
    last = pictures[NAMES[order[-1]]]  # whose bar is the sixth
    rows = [(np.abs(picture[:, -40] - 234) < 4).all(1).sum() for picture in (same[0], last)]
    assert not np.array_equal(last[: len(same[0])], same[0])
    assert rows[1] > rows[0]


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_explain_writes_other_formats_and_replaces_a_file_on_request_alone(tiny, photos, tmp_path, capsys, suffix):
    output = tmp_path / f"heat.{suffix}"
    arguments = ["explain", photos / "001.png", "--model", tiny, "--output", output, "--method", "last"]
    assert main([str(argument) for argument in arguments]) == 0
    with PIL.Image.open(output) as picture:
        assert picture.format == {"jpg": "JPEG", "webp": "WEBP"}[suffix]
    capsys.readouterr()
    assert "exists" in failure(capsys, *arguments)
    assert main([str(argument) for argument in (*arguments, "--overwrite")]) == 0


def test_explain_refuses_in_one_line(tiny, photos, tmp_path, capsys):
    explain = ["explain", photos / "001.png", "--model", tiny, "--output"]
    assert "ends in .png" in failure(capsys, *explain, tmp_path / "heat.gif")
    assert "no folder" in failure(capsys, *explain, tmp_path / "no" / "heat.png")
    png = tmp_path / "heat.png"
    assert "only" not in failure(capsys, *explain, png, "--method", "last", "--target", "cat")
    assert "no such class" in failure(capsys, *explain, png, "--target", "katze")
    assert "no.png" in failure(capsys, "explain", photos / "no.png", "--model", tiny, "--output", png)
    assert "invalid choice: 'flow'" in usage_error(capsys, *explain, png, "--method", "flow")
    assert not png.exists()


def test_explain_has_a_row_for_token_merging(photos, tmp_path, capsys):
    arguments = ["explain", photos / "001.png", "--method", "last", "--token-merging", "4"]
    output = ["--output", tmp_path / "heat.png", "--model"]
    assert main([str(argument) for argument in (*arguments, *output, "deit_micro_distilled_patch4_32")]) == 0
    plain = ["explain", photos / "001.png", "--method", "last", "rollout", "--output", tmp_path / "plain.png"]
    assert main([str(argument) for argument in plain]) == 0
    assert pixels(tmp_path / "heat.png").shape == pixels(tmp_path / "plain.png").shape
    capsys.readouterr()
    levit = deit_models.create_model("levit_micro_cifar10")
    levit.save_pretrained(tmp_path / "levit")
    message = failure(capsys, *arguments, "--output", tmp_path / "levit.png", "--model", tmp_path / "levit")
    assert "needs its tokens on a grid" in message


def test_a_class_is_known_by_its_names_and_its_number():
    labels = ("tabby, tabby cat", "Egyptian cat", "crane", "crane", "7", "crow, 2")
    assert [class_number(text, labels) for text in ("Tabby", " tabby cat", "EGYPTIAN CAT", "1", "7", "0")] == [
        *(0, 0, 1, 1, 4, 0)
    ]
    assert class_number("2", labels) == 5
    for text, message in (("crane", r"classes \[2, 3\]"), ("6", "a number to 5"), ("-1", "no such"), ("²", "no such")):
        with pytest.raises(ConfigError, match=message):
            class_number(text, labels)


def test_demo_serves_the_chosen_models(capsys):
    calls = []
    for options in ([], ["--model", "a", "b", "--host", "0.0.0.0", "--port", "80"]):
        args = build_parser().parse_args(["demo", *options])
        assert run_demo(args, launch=lambda models, **changes: calls.append((models, changes))) == 0
    assert calls[0][0] == [DEFAULT_MODEL]
    assert calls[1][0] == ["a", "b"]
    assert [(changes["host"], changes["port"]) for _, changes in calls] == [("127.0.0.1", 7860), ("0.0.0.0", 80)]
    assert "no --model given" in capsys.readouterr().err


def test_demo_on_a_taken_port_or_without_its_extra_ends_in_one_line(tiny, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = failure(capsys, "demo", "--model", tiny, "--port", port)
    assert str(port) in message or "[demo]" in message


# predict --heat-maps


def test_predict_draws_the_gradient_map_of_each_image(tiny, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"no image")
    folder = tmp_path / "maps"
    assert main(["predict", str(photos), "--model", str(tiny), "--heat-maps", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out.count("%") == 15
    assert err.count("broken.png") == 1
    assert [*maps_in(folder)] == sorted(picture_name(str(photos / f"{i:03}.png")) for i in range(3))
    classifier = deit_models.Classifier(tiny)
    heat = deit_models.heat_maps(classifier.model, classifier.transform(photos / "001.png")[None], method="gradient")[0]
    expected = overlay(view(classifier.transform, photos / "001.png"), heat)
    drawn = pixels(folder / picture_name(str(photos / "001.png")))
    assert np.abs(drawn - np.asarray(expected, dtype=float)).mean() < 4  # JPEG


def test_pictures_of_one_name_do_not_collide(tiny, photos, tmp_path):
    (photos / "more").mkdir()
    (photos / "001.png").rename(photos / "more" / "000.png")
    (photos / "000.jpg").write_bytes((photos / "002.png").read_bytes())
    assert main(["predict", str(photos), "--model", str(tiny), "--heat-maps", str(tmp_path / "maps")]) == 0
    assert len(maps_in(tmp_path / "maps")) == 4
    names = [picture_name(name) for name in ("a/x.png", "b/x.png", "x.png", "a/x.jpg", "ü\udcff/../x", "y" * 300)]
    assert len(set(names)) == 6
    assert max(map(len, names)) < 120


def test_resume_draws_what_is_missing_and_keeps_the_rest(tiny, photos, tmp_path):
    folder, labels = tmp_path / "maps", tmp_path / "labels.csv"
    command = ["predict", photos, "--model", tiny, "--format", "csv", "--output", labels, "--heat-maps", folder]
    command = [str(argument) for argument in command]
    assert main(command) == 0
    whole = maps_in(folder)
    first, second, _ = whole
    (folder / first).unlink()
    (folder / second).write_bytes(b"kept")
    assert main([*command, "--resume"]) == 0
    assert maps_in(folder) == whole | {second: b"kept"}
    assert main([*command, "--overwrite"]) == 0
    assert maps_in(folder) == whole


def test_heat_maps_are_refused_in_one_line(tiny, photos, tmp_path, capsys):
    predict = ["predict", photos, "--model", tiny, "--heat-maps"]
    assert "leave out --optimize" in failure(capsys, *predict, tmp_path / "maps", "--optimize")
    assert "is a file" in failure(capsys, *predict, photos / "001.png")
    assert "holds files already" in failure(capsys, *predict, photos)
    assert not (tmp_path / "maps").exists()


def test_each_process_draws_its_share(tiny, photos, tmp_path):
    classifier, images = deit_models.Classifier(tiny), image_sources(photos)
    args = Namespace(heat_maps=tmp_path / "maps", resume=False)
    drawn = []
    for rank in range(2):
        draw_heat_maps(args, classifier, images, Process(rank, 2, torch.device("cpu")))
        drawn.append(len(maps_in(args.heat_maps)))
    assert drawn == [2, 3]


@pytest.mark.slow
def test_processes_share_the_heat_maps(tiny, photos, tmp_path):
    folder, labels = tmp_path / "maps", tmp_path / "labels.csv"
    assert main(["predict", str(photos), "--model", str(tiny), "--heat-maps", str(tmp_path / "alone")]) == 0
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ["--device", "cpu", "--format", "csv", "--output", labels, "--heat-maps", folder]
    status, _, err = run("predict", photos, "--model", tiny, *options, options=torchrun)
    assert status == 0, err
    assert maps_in(folder) == maps_in(tmp_path / "alone")
