"""A receipt of made-up figures, for whoever stores or shows one."""

from __future__ import annotations

from typing import Any

import chatserve
from chatserve.models.form import PlainForm
from chatserve.models.packing import Packing
from chatserve.models.receipt import LayerError, MeasuredForm, Measurement, Receipt, Text

INT8 = PlainForm("cpu", "float32", Packing(), on_kernels=True)


def measurement(form: PlainForm = INT8, **changes: Any) -> Measurement:
    figures: dict[str, Any] = {
        "mean_kl": 0.0059, "p99_kl": 0.033, "top1_agreement": 0.958, "top1_error": 0.005,
        "perplexity": 13.0, "quantiles": tuple(index / 1000 for index in range(101)),
        "layers": tuple(LayerError(index, 0.01 * (index + 1), 0.02) for index in range(5)),
    }  # fmt: skip
    return Measurement(MeasuredForm.of(form), **{**figures, **changes})


def receipt(fingerprint: str, *measurements: Measurement, **changes: Any) -> Receipt:
    facts: dict[str, Any] = {
        "version": chatserve.__version__, "text": Text("shipped", "ab" * 32, 1924, 512),
        "reference": "float32", "reference_perplexity": 12.9,
        "measured_at": "2026-11-23T10:00:00+00:00",
    }  # fmt: skip
    facts |= changes
    return Receipt(fingerprint, measurements=measurements or (measurement(),), **facts)
