"""Layer by layer is the served network, to the bit; the reference is full precision."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy, choose_policy
from chatserve.models.form import native_config
from chatserve.models.loader import load_model
from chatserve.quality import measure as module
from chatserve.quality.divergence import Divergence
from chatserve.quality.measure import Result, measure
from chatserve.quality.texts import TokenText
from tests import networks, tiny

FORMS = {
    "int8": {"load_8bit": True},
    "fine": {"load_8bit": True, "quant_group": "32"},
    "int4": {"load_4bit": True},
    "half": {"dtype": "bfloat16"},
    "full": {"dtype": "float32"},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": 20},
    "alternating": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 20,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}  # fmt: skip
WINDOWS = tuple(
    tuple(torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist())
    for length in (70, 33, 64)
)
TEXT = TokenText("test", WINDOWS)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save_model(path, dtype=torch.bfloat16, tokenizer=False, **FAMILIES[request.param])
    return path


@pytest.fixture
def checkpoint(folder: Path) -> Iterator[Checkpoint]:
    opened = open_checkpoint(folder)
    with closing(opened.weights):
        yield opened


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    path = tmp_path_factory.mktemp("model")
    tiny.save_model(path, tokenizer=False)
    opened = open_checkpoint(path)
    with closing(opened.weights):
        yield opened


class Spy(Divergence):
    """Also keeps what it compares."""

    seen: ClassVar[list[Spy]] = []

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[torch.Tensor] = []
        self.reference: list[torch.Tensor] = []
        self.seen.append(self)

    def add(self, logits: torch.Tensor, reference: torch.Tensor, next_ids: torch.Tensor) -> None:
        self.logits.append(logits.clone())
        self.reference.append(reference.clone())
        super().add(logits, reference, next_ids)


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> list[Spy]:
    monkeypatch.setattr(Spy, "seen", [])
    monkeypatch.setattr(module, "Divergence", Spy)
    return Spy.seen


def policies(*names: str) -> list[DevicePolicy]:
    return [choose_policy("cpu", **FORMS[name]) for name in names]  # type: ignore[arg-type]


def run(checkpoint: Checkpoint, *names: str, **changes: Any) -> Result:
    return measure(checkpoint, native_config(checkpoint), policies(*names), TEXT, **changes)


def served_logits(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Of all windows, from the network that the engine would have."""
    (policy,) = policies(name)
    model = load_model(checkpoint, policy)
    with torch.inference_mode():
        return torch.cat([networks.logits(model, window).float() for window in WINDOWS])


