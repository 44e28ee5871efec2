"""Recording what is published: digests, revisions and first logits, written into the text of the manifest."""

import difflib

import pytest
import torch
from hub_protocol import sha256
from safetensors.torch import save
from tiny_models import answer, assert_same_answer, published_files, refusal, tiny_model
from toy_manifest import HEAD, put_in_force, register_toys, toy_table

from deit_models import CheckpointError, ManifestError, SaveError, UnknownModelError, from_pretrained
from deit_models.checkpoint import Source, parse_manifest, parse_teachers
from deit_models.cli import main
from deit_models.hub.fetch import Access
from deit_models.hub.load import load_source
from deit_models.hub.record import Outcome, record, set_value
from deit_models.hub.weights import REFERENCE_TOLERANCE

TIMM, HF = "timm/toy", "facebook/toy"
WEIGHTS = "model.safetensors"


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def pth(model, tmp_path):
    torch.save({"model": model.state_dict()}, tmp_path / "toy.pth")
    return (tmp_path / "toy.pth").read_bytes()


@pytest.fixture
def published(hub_server, hub_env, own_registry, monkeypatch, model, pth, tmp_path):
    """The manifest file; "toy" is at three places, one a layout, and "bear" at one of them."""
    assert hub_env
    assert own_registry is None
    hub_server.add_repo(TIMM, published_files(model, "timm"))
    hub_server.add_repo(HF, published_files(model, "transformers"))
    url = hub_server.add_file("toy.pth", pth)
    sources = (
        f'repo = "{TIMM}"  # their copy\nlayout = "timm"',
        f'repo = "{HF}"\nlayout = "transformers"',
        f'# the original\nurl = "{url}"\nlayout = "native"\npayload = "model"\nsha256_prefix = "{sha256(pth)[:8]}"',
    )
    distilled = "distilled = true\n"
    toy, bear = toy_table(*sources, facts=distilled), toy_table(sources[1], name="bear", facts=distilled)
    register_toys(model, "toy", "bear", "unpublished")
    text = f"{HEAD}{toy}\n# Bears come last.\n{bear}\n{toy_table(name='unpublished')}"
    put_in_force(text, monkeypatch)
    manifest = tmp_path / "manifest.toml"
    manifest.write_text(text, encoding="utf-8")
    return manifest


def errors(outcomes: list[Outcome]) -> dict[str, str | None]:
    return {outcome.source: outcome.error for outcome in outcomes}


def recorded(manifest, name="toy"):
    return parse_manifest(manifest.read_text(encoding="utf-8"))[name]


# What is written


def test_every_copy_gets_its_digest_and_hub_copies_their_revision(published, hub_server, model, pth):
    outcomes = record(published)
    assert [(outcome.model, outcome.error) for outcome in outcomes] == [*[("toy", None)] * 3, ("bear", None)]
    toy = recorded(published)
    for source, repo in zip(toy.sources, (TIMM, HF), strict=False):
        assert source.revision == hub_server.repos[repo].branches["main"]
        assert source.sha256 == sha256(hub_server.files(repo)[WEIGHTS])
    assert (toy.sources[2].sha256, toy.sources[2].revision) == (sha256(pth), "main")
    torch.testing.assert_close(torch.tensor(toy.reference_logits), answer(model)[0, :5], atol=1e-5, rtol=0)
    assert recorded(published, "bear").sources[0] == toy.sources[1]


def test_nothing_but_new_lines_is_written(published):
    before = published.read_text(encoding="utf-8").splitlines()
    record(published)
    changes = list(difflib.ndiff(before, published.read_text(encoding="utf-8").splitlines()))
    assert [line for line in changes if line[0] == "-"] == []
    keys = [line.split()[1] for line in changes if line[0] == "+"]
    assert sorted(keys) == sorted([*["sha256"] * 4, *["revision"] * 3, *["reference_logits"] * 2])


