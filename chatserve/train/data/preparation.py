"""From a source to the tables of the recipe's steps: read into buckets, then a shard of each.

Memory holds a buffer and, in each process, one bucket. Whatever moment this is killed in, the same
call goes on and makes the same bytes.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from chatserve.errors import StartupError, UsageError
from chatserve.progress import Progress
from chatserve.train.data.buckets import Buckets, bucket_path, num_buckets
from chatserve.train.data.records import BadSource, Record, encode
from chatserve.train.data.shard import ShardJob, make_shard
from chatserve.train.data.source import Place, Source
from chatserve.train.data.splits import SPLITS, place_of
from chatserve.train.data.work_folder import (
    ATTRIBUTION,
    MANIFEST,
    ReadingState,
    WorkFolder,
    disk_faults,
)
from chatserve.train.data.workers import WorkerDied, done_by_workers

VERSION = 1
MAX_BAD = 1000
_SHOWN_BAD = 20
_LICENSE = "license "
_MODULUS = 1 << 256
Bar = Callable[[str], AbstractContextManager[Progress]]


class PreparationFailed(StartupError):
    """A process that took part is gone, or what was kept on disk is damaged."""

    exit_code = 1


@dataclass(frozen=True)
class Settings:
    """What decides the bytes that are written, beside the source.

    `pairs`: at most so many of one question; `shares`: parts for the splits, in their order;
    `text`: "html" or "markdown", the form of the source's texts.
    """

    pairs: int
    shares: tuple[int, ...]
    seed: int
    text: str


def prepare(
    source: Source,
    out: Path,
    settings: Settings,
    *,
    skip_bad: bool,
    num_workers: int,
    bar: Bar,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Write the tables, attribution and manifest into `out`; the manifest is returned.

    Raises `BadSource`, `UsageError` for a folder that holds something else, `CannotWrite` and
    `PreparationFailed`.
    """
    folder = WorkFolder(out)
    table = _settings_table(source, settings)
    if (manifest := folder.manifest()) is not None:
        _check_same(out, source, table, manifest)
        folder.remove()
        tell(f"{out} holds these data already")
        return manifest
    with folder.alone():
        state = _opened(folder, source, table, tell)
        if not state.is_read:
            _read(source, folder, state, settings.seed, skip_bad=skip_bad, bar=bar)
        if state.num_bad and not skip_bad:
            raise _bad_rows(source, state)
        if not state.num_records:
            raise BadSource(f"{_name(source)} holds no question and no answer; check the path")
        _make_shards(folder, state, settings, num_workers, bar)
        manifest = _manifest(folder, state)
        with disk_faults(out):
            folder.finish(manifest, len(state.lengths))
    return manifest


def _settings_table(source: Source, settings: Settings) -> dict[str, Any]:
    table = dataclasses.asdict(settings) | {"license": source.license, "site": source.site}
    return {**table, "shares": list(settings.shares)}


def _source_table(source: Source) -> list[dict[str, Any]]:
    return [{"file": file.path.name, "bytes": file.num_bytes} for file in source.files]


