"""from_pretrained against a local Hub with the real client, and from disk: a whole model, or one line that says why."""

import errno
import json
import logging
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hub_protocol import HTML_PAGE, sha256
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file, save_file
from tiny_models import LAYOUTS, SHAPE, answer, assert_same_answer, assert_same_state, published_files, refusal
from tiny_models import tiny_model as make
from toy_manifest import put_checkpoints_in_force
from tracing import calls_of

import deit_models
from deit_models import (
    CheckpointError,
    ConfigError,
    FetchError,
    IntegrityError,
    SaveError,
    UnknownModelError,
    create_model,
    from_pretrained,
    register_model,
    registry,
)
from deit_models.checkpoint import ModelInfo, Preprocessing, Source
from deit_models.hub import load
from deit_models.hub.fetch import Access
from deit_models.hub.weights import unpickle_tensors
from deit_models.models.deit import DeiT

REPO = "me/model"
WEIGHTS = "model.safetensors"


@pytest.fixture
def model():
    return make()


@pytest.fixture
def hub(hub_server, hub_env, model):
    """The local Hub with the model in a repository, the client pointed at it."""
    assert hub_env
    hub_server.add_repo(REPO, published_files(model))
    return hub_server


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def bodies(hub):
    return hub.count("GET", "/cdn/")


# From the Hub


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["deit_micro_patch4_32", "deit_micro_distilled_patch4_32"])
def test_every_layout_gives_the_same_model(hub_server, hub_env, name, layout):
    model = make(name)
    sha = hub_server.add_repo(REPO, published_files(model, layout))
    loaded = from_pretrained(REPO)
    assert not loaded.training
    assert loaded.config.distilled == model.config.distilled
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert_same_answer(model, loaded)
    assert (loaded.origin.source, loaded.origin.revision) == (REPO, sha)
    assert loaded.origin.sha256 in {blob.name for blob in hub_env.blobs()}


def test_cold_download_fetches_each_file_once(hub):
    from_pretrained(REPO)
    fetched = [request.path.rsplit("/", 1)[1] for request in hub.requests if request.method == "GET"]
    assert sorted(fetched) == ["config.json", WEIGHTS]


def test_warm_cache_asks_for_the_etag_alone(hub):
    from_pretrained(REPO)
    hub.requests.clear()
    from_pretrained(REPO)
    assert [(request.method, request.path) for request in hub.requests] == [
        ("HEAD", f"/{REPO}/resolve/main/config.json")
    ]


@pytest.mark.parametrize("how", ["argument", "environment"])
@pytest.mark.parametrize("layout", ["native", "transformers"])
def test_offline_the_cache_serves_without_a_request(hub_server, hub_env, model, how, layout):
    hub_server.add_repo(REPO, published_files(model, layout))
    from_pretrained(REPO)
    hub_server.requests.clear()
    hub_env.go_offline(how == "environment")
    assert_same_answer(model, from_pretrained(REPO, local_files_only=how == "argument"))
    assert hub_server.requests == []


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_without_cache_says_how_to_get_it(hub, hub_env, how):
    hub_env.go_offline(how == "environment")
    message = refusal(FetchError, lambda: from_pretrained(REPO, local_files_only=how == "argument"))
    assert "offline; load it once with network" in message
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
def test_own_cache_folder_is_used_and_needed_again(hub_env, tmp_path, model):
    from_pretrained(REPO, cache_dir=tmp_path / "mine")
    assert hub_env.blobs() == []
    assert_same_answer(model, from_pretrained(REPO, cache_dir=tmp_path / "mine", local_files_only=True))
    refusal(FetchError, lambda: from_pretrained(REPO, local_files_only=True))


def test_revision_pins_the_weights(hub):
    first = hub.repos[REPO].branches["main"]
    other, side = make(seed=1), make(seed=2)
    second = hub.commit(REPO, published_files(other))
    hub.commit(REPO, published_files(side), branch="side")
    for revision, expected in ((first, make()), (second, other), (None, other), ("side", side)):
        loaded = from_pretrained(REPO, revision=revision)
        assert_same_answer(expected, loaded)
        assert loaded.origin.revision == (
            second if revision is None else hub.repos[REPO].branches.get(revision, revision)
        )


def test_branch_that_moves_between_two_files_gives_one_commit(hub, model):
    wider = make(num_classes=3)

    def move_after_config(repo_id, filename, **options):
        path = hf_hub_download(repo_id, filename, **options)
        if filename == "config.json":
            hub.commit(REPO, published_files(wider))
        return path

    assert_same_answer(model, load_through(move_after_config, REPO))


def load_through(download, source):
    """Load with another function in the place of the client's."""
    return load.load(source, Access(download=download), changes={}).eval()


def test_private_repository_without_token_says_what_to_do(hub, hub_env, model):
    hub.add_repo("me/secret", published_files(model), private_token="hf_key")
    message = refusal(FetchError, lambda: from_pretrained("me/secret"))
    assert "token=..." in message
    assert "hf auth login" in message
    message = refusal(FetchError, lambda: from_pretrained("me/secret", token="hf_expired"))
    assert "401" in message
    assert "token" in message
    assert_same_answer(model, from_pretrained("me/secret", token="hf_key"))
    hub_env.login("hf_key")
    assert_same_answer(model, from_pretrained("me/secret"))


def test_missing_repository_revision_and_file_are_told_apart(hub):
    assert "no such repository" in refusal(FetchError, lambda: from_pretrained("me/nothing"))
    message = refusal(FetchError, lambda: from_pretrained(REPO, revision="nothing"))
    assert "no such revision" in message
    assert "nothing" in message
    hub.commit(REPO, {}, delete=(WEIGHTS,))
    assert "has no model.safetensors or pytorch_model.bin" in refusal(FetchError, lambda: from_pretrained(REPO))
    hub.add_repo("me/empty", {"README.md": b""})
    message = refusal(FetchError, lambda: from_pretrained("me/empty"))
    assert "me/empty/config.json" in message
    assert "no such file" in message