def test_recording_twice_changes_nothing(published):
    record(published)
    text = published.read_text(encoding="utf-8")
    assert errors(record(published)) == dict.fromkeys(errors(record(published)))
    assert published.read_text(encoding="utf-8") == text


def test_named_models_alone_are_recorded(published):
    assert {outcome.model for outcome in record(published, ["bear"])} == {"bear"}
    assert recorded(published).reference_logits is None
    assert recorded(published, "bear").reference_logits is not None


@pytest.mark.parametrize("name", ["beer", "unpublished"])
def test_name_without_sources_in_the_manifest_is_refused(published, name):
    text = published.read_text(encoding="utf-8")
    message = refusal(UnknownModelError, lambda: record(published, ["toy", name]))
    assert f"lists no sources of '{name}'" in message
    assert "bear" in message
    assert published.read_text(encoding="utf-8") == text


def test_each_outcome_is_reported(published):
    seen = []
    assert record(published, report=seen.append) == seen
    assert len(seen) == 4


def test_half_precision_copy_is_recorded(published, hub_server):
    hub_server.commit(HF, published_files(tiny_model().half(), "transformers"))
    outcomes = record(published, ["bear"])
    assert errors(outcomes) == {HF: None}
    expected = answer(tiny_model().half().float())[0, :5]
    torch.testing.assert_close(torch.tensor(recorded(published, "bear").reference_logits), expected, atol=1e-5, rtol=0)


# What is not


def test_copy_with_other_logits_is_reported_and_not_recorded(published, hub_server):
    hub_server.commit(HF, published_files(tiny_model(seed=1), "transformers"))
    found = errors(record(published, ["toy"]))
    assert f"logits differ from those of {TIMM} by" in found.pop(HF)
    assert set(found.values()) == {None}
    first, second, third = recorded(published).sources
    assert first.sha256
    assert third.sha256
    assert (second.sha256, second.revision) == (None, "main")


def test_copies_are_compared_with_the_first_that_loads(published, hub_server):
    del hub_server.repos[TIMM]
    hub_server.commit(HF, published_files(tiny_model(seed=1), "transformers"))
    found = errors(record(published, ["toy"]))
    assert "no such repository" in found[TIMM]
    assert [f"logits differ from those of {HF} by" in str(error) for error in found.values()] == [False, False, True]


def test_small_differences_of_arithmetic_are_allowed(published, hub_server, model):
    with torch.no_grad():
        model.head.bias += REFERENCE_TOLERANCE / 4
    hub_server.commit(HF, published_files(model, "transformers"))
    assert set(errors(record(published, ["toy"])).values()) == {None}


def test_unreachable_copy_is_reported_and_the_others_are_recorded(published, hub_server):
    hub_server.fail("/files/", times=None)
    found = errors(record(published))
    url = next(source for source in found if source.startswith("http"))
    assert "the server answered 503" in found.pop(url)
    assert found == {TIMM: None, HF: None}
    toy = recorded(published)
    assert [source.sha256 is None for source in toy.sources] == [False, False, True]
    assert toy.reference_logits
    hub_server.heal()
    assert set(errors(record(published)).values()) == {None}
    assert all(source.sha256 for source in recorded(published).sources)


def test_nothing_reachable_leaves_the_file_as_it_was(published, hub_env):
    hub_env.go_offline()
    text = published.read_text(encoding="utf-8")
    assert all("offline" in error for error in errors(record(published)).values())
    assert published.read_text(encoding="utf-8") == text


def test_changed_copy_does_not_replace_a_recorded_one(published, hub_server, tmp_path):
    record(published)
    text = published.read_text(encoding="utf-8")
    hub_server.corrupt("/cdn/")
    hub_server.corrupt("/files/")
    found = errors(record(published, access=Access(cache_dir=tmp_path / "empty")))
    assert all("SHA-256" in error or "logits differ" in error for error in found.values())
    assert published.read_text(encoding="utf-8") == text


def test_interrupted_run_keeps_the_models_it_finished(published):
    def interrupt(outcome):
        if outcome.model == "bear":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(published, report=interrupt)
    assert recorded(published).reference_logits
    assert recorded(published, "bear").reference_logits is None


