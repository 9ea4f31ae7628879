"""A conversation as one HTML page that needs nothing else: no script, no other file, no host.

Knows transcripts and text. What was asked stands as it was typed, answers as the Markdown that
they are. Whatever comes from outside passes the escape filter, and then the escaping of HTML.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

from chatserve.cli.escapes import one_line, strip_escapes
from chatserve.cli.transcript import Transcript

_MAX_NESTING = 100
# pictures are links, so that opening a page asks nobody for anything
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "maxNesting": _MAX_NESTING})
_MARKDOWN.enable(["table", "strikethrough"]).disable("image")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 46rem; padding: 0 1rem; }
section { border-top: 1px solid #8886; padding: .5rem 0; }
h2 { font-size: .85rem; letter-spacing: .05em; opacity: .7; text-transform: uppercase; }
section > div { overflow-wrap: anywhere; }
.typed { font-weight: 500; white-space: pre-wrap; }
pre { background: #8882; border-radius: .4rem; overflow-x: auto; padding: .75rem; }
code { font: .9em ui-monospace, monospace; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { border: 1px solid #8886; padding: .2rem .6rem; }
"""


def page_of(transcript: Transcript, title: str, model: str) -> str:
    """The whole file. It can be read on paper, on a phone, light and dark."""
    heading = escape(one_line(title))
    by = f"<p>Model: <code>{escape(one_line(model))}</code></p>\n" if model else ""
    sections = [_section("System", _typed(transcript.system))] if transcript.system else []
    for turn in transcript.turns:
        is_question = turn.role == "user"
        name = "Question" if is_question else "Answer"
        broke_off = " (broke off)" if turn.is_partial else ""
        content = _typed(turn.content) if is_question else _drawn(turn.content)
        sections.append(_section(name + broke_off, content))
    return (
        '<!doctype html>\n<html lang="">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1 dir="auto">{heading}</h1>\n{by}</header>\n{"".join(sections)}'
        "</main>\n</body>\n</html>\n"
    )


def _section(name: str, content: str) -> str:
    return f"<section>\n<h2>{name}</h2>\n{content}\n</section>\n"


def _typed(text: str) -> str:
    return f'<div class="typed" dir="auto">{escape(strip_escapes(text))}</div>'


def _drawn(text: str) -> str:
    env: dict[str, Any] = {}
    tokens = _MARKDOWN.parse(strip_escapes(text), env)
    if any(token.level >= _MAX_NESTING - 1 for token in tokens):
        return _typed(text)  # the parser leaves out what is deeper
    return f'<div dir="auto">\n{_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, env)}</div>'


def _link_open(
    renderer: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Any,
    env: MutableMapping[str, Any],
) -> str:
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return renderer.renderToken(tokens, index, options, env)


def _may_be_linked(url: str) -> bool:
    # others run something, or name a file of whoever opens the page
    return url.lower().startswith(("https://", "http://", "mailto:"))


_MARKDOWN.add_render_rule("link_open", _link_open)
vars(_MARKDOWN)["validateLink"] = _may_be_linked