def test_old_repository_with_pickled_weights_loads(hub, model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    hub.commit(REPO, {"pytorch_model.bin": tmp_path / "weights.bin"}, delete=(WEIGHTS,))
    assert_same_answer(model, from_pretrained(REPO))
    hub.requests.clear()
    assert_same_answer(model, from_pretrained(REPO, local_files_only=True))
    assert hub.requests == []


# Bad networks


@pytest.mark.parametrize("where", ["/resolve/", "/cdn/"])
@pytest.mark.parametrize("status", [503, 429])
def test_busy_server_is_asked_again(hub, model, where, status):
    hub.fail(where, status=status)
    assert_same_answer(model, from_pretrained(REPO))


@pytest.mark.parametrize(("where", "reason"), [("/resolve/", "cannot be reached"), ("/cdn/", "answered 503")])
def test_server_that_stays_busy_is_one_line(hub, hub_env, model, where, reason):
    hub.fail(where, times=None)
    assert reason in refusal(FetchError, lambda: from_pretrained(REPO))
    assert not any(len(blob.name) == 64 for blob in hub_env.blobs())
    hub.heal()
    assert_same_answer(model, from_pretrained(REPO))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("after", [0, 5000])
def test_connection_cut_once_is_taken_up_again(hub, model, after, reset):
    hub.cut("/cdn/", after=after, reset=reset)
    assert_same_answer(model, from_pretrained(REPO))


@pytest.mark.parametrize("reset", [False, True])
def test_connection_always_cut_is_one_line_and_leaves_no_file(hub, hub_env, model, reset):
    hub.cut("/cdn/", after=0, times=None, reset=reset)
    message = refusal(FetchError, lambda: from_pretrained(REPO))
    assert "connection lost" in message
    assert f"{REPO}/{WEIGHTS}" in message
    assert not any(len(blob.name) == 64 for blob in hub_env.blobs())
    hub.heal()
    assert_same_answer(model, from_pretrained(REPO))


def test_no_server_at_all_is_one_line(hub_env, hub_server):
    hub_server._httpd.server_close()
    message = refusal(FetchError, lambda: from_pretrained(REPO))
    assert "cannot be reached" in message
    assert hub_env.blobs() == []


@pytest.fixture(params=["refuses", "accepts and says nothing"])
def down(request, hub):
    """Takes the Hub away."""
    if request.param == "refuses":
        return hub.__exit__
    return lambda: hub.delay(seconds=30)


def as_files_of_long_ago(model, tmp_path):
    """Weights under the second name that is looked up, and no processor beside a transformers config."""
    files = published_files(model, "transformers")
    torch.save(load_safetensors(files.pop(WEIGHTS)), tmp_path / "weights.bin")
    del files["preprocessor_config.json"]
    return {**files, "pytorch_model.bin": tmp_path / "weights.bin"}


@pytest.mark.parametrize("files", ["native", "transformers", "of long ago"])
def test_hub_that_is_down_leaves_the_copy_in_the_cache_at_once(hub, down, model, tmp_path, files, caplog):
    old = files == "of long ago"
    hub.add_repo("me/other", as_files_of_long_ago(model, tmp_path) if old else published_files(model, files))
    from_pretrained("me/other")
    down()
    began = time.monotonic()
    loaded = load.load("me/other", Access(wait_s=0.6), changes={}).eval()
    assert time.monotonic() - began < 10
    assert_same_answer(model, loaded)
    said = [record.getMessage() for record in caplog.records if "cannot be reached" in record.getMessage()]
    assert len(said) == 1
    assert "loading the copy in the cache" in said[0]


def test_hub_that_is_down_is_one_error_within_the_limit_without_a_copy(hub, down):
    assert hub.repos
    down()
    began = time.monotonic()
    message = refusal(FetchError, lambda: load.load(REPO, Access(wait_s=0.6), changes={}))
    assert "cannot be reached" in message
    assert time.monotonic() - began < 10


def test_file_that_a_cached_commit_lacks_is_asked_for_once(hub, model):
    files = published_files(model, "transformers")
    del files["preprocessor_config.json"]
    hub.add_repo("me/other", files)
    from_pretrained("me/other")
    hub.requests.clear()
    from_pretrained("me/other")
    assert hub.count(match="preprocessor_config") == 0


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(None, id="one bit"),
        pytest.param(lambda data: HTML_PAGE.ljust(len(data)), id="web page of the right size"),
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
    ],
)
def test_other_bytes_than_announced_are_refused_and_not_kept(hub, hub_env, model, edit):
    hub.corrupt("/cdn/", edit)
    message = refusal(IntegrityError, lambda: from_pretrained(REPO))
    assert REPO in message
    assert "SHA-256" in message
    assert not any(len(blob.name) == 64 for blob in hub_env.blobs())
    hub.heal()
    assert_same_answer(model, from_pretrained(REPO))


@pytest.mark.usefixtures("hub")
def test_damaged_cache_is_noticed_and_mended(hub_env, model):
    from_pretrained(REPO)
    (blob,) = [blob for blob in hub_env.blobs() if len(blob.name) == 64]
    blob.write_bytes(blob.read_bytes()[:-4] + b"\0\0\0\1")
    refusal(IntegrityError, lambda: from_pretrained(REPO, local_files_only=True))
    assert_same_answer(model, from_pretrained(REPO))


def test_web_page_in_place_of_the_weights_is_one_line(hub, hub_env, model):
    hub.replace("/cdn/")
    refusal(FetchError, lambda: from_pretrained(REPO))
    assert not any(len(blob.name) == 64 for blob in hub_env.blobs())
    hub.heal()
    assert_same_answer(model, from_pretrained(REPO))


def test_captive_portal_is_one_line(hub, hub_env, model):
    hub.replace(method=None)
    refusal(FetchError, lambda: from_pretrained(REPO))
    assert hub_env.blobs() == []
    hub.heal()
    assert_same_answer(model, from_pretrained(REPO))


