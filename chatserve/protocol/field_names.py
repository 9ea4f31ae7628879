"""What the fields of a chat are called in the API that a translated request came by."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from chatserve.errors import InvalidRequest

_MESSAGE = re.compile(r"messages\[(\d+)\]")
_CALL = re.compile(r"messages\[\d+\]\.tool_calls\[\d+\]")


@contextlib.contextmanager
def errors_renamed(name_of: Callable[[str], str]) -> Iterator[None]:
    """What is refused inside is refused by another name."""
    try:
        yield
    except InvalidRequest as error:
        if error.param is not None:
            name = name_of(error.param)
            error.message = error.message.replace(error.param, name)
            error.args = (error.message,)
            error.param = name
        raise


@dataclass(frozen=True)
class FieldNames:
    """`messages`: where each message of the chat came from. `patterns`: further names, each a
    regular expression for the beginning of a chat's and what stands there instead. `calls`: where
    calls of the chat came from, each an item with the fields of its function."""

    messages: Sequence[str] = ()
    patterns: Mapping[str, str] = field(default_factory=dict)
    calls: Mapping[str, str] = field(default_factory=dict)

    def of(self, param: str) -> str:
        call = _CALL.match(param)
        if call and call[0] in self.calls:
            within = param[call.end() :]
            within = ".call_id" if within == ".id" else within.removeprefix(".function")
            return self.calls[call[0]] + within
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
        with errors_renamed(self.of):
            yield
