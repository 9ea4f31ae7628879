"""OperatedServer: a running server as its operator sees it; found by its private file, or named.

Knows the HTTP client and what servers announce; no terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chatserve import environment
from chatserve.cli.address import is_loopback
from chatserve.cli.client import ChatClient
from chatserve.errors import BadStream, UsageError
from chatserve.protocol.operation import LOAD_MODEL_PATH, MODELS_PATH, UNLOAD_MODEL_PATH
from chatserve.running_servers import RunningServer, running_servers
from chatserve.settings import setting


@dataclass(frozen=True)
class OperatorOptions:
    """Which server; its settings are the same for all commands of an operator."""

    base_url: str | None = setting(
        None, "URL of the server; default: the one of yours that runs on this machine",
        metavar="URL",
    )  # fmt: skip
    ssl_ca_certs: str | None = setting(
        None, "with --base-url https://...: believe certificates of these authorities, in PEM form",
        metavar="FILE",
    )  # fmt: skip


class OperatedServer:
    """To be closed. All but `close` raise `ChatserveError`."""

    def __init__(self, client: ChatClient, *, is_here: bool) -> None:
        """`is_here`: on this machine, so that paths mean the same to both."""
        self.client = client
        self.is_here = is_here

    @property
    def url(self) -> str:
        return self.client.base_url.removesuffix("/v1")

    def models(self) -> list[dict[str, Any]]:
        """The rows of `/admin/models`."""
        table = self.client.get(MODELS_PATH, below_v1=False)
        rows = table.get("models") if isinstance(table, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise BadStream(f"{self.url} does not tell of its models; is it chatserve?")
        return rows

    def load(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Wait until a model is loaded."""
        return self._row(self.client.post(LOAD_MODEL_PATH, fields, below_v1=False))

    def unload(self, model: str) -> dict[str, Any]:
        """Wait until its memory is back."""
        return self._row(self.client.post(UNLOAD_MODEL_PATH, {"model": model}, below_v1=False))

    def close(self) -> None:
        self.client.close()

    def _row(self, row: Any) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise BadStream(f"{self.url} does not tell of its models; is it chatserve?")
        return row


def find_servers(options: OperatorOptions) -> list[OperatedServer]:
    """The one that is named, else all of this user that run here, the youngest first.

    Raises `UsageError` where there is none.
    """
    here = running_servers()
    if options.base_url is not None:
        wanted = options.base_url.rstrip("/").removesuffix("/v1")
        same = next((each for each in here if each.url == wanted), None)
        secret = same.control_token if same is not None else _secret_for(options.base_url)
        client = ChatClient(options.base_url, secret, ca_certs=options.ssl_ca_certs)
        return [OperatedServer(client, is_here=same is not None)]
    if not here:
        raise UsageError(
            "no server of yours runs on this machine; start one by `chatserve serve`, or name one "
            "by --base-url, with its key in CHATSERVE_API_KEY"
        )
    return [_connected(each) for each in here]


def find_server(options: OperatorOptions, model: str | None = None) -> OperatedServer:
    """The only one; of several, the only one that has `model`. Raises `UsageError`."""
    servers = find_servers(options)
    if len(servers) > 1 and model is not None:
        having = [each for each in servers if any(row["name"] == model for row in each.models())]
        servers = having if len(having) == 1 else servers
    if len(servers) > 1:
        raise UsageError(
            f"several servers of yours run here: {_urls(servers)}; choose one by --base-url"
        )
    return servers[0]


def _secret_for(base_url: str) -> str | None:
    """A key says whose it is; the control token is this machine's, and never leaves it."""
    key = environment.client_api_key(base_url)
    return key or (environment.control_token() if is_loopback(base_url) else None)


def _connected(server: RunningServer) -> OperatedServer:
    return OperatedServer(ChatClient(server.url, server.control_token), is_here=True)


def _urls(servers: Sequence[OperatedServer]) -> str:
    return ", ".join(each.url for each in servers)
