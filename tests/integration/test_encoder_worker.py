"""Encoders as workers: their vectors are those of transformers, and nothing else is answered."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from chatserve.config import WorkerConfig
from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.sequence import SamplingParams
from chatserve.engine.serving import load
from chatserve.errors import DoesNotFit, ModelLoadError, UsageError
from chatserve.models import encoder_network
from chatserve.models.encoders import SERVED_TYPES
from chatserve.models.safetensors_file import SafetensorsFile
from chatserve.protocol.control import WorkerStatus
from chatserve.server.contract import ServedModel
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.model_slot import ModelSlot
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_slot_app
from chatserve.server.worker_process import load_engine
from tests.encoders import CLS, CONTEXT, HIDDEN, save_encoder, vocabulary
from tests.servers import RunningServer, serving

TOKEN = "control-token"
TEXTS = ["The cat sat.", "On the mats! " * 9, "x", "sitting ünder it", "the " * 40]
# a special token that is written in a text stays text, which transformers' tokenizer has no way for
WRITTEN = "[CLS] cat"


def config_of(folder: Path, **options: Any) -> WorkerConfig:
    return WorkerConfig(
        weights=str(folder), device="cpu", model_names=("tiny",), max_num_seqs=4,
        max_num_batched_tokens=200, **options,
    )  # fmt: skip


def expected(folder: Path, texts: list[str], pooling: str) -> np.ndarray:
    """As sentence-transformers has it: each text alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            states = model(input_ids=ids).last_hidden_state[0].numpy().astype(np.float64)
        pooled = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
        vectors.append(pooled / np.linalg.norm(pooled))
    return np.array(vectors)


@dataclass(frozen=True)
class House:
    folder: Path
    engine: AsyncEngine
    model: ServedModel
    worker: RunningServer
    controller: RunningServer


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("bert")
    save_encoder(folder, pooling="pooling_mode_cls_token")
    engine, model = load_engine(config_of(folder), lambda done, total: None)
    assert isinstance(engine, AsyncEngine)
    slot = ModelSlot.filled(engine, model)
    registry = WorkerRegistry(time.monotonic)

    def build() -> Edge:
        engine.start()
        return create_slot_app(slot, policy=AccessPolicy.build("127.0.0.1", api_keys=[TOKEN]))

    with ExitStack() as stack:
        worker = stack.enter_context(serving(build))
        controller = stack.enter_context(
            serving(lambda: create_controller_app(registry, control_token=TOKEN))
        )
        registry.register("w", worker.url, WorkerStatus(state="ready", models=slot.cards()))
        yield House(folder, engine, model, worker, controller)
        worker.call(engine.stop())