def test_every_layer_and_the_head_are_those_of_the_served_network_to_the_bit(
    checkpoint: Checkpoint, spies: list[Spy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLICE_VALUES", 1000)  # several slices of each matrix
    monkeypatch.setattr(module, "_BLOCK", 50)  # positions, of several blocks
    run(checkpoint, "int8", "fine", "int4")
    for spy, name in zip(spies, ("int8", "fine", "int4"), strict=True):
        assert torch.equal(torch.cat(spy.logits), served_logits(checkpoint, name)), name
    full = served_logits(checkpoint, "full").log_softmax(-1)
    assert (torch.cat(spies[0].reference) - full).abs().max() < 2e-4


def test_on_pytorch_s_operators_too(checkpoint: Checkpoint, spies: list[Spy]) -> None:
    result = run(checkpoint, "half", "full")
    expected = served_logits(checkpoint, "half")
    # products of another number of rows round differently
    assert (torch.cat(spies[0].logits) - expected).abs().max() <= 0.02 * expected.abs().max()
    half, full = result.measurements
    assert full.mean_kl < 1e-6 < half.mean_kl


def test_without_kernels_int8_runs_on_pytorch_s_operators(
    one: Checkpoint, spies: list[Spy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATSERVE_KERNELS", "off")
    run(one, "int8")
    expected = served_logits(one, "int8")
    assert (torch.cat(spies[0].logits) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_the_figures_are_those_of_the_logits(one: Checkpoint) -> None:
    result = run(one, "int8", "int4")
    full = served_logits(one, "full").double().log_softmax(-1)
    following = [id_ for window in WINDOWS for id_ in (*window[1:], -1)]
    places = [index for index, id_ in enumerate(following) if id_ >= 0]
    next_ids = torch.tensor([following[index] for index in places])

    def perplexity(logits: torch.Tensor) -> float:
        rows = logits.double().log_softmax(-1)[places]
        return float((-rows[range(len(places)), next_ids]).mean().exp())

    assert result.reference_perplexity == pytest.approx(perplexity(full), rel=1e-4)
    for found, name in zip(result.measurements, ("int8", "int4"), strict=True):
        logits = served_logits(one, name)
        ours = logits.double().log_softmax(-1)
        kl = (full.exp() * (full - ours)).sum(-1)
        same = (ours.argmax(-1) == full.argmax(-1)).double()
        assert found.mean_kl == pytest.approx(float(kl.mean()), rel=0.02)
        assert found.p99_kl == pytest.approx(float(kl.quantile(0.99)), rel=0.02)
        assert found.top1_agreement == pytest.approx(float(same.mean()), abs=0.01)
        assert found.top1_error == pytest.approx(float(same.std()) / math.sqrt(len(same)), rel=0.05)
        assert found.perplexity == pytest.approx(perplexity(logits), rel=1e-4)
        assert found.quantiles == tuple(sorted(found.quantiles)) and len(found.quantiles) == 101
        assert found.quantiles[-1] == pytest.approx(float(kl.max()), rel=0.02)


def test_the_worst_layer_is_the_one_with_a_weight_far_from_the_others(
    tmp_path: Path, one: Checkpoint
) -> None:
    model = tiny.build_hf_model(num_hidden_layers=4)
    with torch.no_grad():  # its row's scale leaves nothing for the others
        model.model.layers[2].mlp.down_proj.weight[:, 5] = 30
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with closing(checkpoint.weights):
        (found,) = run(checkpoint, "int8").measurements
    assert [layer.layer for layer in found.layers] == [0, 1, 2, 3]
    assert found.worst_layers[0].layer == 2 and len(found.worst_layers) == 3
    assert found.worst_layers[0].added > 2 * found.worst_layers[1].added
    # what a layer has spoilt stays
    assert found.layers[1].drift < found.layers[2].drift
    assert found.layers[3].drift > found.layers[3].added / 10


def test_drift_starts_with_the_error_of_the_embedding_and_grows(one: Checkpoint) -> None:
    (full, int4) = run(one, "full", "int4").measurements
    assert all(layer.added < 1e-5 and layer.drift < 1e-5 for layer in full.layers)
    assert int4.layers[0].drift < int4.layers[1].drift


def test_progress_ends_where_it_said(one: Checkpoint) -> None:
    calls: list[tuple[int, int]] = []
    run(one, "int8", progress=lambda done, total: calls.append((done, total)))
    assert len({total for _, total in calls}) == 1
    done = [each for each, _ in calls]
    assert done == sorted(done)
    assert done[-1] == calls[0][1]


@pytest.mark.parametrize("name", ["int8", "int4", "half"])
def test_weights_that_compute_nothing_are_no_measurement(
    tmp_path: Path, name: str, one: Checkpoint
) -> None:
    model = tiny.build_hf_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = math.nan
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with closing(checkpoint.weights), pytest.raises(ModelLoadError, match="computes no numbers"):
        run(checkpoint, name)


def test_one_layer_of_a_form_at_a_time(one: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network that is built has a single layer, and the one before is gone by then."""
    import weakref

    from chatserve.quality import served

    alive: list[weakref.ref[Any]] = []

    class Counted(served.KernelLlama):
        def __init__(self, config: ModelConfig, *args: Any, **kwargs: Any) -> None:
            assert config.num_layers == 1
            assert not [ref for ref in alive if ref() is not None]
            super().__init__(config, *args, **kwargs)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(served, "KernelLlama", Counted)
    run(one, "int8")
    assert len(alive) == 2  # all layers in one, then the head


def test_dataclasses_of_a_result_hold_plain_numbers(one: Checkpoint) -> None:
    (found,) = run(one, "int8").measurements
    flat = dataclasses.asdict(found)
    assert all(type(flat[name]) is float for name in ("mean_kl", "p99_kl", "perplexity"))
