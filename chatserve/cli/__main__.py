"""`python -m chatserve.cli ARGS` = `chatserve chat ARGS`."""

import sys

from chatserve.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["chat", *sys.argv[1:]]))
