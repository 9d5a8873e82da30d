"""`python -m jaxcompress`."""

import sys

from jaxcompress.cli import main

if __name__ == "__main__":
    sys.exit(main())