@pytest.fixture(params=["worker", "controller"])
def client(house: House, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    server: RunningServer = getattr(house, request.param)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


def vectors_of(reply: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    return np.array([each.embedding for each in reply.data], np.float32)


@pytest.mark.parametrize("pooling", [None, "mean", "last", "cls"])
def test_vectors_are_those_of_transformers(
    client: openai.OpenAI, house: House, pooling: str | None
) -> None:
    extra = {"pooling": pooling} if pooling else {}
    reply = client.embeddings.create(model="tiny", input=TEXTS, extra_body=extra)
    # the folder says cls
    wanted = expected(house.folder, TEXTS, pooling or "cls")
    assert np.abs(vectors_of(reply) - wanted).max() < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(house.folder)
    assert reply.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)


def test_a_text_has_the_same_vector_alone_and_among_others(client: openai.OpenAI) -> None:
    many = [f"{text} {index}" for index in range(12) for text in TEXTS[:4]]
    together = vectors_of(client.embeddings.create(model="tiny", input=many))
    for index in (0, 17, 45):
        [alone] = vectors_of(client.embeddings.create(model="tiny", input=many[index]))
        assert np.abs(together[index] - alone).max() < 1e-5


def test_scores(client: openai.OpenAI, house: House) -> None:
    body = {"model": "tiny", "text_1": TEXTS[0], "text_2": TEXTS[1:]}
    reply: Any = client.post("/score", cast_to=object, body=body)
    first, *rest = expected(house.folder, TEXTS, "cls")
    scores = [each["score"] for each in reply["data"]]
    assert scores == pytest.approx([float(first @ each) for each in rest], abs=1e-5)


def test_tokens_and_back(house: House) -> None:
    ids = vocabulary()
    with httpx.Client(
        base_url=house.worker.url, headers={"Authorization": f"Bearer {TOKEN}"}
    ) as http:
        reply = http.post("/tokenize", json={"prompt": "The cats"}).json()
        assert reply["tokens"] == [ids[CLS], ids["the"], ids["cat"], ids["##s"], ids["[SEP]"]]
        assert reply["max_model_len"] == CONTEXT
        bare = http.post("/tokenize", json={"prompt": "cat", "add_special_tokens": False}).json()
        assert bare["tokens"] == [ids["cat"]]
        written = http.post("/tokenize", json={"prompt": WRITTEN}).json()["tokens"]
        assert written.count(ids[CLS]) == 1
        text = http.post("/detokenize", json={"tokens": reply["tokens"]}).json()["prompt"]
        assert text == "[CLS] the cats[SEP]"
        hidden = {"tokens": reply["tokens"], "skip_special_tokens": True}
        assert http.post("/detokenize", json=hidden).json()["prompt"] == "the cats"


def test_too_long_is_refused_and_what_is_cut_ends_as_any_text(
    client: openai.OpenAI, house: House
) -> None:
    text = "x " * CONTEXT
    with pytest.raises(openai.BadRequestError, match=f"tiny holds {CONTEXT}") as caught:
        client.embeddings.create(model="tiny", input=text)
    assert caught.value.code == "context_length_exceeded"
    cut = client.embeddings.create(
        model="tiny", input=text, extra_body={"truncate_prompt_tokens": -1}
    )
    assert cut.usage.model_extra == {"prompt_tokens_dropped": 2}
    # the longest that fits, between the tokens that begin and end each text
    wanted = expected(house.folder, ["x " * (CONTEXT - 2)], "cls")
    assert np.abs(vectors_of(cut) - wanted).max() < 1e-5


CHATS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "hi"}], "truncation": "rolling", "stream": True,
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "hi"}],
        "response_format": {"type": "json_object"},
    }),
    ("/v1/completions", {"prompt": "hi"}),
    ("/v1/responses", {"input": "hi", "store": False}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
]  # fmt: skip


@pytest.mark.parametrize("server", ["worker", "controller"])
@pytest.mark.parametrize(("path", "body"), CHATS)
def test_what_needs_an_answer_is_refused(
    house: House, server: str, path: str, body: dict[str, Any]
) -> None:
    url = getattr(house, server).url
    headers = {"Authorization": f"Bearer {TOKEN}"}
    reply = httpx.post(f"{url}{path}", json={"model": "tiny", **body}, headers=headers)
    assert reply.status_code == 400, reply.text
    message = reply.json()["error"]["message"]
    assert "tiny is an encoder" in message and "/v1/embeddings" in message


