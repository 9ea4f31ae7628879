"""Programs that measure one engine from inside its own process; `loop.py` is what they share.

An agent may run under a Python that has no chatserve: only the standard library and the engine.
"""