def test_file_that_is_no_manifest_is_refused(tmp_path):
    (tmp_path / "other.toml").write_text("schema = 2")
    refusal(ManifestError, lambda: record(tmp_path / "other.toml"))
    for content in (b"\x89PNG", "schema = 1".encode("utf-16"), b"schema = 1\nmodel = '\xe9'"):
        (tmp_path / "other.toml").write_bytes(content)
        refusal(ManifestError, lambda: record(tmp_path / "other.toml"))


# What it is good for


def test_load_by_the_recorded_manifest_refuses_a_changed_file(published, hub_server, monkeypatch, tmp_path):
    record(published)
    table = put_in_force(published.read_text(encoding="utf-8"), monkeypatch)
    assert from_pretrained("toy", cache_dir=tmp_path / "a").origin.sha256 == table["toy"].sources[0].sha256
    other = published_files(tiny_model(seed=1), "timm")[WEIGHTS]
    hub_server.large_files.clear()
    for repo in (TIMM, HF):  # the same commit, honestly announced, of other bytes
        (commit,) = hub_server.repos[repo].commits.values()
        commit[WEIGHTS] = other
    hub_server.large_files[sha256(other)] = other
    hub_server.corrupt("/files/")
    message = refusal(CheckpointError, lambda: from_pretrained("toy", cache_dir=tmp_path / "b"))
    assert message.count("SHA-256") == 3


def test_recorded_logits_vouch_for_a_copy_without_digest(published, hub_server, monkeypatch, tmp_path):
    del hub_server.repos[TIMM]
    record(published, ["toy"])
    toy = put_in_force(published.read_text(encoding="utf-8"), monkeypatch)["toy"]
    assert toy.sources[0].sha256 is None
    hub_server.add_repo(TIMM, published_files(tiny_model(seed=1), "timm"))
    message = refusal(CheckpointError, lambda: load_source(toy, toy.sources[0], Access(cache_dir=tmp_path / "new")))
    assert "logits differ from the recorded ones" in message


def test_newer_commit_does_not_reach_a_recorded_name(published, hub_server, monkeypatch, model):
    record(published)
    table = put_in_force(published.read_text(encoding="utf-8"), monkeypatch)
    hub_server.commit(HF, published_files(tiny_model(seed=1), "transformers"))
    loaded = from_pretrained("bear")
    assert loaded.origin.revision == table["bear"].sources[0].revision
    assert_same_answer(model, loaded)


# The command


