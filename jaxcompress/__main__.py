"""`python -m jaxcompress`."""

import os
import sys

from jaxcompress.cli import main

INTERRUPTED = 130

if __name__ == "__main__":
    code = main()
    if code == INTERRUPTED:
        # Threads may be inside compiled programs, which the interpreter's end crashes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
