"""transformers' `generate`, in the Python that runs the benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.peers.agent import AgentPeer
from benchmarks.peers.peer import Peer
from benchmarks.run_model import RunModel

DEFAULT_FORMS = ("bf16",)
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def peers(mode: str, model: RunModel, forms: Sequence[str]) -> list[Peer]:
    """One peer per dtype; transformers has no server that we compare with."""
    if mode == "http":
        return []
    module = [sys.executable, "-m", "benchmarks.agents.transformers_agent", str(model.folder)]
    return [
        AgentPeer(f"transformers {form}", [*module, _DTYPES[form]], {"HF_HUB_OFFLINE": "1"})
        for form in forms
    ]
