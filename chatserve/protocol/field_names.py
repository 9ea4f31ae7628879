"""What the fields of a chat are called in the API that a translated request came by."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from chatserve.errors import InvalidRequest

_MESSAGE = re.compile(r"messages\[(\d+)\]")


@dataclass(frozen=True)
class FieldNames:
    """`messages`: where each message of the chat came from. `patterns`: further names, each a
    regular expression for the beginning of a chat's and what stands there instead."""

    messages: Sequence[str] = ()
    patterns: Mapping[str, str] = field(default_factory=dict)

    def of(self, param: str) -> str:
        message = _MESSAGE.match(param)
        if message and int(message[1]) < len(self.messages):
            return self.messages[int(message[1])] + param[message.end() :]
        for pattern, name in self.patterns.items():
            renamed, count = re.subn(rf"^{pattern}(?![\w-])", name, param, count=1)
            if count:
                return renamed
        return param

    @contextlib.contextmanager
    def in_errors(self) -> Iterator[None]:
        """What is refused inside is refused by the name that the client used."""
        try:
            yield
        except InvalidRequest as error:
            if error.param is not None:
                name = self.of(error.param)
                error.message = error.message.replace(error.param, name)
                error.args = (error.message,)
                error.param = name
            raise
