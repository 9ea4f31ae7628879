"""What an operator looks at, in the document."""

from __future__ import annotations

from typing import Any

from chatserve.protocol.measured import METRICS_PATH, STATUS_PATH
from chatserve.server.openapi.operation import ANY_REQUEST, Operation

OPERATIONS = (
    Operation(
        "get", METRICS_PATH, "metrics", "Operation", "Counts and gauges for Prometheus", str,
        about="In the text format of Prometheus, or OpenMetrics for who accepts that.",
        errors=ANY_REQUEST, media="text/plain",
    ),
    Operation(
        "get", STATUS_PATH, "status", "Operation", "Workers, models, queue and recent errors",
        dict[str, Any],
        about="What `chatserve top` and the page `/status` show.", errors=ANY_REQUEST,
    ),
)  # fmt: skip
