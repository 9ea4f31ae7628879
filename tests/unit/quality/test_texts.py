"""What is read: the shipped texts or a file, cut into windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatserve.errors import ModelLoadError, UsageError
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from chatserve.quality.texts import MIN_TOKENS, SHIPPED, TokenText, read_text
from tests import tiny
from tests.weights import default_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return load_tokenizer(folder)


def read(tokenizer: Tokenizer, file: Path | None, **changes: int) -> TokenText:
    limits = {"num_tokens": 1 << 16, "window": 512, "vocab_size": tiny.VOCAB_SIZE, **changes}
    return read_text(tokenizer, file, **limits)


def written(folder: Path, content: str | bytes) -> Path:
    file = folder / "text.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.weights
def test_the_shipped_texts_of_the_default_model() -> None:
    text = read(load_tokenizer(default_model()), None, vocab_size=49152)
    assert text.name == "shipped" and text.num_left == 0
    assert text.num_positions == 1924 and len(text.windows) == 6  # one is cut


def test_five_kinds_of_text_are_shipped(tokenizer: Tokenizer) -> None:
    assert len(list(SHIPPED.glob("*.txt"))) == 5
    text = read(tokenizer, None)
    assert text.num_positions > 5000  # a token a byte here; elsewhere a fourth of that
    assert max(map(len, text.windows)) == 512
    assert any(tiny.START_ID in window for window in text.windows)  # the chat's marks are meant


def test_a_file_is_cut_into_windows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    letters = "".join(chr(97 + index % 26) for index in range(1000))
    text = read(tokenizer, written(tmp_path, f"\n {letters} \n"), window=300)
    assert list(map(len, text.windows)) == [300, 300, 300, 100]
    assert tokenizer.decode(id_ for window in text.windows for id_ in window) == letters
    assert (text.name, text.num_left) == ("text.txt", 0)


def test_each_window_begins_as_a_prompt_does(tokenizer: Tokenizer, tmp_path: Path) -> None:
    class WithBos(Tokenizer):
        adds_bos, bos_id = True, tiny.BOS_ID

        def __init__(self) -> None:
            self.__dict__ |= {**vars(tokenizer), "adds_bos": True, "bos_id": tiny.BOS_ID}

    file = written(tmp_path, "a" * 500)
    text = read(WithBos(), file, window=200)
    assert [window[0] for window in text.windows] == [tiny.BOS_ID] * 3
    assert list(map(len, text.windows)) == [200, 200, 103]
    text = read(WithBos(), written(tmp_path, "<|endoftext|>" + "a" * 300))
    assert text.windows[0][:2] == (tiny.BOS_ID, text.windows[0][2])


def test_no_more_is_read_than_was_asked_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = read(tokenizer, written(tmp_path, "a" * 1000), window=300, num_tokens=700)
    assert list(map(len, text.windows)) == [300, 300, 100] and text.num_left == 300
    # a token alone predicts nothing
    text = read(tokenizer, written(tmp_path, "a" * 1000), window=300, num_tokens=601)
    assert list(map(len, text.windows)) == [300, 300]


def test_of_an_endless_file_only_the_beginning_is_read(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="zero bytes"):
        read(tokenizer, Path("/dev/zero"), num_tokens=200)


def test_a_cut_leaves_no_part_of_a_character(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = read(tokenizer, written(tmp_path, "ä" * 100 + "\n" + "ä" * 9000), num_tokens=200)
    assert text.num_positions == 200


BAD = {
    "missing": (None, "No such file"),
    "a folder": ("folder", "directory"),
    "latin-1": (b"caf\xe9 " * 100, "byte 3 is not UTF-8"),
    "binary": (b"abc\0" * 100, "zero bytes"),
    "empty": (b"", f"0 tokens, too few .* at least {MIN_TOKENS}"),
    "too short": (b"a" * (MIN_TOKENS - 1), f"{MIN_TOKENS - 1} tokens, too few"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_text_is_refused(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    file = tmp_path if content == "folder" else tmp_path / "text.txt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read(tokenizer, file)
    assert str(file) in caught.value.message


def test_ids_that_the_model_does_not_have(tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelLoadError, match="of different models"):
        read(tokenizer, None, vocab_size=100)


def test_the_hash_is_of_ids_and_windows() -> None:
    base = TokenText("a", ((1, 2), (3,)))
    assert base.sha256 == TokenText("b", ((1, 2), (3,))).sha256
    assert base.sha256 != TokenText("a", ((1, 2, 3),)).sha256
    assert base.sha256 != TokenText("a", ((1, 2), (4,))).sha256