def _check_same(
    out: Path, source: Source, table: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    """Raises `UsageError`: what is whole is never written over."""
    known = manifest.get("settings", {})
    differences = _differences(known, table)
    finished_ns = (out / MANIFEST).stat().st_mtime_ns
    if manifest.get("source", {}).get("files") != _source_table(source):
        differences.append("the source has other files")
    elif any(file.changed_ns >= finished_ns for file in source.files):
        differences.append("the source has changed since")
    if differences:
        raise UsageError(
            f"{out} holds other data: {', '.join(differences)}; name another folder with --out"
        )


def _opened(
    folder: WorkFolder, source: Source, table: dict[str, Any], tell: Callable[[str], None]
) -> ReadingState:
    """What was begun, or a beginning. Raises `UsageError` for other settings."""
    files = [
        {**row, "changed_ns": file.changed_ns}
        for row, file in zip(_source_table(source), source.files, strict=True)
    ]
    state = folder.load()
    if state is not None and (differences := _differences(state.settings, table)):
        raise UsageError(
            f"{folder.out} was begun with other settings: {', '.join(differences)}; run it with "
            "the old ones, or name another folder with --out"
        )
    if state is not None and state.source != files:
        tell("the source has changed since this was begun: reading it from its beginning")
        state = None
    if state is not None and not Buckets(folder.buckets, len(state.lengths), state.lengths).cut():
        tell("what was kept is not whole: reading the source from its beginning")
        state = None
    if state is None:
        with disk_faults(folder.out):
            folder.clear()
        state = ReadingState(table, files, [0] * num_buckets(source.num_bytes))
    return state


def _differences(known: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {known.get(name)} and is {given.get(name)}"
        for name in sorted(known.keys() | given.keys())
        if known.get(name) != given.get(name)
    ]


def _read(
    source: Source, folder: WorkFolder, state: ReadingState, seed: int, *, skip_bad: bool, bar: Bar
) -> None:
    """Put the rest of the source into buckets; `state` says at any time what is on disk."""
    buckets = Buckets(folder.buckets, len(state.lengths), state.lengths)
    buckets.cut()
    digest, place = int(state.digest, 16), Place(*state.place)

    def keep() -> None:
        with disk_faults(folder.out):
            buckets.flush()
            state.lengths, state.digest = buckets.lengths, f"{digest:x}"
            state.place = dataclasses.astuple(place)
            folder.save(state)

    with bar(f"reading {_name(source)}") as progress:
        for place, at, row in source.rows(Place(*state.place)):
            if row.fault is not None:
                state.num_bad += 1
                if len(state.bad) < _SHOWN_BAD:
                    state.bad.append(
                        f"{source.files[place.file].path.name}, {row.where}: {row.fault}"
                    )
                if state.num_bad == MAX_BAD and not skip_bad:
                    keep()
                    raise _bad_rows(source, state)
            for record in row.records:
                state.num_records += 1
                digest = (digest + _hash(record)) % _MODULUS
                buckets.add(record, place_of(record.question_id, seed)[0])
            if buckets.is_full:
                keep()
            progress(at, source.num_bytes)
        state.is_read = True
        keep()
        progress(source.num_bytes, source.num_bytes)


def _hash(record: Record) -> int:
    return int.from_bytes(blake2b(encode(record), digest_size=32).digest(), "big")


def _bad_rows(source: Source, state: ReadingState) -> BadSource:
    many = f"{state.num_bad:,} row{'s' if state.num_bad > 1 else ''}"
    if not state.is_read:
        many = f"the first {many}"
    return BadSource(
        f"{many} of {_name(source)} cannot be read: {'; '.join(state.bad[:3])}"
        f"{'; …' if state.num_bad > 3 else ''}; put that right, or leave such rows out with "
        "--skip-bad"
    )


def _name(source: Source) -> str:
    first = source.files[0].path.name
    more = len(source.files) - 1
    return f"{first} and {more} more" if more else first


def _make_shards(
    folder: WorkFolder, state: ReadingState, settings: Settings, num_workers: int, bar: Bar
) -> None:
    jobs = [
        ShardJob(
            shard=shard, bucket=bucket_path(folder.buckets, shard), out=folder.tables,
            attribution=folder.attribution / f"{shard:05}", done=folder.done / f"{shard:05}",
            **dataclasses.asdict(settings),
        )
        for shard in range(len(state.lengths))
    ]  # fmt: skip
    missing = [job for job in jobs if not job.done.exists()]
    total = sum(state.lengths)
    done = total - sum(state.lengths[job.shard] for job in missing)
    try:
        with disk_faults(folder.out), bar("comparing answers") as progress:
            progress(done, total)
            finished = done_by_workers(make_shard, missing, min(num_workers, len(missing)))
            for job, _ in finished:
                done += state.lengths[job.shard]
                progress(done, total)
    except WorkerDied as error:
        raise PreparationFailed(
            f"a process that compares answers ended with {error.args[0]}, maybe for want of "
            "memory; run the same command again, it goes on from there; --workers 1 takes less"
        ) from error
    except (zlib.error, orjson.JSONDecodeError) as error:
        raise PreparationFailed(
            f"what was read into {folder.path} is damaged; remove that folder and run the same "
            "command again"
        ) from error


def _manifest(folder: WorkFolder, state: ReadingState) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for shard in range(len(state.lengths)):
        counts.update(orjson.loads((folder.done / f"{shard:05}").read_bytes()))
    licenses = {name: n for name, n in sorted(counts.items()) if name.startswith(_LICENSE)}
    rows = {split: counts.pop(f"{split} rows", 0) for split in SPLITS}
    return {
        "version": VERSION,
        "source": {
            "files": [{name: row[name] for name in ("file", "bytes")} for row in state.source],
            "digest": f"{int(state.digest, 16):064x}",
        },
        "settings": state.settings,
        "rows": rows,
        "counts": {
            "records": state.num_records,
            "bad rows": state.num_bad,
            **{name: n for name, n in sorted(counts.items()) if name not in licenses},
        },
        "bad rows": state.bad,
        "licenses": {name.removeprefix(_LICENSE): n for name, n in licenses.items()},
        "attribution": ATTRIBUTION,
    }