def test_repository_that_holds_another_model_is_refused(hub):
    hub.commit(REPO, {WEIGHTS: published_files(make("deit_micro_patch4_32"))[WEIGHTS]})
    message = refusal(CheckpointError, lambda: from_pretrained(REPO))
    assert message.startswith(REPO)
    assert "missing: dist_token" in message.replace("3 missing", "missing")


def test_full_disk_is_one_line_and_a_later_load_works(hub, hub_env, model, full_disk):
    with full_disk(10_000):
        message = refusal(SaveError, lambda: from_pretrained(REPO))
    assert f"{REPO}/{WEIGHTS}" in message
    assert "File too large" in message
    assert bodies(hub) == 1  # no use in asking again
    assert not any(len(blob.name) == 64 for blob in hub_env.blobs())
    assert_same_answer(model, from_pretrained(REPO))


def test_no_space_left_is_not_tried_again(hub):
    def refuse(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert "No space left on device" in refusal(SaveError, lambda: load_through(refuse, REPO))
    assert bodies(hub) == 0


EIGHT = """
import json, multiprocessing, sys
import torch
torch.set_num_threads(1)
import deit_models
from deit_models.hub.weights import reference_input
def work(barrier, answers):
    barrier.wait()
    model = deit_models.from_pretrained(sys.argv[1])
    answers.put(model(reference_input(model.config))[0].tolist())
context = multiprocessing.get_context("fork")
barrier, answers = context.Barrier(8), context.Queue()
workers = [context.Process(target=work, args=(barrier, answers)) for _ in range(8)]
for worker in workers: worker.start()
print(json.dumps([answers.get(timeout=60) for _ in workers]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks, so that torch is imported once")
def test_eight_processes_at_once_load_and_download_once(hub, model):
    hub.delay("/cdn/", seconds=0.3)
    done = subprocess.run([sys.executable, "-c", EIGHT, REPO], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answers = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert answers.shape == (8, 10)
    torch.testing.assert_close(answers, answer(model).expand(8, -1), atol=1e-5, rtol=0)
    assert bodies(hub) == 1


# A registered name and its sources


@pytest.fixture
def publish(monkeypatch, own_registry):
    """`publish(model, *sources)`: register "toy" with the model's config and list it in the manifest."""

    def row(model, *sources, **facts):
        register_model("toy", DeiT, model.config)
        checkpoint = ModelInfo(
            name="toy",
            family="deit",
            params=1,
            macs=1,
            input_size=32,
            num_classes=model.num_classes,
            distilled=model.config.distilled,
            preprocessing=Preprocessing(resize=36, crop=(32, 32), mean=(0.5,) * 3),
            dataset="CIFAR-10",
            licence="MIT",
            class_names=tuple("abcdefghij"),
            sources=sources,
            **facts,
        )
        put_checkpoints_in_force({"toy": checkpoint}, monkeypatch)
        return checkpoint

    assert own_registry is None
    return row


@pytest.fixture
def pth(model, tmp_path):
    payload = {"model": model.state_dict(), "epoch": 3}
    torch.save(payload, tmp_path / "authors.pth")
    return (tmp_path / "authors.pth").read_bytes()


def test_registered_name_brings_the_manifests_facts(hub, publish, model):
    publish(model, Source(repo=REPO, layout="native"))
    loaded = from_pretrained("toy")
    assert_same_answer(model, loaded)
    assert loaded.origin.name == "toy"
    assert loaded.origin.class_names == tuple("abcdefghij")
    assert (loaded.origin.licence, loaded.origin.dataset) == ("MIT", "CIFAR-10")
    assert loaded.origin.preprocessing == Preprocessing(resize=36, crop=(32, 32), mean=(0.5,) * 3)
    assert loaded.origin.revision == hub.repos[REPO].branches["main"]
    assert hub.count("GET", "config.json") == 0
    assert from_pretrained(REPO).origin == loaded.origin


def test_sources_are_tried_in_turn(hub, publish, model, pth, caplog):
    url = hub.add_file("authors.pth", pth)
    hub.add_repo("me/broken", {WEIGHTS: b"no weights at all" * 100})
    publish(
        model,
        Source(repo="me/gone", layout="timm"),
        Source(repo="me/broken", layout="timm"),
        Source(url=url, layout="native", payload="model", sha256_prefix=sha256(pth)[:8]),
    )
    with caplog.at_level(logging.WARNING):
        loaded = from_pretrained("toy")
    assert_same_answer(model, loaded)
    assert (loaded.origin.source, loaded.origin.revision, loaded.origin.sha256) == (url, None, sha256(pth))
    assert "me/gone" in caplog.text
    assert "truncated or damaged" in caplog.text


def test_first_sound_source_ends_the_search(hub, publish, model):
    publish(model, Source(repo=REPO, layout="native"), Source(repo="me/never", layout="timm"))
    from_pretrained("toy")
    assert hub.count(match="never") == 0


def test_combined_error_names_each_source_and_its_reason(hub, publish, model):
    url = f"{hub.url}/files/gone.pth"
    publish(model, Source(repo="me/gone", layout="timm"), Source(url=url, layout="native", sha256_prefix="abcd1234"))
    message = refusal(FetchError, lambda: from_pretrained("toy"))
    assert "no source of toy" in message
    assert "me/gone/model.safetensors" in message
    assert "no such repository" in message
    assert f"{url}: the server answered 404" in message


def test_unreachable_hub_is_asked_once_and_the_next_source_gives_the_weights(hub, publish, model, pth):
    asked = []

    def without_network(repo, *args, **options):
        asked.append((repo, options["local_files_only"]))
        if not options["local_files_only"]:
            raise LocalEntryNotFoundError("no connection") from ConnectionError("no route to host")
        return hf_hub_download(repo, *args, **options)

    url = hub.add_file("authors.pth", pth)
    publish(
        model,
        Source(repo="me/first", layout="timm"),
        Source(repo="me/second", layout="timm"),
        Source(url=url, layout="native", sha256_prefix=sha256(pth)[:8]),
    )
    assert_same_state(load_through(without_network, "toy").state_dict(), model.state_dict())
    assert [repo for repo, offline in asked if not offline] == ["me/first"]


def test_unreachable_hub_leaves_the_cached_copy_of_a_later_source(down, publish, model):
    from_pretrained(REPO)  # now in the cache
    publish(model, Source(repo="me/first", layout="timm"), Source(repo=REPO, layout="native"))
    down()
    loaded = load.load("toy", Access(wait_s=0.6), changes={})
    assert_same_state(loaded.state_dict(), model.state_dict())


def test_combined_error_is_of_the_kind_of_all_its_reasons(hub, publish, model):
    hub.add_repo("me/bad", {WEIGHTS: b"no weights at all" * 100})
    bad = Source(repo="me/bad", layout="timm")
    publish(model, bad, bad)
    refusal(CheckpointError, lambda: from_pretrained("toy"))


def test_combined_error_of_mixed_reasons_is_a_fetch_error(hub, publish, model):
    hub.add_repo("me/bad", {WEIGHTS: b"no weights at all" * 100})
    publish(model, Source(repo="me/gone", layout="timm"), Source(repo="me/bad", layout="timm"))
    refusal(FetchError, lambda: from_pretrained("toy"))


def test_offline_every_source_is_tried_in_the_cache(hub, publish, model, pth):
    url = hub.add_file("authors.pth", pth)
    row = (Source(repo="me/gone", layout="timm"), Source(url=url, layout="native", sha256_prefix=sha256(pth)[:8]))
    publish(model, *row)
    message = refusal(FetchError, lambda: from_pretrained("toy", local_files_only=True))
    assert message.count("offline; load it once with network") == 2
    from_pretrained("toy")
    hub.requests.clear()
    assert_same_answer(model, from_pretrained("toy", local_files_only=True))
    assert hub.requests == []


def test_recorded_digest_belongs_to_the_recorded_revision(hub, publish, model):
    old = hub.repos[REPO].branches["main"]
    digest = sha256(hub.files(REPO)[WEIGHTS])
    new = hub.commit(REPO, published_files(make(seed=1)))
    publish(model, Source(repo=REPO, layout="native", revision=old, sha256=digest))
    assert_same_answer(model, from_pretrained("toy"))
    assert_same_answer(make(seed=1), from_pretrained("toy", revision=new))


@pytest.mark.usefixtures("hub")
def test_recorded_digest_of_other_bytes_is_refused(hub_env, publish, model):
    publish(model, Source(repo=REPO, layout="native", sha256="0" * 64))
    assert "SHA-256" in refusal(IntegrityError, lambda: from_pretrained("toy"))
    assert hub_env.blobs() == []


def test_other_bytes_than_the_hub_announced_are_refused_without_a_recorded_digest(hub, hub_env, publish, model):
    publish(model, Source(repo=REPO, layout="native"))
    hub.corrupt("/cdn/")
    assert "SHA-256" in refusal(IntegrityError, lambda: from_pretrained("toy"))
    assert hub_env.blobs() == []
    hub.heal()
    assert_same_answer(model, from_pretrained("toy"))


def test_name_without_weights_says_how_to_build_it(publish, model):
    publish(model)
    assert "create_model('toy')" in refusal(FetchError, lambda: from_pretrained("toy"))


def test_revision_of_a_name_with_plain_downloads_only_is_refused(publish, model):
    publish(model, Source(url="http://127.0.0.1:9/x.pth", layout="native"))
    assert "at revision v1" in refusal(FetchError, lambda: from_pretrained("toy", revision="v1"))


def test_shipped_file_is_checked_and_kept(publish, model, folder, monkeypatch):
    file = str(folder / WEIGHTS)  # an absolute path is not looked for in weights/
    row = publish(model, Source(file=file, layout="native", sha256=sha256((folder / WEIGHTS).read_bytes())))
    assert_same_answer(model, from_pretrained("toy"))
    wrong = replace(row, sources=(replace(row.sources[0], sha256="1" * 64),))
    put_checkpoints_in_force({"toy": wrong}, monkeypatch)
    refusal(IntegrityError, lambda: from_pretrained("toy"))
    assert (folder / WEIGHTS).is_file()
    (folder / WEIGHTS).unlink()
    assert "reinstall" in refusal(FetchError, lambda: from_pretrained("toy"))


@pytest.mark.usefixtures("hub")
def test_recorded_logits_are_compared(publish, model, monkeypatch):
    right = tuple(answer(model)[0, :3].tolist())
    row = publish(model, Source(repo=REPO, layout="native"), reference_logits=right)
    assert_same_answer(model, from_pretrained("toy"))
    wrong = replace(row, reference_logits=(right[0], right[1] + 0.01, right[2]))
    put_checkpoints_in_force({"toy": wrong}, monkeypatch)
    message = refusal(CheckpointError, lambda: from_pretrained("toy"))
    assert "logits differ from the recorded ones by 0.01" in message
    assert from_pretrained("toy", num_classes=3).num_classes == 3  # other heads, other logits


# Plain downloads


def test_right_prefix_is_fetched_and_converted_once(hub, publish, model, pth):
    url = hub.add_file("authors.pth", pth)
    publish(model, Source(url=url, layout="native", payload="model", sha256_prefix=sha256(pth)[:8]))
    assert_same_answer(model, from_pretrained("toy"))
    hub.requests.clear()
    assert calls_of(unpickle_tensors, lambda: assert_same_answer(model, from_pretrained("toy"))) == 0
    assert hub.requests == []


def test_wrong_prefix_is_refused_and_not_kept(hub, hub_env, publish, model, pth):
    url = hub.add_file("authors.pth", pth)
    publish(model, Source(url=url, layout="native", sha256_prefix="00000000"))
    message = refusal(IntegrityError, lambda: from_pretrained("toy"))
    assert url in message
    assert not [path for path in hub_env.home.rglob("authors*") if path.suffix != ".lock"]


def test_damaged_download_is_refused_removed_and_fetched_anew(hub, hub_env, publish, model, pth):
    url = hub.add_file("authors.pth", pth)
    publish(model, Source(url=url, layout="native", sha256_prefix=sha256(pth)[:8]))
    from_pretrained("toy")
    (cached,) = hub_env.home.rglob("authors.pth")
    cached.write_bytes(pth[:-1] + b"!")
    refusal(IntegrityError, lambda: from_pretrained("toy"))
    assert not cached.exists()
    assert_same_answer(model, from_pretrained("toy"))


def test_web_page_in_place_of_a_download_is_refused(hub, publish, model, pth):
    url = hub.add_file("authors.pth", pth)
    publish(model, Source(url=url, layout="native", sha256_prefix=sha256(pth)[:8]))
    hub.replace("/files/")
    refusal(IntegrityError, lambda: from_pretrained("toy"))
    hub.heal()
    assert_same_answer(model, from_pretrained("toy"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_gives_back_the_model(model, tmp_path, layout):
    model.save_pretrained(tmp_path / "out", layout=layout)
    for source in (tmp_path / "out", str(tmp_path / "out"), tmp_path / "out" / WEIGHTS):
        assert_same_state(from_pretrained(source).state_dict(), model.state_dict())


@pytest.fixture
def bare(own_registry, tmp_path):
    """`bare(layout, **config)`: a weights file alone of a tiny model registered as "tiny"; (model, path)."""
    assert own_registry is None

    def write(layout, *, distilled=True, **overrides):
        name = f"deit_micro{'_distilled' if distilled else ''}_patch4_32"
        register_model("tiny", DeiT, registry.model_spec(name).config, **SHAPE)
        model = make("tiny", **overrides)
        model.save_pretrained(tmp_path / "whole", layout=layout)
        path = tmp_path / "bare.safetensors"
        path.write_bytes((tmp_path / "whole" / WEIGHTS).read_bytes())
        return model, path

    return write


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"num_classes": 7, "img_size": 48}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bare_file_of_any_layout_loads_with_the_models_name(bare, layout, overrides, distilled):
    model, path = bare(layout, distilled=distilled, **overrides)
    loaded = from_pretrained(path, model="tiny")
    assert loaded.config == model.config
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert loaded.origin.class_names is None


def test_bare_file_without_name_asks_for_it(bare):
    path = bare("native")[1]
    message = refusal(ConfigError, lambda: from_pretrained(path))
    assert "model=" in message
    assert str(path) in message


def test_bare_file_said_to_be_another_model_is_refused(bare):
    path = bare("native")[1]
    message = refusal(CheckpointError, lambda: from_pretrained(path, model="deit_micro_patch4_32"))
    assert "missing" in message
    assert str(path) in message


def test_bare_file_of_absurd_shapes_is_refused(bare):
    model, path = bare("native")
    for broken in ({"head.weight": torch.zeros(1)}, {"pos_embed": torch.zeros(5)}, {"head.weight": torch.zeros(0, 16)}):
        save_file(model.state_dict() | broken, path)
        refusal(CheckpointError, lambda: from_pretrained(path, model="tiny"))


def test_authors_pth_loads_with_the_models_name(bare, hub_env, pth, tmp_path):
    assert hub_env
    model, _ = bare("native")
    assert_same_answer(model, from_pretrained(tmp_path / "authors.pth", model="tiny"))
    assert (tmp_path / "authors.pth").read_bytes() == pth


@pytest.mark.parametrize("source", ["a/b/c.safetensors", "out/model.safetensors", "model.pth", "./out", "/no/such"])
def test_path_that_does_not_exist_is_no_request(hub, source):
    message = refusal(UnknownModelError, lambda: from_pretrained(source))
    assert source in message
    assert hub.requests == []


def test_unknown_name_gets_the_nearest():
    message = refusal(UnknownModelError, lambda: from_pretrained("deit_tiny_patch16_244"))
    assert "deit_tiny_patch16_224" in message


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{", CheckpointError),
        ("[]", CheckpointError),
        ("{}", CheckpointError),
        ('{"deit_models": 99}', CheckpointError),
        ('{"deit_models": 1, "family": "deit"}', CheckpointError),
        ('{"architecture": "resnet50"}', UnknownModelError),
        ('{"architecture": "deit_tiny_patch16_224", "model_args": {"global_pool": "map"}}', ConfigError),
        ('{"architecture": "deit_tiny_patch16_224", "pretrained_cfg": 3}', CheckpointError),
        ('{"model_type": "swin"}', ConfigError),
        ('{"model_type": "vit", "hidden_act": "relu"}', ConfigError),
        ('{"model_type": "vit", "id2label": ["a", "b"]}', CheckpointError),
        ('{"model_type": "vit", "id2label": {"0": "a", "2": "b"}}', CheckpointError),
        ('{"model_type": "vit", "hidden_size": "wide"}', CheckpointError),
    ],
)
def test_broken_config_is_refused(folder, text, kind):
    (folder / "config.json").write_text(text, encoding="utf-8")
    refusal(kind, lambda: from_pretrained(folder))


def test_config_that_is_not_text_is_refused(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "is not JSON" in refusal(CheckpointError, lambda: from_pretrained(folder))


def test_folder_without_weights_is_refused(folder):
    (folder / WEIGHTS).unlink()
    assert "has no model.safetensors" in refusal(CheckpointError, lambda: from_pretrained(folder))


@pytest.fixture
def tiny(own_registry, model):
    """The model's registered name, for files that do not say what they are."""
    assert own_registry is None
    register_model("tiny", type(model), model.config, num_classes=10, img_size=32)
    return "tiny"


@pytest.mark.parametrize(
    "script", ["timm", "timm-last", "lightning", "lightning-root", "accelerate", "shards", "shards of pickles"]
)
def test_folders_of_other_programs_are_loaded(tiny, model, tmp_path, script):
    state, folder = model.state_dict(), tmp_path / "run"
    others = {name: tensor + 1 for name, tensor in state.items()}
    (folder / "checkpoints").mkdir(parents=True)
    known = {"model": tiny}
    if script.startswith("timm"):
        shape = "".join(f"  {name}: {size}\n" for name, size in SHAPE.items())
        said = f"lr: 0.1\nmodel: {model.origin.name}\nmodel_ema: true\nnum_classes: 10\nmodel_kwargs:\n{shape}"
        (folder / "args.yaml").write_text(said, encoding="utf-8")
        best, last = {"state_dict": others, "state_dict_ema": state, "arch": tiny}, {"state_dict": others}
        torch.save(best, folder / ("last.pth.tar" if script == "timm-last" else "model_best.pth.tar"))
        torch.save(last, folder / ("checkpoint-3.pth.tar" if script == "timm-last" else "last.pth.tar"))
        known = {}
    elif script.startswith("lightning"):
        (folder / "hparams.yaml").write_text("lr: 1\n", encoding="utf-8")
        place = folder / "checkpoints" if script == "lightning-root" else folder
        torch.save({"state_dict": {f"net.{k}": v for k, v in state.items()}}, place / "epoch=3-step=9.ckpt")
        torch.save({"state_dict": {f"net.{k}": v for k, v in others.items()}}, place / "last.ckpt")
    else:
        torch.save({"state": {}}, folder / "optimizer.bin")
        torch.save([1], folder / "random_states_0.pkl")
        names = sorted(state)
        ending, whole = ("bin", "pytorch_model.bin") if script == "shards of pickles" else ("safetensors", WEIGHTS)
        parts = {f"a.{ending}": names[:9], f"b.{ending}": names[9:]}
        if script == "accelerate":
            parts = {WEIGHTS: names}
        for name, part in parts.items():
            (torch.save if ending == "bin" else save_file)({key: state[key] for key in part}, folder / name)
        if script != "accelerate":
            weight_map = {key: name for name, part in parts.items() for key in part}
            (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert_same_state(from_pretrained(folder, cache_dir=tmp_path / "cache", **known).state_dict(), state)


@pytest.mark.parametrize("named", ["folder", "file"])
@pytest.mark.parametrize("classes", [7, 3])
def test_run_of_timms_train_that_began_with_a_folder_is_loaded(tmp_path, named, classes):
    """args.yaml names the folder of `local-dir:`; the run's head may have another size."""
    base, run = tmp_path / "my models" / "base", tmp_path / "run"
    make(num_classes=7).save_pretrained(base, layout="timm")
    state = make(num_classes=classes, seed=1).state_dict()
    run.mkdir()
    asked = "null" if classes == 7 else classes
    text = f"amp: false\nmodel: local-dir:{base}\nmodel_ema: false\nnum_classes: {asked}\n"
    (run / "args.yaml").write_text(text, encoding="utf-8")
    torch.save({"state_dict": state, "arch": "x"}, run / "last.pth.tar")
    loaded = from_pretrained(run if named == "folder" else run / "last.pth.tar", cache_dir=tmp_path / "cache")
    assert_same_state(loaded.state_dict(), state)
    assert loaded.num_classes == classes


def test_run_of_timms_train_whose_first_folder_is_gone_asks_for_the_model(tmp_path):
    (tmp_path / "args.yaml").write_text("model: local-dir:/gone/away\n", encoding="utf-8")
    torch.save({"state_dict": make().state_dict()}, tmp_path / "last.pth.tar")
    message = refusal(ConfigError, lambda: from_pretrained(tmp_path))
    assert "names the model of /gone/away/config.json, which is not there" in message


def test_config_that_is_passed_over_for_a_named_model_is_told(folder, tiny, model, caplog):
    assert_same_state(from_pretrained(folder, model=tiny).state_dict(), model.state_dict())
    assert "config.json is not read" in caplog.text


def test_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "merge_and_unload" in refusal(CheckpointError, lambda: from_pretrained(folder))


def test_folder_of_many_checkpoints_asks_which(tiny, tmp_path):
    for epoch in range(3):
        torch.save({}, tmp_path / f"checkpoint-{epoch}.pth")
    message = refusal(CheckpointError, lambda: from_pretrained(tmp_path, model=tiny))
    assert "checkpoint-0.pth, checkpoint-1.pth, checkpoint-2.pth); pass the path of one" in message


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
def test_shards_of_a_repository_are_fetched(hub, model, tmp_path, name):
    state = model.state_dict()
    names = sorted(state)
    files = {}
    weight_map = {}
    ending = name.partition(".")[2]
    for shard, part in ((f"one.{ending}", names[:5]), (f"two.{ending}", names[5:])):
        (torch.save if ending == "bin" else save_file)({key: state[key] for key in part}, tmp_path / shard)
        files[shard] = tmp_path / shard
        weight_map |= dict.fromkeys(part, shard)
    files[f"{name}.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    hub.commit(REPO, files, delete=(WEIGHTS,))
    assert_same_state(from_pretrained(REPO).state_dict(), state)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_may_be_a_name(folder, name):
    expected = getattr(torch, name)
    assert from_pretrained(folder, dtype=name).cls_token.dtype == expected


@pytest.mark.parametrize("dtype", ["int8", "fp8", "float8_e4m3fn", torch.int64, "nn", ""])
def test_other_dtypes_are_refused(folder, dtype):
    assert "expected float32" in refusal(ConfigError, lambda: from_pretrained(folder, dtype=dtype))


@pytest.mark.parametrize(
    ("value", "stored", "dtype"),
    [
        (7e4, "float32", "float16"),
        (-1e39, "float64", None),
        (1e39, "float64", "bfloat16"),
        (3e38, "bfloat16", "float16"),
    ],
)
def test_weights_beyond_the_wanted_type_are_refused(tiny, model, tmp_path, value, stored, dtype):
    state = {**model.state_dict(), "head.bias": torch.full((10,), value, dtype=getattr(torch, stored))}
    save_file(state, tmp_path / WEIGHTS)
    message = refusal(CheckpointError, lambda: from_pretrained(tmp_path, model=tiny, dtype=dtype))
    assert "beyond the range" in message
    assert "head.bias" in message
    assert from_pretrained(tmp_path, model=tiny, dtype="float64").head.bias[0] == state["head.bias"][0].double()


def test_float16_file_loads_as_float32_unless_asked(model, tmp_path):
    half = make().half()
    half.save_pretrained(tmp_path / "half")
    assert load_file(tmp_path / "half" / WEIGHTS)["cls_token"].dtype == torch.float16
    loaded = from_pretrained(tmp_path / "half")
    assert_same_state(loaded.state_dict(), {name: t.half().float() for name, t in model.state_dict().items()})
    assert from_pretrained(tmp_path / "half", dtype=torch.float16).cls_token.dtype == torch.float16
    assert from_pretrained(tmp_path / "half", dtype=torch.bfloat16, device="cpu").cls_token.dtype == torch.bfloat16


# Other classes, other sizes


@pytest.mark.parametrize("name", ["deit_micro_patch4_32", "deit_micro_distilled_patch4_32"])
def test_other_classes_make_new_heads_and_change_nothing_else(name, tmp_path):
    model = make(name)
    model.origin = replace(model.origin, class_names=tuple("abcdefghij"))
    model.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).origin.class_names == tuple("abcdefghij")
    loaded = from_pretrained(tmp_path, num_classes=3)
    assert loaded.num_classes == 3
    assert loaded.origin.class_names is None
    heads = {key for key in model.state_dict() if key.startswith("head")}
    rest = {key: tensor for key, tensor in model.state_dict().items() if key not in heads}
    assert_same_state({key: tensor for key, tensor in loaded.state_dict().items() if key not in heads}, rest)
    for key in heads:
        fresh = loaded.state_dict()[key]
        assert fresh.shape[0] == 3
        assert fresh.std() > 0 if key.endswith("weight") else not fresh.any()
    assert answer(loaded).isfinite().all()


def test_same_number_of_classes_keeps_the_heads(folder, model):
    assert_same_answer(model, from_pretrained(folder, num_classes=10))


@pytest.mark.parametrize("img_size", [48, (32, 64)])
def test_other_size_interpolates_positions_and_changes_nothing_else(folder, model, img_size):
    loaded = from_pretrained(folder, img_size=img_size)
    grid = loaded.config.grid
    assert grid == ((12, 12) if img_size == 48 else (8, 16))
    ours, before = loaded.state_dict(), model.state_dict()
    assert ours["pos_embed"].shape == (1, 2 + grid[0] * grid[1], 16)
    assert torch.equal(ours["pos_embed"][:, :2], before["pos_embed"][:, :2])
    patches = before["pos_embed"][:, 2:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(patches, size=grid, mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(ours.pop("pos_embed")[:, 2:], expected)
    before.pop("pos_embed")
    assert_same_state(ours, before)
    assert loaded.origin.preprocessing.crop == loaded.config.image_hw
    assert answer(loaded).isfinite().all()


@pytest.mark.parametrize("change", [{"img_size": 30}, {"num_classes": -1}, {"in_chans": 0}, {"img_size": (32,)}])
def test_impossible_change_is_refused(folder, change):
    refusal(ConfigError, lambda: from_pretrained(folder, **change))


# The file stays what it was


def test_loaded_model_trains_without_touching_the_file(folder):
    whole = (folder / WEIGHTS).read_bytes()
    loaded = from_pretrained(folder).train()
    before = loaded.pos_embed.detach().clone()
    optimiser = torch.optim.SGD(loaded.parameters(), lr=0.1)
    cls, dist = loaded(torch.randn(2, 3, 32, 32))
    (cls + dist).square().sum().backward()
    optimiser.step()
    assert not torch.equal(loaded.pos_embed, before)
    assert all(not torch.isnan(parameter).any() for parameter in loaded.parameters())
    assert (folder / WEIGHTS).read_bytes() == whole
    assert torch.equal(from_pretrained(folder).pos_embed, before)


def test_saving_over_the_folder_it_was_loaded_from_is_safe(folder, model):
    loaded, other = from_pretrained(folder), from_pretrained(folder)
    with torch.no_grad():
        loaded.head.weight.add_(1)
    expected = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(folder)
    assert_same_state(loaded.state_dict(), expected)
    assert_same_state(other.state_dict(), model.state_dict())
    assert_same_state(from_pretrained(folder).state_dict(), expected)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", WEIGHTS]


def test_no_random_weights_are_made_on_the_way(folder):
    before = torch.get_rng_state()
    assert calls_of(torch.nn.Module.to_empty, lambda: from_pretrained(folder)) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_package_offers_it_at_the_top():
    assert deit_models.from_pretrained is load.from_pretrained


# Other heads, tokens and channels than the file has


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bare_backbone_gets_a_new_head_or_gives_features(bare, layout, distilled, caplog):
    model, path = bare(layout, distilled=distilled)
    whole = {name: t for name, t in load_file(path).items() if "classifier" not in name and not name.startswith("head")}
    save_file(whole, path)
    assert "num_classes=0" in refusal(CheckpointError, lambda: from_pretrained(path, model="tiny"))
    caplog.clear()
    loaded = from_pretrained(path, model="tiny", num_classes=4)
    assert answer(loaded).shape == (1, 4)
    assert [record.message for record in caplog.records] == [
        f"{path}: no classification head in the file: new heads with 4 classes"
    ]
    features = from_pretrained(path, model="tiny", num_classes=0)
    x = torch.rand(2, 3, *model.config.image_hw)
    for found in (features(x), features.embed(x)):
        torch.testing.assert_close(found, model.embed(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["deit_micro_patch4_32", "deit_micro_distilled_patch4_32"])
def test_saved_backbone_is_a_backbone(tmp_path, layout, name):
    model = make(name)
    model.save_pretrained(tmp_path / "whole")
    from_pretrained(tmp_path / "whole", num_classes=0).save_pretrained(tmp_path / "body", layout=layout)
    loaded = from_pretrained(tmp_path / "body")
    assert (loaded.num_classes, loaded.config.distilled) == (0, model.config.distilled)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model.embed(x))
    assert from_pretrained(tmp_path / "body", num_classes=3)(x).shape == (2, 3)
    classify = deit_models.Classifier(tmp_path / "body")
    assert classify.embed(torch.zeros(1, 32, 32, 3, dtype=torch.uint8).numpy()).shape == (1, model.num_features)
    image = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    assert "num_classes=0" in refusal(ConfigError, lambda: classify(image))


def test_folder_that_lost_the_head_it_promises_is_refused_unless_a_new_one_is_asked_for(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if not name.startswith("head")}, folder / WEIGHTS)
    assert "missing" in refusal(CheckpointError, lambda: from_pretrained(folder))
    assert from_pretrained(folder, num_classes=10).num_classes == 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_distilled_weights_become_the_plain_model_that_is_asked_for(bare, layout, own_registry, caplog):
    assert own_registry is None
    model, path = bare(layout)
    register_model("plain", DeiT, registry.model_spec("deit_micro_patch4_32").config, **SHAPE)
    loaded = from_pretrained(path, model="plain")
    assert "left out" in caplog.text
    state = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        if name == "pos_embed":
            assert torch.equal(tensor, torch.cat([state[name][:, :1], state[name][:, 2:]], dim=1))
        else:
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_weights_become_the_distilled_model_that_is_asked_for(bare, layout, caplog):
    model, path = bare(layout, distilled=False)
    register_model("pair", DeiT, registry.model_spec("deit_micro_distilled_patch4_32").config, **SHAPE)
    loaded = from_pretrained(path, model="pair", num_classes=10)
    assert "dist_token" in caplog.text
    heads = loaded.forward_heads(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(heads.cls, heads.dist)
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_error_names_the_model_that_the_tensors_are_of(tmp_path):
    other = deit_models.create_model("deit_micro_distilled_patch4_32")
    torch.save(other.state_dict(), tmp_path / "other.pth")
    for name in ("deit_tiny_patch4_32", "deit3_small_patch16_224"):
        message = refusal(CheckpointError, lambda: from_pretrained(tmp_path / "other.pth", model=name))  # noqa: B023
        assert "model='deit_micro_distilled_patch4_32'" in message


@pytest.mark.parametrize("name", ["deit_micro_patch4_32", "levit_micro_cifar10", "t2t_vit_micro_cifar10"])
def test_bare_file_of_another_shape_loads_with_its_size(tmp_path, name):
    step = 4 if name.startswith("deit") else 16
    model = deit_models.create_model(name, img_size=(step * 4, step * 8)).eval()
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    assert "img_size=" in refusal(CheckpointError, lambda: from_pretrained(tmp_path / "wide.pth", model=name))
    loaded = from_pretrained(tmp_path / "wide.pth", model=name, img_size=(step * 4, step * 8))
    assert_same_state(loaded.state_dict(), model.state_dict())


CHANNEL_MODELS = ("deit_micro_patch4_32", "levit_micro_cifar10", "t2t_vit_micro_cifar10", "vit_resnas_tiny")


@pytest.mark.parametrize("name", CHANNEL_MODELS)
def test_one_channel_answers_as_three_equal_ones(tmp_path, name):
    model = deit_models.create_model(name).eval()
    model.save_pretrained(tmp_path)
    height, width = model.config.image_hw
    grey = torch.rand(1, 1, height, width)
    one, five = from_pretrained(tmp_path, in_chans=1), from_pretrained(tmp_path, in_chans=5)
    torch.testing.assert_close(one(grey), model(grey.expand(-1, 3, -1, -1)), atol=1e-3, rtol=0)
    torch.testing.assert_close(five(grey.expand(-1, 5, -1, -1)).shape, one(grey).shape)
    assert len(one.origin.preprocessing.mean) in (1, 3)
    torch.save(one.state_dict(), tmp_path / "one.pth")
    assert from_pretrained(tmp_path / "one.pth", model=name).config.in_chans == 1


def test_three_channels_are_repeated_and_scaled(folder, model):
    two, four = (from_pretrained(folder, in_chans=count).patch_embed.proj.weight for count in (2, 4))
    weight = model.patch_embed.proj.weight
    torch.testing.assert_close(two, weight[:, :2] * 1.5)
    torch.testing.assert_close(four, torch.cat([weight, weight[:, :1]], dim=1) * 0.75)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.int8}, {"dtype": "float17"}, {"dtype": 3}, {"device": "nope"}, {"device": "cuda:99"}]
)
def test_device_and_dtype_that_do_not_exist_are_refused_by_name(tmp_path, options):
    assert next(iter(options)) in refusal(ConfigError, lambda: from_pretrained(tmp_path, **options))
    assert next(iter(options)) in refusal(ConfigError, lambda: create_model("deit_micro_patch4_32", **options))


@pytest.mark.parametrize("name", ["a" * 5000, "/tmp/" + "b" * 300])
def test_absurd_names_are_one_line(name):
    refusal(UnknownModelError, lambda: from_pretrained(name, local_files_only=True))


def test_empty_name_is_no_model_although_its_path_is_the_current_folder(tmp_path, monkeypatch, model):
    model.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert from_pretrained(".").config == model.config
    assert "unknown model ''" in refusal(UnknownModelError, lambda: from_pretrained(""))


def test_model_beside_another_models_name_is_refused():
    reason = (
        "model='deit_tiny_patch4_32' is for a weights file or repository; deit_micro_distilled_patch4_32 is a model"
    )
    assert reason in refusal(
        ConfigError, lambda: from_pretrained("deit_micro_distilled_patch4_32", model="deit_tiny_patch4_32")
    )
