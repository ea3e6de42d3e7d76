"""The verbs of fine-tuned models: classify and chat."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxgpt.arguments import parse
from jaxgpt.cli.options import RunOptions, WritingOptions, load_model
from jaxgpt.config import require

if TYPE_CHECKING:
    from jaxgpt.apps.chatbot import Chatbot
    from jaxgpt.apps.sentiment import Classifier, Judged


@dataclass(frozen=True)
class ClassifyOptions(RunOptions):
    """Label texts: as many lines come out as went in, in their order; texts that belong together, tab-separated."""

    model: str
    """a fine-tuning run, or a classifier that export wrote"""
    file: tuple[str, ...] = ()
    """the text file to label, also without --file; - or none: standard input"""
    text: tuple[str, ...] = ()
    """a text to label, instead of a file; several: each a line of its own"""
    json: bool = False
    """print one JSON object a line: texts, label, probabilities, cut (tokens not read)"""
    tsv: bool = False
    """print the label and the probabilities of all classes, tab-separated, below a header"""
    batch_size: int = 32
    """texts computed at once"""

    def __post_init__(self) -> None:
        require(len(self.file) <= 1, f"one file is labelled at a time, not {len(self.file)}: {', '.join(self.file)}")
        require(not (self.file and self.text), "--text and a file are both given; one is enough")
        require(not (self.json and self.tsv), "--json and --tsv are both given; one is enough")
        require(self.batch_size >= 1, f"batch-size is {self.batch_size}; it must be at least 1")


@dataclass(frozen=True)
class ChatOptions(WritingOptions):
    """Talk with a model. At a terminal: /reset forgets, /system TEXT tells it something, /save FILE, /quit."""

    system: str | None = None
    """what the model is told before the first message"""
    transcript: str | None = None
    """add all that is said to the end of this file too, a JSON message a line, as it comes"""
    jsonl: bool = False
    """for programs: a JSON message {"content": ...} a line in and out; {"reset": true} begins anew"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.samples == 1 and self.beams == 1, "a chat has one answer: samples and beams must be 1")


def classify(arguments: list[str]) -> int:
    """`jaxgpt classify`."""
    options = parse(ClassifyOptions, arguments, "jaxgpt classify", positional="--file")
    from jaxgpt.apps.lines import open_lines
    from jaxgpt.apps.sentiment import Classifier

    _write_utf8()
    lines, ready = iter(options.text), lambda: True
    if not options.text:
        lines, ready = open_lines(options.file[0] if options.file else "-", strict=False)
    classifier = Classifier(options.model, checkpoint=options.checkpoint, dtype=options.dtype, base=options.base)
    classes = () if classifier.config.regression else classifier.config.labels
    if options.tsv:
        print("\t".join(["label", *map(_on_one_line, classes)]))
    wrong = False
    problems: dict[int, str] = {}
    examples = _examples(lines, classifier, problems)
    for number, judged in enumerate(classifier.stream(examples, batch_size=options.batch_size, ready=ready), 1):
        if number in problems:
            print(f"jaxgpt: line {number}: {problems[number]}", file=sys.stderr)
            wrong = True
        print(_judgement(judged, options, len(classes)), flush=True)
    return 2 if wrong else 0


def _examples(lines: Iterable[str], classifier: Classifier, problems: dict[int, str]) -> Iterator[tuple[str, ...]]:
    """Each line as the texts of an example; one that is none becomes an empty one, and `problems` says why."""
    needed, task = classifier.texts_needed, classifier.config.task
    for number, line in enumerate(lines, 1):
        texts = tuple(line.split("\t")) if needed != 1 else (line,)
        fits = len(texts) == needed if needed is not None else len(texts) >= 3
        if not fits:
            takes = f"{needed} texts" if needed else "a context and two answers or more"
            problems[number] = f"the task {task} takes {takes}, tab-separated, and it has {len(texts)}"
        elif not all(text.strip() for text in texts):
            problems[number] = "a text is empty, so it has no label"
        elif problem := _unreadable(classifier, texts):
            fits, problems[number] = False, problem
        yield texts if fits else ("",) * (needed or 3)


def _unreadable(classifier: Classifier, texts: tuple[str, ...]) -> str | None:
    """What keeps texts from becoming tokens; None if nothing does."""
    from jaxgpt.apps.lines import undecoded

    try:
        for text in texts:
            classifier.tokenizer.check(text.strip())
    except ValueError as error:
        return next(filter(None, map(undecoded, texts)), str(error))
    return None


def _judgement(judged: Judged, options: ClassifyOptions, classes: int) -> str:
    if options.json:
        return json.dumps(dataclasses.asdict(judged), ensure_ascii=False)
    label = "" if judged.label is None else _on_one_line(judged.label)
    shares = [f"{share:.4f}" for share in judged.probabilities.values()]
    if options.tsv:
        return "\t".join([label, *(shares or [""] * classes)])
    return label + (f"\t{max(shares)}" if shares else "")


def _on_one_line(label: str) -> str:
    """A label without the newlines and tabs that JSON can give it, which would make it several."""
    return " ".join(label.split())


def chat(arguments: list[str]) -> int:
    """`jaxgpt chat`."""
    options = parse(ChatOptions, arguments, "jaxgpt chat")
    from jaxgpt.apps.chatbot import Chatbot
    from jaxgpt.apps.terminal import talk

    _write_utf8()
    bot = Chatbot(load_model(options, options.draft), system=options.system, settings=options.settings)
    if options.jsonl:
        return _answer_programs(bot, options.transcript)
    talk(bot, options.transcript)
    return 0


def _answer_programs(bot: Chatbot, transcript: str | None) -> int:
    """Answer JSON messages line by line; what is wrong with one is answered too, and the rest goes on."""
    from jaxgpt.apps.lines import open_lines
    from jaxgpt.apps.terminal import Transcript

    lines, _ = open_lines("-", strict=False)
    wrong = False
    with Transcript(transcript) as kept:
        for number, line in enumerate(lines, 1):
            try:
                reply = _reply(bot, line)
            except ValueError as error:
                print(f"jaxgpt: line {number}: {error}", file=sys.stderr)
                reply, wrong = {"error": str(error)}, True
            print(json.dumps(reply, ensure_ascii=False), flush=True)
            if "content" in reply:
                kept.write(bot.messages[-2:])
    return 2 if wrong else 0


def _reply(bot: Chatbot, line: str) -> dict[str, Any]:
    from jaxgpt.apps.lines import undecoded

    if problem := undecoded(line):
        raise ValueError(problem)
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ValueError('it is not a JSON object, such as {"content": "hello"}')
    if message.get("reset") is True:
        bot.reset()
        return {"reset": True}
    content, role = message.get("content"), message.get("role", "user")
    if not isinstance(content, str) or role not in ("user", "system"):
        raise ValueError('it must have "content", a text, and no "role" but user or system; or be {"reset": true}')
    if role == "system":
        bot.tell(content)
        return {"system": bot.system}
    reply = {"role": "assistant", "content": bot.answer(content)}
    return reply | ({"forgotten": bot.forgotten} if bot.forgotten else {})


def _write_utf8() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as the lines that come in are, whatever the terminal's
