"""The command line: `jaxgpt VERB ...`. Parses, calls the API, turns errors into one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input, 75 stopped by a signal and saved (start it again with --resume),
130 interrupted at once.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence

from jaxgpt import __version__
from jaxgpt.cli.planning import plan
from jaxgpt.cli.preparing import prepare
from jaxgpt.cli.text import evaluate, export, generate, verify
from jaxgpt.cli.training import inspect, train
from jaxgpt.cli.translation import translate
from jaxgpt.cli.tuned import chat, classify
from jaxgpt.config import BAD_INPUT, suggestion

LONGEST = 500  # characters of an error's line
VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "prepare": prepare,
    "inspect": inspect,
    "plan": plan,
    "generate": generate,
    "chat": chat,
    "translate": translate,
    "classify": classify,
    "evaluate": evaluate,
    "export": export,
    "verify": verify,
}

USAGE = """usage: jaxgpt VERB ...

  train [RECIPE] [--section.key value ...]   train a model (the same as python train.py)
  prepare TEXT.. --out FOLDER                tokenise a large corpus once, for --data.path FOLDER
  inspect RECIPE|RUN [--batch N]             show a batch that it is trained on
  plan RECIPE [--topology v5e:16x16]         will it fit, how fast can it be, before renting anything
  generate --model MODEL --prompt TEXT       let a model write
  chat --model MODEL                         talk with it
  translate --model RUN [FILE|-]             translate, line in, line out
  classify --model RUN [FILE|-]              label texts, line in, line out
  evaluate --model MODEL --data FILE         measure how well it predicts a text
  evaluate --model RUN --source F --reference G   measure how well it translates (BLEU, chrF)
  export --model MODEL --out FOLDER          write it for transformers and other programs
  verify --model MODEL [--reference hf]      check that it computes what it should

MODEL is a run folder, a Hugging Face folder, or a name on the hub such as gpt2.

jaxgpt VERB --help says more. --debug, with any verb, shows the traceback of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxgpt` with these arguments (default: the process's) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not debug:
        _silence_libraries()
    try:
        return _run(arguments)
    except SystemExit as end:  # --help of a verb
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does: nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"jaxgpt: {shown(error)}", file=sys.stderr)
        return 2 if isinstance(error, BAD_INPUT) else 1


def _silence_libraries() -> None:
    """Orbax prints the traceback of every thread of a failed save; the error itself reaches us, and so the user."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook = lambda arguments: None
    # What else it had begun to read of a damaged checkpoint is left where it was, and finds its event loop closed.
    sys.unraisablehook = lambda arguments: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def shown(error: Exception) -> str:
    """An error as one line, which a damaged file cannot make long, nor steer a terminal with."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 2 // 3]} [...] {text[-LONGEST // 3 :]}"
    if isinstance(error, (*BAD_INPUT, OSError, FloatingPointError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb == "--version":
        print(f"jaxgpt {__version__}")
        return 0
    if verb not in VERBS:
        raise ValueError(f"there is no verb {verb}{suggestion(verb, VERBS)}")
    return VERBS[verb](rest)
