"""What holds for all tests: no timing decides, and threads do not fight for the cores."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from hypothesis import settings as hypothesis_settings

from chatserve.environment import limit_spinning

limit_spinning()  # before the first test imports torch

# where there is no GPU, Triton interprets; that is chosen when it is imported, which the libraries
# of training do on their own
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# a shell starts background jobs deaf to Ctrl-C, and the programs under test would inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# a busy machine makes an example slow, not wrong
hypothesis_settings.register_profile("chatserve", deadline=None)
hypothesis_settings.load_profile("chatserve")
