"""A client's own items in an input that begins with those of an earlier response.

What is wrong with the input, and what of it gave way, is told by the places that the client knows.
Knows no store.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.responses import Response

from chatserve.protocol.field_names import errors_renamed
from chatserve.server.truncation import MESSAGES_HEADER, in_ranges, out_of_ranges

_ITEM = re.compile(r"input\[(\d+)\]")


@dataclass(frozen=True)
class OwnItems:
    """Those behind `num_before` others."""

    num_before: int = 0

    def name_of(self, param: str) -> str:
        found = _ITEM.match(param)
        if not found or not self.num_before:
            return param
        place = int(found[1]) - self.num_before
        if place < 0:
            return "previous_response_id"
        return f"input[{place}]{param[found.end() :]}"

    @contextlib.contextmanager
    def in_errors(self) -> Iterator[None]:
        with errors_renamed(self.name_of):
            yield

    def in_headers(self, answer: Response) -> None:
        """Of items that gave way, the client's own; how many tokens all were is told beside it."""
        told = answer.headers.get(MESSAGES_HEADER)
        if told is None or not self.num_before:
            return
        own = [place - self.num_before for place in out_of_ranges(told) if place >= self.num_before]
        if own:
            answer.headers[MESSAGES_HEADER] = in_ranges(own)
        else:
            del answer.headers[MESSAGES_HEADER]

    def in_answer(self, answer: Response) -> Response:
        """The same, where the error has become an answer elsewhere."""
        if not self.num_before or answer.status_code != 400:
            return answer
        error: dict[str, Any] = orjson.loads(bytes(answer.body))["error"]
        param = error["param"]
        if param is None or (name := self.name_of(param)) == param:
            return answer
        error |= {"param": name, "message": error["message"].replace(param, name)}
        headers = {n: v for n, v in answer.headers.items() if n != "content-length"}
        return Response(orjson.dumps({"error": error}), answer.status_code, headers)
