"""GGUFFile: valid files judged by llama.cpp's package, hostile ones made by hand, mutants."""

from __future__ import annotations

import os
import random
import tracemalloc
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from chatserve import environment
from chatserve.errors import ModelLoadError
from chatserve.models.gguf import GGUFWeights
from chatserve.models.gguf_file import GGUFFile
from tests.unit.models.gguf_bytes import (
    ARRAY,
    BF16,
    F16,
    INT32,
    Q4_0,
    Q4_K,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    array,
    gguf_bytes,
    key_value,
    model_tensors,
    string,
    tensor,
    u32,
    u64,
    write_model,
)

SMOLLM2 = environment.home() / "models" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
HUGE = 2**64 - 1


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


# Valid files ----------------------------------------------------------------------------------


def test_metadata_of_every_type_comes_back(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint8("a.uint8", 255)
    writer.add_int8("a.int8", -128)
    writer.add_uint16("a.uint16", 65535)
    writer.add_int16("a.int16", -32768)
    writer.add_uint32("a.uint32", 2**32 - 1)
    writer.add_int32("a.int32", -(2**31))
    writer.add_uint64("a.uint64", HUGE)
    writer.add_int64("a.int64", -(2**63))
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 1e-300)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Größe 大小")
    writer.add_array("a.strings", ["", "é", "x" * 300])
    writer.add_array("a.numbers", [3, -1, 2])
    writer.add_array("a.floats", [0.25, -2.0])
    writer.add_array("a.bools", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with closing(GGUFFile.open(tmp_path / "model.gguf")) as file:
        judged = gguf.GGUFReader(tmp_path / "model.gguf")
        fields = {name: field.contents() for name, field in judged.fields.items()}
        expected = {name: value for name, value in fields.items() if not name.startswith("GGUF.")}
        assert file.metadata == expected
        assert {name: type(value) for name, value in file.metadata.items()} == {
            name: type(value) for name, value in expected.items()
        }


def test_a_vocabulary_larger_than_the_first_read_comes_back(tmp_path: Path) -> None:
    tokens = [f"Ġtoken{index}" + "é" * (index % 40) for index in range(60_000)]
    scores = [float(index) for index in range(60_000)]
    keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores}
    path = write_model(tmp_path / "model.gguf", "llama", model_tensors(), keys)
    with closing(GGUFFile.open(path)) as file:
        assert file.metadata["tokenizer.ggml.tokens"] == tokens
        assert file.metadata["tokenizer.ggml.scores"] == scores
        assert torch.equal(
            file.read("output.weight"), torch.from_numpy(model_tensors()["output.weight"])
        )


