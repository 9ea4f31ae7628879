"""chatserve: a local chat-serving runtime with an OpenAI-compatible API."""

__version__ = "0.1.0"
