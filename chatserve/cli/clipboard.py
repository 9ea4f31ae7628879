"""The clipboard: the program of this system that fills it.

Knows programs and the environment that says which screen there is; no terminal, no chat.
"""

from __future__ import annotations

import shutil
import subprocess

from chatserve import environment
from chatserve.errors import UsageError

TIMEOUT_S = 5.0
# program, its arguments, the variable without which it has no screen to talk to
_PROGRAMS = (
    ("pbcopy", (), None),
    ("wl-copy", (), "WAYLAND_DISPLAY"),
    ("xclip", ("-selection", "clipboard"), "DISPLAY"),
    ("xsel", ("--clipboard", "--input"), "DISPLAY"),
)


def copy(text: str) -> str:
    """Put `text` on the clipboard; the program that has done it. Raises `UsageError`."""
    variables = environment.variables()
    failure = ""
    for program, arguments, variable in _PROGRAMS:
        path = shutil.which(program)
        if path is None or (variable is not None and not variables.get(variable)):
            continue
        try:
            # these programs stay behind to serve what they hold: no pipe may wait for their end
            subprocess.run(
                [path, *arguments],
                input=text.encode("utf-8", "replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=TIMEOUT_S,
                check=True,
            )
            return program
        except (OSError, subprocess.SubprocessError) as error:
            failure = f"{program} failed ({_reason(error)})"
    raise UsageError(
        f"{failure or 'there is no pbcopy, wl-copy, xclip or xsel with a screen'}; "
        "`/set clipboard terminal` lets the terminal copy (OSC 52), if it can"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no end within {TIMEOUT_S:g} s"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