def test_tensors_come_back_in_their_own_dtype_and_in_disk_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 64), np.float32)
    # 1,100 rows: more than one chunk, the last one not full
    large = rng.standard_normal((1100, 256), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    types = gguf.GGMLQuantizationType
    writer.add_tensor("whole", values)
    writer.add_tensor("half", values.astype(np.float16))
    for name, data, kind in (
        ("brain", values, types.BF16),
        ("quarter", large, types.Q4_0),
        ("eight", values, types.Q8_0),
    ):
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.add_tensor("cube", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with closing(GGUFFile.open(tmp_path / "model.gguf")) as file:
        judged = gguf.GGUFReader(tmp_path / "model.gguf").tensors
        assert list(file.tensors()) == [item.name for item in judged]
        dtypes = {"half": torch.float16, "brain": torch.bfloat16}
        for item in judged:
            info, found = file.tensors()[item.name], file.read(item.name)
            expected = gguf.quants.dequantize(item.data, item.tensor_type)
            assert info.dtype == found.dtype == dtypes.get(item.name, torch.float32)
            assert info.shape == tuple(found.shape) == expected.shape
            assert info.num_bytes == item.n_bytes
            assert found.is_contiguous()
            assert np.array_equal(found.float().numpy(), expected)
            part = file.read(item.name, range(1, len(expected)))
            assert np.array_equal(part.float().numpy(), expected[1:])


def test_version_2_and_another_alignment_are_read(tmp_path: Path) -> None:
    data = np.arange(6, dtype=np.float32).tobytes()
    content = gguf_bytes(
        [key_value("general.alignment", UINT32, u32(64))],
        [tensor("late", [2], offset=64), tensor("early", [3, 2])],
        data.ljust(64, b"\0") + data,
        version=u32(2),
        alignment=64,
    )
    with closing(GGUFFile.open(written(tmp_path, content))) as file:
        assert list(file.tensors()) == ["early", "late"]
        assert file.read("early").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.read("late").tolist() == [0, 1]


def test_a_file_without_tensors_is_a_vocabulary(tmp_path: Path) -> None:
    path = written(tmp_path, gguf_bytes([key_value("k", STRING, string("v"))]))
    with closing(GGUFFile.open(path)) as file:
        assert file.metadata == {"k": "v"}
        assert file.tensors() == {}


def test_scales_that_are_not_numbers_are_read_without_a_warning(tmp_path: Path) -> None:
    content = gguf_bytes([], [tensor("t", [32], Q8_0)], b"\xff" * 34)
    with closing(GGUFFile.open(written(tmp_path, content))) as file:
        assert file.read("t").isnan().all()


@pytest.mark.weights
def test_default_model_equals_the_reference() -> None:
    if not SMOLLM2.exists():
        pytest.skip("the default model is not in the cache; `make chat` fetches it")
    with closing(GGUFFile.open(SMOLLM2)) as file:
        judged = {item.name: item for item in gguf.GGUFReader(SMOLLM2).tensors}
        assert list(file.tensors()) == list(judged)
        for name in ("token_embd.weight", "blk.0.attn_norm.weight", "blk.29.ffn_down.weight"):
            expected = gguf.quants.dequantize(judged[name].data, judged[name].tensor_type)
            assert np.array_equal(file.read(name).numpy(), expected)


# Hostile files --------------------------------------------------------------------------------

ZEROS = bytes(4096)
HOSTILE = {
    "empty file": (b"", "no GGUF file"),
    "three bytes": (b"GGU", "no GGUF file: it is too short"),
    "bad magic": (gguf_bytes(magic=b"FUGG"), "starts with b'FUGG'"),
    "a zip archive": (b"PK\x03\x04" + ZEROS, "no GGUF file"),
    "magic alone": (b"GGUF", "cut off"),
    "version 0": (gguf_bytes(version=u32(0)), "version 0 is unknown, supported are 2 and 3"),
    "version 1": (gguf_bytes(version=u32(1)), "version 1 is unknown"),
    "version of the future": (gguf_bytes(version=u32(4)), "version 4 is unknown"),
    "big-endian": (
        gguf_bytes(version=b"\0\0\0\x03"),
        "big-endian .*convert it with --endian little",
    ),
    "counts are missing": (b"GGUF" + u32(3) + u64(1), "cut off"),
    "too many tensors": (gguf_bytes(num_tensors=HUGE), "counts 18,446,744,073,709,551,615 tensors"),
    "tensors over the cap": (gguf_bytes(num_tensors=65_537), "65,537 tensors, allowed are 65,536"),
    "too many keys": (gguf_bytes(num_keys=HUGE), "metadata keys, allowed are 65,536"),
    "more keys than there are": (gguf_bytes(num_keys=3), "cut off|1 to 65,536"),
    "key length past the end": (gguf_bytes([u64(60_000) + b"key"]), "asks for 60,000 bytes"),
    "key length overflows": (gguf_bytes([u64(HUGE) + b"key"]), "18,446,744,073,709,551,615 bytes"),
    "empty key": (gguf_bytes([key_value("", UINT8, b"\0")]), "has 0 bytes"),
    "key is not UTF-8": (gguf_bytes([key_value(b"\xff\xfe", UINT8, b"\0")]), "not UTF-8"),
    "unknown value type": (
        gguf_bytes([key_value("k", 13, ZEROS)]),
        "'k' has unknown value type 13",
    ),
    "string past the end": (
        gguf_bytes([key_value("k", STRING, u64(2**62))]),
        "asks for 4,611,686,018,427,387,904 bytes",
    ),
    "string is not UTF-8": (
        gguf_bytes([key_value("k", STRING, string(b"\xc3("))]),
        "the value of 'k' is not UTF-8",
    ),
    "array count overflows": (gguf_bytes([array("k", UINT32, HUGE, b"")]), "allowed are 4,194,304"),
    "arrays overflow together": (
        gguf_bytes([array("a", UINT8, 3 << 20, bytes(3 << 20)), array("b", UINT8, 2 << 20, b"")]),
        "'b' is an array of 2,097,152 items, allowed are 4,194,304 in all arrays",
    ),
    "strings overflow together": (
        gguf_bytes([array("a", STRING, 1, string("x")), array("b", STRING, 1 << 20, b"")]),
        "'b' is an array of 1,048,576 strings, allowed are 786,432 in all arrays",
    ),
    "array past the end": (
        gguf_bytes([array("k", UINT32, 100_000, b"")]),
        "asks for 400,000 bytes",
    ),
    "strings past the end": (gguf_bytes([array("k", STRING, 100_000, b"")]), "asks for 800,000"),
    "string in array past the end": (
        gguf_bytes([array("k", STRING, 2, string("ok") + u64(2**40))]),
        "asks for",
    ),
    "string in array is not UTF-8": (
        gguf_bytes([array("k", STRING, 2, string("ok") + string(b"\xff"))]),
        "string 1 of 'k' is not UTF-8",
    ),
    "array of unknown type": (
        gguf_bytes([array("k", 77, 1, b"\0")]),
        "'k' is an array of unknown value type 77",
    ),
    "array of arrays": (gguf_bytes([array("k", ARRAY, 1, ZEROS)]), "array of arrays"),
    "duplicate key": (
        gguf_bytes([key_value("k", UINT8, b"\0"), key_value("k", UINT8, b"\1")]),
        "key 'k' appears twice",
    ),
    "alignment 13": (
        gguf_bytes([key_value("general.alignment", UINT32, u32(13))]),
        "alignment is 13, not a power of two",
    ),
    "alignment 0": (gguf_bytes([key_value("general.alignment", UINT32, u32(0))]), "is 0, not"),
    "alignment 4": (gguf_bytes([key_value("general.alignment", UINT32, u32(4))]), "is 4, not"),
    "alignment 24": (gguf_bytes([key_value("general.alignment", UINT32, u32(24))]), "is 24, not"),
    "alignment of another type": (
        gguf_bytes([key_value("general.alignment", INT32, u32(32))]),
        "has value type 5, expected is 4",
    ),
    "tensor name past the end": (gguf_bytes([], [u64(50_000)]), "asks for 50,000 bytes"),
    "tensor name empty": (gguf_bytes([], [tensor("", [1])], ZEROS), "a tensor's name has 0 bytes"),
    "no dimensions": (gguf_bytes([], [tensor("t", [])], ZEROS), "'t' has 0 dimensions"),
    "five dimensions": (gguf_bytes([], [tensor("t", [1] * 5)], ZEROS), "'t' has 5 dimensions"),
    "four billion dimensions": (
        gguf_bytes([], [string("t") + u32(2**32 - 1)], ZEROS),
        "4294967295 dimensions",
    ),
    "zero dimension": (gguf_bytes([], [tensor("t", [0, 4])], ZEROS), "'t' has an empty dimension"),
    "negative dimension": (gguf_bytes([], [tensor("t", [HUGE])], ZEROS), "the file has"),
    "dimensions overflow to zero": (gguf_bytes([], [tensor("t", [2**32, 2**32])], ZEROS), "bytes"),
    "dimensions overflow to something small": (
        gguf_bytes([], [tensor("t", [2**62 + 1, 4])], ZEROS),
        "takes 73,786,976,294,838,206,480 bytes",
    ),
    "unknown tensor type": (
        gguf_bytes([], [tensor("t", [1], 99)], ZEROS),
        "'t' has type number 99, supported are F32, F16, BF16, Q4_0.*another quantisation",
    ),
    "a type we do not have": (gguf_bytes([], [tensor("t", [256], 20)], ZEROS), "has type IQ4_NL"),
    "block size does not divide": (
        gguf_bytes([], [tensor("t", [48], Q4_0)], ZEROS),
        "rows of 48 values do not divide into blocks of 32",
    ),
    "block size does not divide the row, only the whole": (
        gguf_bytes([], [tensor("t", [128, 4], Q4_K)], ZEROS),
        "blocks of 256 .Q4_K",
    ),
    "offset not aligned": (gguf_bytes([], [tensor("t", [1], offset=8)], ZEROS), "multiple of 32"),
    "offset past the end": (
        gguf_bytes([], [tensor("t", [1], offset=8192)], ZEROS),
        "ends at byte .* cut off",
    ),
    "offset overflows": (
        gguf_bytes([], [tensor("t", [1], offset=2**64 - 32)], ZEROS),
        "ends at byte",
    ),
    "data cut off": (gguf_bytes([], [tensor("t", [64], F16)], bytes(127)), "cut off"),
    "no data": (gguf_bytes([], [tensor("t", [64], BF16)]), "cut off"),
    "duplicate tensor": (
        gguf_bytes([], [tensor("t", [1]), tensor("t", [1], offset=32)], ZEROS),
        "tensor name 't' appears twice",
    ),
    "overlap": (
        gguf_bytes([], [tensor("a", [16]), tensor("b", [4], offset=32)], ZEROS),
        "tensors 'a' and 'b' overlap",
    ),
    "same place": (
        gguf_bytes([], [tensor("a", [1]), tensor("b", [1])], ZEROS),
        "overlap",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, expected = HOSTILE[name]
    path = written(tmp_path, content)
    with pytest.raises(ModelLoadError, match=expected) as caught:
        GGUFFile.open(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert "; " in caught.value.message  # the way out
    assert len(caught.value.message) < 500


def test_a_header_over_the_cap_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, gguf_bytes([key_value("k", STRING, u64(65 * 2**20))]))
    with path.open("r+b") as file:
        file.truncate(70 * 2**20)  # sparse: takes no disk
    with pytest.raises(ModelLoadError, match="header is larger than 67,108,864 bytes"):
        GGUFFile.open(path)


def test_a_hostile_name_cannot_flood_or_break_the_message(tmp_path: Path) -> None:
    name = "\x1b[2J\n" + "x" * 50_000
    path = written(tmp_path, gguf_bytes([], [tensor(name, [1], 99)], ZEROS))
    with pytest.raises(ModelLoadError) as caught:
        GGUFFile.open(path)
    assert len(caught.value.message) < 600
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("length", range(0, 160, 5))
def test_every_truncation_is_refused(length: int, tmp_path: Path) -> None:
    content = gguf_bytes(
        [key_value("k", STRING, string("v")), array("n", STRING, 2, string("a") + string("b"))],
        [tensor("t", [8])],
        bytes(32),
    )
    assert len(content) == 160
    with pytest.raises(ModelLoadError):
        GGUFFile.open(written(tmp_path, content[:length]))


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, expected in (
        (tmp_path, "is not a file"),
        (tmp_path / "pipe", "is not a file"),  # opening it would wait for ever
        (tmp_path / "missing.gguf", "No such file"),
        (tmp_path / "nul\0.gguf", "null"),
    ):
        with pytest.raises(ModelLoadError, match=expected):
            GGUFFile.open(path)


def test_reading_what_is_gone_is_refused(tmp_path: Path) -> None:
    content = gguf_bytes([], [tensor("a", [8]), tensor("q", [32], Q8_0, 32)], bytes(66))
    path = written(tmp_path, content)
    with closing(GGUFFile.open(path)) as file:
        with pytest.raises(ModelLoadError, match="no tensor 'b'"):
            file.read("b")
        with path.open("r+b") as cut:
            cut.truncate(len(content) - 1)
        assert file.read("a").tolist() == [0] * 8
        with pytest.raises(ModelLoadError, match="ends within tensor 'q'"):
            file.read("q")
    with pytest.raises(ModelLoadError, match="cannot read tensor 'a'"):
        file.read("a")


# Mutants --------------------------------------------------------------------------------------


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four faults: flipped bytes, extreme numbers, cuts, doubled and missing pieces."""
    mutant = bytearray(content)
    header = 900  # most faults go where the structure is
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(header, len(mutant)))
        match rng.randrange(6):
            case 0:
                mutant[place] ^= 1 << rng.randrange(8)
            case 1:
                mutant[place] = rng.randrange(256)
            case 2:
                mutant[place : place + 8] = u64(rng.choice([0, 1, 2**31, 2**32, 2**63, HUGE]))
            case 3:
                mutant[place : place + 4] = u32(rng.choice([0, 1, 8, 9, 13, 2**31, 2**32 - 1]))
            case 4:
                del mutant[place : place + rng.randint(1, 16)]
            case 5:
                mutant[place:place] = mutant[place : place + rng.randint(1, 16)]
    if rng.random() < 0.2:
        del mutant[rng.randrange(len(mutant)) :]
    return bytes(mutant)


def use(path: Path) -> None:
    """Everything a loader does with a file."""
    with closing(GGUFFile.open(path)) as file:
        for name in file.tensors():
            file.read(name)
        weights = GGUFWeights(file)
        weights.config()
        for name in weights.tensors():
            weights.read(name)


def test_mutants_load_or_are_refused(tmp_path: Path) -> None:
    tensors = model_tensors(num_layers=1, tied=True)
    keys = {"block_count": 1, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    content = write_model(tmp_path / "valid.gguf", "llama", tensors, keys).read_bytes()
    use(tmp_path / "valid.gguf")
    rng = random.Random(2023)
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(300):
            path = written(tmp_path, mutate(content, rng))
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            try:
                use(path)
            except ModelLoadError:
                refused += 1
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < 2 * 2**20
    finally:
        tracemalloc.stop()
    assert 100 < refused < 300  # the faults bite, and not all of them
