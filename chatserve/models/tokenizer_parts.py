"""What a tokenizer is made of, as its readers hand it over; the choice of stop ids; damaged files.

Knows no file format.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import tokenizers

from chatserve.errors import ModelLoadError
from chatserve.models.special_tokens import AddedToken

logger = logging.getLogger(__name__)

PAD_TOKENS = frozenset({"[PAD]", "<pad>", "<|pad|>"})
# Never an end of sequence, whatever a config.json says.
_NOT_EOS = frozenset({"<s>", "<unk>"}) | PAD_TOKENS


@dataclass(frozen=True)
class TokenizerParts:
    """Everything that `Tokenizer` needs.

    `first` encodes text at the very start of a prompt, `later` text after something else; neither
    can produce a marker of `added`. `names` are `bos_token` and its like, for templates. `frame`:
    the ids that the vocabulary's own rules put before and behind a whole text.
    """

    first: tokenizers.Tokenizer
    later: tokenizers.Tokenizer
    piece_bytes: Callable[[str], bytes]
    added: tuple[AddedToken, ...]
    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    adds_bos: bool
    strips_leading_space: bool
    names: Mapping[str, str] = field(default_factory=dict)
    frame: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


@contextmanager
def damage_refused(source: str) -> Iterator[None]:
    """Whatever the tokenizers library raises becomes a `ModelLoadError` that names `source`."""
    try:
        yield
    except (ModelLoadError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # The library raises bare exceptions, and its panics are no Exception at all.
    except BaseException as error:
        raise ModelLoadError(f"{source} is damaged ({error}); download the file again") from error


def choose_eos_ids(
    own: Iterable[int | None],
    candidates: Iterable[int],
    added: Iterable[AddedToken],
    vocab_size: int,
) -> frozenset[int]:
    """The vocabulary's own end ids, and those of `candidates` that can be one.

    An early Vicuna v1.1 config.json says eos 1, which is `<s>`: such candidates are dropped and
    logged.
    """
    texts = {token.id: token.text for token in added}
    chosen = {token_id for token_id in own if token_id is not None}
    for token_id in candidates:
        if token_id in chosen:
            continue
        if token_id >= vocab_size or texts.get(token_id) in _NOT_EOS:
            text = texts.get(token_id, "not in the vocabulary")
            logger.warning("ignored the end-of-sequence id %d: it is %s", token_id, text)
            continue
        chosen.add(token_id)
    return frozenset(chosen)
