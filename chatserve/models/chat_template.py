"""Which chat template a model gets: by name, by verified family, the tokenizer's own, or an error.

Knows no token ids beyond the families' probe, and no roles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatserve.errors import ModelLoadError, UsageError
from chatserve.models.adapter_config import merged_adapters
from chatserve.models.registry import (
    APPLIED_DELTA,
    FAMILIES,
    LLAMA_PROBE,
    OTHER_NAMES,
    Family,
)
from chatserve.models.special_tokens import Rendered, Special
from chatserve.models.templates import ChatMessage, ChatTemplate
from chatserve.models.templates.builtin import ALIASES, BUILTIN
from chatserve.models.templates.jinja import MAX_TEMPLATE_CHARS, JinjaTemplate, Renderer
from chatserve.models.tokenizer import Tokenizer
from chatserve.models.weight_files import member, read_json

__all__ = [
    "ChatMessage", "ChatTemplate", "Rendered", "Special", "TemplateChoice", "TemplateOrigin",
    "WeightsFacts", "choose_template", "load_template_sources", "template_names",
    "template_origins",
]  # fmt: skip

OWN = "tokenizer"
ONE_SHOT_HINT = " (zero_shot is the same layout without FastChat's example)"


@dataclass(frozen=True)
class WeightsFacts:
    """What is known of the weights. `name` is that of the folder or file: a hint, never proof."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    vocab_rows: int | None = None

    @property
    def num_vocab_rows(self) -> int | None:
        """Rows of the embedding, measured if possible, else as config.json says."""
        rows = self.config.get("vocab_size") if self.vocab_rows is None else self.vocab_rows
        return rows if isinstance(rows, int) else None

    @property
    def names(self) -> tuple[str, ...]:
        """The folder's own name, the config's, and those of what was added: a delta, adapters.

        Lower case, without what they lie in.
        """
        named = [self.name, self.config.get("_name_or_path"), self.config.get(APPLIED_DELTA)]
        for adapter in merged_adapters(self.config):
            named += [adapter.get("name"), adapter.get("base")]
        texts = (name.rstrip("/\\") for name in named if isinstance(name, str))
        return tuple(re.split(r"[/\\]", text)[-1].lower() for text in texts)


@dataclass(frozen=True)
class TemplateChoice:
    """A template and, for the log, why it was taken."""

    template: ChatTemplate
    reason: str


@dataclass(frozen=True)
class TemplateOrigin:
    """A place where a template may come from: `choice`, or None and `absence` says why not."""

    name: str
    choice: TemplateChoice | None = None
    absence: str = ""


def template_names() -> list[str]:
    """Every name that an explicit choice may have."""
    return [*BUILTIN, *ALIASES, OWN]


def choose_template(
    explicit: str | None,
    facts: WeightsFacts,
    tokenizer: Tokenizer,
    sources: Mapping[str, str],
    renderer: Renderer | None = None,
) -> TemplateChoice:
    """The template for these weights.

    sources: the tokenizer's own templates by name (`load_template_sources`). renderer: who runs
    them, this process unless another is given. Raises `UsageError`
    that lists the names when none fits, never guesses; `ModelLoadError` when the tokenizer's own is
    not valid Jinja.
    """
    if explicit is not None:
        return TemplateChoice(_named(explicit, tokenizer, sources, renderer), "chosen by name")
    if found := _fingerprint(facts, tokenizer, has_own="default" in sources):
        family, reason = found
        return TemplateChoice(_named(family.template, tokenizer, sources, renderer), reason)
    if "default" in sources:
        own = _named(OWN, tokenizer, sources, renderer)
        return TemplateChoice(own, "the tokenizer's own chat template")
    raise UsageError(
        f"no chat template is known for {facts.name}: it is no verified Vicuna or StackLLaMA, and "
        "its tokenizer brings none; choose one with --conv-template "
        f"({', '.join(template_names())})"
    )


