"""`chatserve template [WEIGHTS]`: which prompt a model gets, as text and as token ids.

`template check WEIGHTS` is `template_check`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatserve import config
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.settings import setting

if TYPE_CHECKING:
    from chatserve.engine.prompt import Message
    from chatserve.models.chat_template import TemplateChoice, WeightsFacts
    from chatserve.models.special_tokens import Rendered
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
    if argv[:1] == ["check"]:
        from chatserve.cli.commands import template_check

        return template_check.main(argv[1:])
    parser = CommandParser(
        "chatserve template",
        "List the chat templates, or show how a chat looks to a model: its text and its ids. "
        "`chatserve template check WEIGHTS` compares every template that it could get.",
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
    from chatserve.models.chat_template import choose_template

    found = open_tokenizer(path)
    _show(choose_template(options.name, *found), found[1], options)
    return 0


def open_tokenizer(path: Path) -> tuple[WeightsFacts, Tokenizer, dict[str, str]]:
    """What decides which template the weights get; reads no weights. Raises `ModelLoadError`."""
    from chatserve.models.chat_template import WeightsFacts, load_template_sources
    from chatserve.models.tokenizer import load_tokenizer
    from chatserve.models.weight_files import read_json

    if path.is_dir():
        metadata, model_config = None, read_json(path, "config.json")
    else:
        from chatserve.models.gguf import hf_config
        from chatserve.models.gguf_parts import open_gguf

        file = open_gguf(path)
        file.close()
        metadata, model_config = file.metadata, hf_config(file.metadata)
    tokenizer = load_tokenizer(path, metadata)
    facts = WeightsFacts(path.name, model_config)
    return facts, tokenizer, load_template_sources(path, metadata)


def sample(options: TemplateConfig) -> list[Message]:
    """The chat to show: of one message, or of three."""
    from chatserve.engine.prompt import Message

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
    return messages


def marked(rendered: Rendered) -> str:
    """The text of a prompt, special tokens in brackets."""
    from chatserve.models.special_tokens import Special

    return "".join(f"⟦{part}⟧" if isinstance(part, Special) else part for part in rendered)


def _show(choice: TemplateChoice, tokenizer: Tokenizer, options: TemplateConfig) -> None:
    from chatserve.cli.escapes import EscapeFilter
    from chatserve.models.template_check import report

    made = report(choice.template, tokenizer, sample(options))
    print(f"template: {choice.template.name} ({choice.reason})")
    print("text, special tokens in ⟦⟧:")
    print(EscapeFilter().feed(marked(made.rendered)))
    print(f"{len(made.ids)} ids: {' '.join(map(str, made.ids))}")
    print(f"stops at ids: {' '.join(map(str, made.stop_ids)) or 'none'}")
    print(f"stops at text: {' '.join(map(repr, made.stop_texts)) or 'none'}")
