"""What holds for all tests: no timing decides, and threads do not fight for the cores."""

from __future__ import annotations

import signal

from hypothesis import settings as hypothesis_settings

from chatserve.environment import limit_spinning

limit_spinning()  # before the first test imports torch

# a shell starts background jobs deaf to Ctrl-C, and the programs under test would inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# a busy machine makes an example slow, not wrong
hypothesis_settings.register_profile("chatserve", deadline=None)
hypothesis_settings.load_profile("chatserve")
