"""`python -m chatserve.server [WEIGHTS ...]` = `chatserve serve`."""

from chatserve.server.launch import main

if __name__ == "__main__":
    raise SystemExit(main())
