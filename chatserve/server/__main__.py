"""`python -m chatserve.server [WEIGHTS ...]` = `chatserve serve`."""

from chatserve.server.command_line import serve

if __name__ == "__main__":
    raise SystemExit(serve())
