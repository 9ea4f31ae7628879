"""Bodies: JSON, depth, the model that is asked for."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.chat import parse_chat
from chatserve.protocol.fields import model_of, read_object, validate


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff", b'{"model":"\\ud800"}', b"[" * 100_000],
)
def test_bodies_that_are_no_objects(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_chat(body)
    with pytest.raises(InvalidRequest):
        model_of(body)


def test_a_byte_order_mark_is_named() -> None:
    with pytest.raises(InvalidRequest, match="byte order mark"):
        model_of(b'\xef\xbb\xbf{"model":"m"}')


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    n: int = 0
    inner: Strict | None = None


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b'{"n":"1"}', InvalidRequest, "n must be an integer"),
        (b'{"x":1}', UnsupportedParameter, "x is not a known field; leave it out"),
        (b'{"inner":{"x":1}}', UnsupportedParameter, "inner.x is not a known field; leave it out"),
    ],
)
def test_what_pydantic_finds_is_told_in_our_words(
    body: bytes, kind: type[InvalidRequest], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(Strict, read_object(body), {})
    assert type(caught.value) is kind and caught.value.message == message


def nested(depth: int) -> bytes:
    """A body in which the deepest list is at `depth`, the body itself being level 1."""
    return b'{"model":"m","metadata":' + b'{"a":' * (depth - 1) + b"1" + b"}" * (depth - 1) + b"}"


def test_nesting() -> None:
    assert model_of(nested(64)) == "m"
    for depth in (65, 900):
        with pytest.raises(InvalidRequest, match="64 levels"):
            model_of(nested(depth))


def test_model_of() -> None:
    assert model_of(b'{"model":"a","x":[1]}') == "a"
    for body in (b"{}", b'{"model":1}', b'{"model":null}'):
        with pytest.raises(InvalidRequest) as caught:
            model_of(body)
        assert caught.value.param == "model"


def test_of_a_field_that_is_given_twice_the_last_counts() -> None:
    """For whoever dispatches and for whoever answers: the same parser reads for both."""
    body = b'{"model":"a","messages":[{"role":"user","content":"hi"}],"model":"b"}'
    assert model_of(body) == read_object(body)["model"] == parse_chat(body).model == "b"
