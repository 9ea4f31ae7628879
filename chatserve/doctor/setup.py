"""What a server would start with: port, keys, token, cache and hub. Imports no torch.

No key, token or password is ever part of a finding.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

from chatserve import cache, environment, hub
from chatserve.config import ServeConfig
from chatserve.doctor.finding import Finding, refused
from chatserve.errors import CannotBind, UsageError
from chatserve.server import control_token
from chatserve.server.edge import check_exposure
from chatserve.server.listener import bind

_LITTLE_BYTES = 2_000_000_000  # of disk; a small model in half precision
_HUB_S = 5.0


def check_setup(config: ServeConfig, *, is_online: bool) -> list[Finding]:
    """All of this module's findings, for a server with these settings."""
    return [
        check_port(config.host, config.port),
        check_keys(config),
        check_control_token(),
        check_cache(),
        check_hub(is_online=is_online),
    ]


def check_port(host: str, port: int) -> Finding:
    """Whether `chatserve serve` can listen where its settings say."""
    facts = {"host": host, "port": port}
    try:
        bind(host, port).close()
    except CannotBind as error:
        finding = refused("port", "warn", error)
        if "in use" not in finding.text:
            return Finding("port", "fail", finding.text, finding.way_out, facts)
        join = f"is it a chatserve? chatserve chat --base-url http://{host}:{port}/v1 joins it"
        return Finding("port", "warn", finding.text, f"{finding.way_out}; {join}", facts)
    return Finding("port", "ok", f"{host}:{port} is free", facts=facts)


def check_keys(config: ServeConfig) -> Finding:
    """How many API keys there are, and whether the address asks for one."""
    try:
        num_keys = len(environment.api_keys(config.api_key_file))
        check_exposure(
            config.host, has_key=num_keys > 0, insecure_no_auth=config.insecure_no_auth
        )  # fmt: skip
    except UsageError as error:
        return refused("keys", "fail", error)
    facts = {"num_keys": num_keys, "host": config.host}
    file = config.api_key_file
    if file and os.name == "posix" and Path(file).stat().st_mode & 0o077:
        way_out = f"run chmod 600 on {file}"
        return Finding("keys", "warn", "others can read the API key file", way_out, facts)
    if num_keys:
        return Finding("keys", "ok", f"API keys configured: {num_keys} (not shown)", facts=facts)
    text = f"no API keys: whoever reaches {config.host} may chat; CHATSERVE_API_KEYS sets some"
    return Finding("keys", "ok", text, facts=facts)


def check_control_token() -> Finding:
    """Whether controller and workers can share their secret; makes none."""
    name = "control token"
    if environment.control_token():
        text = "from CHATSERVE_CONTROL_TOKEN (not shown)"
        return Finding(name, "ok", text, facts={"source": "environment"})
    path = environment.home() / control_token.FILE_NAME
    if not path.exists():
        text = f"none yet: the first server makes {path}"
        return Finding(name, "ok", text, facts={"source": None})
    facts = {"source": str(path), "mode": oct(path.stat().st_mode & 0o777)}
    try:
        control_token.shared_token()
    except UsageError as error:
        found = refused(name, "fail", error)
        return Finding(name, "fail", found.text, found.way_out, facts)
    return Finding(name, "ok", f"{path}, mode {facts['mode'].removeprefix('0o')}", facts=facts)


def check_cache() -> Finding:
    """Where models lie, how many bytes, half downloads among them, and the room beside them."""
    folder = cache.models_folder()
    models = hub.cached_models()
    num_bytes = sum(model.num_bytes for model in models)
    partial = [path for path in folder.glob(".*-*") if _is_half(path)]
    existing = _nearest_existing(folder)
    free = shutil.disk_usage(existing).free
    facts = {
        "folder": str(folder), "num_models": len(models), "num_bytes": num_bytes,
        "num_partial": len(partial), "free_bytes": free,
    }  # fmt: skip
    text = f"{folder}: models {len(models)}, {num_bytes / 1e6:,.1f} MB; {free / 1e9:,.1f} GB free"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        way_out = f"make {existing} a folder that you can write to, or set CHATSERVE_HOME"
        return Finding("cache", "fail", f"{text}; cannot be written to", way_out, facts)
    if free < _LITTLE_BYTES:
        way_out = "free some space, or set CHATSERVE_HOME to a folder on another disk"
        return Finding("cache", "warn", text, way_out, facts)
    if partial:
        names = ", ".join(sorted(path.name.partition("-")[2] for path in partial))
        way_out = "`chatserve pull` goes on where it stopped"
        return Finding("cache", "warn", f"{text}; half downloaded: {names}", way_out, facts)
    return Finding("cache", "ok", text, facts=facts)


def _is_half(path: Path) -> bool:
    """A download, or the making of a model of several, that was interrupted."""
    return path.name.startswith((".partial-", ".chain-")) and path.is_dir()


def check_hub(*, is_online: bool) -> Finding:
    """Whether models can be fetched; asks the hub only where `is_online`."""
    endpoint = environment.hub_endpoint()
    is_forbidden = environment.hub_offline()
    facts: dict[str, object] = {"offline": is_forbidden}
    named = ""
    if endpoint is not None:
        shown = _without_password(endpoint)
        if shown is None:
            way_out = "set it to an http or https URL, or unset it"
            return Finding("hub", "fail", "HF_ENDPOINT is no URL of a hub", way_out, facts)
        facts["endpoint"] = shown
        named = f", HF_ENDPOINT is {shown}"
    if is_forbidden:
        text = f"the network is off (HF_HUB_OFFLINE){named}; models in the cache work"
        return Finding("hub", "ok", text, facts=facts)
    if not is_online:
        return Finding("hub", "ok", f"not asked (--online does){named}", facts=facts)
    return _ask(endpoint, named, facts)


def _ask(endpoint: str | None, named: str, facts: dict[str, object]) -> Finding:
    import httpx
    from huggingface_hub import constants

    endpoint = endpoint or constants.ENDPOINT
    start = time.perf_counter()
    try:
        url = f"{endpoint.rstrip('/')}/api/models/{hub.ALIASES['smollm2-360m']}"
        response = httpx.get(url, timeout=_HUB_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        way_out = "check the network and the proxy; --offline and models in the cache work"
        text = f"cannot be reached{named}: {str(error) or type(error).__name__}"
        return Finding("hub", "warn", text, way_out, facts)
    elapsed_ms = 1000 * (time.perf_counter() - start)
    facts |= {"status": response.status_code, "elapsed_ms": round(elapsed_ms)}
    if response.is_success:
        text = f"answers in {elapsed_ms:.0f} ms{named}"
        return Finding("hub", "ok", text, facts=facts)
    text = f"answers with status {response.status_code}{named}"
    return Finding("hub", "warn", text, "try again later, or check HF_ENDPOINT", facts)


def _without_password(url: str) -> str | None:
    """An http or https URL as it may be shown; None for anything else."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return None
    except ValueError:
        return None
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _nearest_existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
