"""`python -m chatserve` = `chatserve`."""

from chatserve.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