def test_its_card_says_what_it_is_for(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    about = (card.model_extra or {})["chatserve"]
    assert about["embeddings_only"] is True
    assert "float32: vectors are compared" in about["reasons"]
    assert (about["pooling"], about["dtype"], about["context_length"]) == (
        "cls", "float32", CONTEXT,
    )  # fmt: skip


def test_it_takes_no_adapters(house: House) -> None:
    body = {"lora_name": "a", "lora_path": "a"}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    reply = httpx.post(f"{house.worker.url}/v1/load_lora_adapter", json=body, headers=headers)
    assert reply.status_code == 400


# Below: what is loaded, and what is not.


def embed(folder: Path, texts: list[str], **options: Any) -> tuple[np.ndarray, ServedModel]:
    """Without a server, a step at a time, vectors of length 1."""
    async_engine, model = load(config_of(folder, **options))
    engine: Any = async_engine._engine
    ids = [model.tokenization.of_embedded(text) for text in texts]
    for index, each in enumerate(ids):
        engine.add(str(index), each, SamplingParams(max_tokens=0, pooling=model.pooling))
    events = {}
    while engine.has_work:
        events.update({event.seq_id: event.embedding for event in engine.step()})
    vectors = np.array([events[str(index)] for index in range(len(ids))], np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), model


@pytest.mark.parametrize("model_type", sorted(SERVED_TYPES - {"bert"}))
def test_every_type_that_is_served(model_type: str, tmp_path: Path) -> None:
    save_encoder(tmp_path, model_type)
    longest = "x " * (CONTEXT - 2)
    texts = [*TEXTS, longest]
    found, model = embed(tmp_path, texts)
    assert (model.pooling, model.hidden_size, model.context_length) == ("mean", HIDDEN, CONTEXT)
    assert np.abs(found - expected(tmp_path, texts, "mean")).max() < 1e-5


def test_one_by_one_is_the_same_to_the_bit_whatever_else_runs(house: House) -> None:
    together, _ = embed(house.folder, TEXTS, deterministic=True)
    alone, _ = embed(house.folder, TEXTS[2:3], deterministic=True)
    assert np.array_equal(together[2], alone[0])


def test_half_precision_where_it_is_asked_for(house: House) -> None:
    found, model = embed(house.folder, TEXTS, dtype="bfloat16")
    assert model.description["dtype"] == "bfloat16"
    assert np.abs(found - expected(house.folder, TEXTS, "cls")).max() < 0.05


@pytest.fixture
def folder(house: House, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(house.folder, tmp_path / "bert"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def test_the_limit_of_sentence_transformers_is_kept(folder: Path) -> None:
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}', "utf-8")
    assert embed(folder, ["x"])[1].context_length == 16


def test_weights_in_a_bin_file_under_the_names_of_another_head(folder: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    bare = {name: rows for name, rows in state.items() if not name.startswith("pooler.")}
    torch.save({f"bert.{name}": rows for name, rows in bare.items()}, folder / "pytorch_model.bin")
    edit(folder / "config.json", architectures=["BertForMaskedLM"])
    wanted = expected(folder, TEXTS, "cls")
    assert np.abs(embed(folder, TEXTS)[0] - wanted).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"model_type": "nomic_bert"}, "'nomic_bert' is an encoder that is not"),
        ("config.json", {"architectures": ["BertForSequenceClassification"]}, "reranker"),
        ("config.json", {"hidden_size": 64}, "size mismatch|cannot load"),
        ("config.json", {"num_hidden_layers": 3}, "lacks 16 tensors"),
        ("config.json", {"num_attention_heads": 5}, "BertConfig|cannot load"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "which is not served"),
    ],
)
def test_what_would_give_other_vectors_is_refused(
    folder: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    edit(folder / name, **changes)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(config_of(folder))
    assert caught.value.exit_code == 3


def test_a_layer_behind_the_pooling_is_refused(folder: Path) -> None:
    kinds = ("models.Transformer", "models.Pooling", "models.Dense")
    modules = [{"idx": i, "type": f"sentence_transformers.{each}"} for i, each in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    with pytest.raises(ModelLoadError, match="'Dense' behind the network"):
        load(config_of(folder))
    (folder / "modules.json").write_text(json.dumps(modules[:2]), "utf-8")
    embed(folder, ["x"])


def test_weights_that_compute_nothing_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["encoder.layer.0.output.dense.weight"].fill_(float("nan"))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match="no finite states"):
        load(config_of(folder))


def test_weights_that_do_not_fit_are_not_read(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: object, name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(SafetensorsFile, "read", read)
    monkeypatch.setattr(encoder_network, "available_bytes", lambda device: 1 << 16)
    with pytest.raises(DoesNotFit, match="of weights in float32") as caught:
        load(config_of(house.folder))
    assert caught.value.exit_code == 4


def test_loading_tells_how_far_it_is(house: House) -> None:
    told: list[tuple[int, int]] = []
    load(config_of(house.folder), lambda done, total: told.append((done, total)))
    [total] = {total for _, total in told}
    assert (told[0][0], told[-1][0]) == (0, total) and total > 0
    assert told == sorted(told)


@pytest.mark.parametrize(
    "options", [{"load_8bit": True}, {"adapter": ("a",)}, {"conv_template": "vicuna"}]
)
def test_flags_without_a_meaning_are_refused(house: House, options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}: .* is an encoder"):
        load(config_of(house.folder, **options))