def template_origins(
    explicit: str | None,
    facts: WeightsFacts,
    tokenizer: Tokenizer,
    sources: Mapping[str, str],
) -> list[TemplateOrigin]:
    """What each place brings, in the order in which `choose_template` asks them."""
    found = _fingerprint(facts, tokenizer, has_own="default" in sources)
    family, verified = found or (None, "")
    has_own = "default" in sources
    asked = (
        ("flag", explicit, "chosen by name", "no name was given"),
        ("fingerprint", family.template if family else None, verified,
         "no verified Vicuna or StackLLaMA"),
        ("tokenizer", OWN if has_own else None, "the tokenizer's own chat template",
         "the tokenizer brings none"),
    )  # fmt: skip
    origins = []
    for origin, name, reason, absence in asked:
        if name is None:
            origins.append(TemplateOrigin(origin, absence=absence))
            continue
        try:
            choice = TemplateChoice(_named(name, tokenizer, sources), reason)
            origins.append(TemplateOrigin(origin, choice))
        except (UsageError, ModelLoadError) as error:
            origins.append(TemplateOrigin(origin, absence=error.message))
    return origins


def load_template_sources(path: Path, metadata: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Jinja sources by name that a model folder or GGUF metadata brings; `default` is for chat.

    Raises `ModelLoadError` for a damaged file.
    """
    if metadata is not None:
        return _gguf_sources(metadata)
    sources: dict[str, str] = {}
    if os.path.lexists(path / "tokenizer_config.json"):
        sources |= _config_sources(read_json(path, "tokenizer_config.json").get("chat_template"))
    if os.path.lexists(path / "chat_template.jinja"):
        sources["default"] = _read_text(member(path, "chat_template.jinja"))
    return sources


def _named(
    name: str,
    tokenizer: Tokenizer,
    sources: Mapping[str, str],
    renderer: Renderer | None = None,
) -> ChatTemplate:
    if name == OWN:
        if "default" not in sources:
            raise UsageError(
                "the model's tokenizer brings no chat template; choose one with --conv-template "
                f"({', '.join(template_names())})"
            )
        return JinjaTemplate(
            OWN, sources["default"], tokenizer.special_tokens, tokenizer.names, renderer
        )
    template = BUILTIN.get(ALIASES.get(name, name))
    if template is None:
        hint = ONE_SHOT_HINT if name == "one_shot" else ""
        raise UsageError(
            f"unknown chat template {name!r}{hint}; known: {', '.join(template_names())}"
        )
    missing = [text for text in template.special_tokens if text not in tokenizer.special_ids]
    if missing:
        raise UsageError(
            f"the chat template {name} needs the special token {missing[0]}, which this model's "
            "vocabulary lacks; choose another with --conv-template"
        )
    return template


def _fingerprint(
    facts: WeightsFacts, tokenizer: Tokenizer, *, has_own: bool
) -> tuple[Family, str] | None:
    """The family that these weights verifiably are, and what was verified."""
    text, ids = LLAMA_PROBE
    if tuple(tokenizer.encode(text, add_bos=False)) != ids:
        return None
    for family in FAMILIES:
        if facts.config.get("model_type") != family.model_type:
            continue
        if facts.num_vocab_rows != family.vocab_rows:
            continue
        verified = [f"{family.model_type}, {family.vocab_rows} vocabulary rows, LLaMA's tokenizer"]
        if family.pad_token is not None:
            token, token_id = family.pad_token
            if tokenizer.special_ids.get(token) != token_id:
                continue
            verified.append(f"{token} is {token_id}")
        if name := _name_of(family, facts.names):
            verified.append(f"named {name}")
        elif family.pad_token is None or has_own or _has_any(OTHER_NAMES, facts.names):
            continue
        return family, f"verified as {family.name}: {', '.join(verified)}"
    return None


def _name_of(family: Family, names: tuple[str, ...]) -> str | None:
    if _has_any(family.not_names, names):
        return None
    return next((part for part in family.names if _has_any((part,), names)), None)


def _has_any(parts: tuple[str, ...], names: tuple[str, ...]) -> bool:
    return any(part in name for part in parts for name in names)


def _config_sources(value: Any) -> dict[str, str]:
    """`chat_template` of a tokenizer_config.json: one source, or a list of named ones."""
    if isinstance(value, str):
        return {"default": value}
    return {
        entry["name"]: entry["template"]
        for entry in (value if isinstance(value, list) else [])
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    }


def _gguf_sources(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    sources = {
        name.removeprefix(f"{key}."): source
        for name, source in metadata.items()
        if name.startswith(f"{key}.") and isinstance(source, str)
    }
    if isinstance(metadata.get(key), str):
        sources["default"] = metadata[key]
    return sources


def _read_text(path: Path) -> str:
    try:
        # One character more than allowed is enough for the template to be refused by its length.
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_TEMPLATE_CHARS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path}: cannot be read as text ({error})") from error
