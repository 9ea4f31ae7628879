"""`chatserve template [WEIGHTS]`: which prompt a model gets, as text and as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatserve import config
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.settings import setting

if TYPE_CHECKING:
    from chatserve.models.chat_template import TemplateChoice
    from chatserve.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class TemplateConfig:
    """Settings of `chatserve template`."""

    name: str | None = setting(
        None, "template to use instead of the model's", flags=("--conv-template",), metavar="NAME"
    )
    message: str | None = setting(
        None, "show a chat of this one message; default: a sample of three", metavar="TEXT"
    )
    system: str | None = setting(
        None, "system message", flags=("--conv-system-msg",), metavar="TEXT"
    )
    revision: str = setting("main", "revision of a hub id")
    offline: bool = setting(False, "never touch the network")


def main(argv: list[str]) -> int:
    """Print the known names, or a chat as WEIGHTS sees it. Raises `StartupError`."""
    parser = CommandParser(
        "chatserve template",
        "List the chat templates, or show how a chat looks to a model: its text and its ids.",
        TemplateConfig,
    )
    parser.add_argument("weights", nargs="?", help="a folder, .gguf file, alias or hub id")
    flags = parser.flags(argv)
    weights = flags.pop("weights", None)
    options = config.build(TemplateConfig, flags)
    if weights is None and options.name is not None:
        raise UsageError(
            f"--name {options.name} needs WEIGHTS, whose tokenizer renders the template: "
            f"chatserve template WEIGHTS --name {options.name}"
        )
    if weights is None:
        from chatserve.models.chat_template import template_names

        print("\n".join(template_names()))
        return 0
    from chatserve import hub

    path = hub.resolve_weights(weights, revision=options.revision, offline=options.offline)
    choice, tokenizer = _load(path, options.name)
    _show(choice, tokenizer, options)
    return 0


def _load(path: Path, name: str | None) -> tuple[TemplateChoice, Tokenizer]:
    from chatserve.models.chat_template import (
        WeightsFacts,
        choose_template,
        load_template_sources,
    )
    from chatserve.models.tokenizer import load_tokenizer
    from chatserve.models.weight_files import read_json

    if path.is_dir():
        metadata, model_config = None, read_json(path, "config.json")
    else:
        from chatserve.models.gguf import GGUFFile, hf_config

        file = GGUFFile.open(path)
        file.close()
        metadata, model_config = file.metadata, hf_config(file.metadata)
    tokenizer = load_tokenizer(path, metadata)
    facts = WeightsFacts(path.name, model_config)
    sources = load_template_sources(path, metadata)
    return choose_template(name, facts, tokenizer, sources), tokenizer


def _show(choice: TemplateChoice, tokenizer: Tokenizer, options: TemplateConfig) -> None:
    from chatserve.cli.escapes import EscapeFilter
    from chatserve.engine.prompt import Message
    from chatserve.models.special_tokens import Special

    template = choice.template
    if options.message is not None:
        messages = [Message("user", options.message)]
    else:
        messages = [
            Message("user", "Hello!"),
            Message("assistant", "Hi!"),
            Message("user", "How are you?"),
        ]
    if options.system is not None:
        messages.insert(0, Message("system", options.system))
    rendered = template.render(messages)
    adds_bos = template.adds_bos and tokenizer.adds_bos
    ids = tokenizer.encode(rendered, add_bos=adds_bos)
    if adds_bos and tokenizer.names.get("bos_token"):
        rendered = [Special(tokenizer.names["bos_token"]), *rendered]
    special_ids = tokenizer.special_ids
    stop_ids = sorted(
        {*tokenizer.eos_ids, *(special_ids[t] for t in template.stop_tokens if t in special_ids)}
    )
    print(f"template: {template.name} ({choice.reason})")
    print("text, special tokens in ⟦⟧:")
    text = "".join(f"⟦{part}⟧" if isinstance(part, Special) else part for part in rendered)
    print(EscapeFilter().feed(text))
    print(f"{len(ids)} ids: {' '.join(map(str, ids))}")
    print(f"stops at ids: {' '.join(map(str, stop_ids)) or 'none'}")
    print(f"stops at text: {' '.join(map(repr, template.stop)) or 'none'}")