def test_command_prints_each_outcome_and_fails_if_one_did(published, hub_server, capsys):
    hub_server.fail("/files/", times=None, status=404)
    assert main(["cache", "record", "toy", "--manifest", str(published)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"toy  {TIMM}  recorded", f"toy  {HF}  recorded"]
    assert lines[2].endswith("the server answered 404")
    hub_server.heal()
    assert main(["cache", "record", "--manifest", str(published)]) == 0
    assert capsys.readouterr().out.count("recorded") == 4
    assert all(source.sha256 for source in recorded(published).sources)


@pytest.mark.parametrize("arguments", [["beer"], ["--manifest", "no/such.toml"]])
def test_command_explains_in_one_line_what_it_cannot_do(published, arguments, capsys):
    assert main(["cache", "record", "--manifest", str(published), *arguments]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("deit-models: ")


def test_manifest_that_cannot_be_written_is_one_line(published, full_disk, tmp_path):
    text = published.read_text(encoding="utf-8")
    record(published, access=Access(cache_dir=tmp_path / "warm"))
    published.write_text(text, encoding="utf-8")
    with full_disk(1000):
        message = refusal(SaveError, lambda: record(published, access=Access(cache_dir=tmp_path / "warm")))
    assert str(published) in message
    assert published.read_text(encoding="utf-8") == text


# Teachers

TEACHER = """
[teacher.old]
network = "regnet_y_400mf"
num_classes = 10

[[teacher.old.source]]
repo = "lab/teacher"
layout = "timm"

[[teacher.old.source]]
url = "{url}"
layout = "timm"
payload = "model"
"""


@pytest.fixture
def teacher(hub_server, hub_env, tmp_path):
    """A manifest with a teacher alone, at two places, and its weights."""
    assert hub_env
    weights = {
        "stem.conv.weight": torch.rand(4, 3),
        "fc.bias": torch.rand(10),
        "bn.num_batches_tracked": torch.tensor(3),
    }
    hub_server.add_repo("lab/teacher", {WEIGHTS: save(weights)})
    torch.save({"model": weights}, tmp_path / "old.pth")
    url = hub_server.add_file("old.pth", (tmp_path / "old.pth").read_bytes())
    (tmp_path / "manifest.toml").write_text(f"{HEAD}{TEACHER.format(url=url)}", encoding="utf-8")
    return tmp_path / "manifest.toml", weights


def test_teacher_gets_its_digests_and_its_revision(teacher, hub_server, tmp_path):
    manifest, _ = teacher
    assert errors(record(manifest, ["old"])) == dict.fromkeys(errors(record(manifest)))
    repo, file = parse_teachers(manifest.read_text(encoding="utf-8"))["old"].sources
    assert (repo.sha256, repo.revision) == (
        sha256(hub_server.files("lab/teacher")[WEIGHTS]), hub_server.repos["lab/teacher"].branches["main"],
    )  # fmt: skip
    assert file.sha256 == sha256((tmp_path / "old.pth").read_bytes())
    assert "reference_logits" not in manifest.read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [{"fc.bias": torch.ones(10)}, {"more": torch.ones(1)}])
def test_copy_of_a_teacher_with_other_weights_is_not_recorded(teacher, hub_server, change):
    manifest, weights = teacher
    hub_server.commit("lab/teacher", {WEIGHTS: save({**weights, **change})})
    *_, file = record(manifest)
    assert "weights differ from those of lab/teacher by " in file.error
    assert parse_teachers(manifest.read_text(encoding="utf-8"))["old"].sources[1].sha256 is None


# The text


TEXT = """\
schema = 1  # comment
[model.a]
licence = "MIT"  # why

[[model.a.source]]  # first
repo = "me/a"
sha256 = "old"  # by hand

[[model.a.source]]
repo = "me/ab"

# about b
[model.b]
reference_logits = [
    1.0,
    2.0,
]
licence = "MIT"
"""


@pytest.mark.parametrize(
    ("model", "repo", "key", "value", "old", "new"),
    [
        ("a", "me/a", "sha256", "new", 'sha256 = "old"  # by', 'sha256 = "new"  # by'),
        ("a", "me/ab", "sha256", "new", '"me/ab"\n', '"me/ab"\nsha256 = "new"\n'),
        ("a", None, "sha256", "new", "# why\n", '# why\nsha256 = "new"\n'),
        ("b", None, "reference_logits", [0.5, -1e-05], "[\n    1.0,\n    2.0,\n]", "[0.5, -1e-05]"),
        ("b", None, "revision", "main", 'licence = "MIT"\n', 'licence = "MIT"\nrevision = "main"\n'),
    ],
)
def test_one_value_is_set_and_everything_else_kept(model, repo, key, value, old, new):
    source = None if repo is None else Source(repo=repo, layout="timm")
    head, _, tail = TEXT.rpartition(old)
    assert head or tail
    assert set_value(TEXT, f"model.{model}", source, key, value) == head + new + tail


@pytest.mark.parametrize(("model", "repo"), [("c", None), ("b", "me/a"), ("a", "me/abc")])
def test_value_of_a_table_that_is_not_there_is_refused(model, repo):
    source = None if repo is None else Source(repo=repo, layout="timm")
    assert f"has no table model.{model}" in refusal(
        ManifestError, lambda: set_value(TEXT, f"model.{model}", source, "sha256", "x")
    )
