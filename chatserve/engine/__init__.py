"""The synchronous engine: add, abort, step. Has never heard of HTTP."""
