"""The chatbot: it sees what was said, the oldest turns make room, and what it is told wrong changes nothing."""

import json
import os
import pty
import select
import signal
import subprocess
import sys

import jax
import pytest
from program import ROOT, environment

from jaxgpt import api
from jaxgpt.api import LanguageModel
from jaxgpt.apps import terminal
from jaxgpt.apps.chatbot import Chatbot
from jaxgpt.config import GenerationConfig, GPTConfig
from jaxgpt.data.conversations import Message, encode_prompt
from jaxgpt.data.tokenizer import byte_tokenizer
from jaxgpt.models.gpt import init_parameters

GREEDY = GenerationConfig(temperature=0.0, max_new_tokens=6)
CONFIG = GPTConfig(vocab_size=257, context=96, layers=1, heads=2, width=16, init_std=0.5, unroll=1)


@pytest.fixture(scope="module")
def model():
    return LanguageModel(CONFIG, init_parameters(CONFIG, jax.random.key(4)), byte_tokenizer(), (256,))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "exported"
    api.export(model, path)
    return path


def test_an_answer_goes_on_from_all_that_was_said(model):
    bot = Chatbot(model, system="be brief", settings=GREEDY)
    said = [Message("system", "be brief")]
    for content in ("hi", "and?"):
        said.append(Message("user", content))
        expected = model.generate(encode_prompt(model.tokenizer, said), GREEDY).text
        assert bot.answer(content) == expected
        said.append(Message("assistant", expected))
    assert bot.messages == said[1:] and bot.forgotten == 0
    bot.reset()
    assert bot.messages == [] and bot.system == "be brief"


def test_the_oldest_turns_leave_first(model):
    bot = Chatbot(model, system="s", settings=GREEDY)
    for number in range(5):
        bot.answer(f"{number}" * 20)
    assert bot.forgotten > 0 and len(bot.messages) == 10
    seen = [Message("system", "s"), *bot.messages[:-1][bot.forgotten :]]
    prompt = encode_prompt(model.tokenizer, seen)
    assert len(prompt) + 6 <= CONFIG.context
    assert model.generate(prompt, GREEDY).text == bot.messages[-1].content
    longer = [Message("system", "s"), *bot.messages[:-1][bot.forgotten - 2 :]]
    assert len(encode_prompt(model.tokenizer, longer)) + 6 > CONFIG.context, "and no more of them than must"


def test_an_answer_has_the_room_that_is_left(model):
    bot = Chatbot(model, settings=GenerationConfig(temperature=0.0, max_new_tokens=500, stop_tokens=()))
    bot.answer("x" * 40)
    assert len(model.tokenizer.encode(bot.messages[-1].content)) <= CONFIG.context


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(model):
    bot = Chatbot(model, settings=GenerationConfig(temperature=0.0, max_new_tokens=20, stop_tokens=()))
    pieces = bot.stream("hi")
    came = next(pieces)
    pieces.close()
    assert bot.messages == [Message("user", "hi"), Message("assistant", came)]


@pytest.mark.parametrize(
    ("content", "message"), [(" ", "the message is empty"), ("x" * 90, "the model's context is 96")]
)
def test_what_cannot_be_answered_changes_nothing(model, content, message):
    bot = Chatbot(model, settings=GREEDY)
    bot.answer("hi")
    before = list(bot.messages)
    with pytest.raises(ValueError, match=message):
        bot.answer(content)
    assert bot.messages == before


def test_what_it_cannot_be_told_changes_nothing(model):
    bot = Chatbot(model, system="s", settings=GREEDY)
    with pytest.raises(ValueError, match="the system's message has 114 tokens"):
        bot.tell("x" * 95)
    assert bot.system == "s"
    bot.tell(" ")
    assert bot.system is None


# The command line, also where Ctrl-C is ignored by what is started, as by a job in the background.
HEEDING = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
HEEDING += "from jaxgpt.cli import main; sys.exit(main())"


