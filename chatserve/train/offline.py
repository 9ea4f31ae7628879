"""Training libraries without the network: no telemetry, no look-ups, no warnings about each other.

`no_network` changes this process's environment and the hub library's constants, and puts both back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from chatserve import environment

_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # tokens are made by our own tokenizer; its threads would only warn after a fork
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def no_network() -> Iterator[None]:
    """Nothing inside asks a hub for anything, whatever the libraries' own customs are."""
    import datasets
    from huggingface_hub import constants
    from transformers.utils import logging

    flags = (constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY)
    constants.HF_HUB_OFFLINE = constants.HF_HUB_DISABLE_TELEMETRY = True
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    has_map_bar = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with environment.overridden(_VARIABLES), warnings.catch_warnings():
            # what these libraries tell each other's authors; nobody who trains can act on it
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_map_bar:
            datasets.enable_progress_bars()
        if has_bar:
            logging.enable_progress_bar()
        constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = flags
