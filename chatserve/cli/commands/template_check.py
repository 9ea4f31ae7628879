"""`chatserve template check WEIGHTS`: the prompt by every template that the weights could get."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatserve import config
from chatserve.cli.commands.template import TemplateConfig, marked, open_tokenizer, sample
from chatserve.errors import ChatserveError, InvalidRequest, ModelLoadError
from chatserve.flags import CommandParser
from chatserve.settings import setting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatserve.models.chat_template import TemplateOrigin, WeightsFacts
    from chatserve.models.template_check import PromptReport
    from chatserve.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class TemplateCheckConfig(TemplateConfig):
    """Settings of `chatserve template check`."""

    adapter: str | None = setting(
        None, "an adapter's folder, whose own template and tokenizer are shown, too", metavar="PATH"
    )
    json: bool = setting(False, "print JSON: every source with its text, ids and remarks")


def main(argv: list[str]) -> int:
    """Print what every source makes of a chat; 1 when the one in use is faulty.

    Raises `StartupError`, also when no template can be chosen.
    """
    parser = CommandParser(
        "chatserve template check",
        "Show a chat as text and ids by every template that WEIGHTS could get, what differs, and "
        "what is wrong: doubled BOS or EOS, answers that nothing stops.",
        TemplateCheckConfig,
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="a folder, .gguf file, alias or hub id")
    flags = parser.flags(argv)
    weights = flags.pop("weights")
    options = config.build(TemplateCheckConfig, flags)

    from chatserve import hub
    from chatserve.models.chat_template import choose_template, template_origins

    path = hub.resolve_weights(weights, revision=options.revision, offline=options.offline)
    found = open_tokenizer(path)
    origins = template_origins(options.name, *found)
    views = [_View.of(origin, found[1], options) for origin in origins]
    if options.adapter is not None:
        views.append(_of_adapter(Path(options.adapter).expanduser(), found[0], found[1], options))
    used, fault = None, None
    try:
        reason = choose_template(options.name, *found).reason
        used = next(v for v in views if v.origin.choice and v.origin.choice.reason == reason)
    except ChatserveError as error:
        fault = error
    if options.json:
        print(json.dumps(_as_json(path, views, used, fault), indent=1))
    else:
        _print(views, used)
    if fault is not None:
        raise fault
    return 1 if used is None or used.is_faulty else 0


@dataclass(frozen=True)
class _View:
    """What one source makes of the chat; `report` is None where it makes nothing of it."""

    origin: TemplateOrigin
    report: PromptReport | None
    absence: str

    @staticmethod
    def of(origin: TemplateOrigin, tokenizer: Any, options: TemplateCheckConfig) -> _View:
        from chatserve.models.template_check import report

        if origin.choice is None:
            return _View(origin, None, origin.absence)
        try:
            made = report(origin.choice.template, tokenizer, sample(options))
        except InvalidRequest as error:
            return _View(origin, None, error.message)
        return _View(origin, made, "")

    @property
    def title(self) -> str:
        choice = self.origin.choice
        what = f"{choice.template.name} ({choice.reason})" if choice else "none"
        return f"{self.origin.name}: {what}"

    @property
    def is_faulty(self) -> bool:
        if self.report is None:
            return True
        return any(remark.status == "fail" for remark in self.report.remarks)


def _of_adapter(
    folder: Path, facts: WeightsFacts, tokenizer: Tokenizer, options: TemplateCheckConfig
) -> _View:
    """What an adapter was trained with, by its own tokenizer where it brings one.

    Never in use: it is served with the template and the tokenizer of its base. Raises
    `ModelLoadError` for what is no adapter.
    """
    from chatserve.models.adapter_config import is_adapter
    from chatserve.models.chat_template import (
        TemplateOrigin,
        load_template_sources,
        template_origins,
    )
    from chatserve.models.tokenizer import load_tokenizer

    if not folder.is_dir() or not is_adapter(folder):
        raise ModelLoadError(f"{folder}: is no adapter's folder; check the path")
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = load_tokenizer(folder)
    *_, origin = template_origins(None, facts, tokenizer, load_template_sources(folder))
    reason = "the adapter's own; it is served with its base's"
    choice = dataclasses.replace(origin.choice, reason=reason) if origin.choice else None
    absence = "the adapter brings none" if not origin.choice else ""
    return _View.of(TemplateOrigin("adapter", choice, absence), tokenizer, options)


def _print(views: Sequence[_View], used: _View | None) -> None:
    from chatserve.cli.escapes import EscapeFilter, one_line

    for view in views:
        print(f"{'* ' if view is used else '  '}{one_line(view.title)}")
        made = view.report
        if made is None:
            print(f"    {one_line(view.absence)}\n")
            continue
        text = EscapeFilter().feed(marked(made.rendered))
        print("\n".join(f"    | {line}" for line in text.split("\n")))
        print(f"    {len(made.ids)} ids: {' '.join(map(str, made.ids))}")
        print(f"    stops at ids: {' '.join(map(str, made.stop_ids)) or 'none'}")
        print(f"    stops at text: {' '.join(map(repr, made.stop_texts)) or 'none'}")
        for remark in made.remarks:
            print(f"    {remark.status:<4}  {one_line(remark.text)}")
        print()
    for base, other in _pairs(views, used):
        print(f"{base.origin.name} → {other.origin.name}: {_difference(base, other)}")
        for line in _diff(base, other):
            print(f"    {EscapeFilter().feed(line)}")
    print("* is in use; special tokens are in ⟦⟧")


def _pairs(views: Sequence[_View], used: _View | None) -> list[tuple[_View, _View]]:
    """The one in use beside each other one that makes a prompt."""
    rendered = [view for view in views if view.report is not None]
    if not rendered:
        return []
    base = used if used in rendered else rendered[0]
    assert base is not None
    return [(base, view) for view in rendered if view is not base]


def _difference(base: _View, other: _View) -> str:
    assert base.report is not None and other.report is not None
    left, right = base.report.ids, other.report.ids
    if left == right:
        return "the same ids"
    first = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )
    ids = [str(ids[first]) if first < len(ids) else "the end" for ids in (left, right)]
    return f"{len(left)} and {len(right)} ids, differing from id {first} on: {' and '.join(ids)}"


def _diff(base: _View, other: _View) -> list[str]:
    assert base.report is not None and other.report is not None
    left, right = (marked(made.rendered).split("\n") for made in (base.report, other.report))
    names = base.origin.name, other.origin.name
    return list(difflib.unified_diff(left, right, *names, lineterm=""))


def _as_json(
    path: Path, views: Sequence[_View], used: _View | None, fault: ChatserveError | None
) -> dict[str, Any]:
    return {
        "weights": str(path),
        "used": used.origin.name if used else None,
        "error": fault.message if fault else None,
        "sources": [
            {
                "source": view.origin.name,
                "template": view.origin.choice.template.name if view.origin.choice else None,
                "reason": view.origin.choice.reason if view.origin.choice else None,
                "absence": view.absence or None,
                **(_report_as_json(view.report) if view.report else {}),
            }
            for view in views
        ],
        "differences": [
            {
                "from": base.origin.name,
                "to": other.origin.name,
                "summary": _difference(base, other),
                "diff": _diff(base, other),
            }
            for base, other in _pairs(views, used)
        ],
    }


def _report_as_json(made: PromptReport) -> dict[str, Any]:
    return {
        "text": marked(made.rendered),
        "ids": made.ids,
        "stop_ids": made.stop_ids,
        "stop_texts": made.stop_texts,
        "remarks": [dataclasses.asdict(remark) for remark in made.remarks],
    }
