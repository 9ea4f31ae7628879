"""Who may name which weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatserve.errors import CannotLoad, ChatserveError, InvalidRequest, OperatorOnly
from chatserve.protocol.operation import LoadModel
from chatserve.server.repertoire.sources import check_source, name_for


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    default = tmp_path / "home" / "models" / "smollm2-135m"
    default.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(weights: str, *, is_operator: bool, offline: bool = False) -> str:
    return check_source(weights, is_operator=is_operator, revision="main", offline=offline)


def cached(home: Path) -> None:
    from chatserve.default_model import SMOLLM2_135M

    SMOLLM2_135M.path.parent.mkdir(parents=True, exist_ok=True)
    SMOLLM2_135M.path.write_bytes(b"GGUF")


def test_a_key_holder_may_name_what_is_in_the_cache(home: Path) -> None:
    with pytest.raises(OperatorOnly):
        check("smollm2-135m", is_operator=False)
    cached(home)
    assert check("smollm2-135m", is_operator=False) == "smollm2-135m"


@pytest.mark.parametrize(
    "weights", ["/", "here", "./here", "~", "org/name", "vicuna-7b-v1.5", "../x", "a\0b", "here\n"]
)
def test_a_key_holder_may_name_no_path_and_nothing_to_download(home: Path, weights: str) -> None:
    """And learns nothing of what is there: all are told the same."""
    (home / "here").mkdir()
    cached(home)
    with pytest.raises(OperatorOnly, match="is none of the models"):
        check(weights, is_operator=False)


def test_a_file_that_is_called_like_a_cached_model_is_not_meant(home: Path) -> None:
    cached(home)
    (home / "smollm2-135m").mkdir()
    with pytest.raises(OperatorOnly):
        check("smollm2-135m", is_operator=False)


def test_an_operator_may_name_an_absolute_path(home: Path) -> None:
    (home / "here").mkdir()
    assert check(str(home / "here"), is_operator=True) == str(home / "here")


@pytest.mark.parametrize(
    ("weights", "kind", "words"),
    [
        ("/no/where", CannotLoad, "no such folder or file"),
        ("here", InvalidRequest, "no absolute path"),
        ("./here", InvalidRequest, "no absolute path"),
        ("~/here", InvalidRequest, "no absolute path"),
        ("nosuch", CannotLoad, "unknown model"),
        ("org/na\0me", InvalidRequest, "null"),
        ("/\0", InvalidRequest, "null"),
    ],
)
def test_what_an_operator_is_refused(
    home: Path, weights: str, kind: type[ChatserveError], words: str
) -> None:
    (home / "here").mkdir()
    with pytest.raises(kind, match=words):
        check(weights, is_operator=True)


def test_an_operator_may_let_it_download_unless_it_is_offline(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check("org/name", is_operator=True) == "org/name"
    with pytest.raises(CannotLoad, match="offline"):
        check("org/name", is_operator=True, offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CannotLoad, match="offline"):
        check("org/name", is_operator=True)


def test_names() -> None:
    assert name_for(LoadModel(weights="/x/llama.gguf"), "/x/llama.gguf") == "llama"
    assert name_for(LoadModel(weights="/x", name="mine"), "/x") == "mine"
    # a worker takes its names as a list: by "a,b" it would never be found
    assert name_for(LoadModel(weights="/x/a,b"), "/x/a,b") == "a-b"
    for name in ("a\nb", "a,b", " ", "a "):
        with pytest.raises(InvalidRequest, match="printable"):
            name_for(LoadModel(weights="/x", name=name), "/x")
    assert json.loads(LoadModel(model="a").model_dump_json())["wait"] is True
