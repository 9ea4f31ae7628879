"""chatserve's tokenizer in the shape that transformers' trainers ask for: `ServedTokenizer`.

So training reads the very ids that serving will: of a folder, of a `.gguf` file, and of the old
vocabularies that transformers 5 encodes otherwise. Is made of memory and saves nothing.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizer

from chatserve.errors import ModelLoadError
from chatserve.models.tokenizer import Tokenizer


class ServedTokenizer(PreTrainedTokenizer):  # type: ignore[misc]  # transformers is untyped
    """One vocabulary; text never yields a special token.

    eos_token_id: the one that is learnt as the end. pad_token_id: another token where there is one,
    so that the end is never taken for padding.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012  (transformers' own form)

    def __init__(self, served: Tokenizer) -> None:
        """Raises `ModelLoadError` for a vocabulary without an end of sequence."""
        self.served = served
        self._ids: dict[str, int] = {}
        for token_id in range(served.vocab_size):
            if piece := served.piece(token_id):
                self._ids.setdefault(piece, token_id)
        names = dict(served.names)
        eos = names.get("eos_token")
        if eos is None or self._ids.get(eos) not in served.eos_ids:
            known = sorted(served.eos_ids)
            if not known:
                raise ModelLoadError(
                    "the vocabulary has no end-of-sequence token, so no answer could learn to end; "
                    "copy the tokenizer from the model's own repository"
                )
            eos = served.piece(known[0])
        pad = _padding(served, eos, names)
        super().__init__(eos_token=eos, pad_token=pad, bos_token=names.get("bos_token"))

    @property
    def vocab_size(self) -> int:
        return self.served.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def encode_text(self, text: str, *, ends: bool = False) -> list[int]:
        """Ids of a whole text, with BOS by this model's custom; `ends`: with EOS behind it."""
        ids = self.served.encode(text, add_bos=self.served.adds_bos)
        return [*ids, self.eos_token_id] if ends else ids

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        bos_id = self.served.bos_id
        start = [bos_id] if self.served.adds_bos and bos_id is not None else []
        return [*start, *token_ids_0, *(token_ids_1 or [])]

    def save_pretrained(self, *arguments: Any, **options: Any) -> tuple[str, ...]:
        """Writes nothing: an adapter is served with its base's tokenizer."""
        return ()

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [self.served.piece(each) for each in self.served.encode(text, add_bos=False)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.served.piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        # a network may have rows behind the vocabulary: they have no text
        return self.served.decode(self._ids[token] for token in tokens if token)


def _padding(served: Tokenizer, eos: str, names: dict[str, str]) -> str:
    """What is behind shorter sequences: no text yields it, and it is not the end, if possible."""
    wanted = [names.get("pad_token"), names.get("unk_token"), names.get("bos_token")]
    others = [token for token in wanted if token and token != eos and token in served.special_ids]
    return others[0] if others else eos
