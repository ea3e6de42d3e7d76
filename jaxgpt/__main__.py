"""`python -m jaxgpt`, the same as `jaxgpt`."""

import sys

from jaxgpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
