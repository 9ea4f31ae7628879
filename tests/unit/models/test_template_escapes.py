"""Ways out of a template's sandbox, from each place that a model's template may come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jinja2
import pytest

from chatserve.engine.prompt import Message
from chatserve.errors import InvalidRequest
from chatserve.models.chat_template import load_template_sources
from chatserve.models.gguf_file import GGUFFile
from chatserve.models.special_tokens import AddedToken, SpecialTokens
from chatserve.models.templates import jinja_sandbox
from chatserve.models.templates.jinja import JinjaTemplate
from tests.hostile_templates import CALLS, ESCAPES, FAILURES, MARKER, READS

USER = [Message("user", "hi")]
REFUSED = "chat template cannot render this chat"


def render(source: str) -> str:
    """As it is served: with the names and helpers that templates get."""
    markers = SpecialTokens((AddedToken("<|end|>", 1, True),))
    template = JinjaTemplate("own", source, markers, {"bos_token": "<s>"})
    return "".join(template.render(USER))


def in_config(folder: Path, source: str) -> Mapping[str, str]:
    text = json.dumps({"chat_template": source})
    (folder / "tokenizer_config.json").write_text(text, "utf-8")
    return load_template_sources(folder)


def in_named_list(folder: Path, source: str) -> Mapping[str, str]:
    named = [{"name": "default", "template": source}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}), "utf-8")
    return load_template_sources(folder)


def in_file(folder: Path, source: str) -> Mapping[str, str]:
    (folder / "chat_template.jinja").write_text(source, "utf-8", newline="")
    return load_template_sources(folder)


def in_gguf(folder: Path, source: str) -> Mapping[str, str]:
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_chat_template(source)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile.open(path)
    file.close()
    return load_template_sources(path, file.metadata)


@pytest.mark.parametrize("place", [in_config, in_named_list, in_file, in_gguf])
def test_no_template_gets_out(place: Callable[..., Mapping[str, str]], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for number, source in enumerate((*CALLS, *READS, *FAILURES)):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = source.replace(MARKER, str(marker))
        read = place(folder, source)["default"]
        assert read == source
        with pytest.raises(InvalidRequest, match=REFUSED):
            render(read)
    assert not marker.exists()


@pytest.mark.parametrize("source", ESCAPES)
def test_each_is_refused_as_the_requests_fault(source: str) -> None:
    with pytest.raises(InvalidRequest, match=REFUSED) as caught:
        render(source)
    assert len(caught.value.message) < 500 and "\n" not in caught.value.message


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_outside_a_sandbox_each_runs_a_command(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teeth: with jinja2's plain environment in its place the marker is there."""
    import subprocess  # noqa: F401, one of them looks for it among the loaded modules

    marker = tmp_path / "marker"
    monkeypatch.setattr(jinja_sandbox, "_environment", plain_environment)
    render(CALLS[number].replace(MARKER, str(marker)))
    assert marker.exists()


def test_outside_a_sandbox_globals_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_sandbox, "_environment", plain_environment)
    for source in READS:
        text = render(source.replace(".x.y", ""))
        assert "'jinja2.utils'" in text or "<class 'str'>" in text


def plain_environment() -> Any:
    environment = jinja2.Environment()
    environment.globals |= {
        "raise_exception": jinja_sandbox._raise_exception,
        "strftime_now": jinja_sandbox._strftime_now,
    }
    return environment
