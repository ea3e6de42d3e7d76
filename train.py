"""The training entry: `python train.py [RECIPE] [--section.key value ...]`, the same as `jaxgpt train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxgpt.cli import main as jaxgpt


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says (without the program's name); return the exit code."""
    return jaxgpt(["train", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
