"""What holds for all tests: no timing decides, and threads do not fight for the cores."""

from __future__ import annotations

from hypothesis import settings as hypothesis_settings

from chatserve.environment import limit_spinning

limit_spinning()  # before the first test imports torch

# a busy machine makes an example slow, not wrong
hypothesis_settings.register_profile("chatserve", deadline=None)
hypothesis_settings.load_profile("chatserve")
