"""Environment variables and the folders they move: the only reader of `os.environ`.

Knows names of variables and nothing of what they configure.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from chatserve.errors import UsageError

MAX_KEY_FILE_LEN = 1_000_000
_PORTS = {"http": 80, "https": 443}
_SECRETS = re.compile("^CHATSERVE_|KEY|TOKEN|SECRET|PASSW|CREDENTIAL")


def variables() -> Mapping[str, str]:
    """This process's environment, for settings that have a variable of their own."""
    return os.environ


def home() -> Path:
    """The cache folder: `CHATSERVE_HOME`, else the platform's user cache folder."""
    if value := os.environ.get("CHATSERVE_HOME"):
        return Path(value).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "chatserve"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "chatserve"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "chatserve"


def data() -> Path:
    """What nobody could make again, chats for one: `CHATSERVE_HOME`, else the platform's folder
    for users' data; caches may be emptied by anyone at any time."""
    if os.environ.get("CHATSERVE_HOME") or sys.platform == "win32":
        return home()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "chatserve"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "chatserve"


def runtime_folder() -> Path:
    """Where sockets may lie: the session's own folder where the system has one."""
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    return folder if folder.is_dir() else Path(tempfile.gettempdir())


def settings_file() -> Path | None:
    """The TOML file with settings, when there is one.

    `CHATSERVE_CONFIG` names it; else `config.toml` in `CHATSERVE_HOME` or in the user's folder for
    settings. Raises `UsageError` when the named file is missing.
    """
    if value := os.environ.get("CHATSERVE_CONFIG"):
        if not Path(value).expanduser().is_file():
            raise UsageError(f"CHATSERVE_CONFIG names {value}, which is not a file")
        return Path(value).expanduser()
    if os.environ.get("CHATSERVE_HOME") or sys.platform == "win32":
        folder = home()
    else:
        folder = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "chatserve"
    file = folder / "config.toml"
    return file if file.is_file() else None


def api_keys(api_key_file: str | None) -> tuple[str, ...]:
    """API keys from `--api-key-file` and `CHATSERVE_API_KEYS`; never from the command line.

    Raises `UsageError` when the file cannot be read or changed by everybody, and when one of the
    two is there and holds no key: a server that was meant to have keys must not start without.
    """
    given = os.environ.get("CHATSERVE_API_KEYS", "")
    keys = _keys(given.split(","))
    if given and not keys:
        raise UsageError("CHATSERVE_API_KEYS holds no key; set one, or unset it")
    if not api_key_file:
        return keys
    in_file = _keys(_lines_of(api_key_file))
    if not in_file:
        raise UsageError(f"--api-key-file {api_key_file} holds no key; write one a line into it")
    return (*keys, *in_file)


def is_open_to_others(path: str) -> bool:
    """Whether other users of this machine can read the file `path`."""
    return os.name == "posix" and bool(os.stat(path).st_mode & 0o077)


def _keys(lines: list[str]) -> tuple[str, ...]:
    return tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))


def _lines_of(api_key_file: str) -> list[str]:
    try:
        with open(api_key_file, encoding="utf-8") as file:
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o002:
                raise UsageError(
                    f"--api-key-file {api_key_file} can be changed by every user of this machine; "
                    "run chmod 600 on it"
                )
            return file.read(MAX_KEY_FILE_LEN).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --api-key-file {api_key_file}: {error}") from error


def control_token() -> str | None:
    """The shared secret between controller and workers, from `CHATSERVE_CONTROL_TOKEN`."""
    return os.environ.get("CHATSERVE_CONTROL_TOKEN") or None


def client_api_key(base_url: str) -> str | None:
    """The key that the terminal client sends to the server at `base_url`, which the user named.

    `CHATSERVE_API_KEY`; else `OPENAI_API_KEY`, but only where `OPENAI_BASE_URL` says whose key
    that is: one that was made for somebody else must not go to whoever is named.
    """
    if key := os.environ.get("CHATSERVE_API_KEY"):
        return key
    meant = _origin(os.environ.get("OPENAI_BASE_URL", ""))
    if meant is not None and meant == _origin(base_url):
        return os.environ.get("OPENAI_API_KEY") or None
    return None


def _origin(url: str) -> tuple[str, str, int] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (parts.scheme, parts.hostname, port) if parts.hostname and port else None


def hub_endpoint() -> str | None:
    """`HF_ENDPOINT`, when set: another hub than the public one."""
    return os.environ.get("HF_ENDPOINT") or None


def hub_offline() -> bool:
    """Whether the environment forbids the network (`HF_HUB_OFFLINE`)."""
    return os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")


def show_gpus(names: str) -> None:
    """Let this process see only these of NVIDIA's GPUs; before PyTorch has asked for any."""
    os.environ["CUDA_VISIBLE_DEVICES"] = names


def is_color_wanted() -> bool:
    """False when `NO_COLOR` is set, `CLICOLOR` is 0, or the terminal is dumb."""
    if os.environ.get("NO_COLOR") or os.environ.get("CLICOLOR") == "0":
        return False
    return os.environ.get("TERM") != "dumb"


def terminal_background() -> str | None:
    """`dark` or `light`, where the terminal says so by `COLORFGBG` (`15;0`)."""
    color = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    if not color.isdecimal():
        return None
    # of the sixteen colours: white and all bright ones but dark grey
    return "light" if int(color) == 7 or int(color) > 8 else "dark"


def editor() -> str:
    """The command line of the user's editor: `VISUAL`, else `EDITOR`, else vi."""
    return os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"


def kernels() -> str | None:
    """`CHATSERVE_KERNELS`: an instruction set level of the CPU kernels, or `off`."""
    return os.environ.get("CHATSERVE_KERNELS") or None


def limit_spinning() -> None:
    """Let PyTorch's threads spin only briefly when they wait for each other; before torch loads.

    With its default GNU OpenMP spins for milliseconds: as soon as another program uses a core, each
    of a step's hundred-odd parallel regions may cost a whole time slice (docs/design/005).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def notify_socket() -> str | None:
    """Where systemd wants to hear of this process (`Type=notify`)."""
    return os.environ.get("NOTIFY_SOCKET") or None


def watchdog_s() -> float | None:
    """How long this process may be silent before systemd ends it (`WatchdogSec=`)."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(
        os.getpid()
    ):
        return None
    return int(microseconds) / 1e6 or None


def child_environment(**overrides: str) -> dict[str, str]:
    """This process's environment for a child, with `overrides`; what systemd wants to hear of this
    process, its child need not say."""
    heard = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    return {**{name: os.environ[name] for name in os.environ if name not in heard}, **overrides}


def without_secrets() -> dict[str, str]:
    """Our own variables, and what others call a key or a token, are nothing to a helper process."""
    return {name: value for name, value in os.environ.items() if not _SECRETS.search(name.upper())}


@contextmanager
def overridden(values: Mapping[str, str]) -> Iterator[None]:
    """This process's variables with `values`, as libraries will read them; put back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
