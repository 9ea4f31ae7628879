"""Decoders that were saved without their head, as embedding models are: vectors, and no answers."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoModel, AutoTokenizer

from chatserve.config import WorkerConfig
from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.serving import load
from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import open_checkpoint
from chatserve.quality import assess
from chatserve.server.edge import Edge
from chatserve.server.model_slot import ModelSlot
from chatserve.server.worker import create_slot_app
from chatserve.server.worker_process import load_engine
from tests import tiny
from tests.servers import RunningServer, serving

TEXTS = ["the cat sat", "on the mat " * 20, "x", "ünïcode 🙂"]
END = "<|endoftext|>"


def save(folder: Path, model_type: str = "qwen3", **changes: Any) -> Path:
    """The bare network, a tokenizer that ends texts, and the pooling that goes with it."""
    torch.manual_seed(0)
    sizes = tiny.sizes(**{"head_dim": 16, **changes})
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=None, special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    tokenizer.save(path)
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), "utf-8")
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")


def expected(folder: Path, texts: list[str]) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tokenizer.convert_tokens_to_ids(END)
        with torch.inference_mode():
            state = model(input_ids=ids).last_hidden_state[0, -1].numpy()
        vectors.append(state / np.linalg.norm(state))
    return np.array(vectors)


def config_of(folder: Path, **options: Any) -> WorkerConfig:
    return WorkerConfig(
        weights=str(folder), device="cpu", model_names=("tiny",), max_num_seqs=4,
        max_num_batched_tokens=64, **{"dtype": "float32", **options},
    )  # fmt: skip


class Served:
    """A worker of a folder; `post` asks it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        engine, model = load_engine(config_of(folder, **options), lambda done, total: None)
        assert isinstance(engine, AsyncEngine) and model.grammars is None
        self._engine = engine
        self._slot = ModelSlot.filled(engine, model)
        self._context = serving(self._build)

    def _build(self) -> Edge:
        self._engine.start()
        return create_slot_app(self._slot)

    def __enter__(self) -> Served:
        self.server: RunningServer = self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.call(self._engine.stop())
        self._context.__exit__(*error)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.server.url}{path}", json={"model": "tiny", **body})

    def embed(self, texts: list[str]) -> np.ndarray:
        reply = self.post("/v1/embeddings", input=texts).json()
        return np.array([each["embedding"] for each in reply["data"]])


def test_vectors_are_those_of_transformers_and_answers_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    assert "embed_tokens.weight" in load_file(folder / "model.safetensors")
    with Served(folder) as served:
        assert np.abs(served.embed(TEXTS) - expected(folder, TEXTS)).max() < 1e-4
        # the end token is counted, shown and kept when a text is cut
        shown = served.post("/tokenize", prompt="x").json()["tokens"]
        assert shown[1:] == [tiny.BOS_ID]
        cut = served.post("/v1/embeddings", input="xyz", truncate_prompt_tokens=2).json()
        whole = served.post("/v1/embeddings", input="x").json()
        assert cut["data"] == whole["data"]
        assert cut["usage"]["prompt_tokens_dropped"] == 2
        card = httpx.get(f"{served.server.url}/v1/models").json()["data"][0]
        assert card["chatserve"]["embeddings_only"] is True
        messages = [{"role": "user", "content": "hi"}]
        for path, body in [
            ("/v1/chat/completions", {"messages": messages}),
            ("/v1/completions", {"prompt": "hi"}),
            ("/v1/responses", {"input": "hi", "store": False}),
            ("/v1/messages", {"messages": messages, "max_tokens": 3}),
        ]:
            reply = served.post(path, **body)
            assert reply.status_code == 400
            message = reply.json()["error"]["message"]
            assert "tiny has no head" in message and "/v1/embeddings" in message
        # of a decoder, whose first token has seen nothing else
        assert served.post("/v1/embeddings", input="x", pooling="cls").status_code == 400


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {}),
        ("qwen2", {}),
        # as Qwen3-Embedding has it: the class with a head, which shares the embedding's matrix
        ("qwen3", {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}),
        ("llama", {"architectures": None}),
    ],
)
def test_other_spellings(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path, model_type)
    edit_config(folder, **changes)
    with Served(folder) as served:
        assert np.abs(served.embed(TEXTS[:2]) - expected(folder, TEXTS[:2])).max() < 1e-4


def test_the_prefix_without_a_head_and_8_bits(tmp_path: Path) -> None:
    folder = save(tmp_path)
    file = folder / "model.safetensors"
    state = {f"model.{name}": rows for name, rows in load_file(file).items()}
    wanted = expected(folder, TEXTS)
    save_file(state, file, {"format": "pt"})
    with Served(folder, dtype="auto", load_8bit=True) as served:
        found = served.embed(TEXTS)
    assert (found * wanted).sum(1).min() > 0.99


def test_a_layer_behind_the_pooling_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    modules = [{"type": "sentence_transformers.models.Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    with pytest.raises(ModelLoadError, match="'Dense' behind the network"):
        load(config_of(folder))


def test_a_model_with_a_head_keeps_it(tmp_path: Path) -> None:
    for name, changes in [("own", {}), ("tied", {"tie_word_embeddings": True})]:
        tiny.save_model(tmp_path / name, "qwen3", tokenizer=False, **changes)
        checkpoint = open_checkpoint(tmp_path / name)
        with closing(checkpoint.weights):
            assert checkpoint.has_head
    # whatever the class is called
    edit_config(tmp_path / "own", architectures=["Qwen3Model"])
    checkpoint = open_checkpoint(tmp_path / "own")
    with closing(checkpoint.weights):
        assert checkpoint.has_head


def test_its_predictions_have_no_quality(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path))
    with closing(checkpoint.weights), pytest.raises(ModelLoadError, match="has no head"):
        assess._checked_config(checkpoint)
