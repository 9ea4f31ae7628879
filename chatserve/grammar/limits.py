"""What one grammar may cost: to compile, to keep, and at each token. Plain numbers.

A request's text can ask for any amount of work, so all of it is bounded: compiling by the clock and
by memory, in a process that can be killed; masks by the engine's own fuel, which is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

TRIAL_S = 2.0
TRIAL_BYTES = 512 * 1024 * 1024
"""More than this beside the vocabulary ends a trial."""
TRIAL_STEPS = 16
"""Tokens that a trial accepts after compiling, to find grammars without any answer."""
LATE_S = 60.0
"""How long a spec that took too long is not tried again: the machine may have been busy."""
START_S = 30.0
MAX_WAITING = 16
"""Specs that wait for their trial; more are turned away."""
MAX_WAITING_OF_ONE = 8
"""Of these, specs of requests with the same API key. Without keys there is nobody to tell apart."""

MAX_GRAMMAR_BYTES = 32 * 1024 * 1024
MAX_CACHED = 64
MAX_CACHED_BYTES = 128 * 1024 * 1024

# of llguidance: https://github.com/microsoft/llguidance, parser/src/api.rs (ParserLimits)
_STEP_LEXER_FUEL = 100_000  # about 8 ms
_STEP_MAX_ITEMS = 20_000
_MAX_LEXER_STATES = 50_000  # about 1 kB each
_MAX_ITEMS_IN_ROW = 300
_MAX_ITEMS_IN_ROW_OF_JSON = 2_000
"""An object of 500 optional properties. Its rows cost what they are long; those of an ambiguous
grammar cost the square of it."""


def parser_limits(*, is_json: bool) -> LLParserLimits:
    """What llguidance may spend on one grammar and on one token."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=_MAX_ITEMS_IN_ROW_OF_JSON if is_json else _MAX_ITEMS_IN_ROW,
        step_lexer_fuel=_STEP_LEXER_FUEL,
        step_max_items=_STEP_MAX_ITEMS,
        max_lexer_states=_MAX_LEXER_STATES,
        verbose_errors=False,
    )