def at_a_terminal(folder, cache, script):
    """Run `jaxgpt chat` at a pseudo-terminal; after each text that it prints, type what follows (None: Ctrl-C)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDING, "chat", "--model", str(folder), "--temperature", "0"],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True,
        env=environment(cache) | {"PYTHONPATH": str(ROOT), "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    shown, last = "", ""
    try:
        for wanted, typed in script:
            seconds = 0
            while wanted not in shown:
                assert seconds < 60 and process.poll() is None, f"{wanted!r} never came: {shown}"
                seconds += 1
                if select.select([ours], [], [], 1.0)[0]:
                    shown += os.read(ours, 1000).decode("utf-8", "replace")
                elif last is None:  # it came after the prompt, and before anything was waited for
                    os.killpg(process.pid, signal.SIGINT)
            shown, last = shown[shown.index(wanted) + len(wanted) :], typed
            os.killpg(process.pid, signal.SIGINT) if typed is None else os.write(ours, typed.encode())
        assert process.wait(timeout=60) == 0, shown
    finally:
        process.kill()
        os.close(ours)


def test_ctrl_c_stops_an_answer_and_not_the_program(folder, tmp_path):
    saved = tmp_path / "saved.jsonl"
    script = [("> ", None), ("Ctrl-D ends)", "/reset\n"), ("(forgotten)", f"/save {saved}\n")]
    script += [("(0 messages", "/quit\n")]
    at_a_terminal(folder, tmp_path, script)
    assert saved.read_text() == ""


def test_an_answer_that_ctrl_c_stops_is_the_answer(model, capsys):
    class Interrupted(Chatbot):
        def stream(self, content):
            def pieces():
                yield "as far"
                raise KeyboardInterrupt

            return self._said(content, pieces())

    bot = Interrupted(model)
    terminal._answer(bot, "hi")
    assert capsys.readouterr().out == "as far ...\n"
    assert bot.messages == [Message("user", "hi"), Message("assistant", "as far")]


def test_what_is_saved_replaces_nothing(model, tmp_path, capsys):
    bot, path = Chatbot(model, system="s", settings=GREEDY), tmp_path / "notes.txt"
    bot.answer("hi")
    path.write_text("dear diary")
    terminal._command(bot, f"/save {path}")
    assert capsys.readouterr().err == f"jaxgpt: {path} exists already; give /save another name\n"
    assert path.read_text() == "dear diary"
    terminal._command(bot, f"/save {tmp_path / 'new.jsonl'}")
    said = [json.loads(line)["role"] for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert said == ["system", "user", "assistant"]
    terminal._command(bot, f"/save {tmp_path / 'nowhere' / 'new.jsonl'}")
    assert "No such file" in capsys.readouterr().err


def chat(folder, cache, arguments, lines, code=0):
    """Run `jaxgpt chat` with these lines on its standard input; return what it printed to both streams."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxgpt", "chat", "--model", str(folder), "--temperature", "0", "--max-new-tokens", "6",
         *arguments],
        input="".join(line + "\n" for line in lines), capture_output=True, cwd=ROOT, timeout=120,
        encoding="utf-8", errors="surrogateescape",
        env=environment(cache) | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_programs_get_a_line_for_a_line(folder, model, tmp_path):
    lines = [
        '{"content": "hi"}', '{"content": "two\\nlines"}', '{"reset": true}', '{"content": "hi"}',
        '{"role": "system", "content": "s"}', "no json", "[]", '{"text": "hi"}', '{"content": " "}',
        '{"content": "\udcff"}', r'{"role": "system", "content": "\ud800"}', "", '{"content": "hi"}',
    ]  # fmt: skip
    kept = tmp_path / "transcript.jsonl"
    out, err = chat(folder, tmp_path, ["--jsonl", "--transcript", str(kept)], lines, code=2)
    replies = [json.loads(line) for line in out.splitlines()]
    assert len(replies) == len(lines)
    bot = Chatbot(model, settings=GREEDY)
    first, second = bot.answer("hi"), bot.answer("two\nlines")
    assert [reply.get("content") for reply in replies[:4]] == [first, second, None, first]
    assert replies[2] == {"reset": True} and replies[4] == {"system": "s"}
    assert [sorted(reply) for reply in replies[5:12]] == [["error"]] * 7
    assert err.count("jaxgpt: line ") == 7 and "line 10: it is not UTF-8: byte 0xff" in err and "Traceback" not in err
    bot = Chatbot(model, system="s", settings=GREEDY)
    bot.messages = [Message("user", "hi"), Message("assistant", first)]
    assert replies[12]["content"] == bot.answer("hi"), "after all that it goes on as it was"
    said = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    assert said[:2] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}] and len(said) == 8


def test_commands(folder, model, tmp_path):
    saved = tmp_path / "saved.jsonl"
    lines = ["hi", "\udcff", "/reset", "hi", "/system \udcff", "/system be brief", f"/system {'x' * 96}", "", "/sav x"]
    lines += ["/save", f"/save {saved}", "/quit", "never"]
    out, err = chat(folder, tmp_path, [], lines)
    answer = Chatbot(model, settings=GREEDY).answer("hi")
    assert out == f"{answer}\n{answer}\n"
    assert err.count("it is not UTF-8: byte 0xff") == 2 and "the system's message has 115 tokens" in err
    assert "there is no command /sav; did you mean /save?" in err and "/save needs the name of a file" in err
    told, *said = [json.loads(line) for line in saved.read_text("utf-8").splitlines()]
    assert told == {"role": "system", "content": "be brief"} and [one["content"] for one in said] == ["hi", answer]
