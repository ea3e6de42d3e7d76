"""The chatbot: it sees what was said, the oldest turns make room, and what it is told wrong changes nothing."""

import json
import subprocess
import sys

import jax
import pytest
from program import ROOT, environment

from jaxgpt import api
from jaxgpt.api import LanguageModel
from jaxgpt.apps.chatbot import Chatbot
from jaxgpt.config import GenerationConfig, GPTConfig
from jaxgpt.data.conversations import Message, encode_prompt
from jaxgpt.data.tokenizer import byte_tokenizer
from jaxgpt.models.gpt import init_parameters

pytestmark = pytest.mark.usefixtures("compilation_cache")

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


def chat(folder, cache, arguments, lines, code=0):
    """Run `jaxgpt chat` with these lines on its standard input; return what it printed to both streams."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxgpt", "chat", "--model", str(folder), "--temperature", "0", "--max-new-tokens", "6",
         *arguments],
        input="".join(line + "\n" for line in lines), capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=environment(cache) | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_programs_get_a_line_for_a_line(folder, model, tmp_path):
    lines = [
        '{"content": "hi"}', '{"content": "two\\nlines"}', '{"reset": true}', '{"content": "hi"}',
        '{"role": "system", "content": "s"}', "no json", "[]", '{"text": "hi"}', '{"content": " "}',
    ]  # fmt: skip
    kept = tmp_path / "transcript.jsonl"
    out, err = chat(folder, tmp_path, ["--jsonl", "--transcript", str(kept)], lines, code=2)
    replies = [json.loads(line) for line in out.splitlines()]
    assert len(replies) == len(lines)
    bot = Chatbot(model, settings=GREEDY)
    first, second = bot.answer("hi"), bot.answer("two\nlines")
    assert [reply.get("content") for reply in replies[:4]] == [first, second, None, first]
    assert replies[2] == {"reset": True} and replies[4] == {"system": "s"}
    assert [sorted(reply) for reply in replies[5:]] == [["error"]] * 4
    assert err.count("jaxgpt: line ") == 4 and "Traceback" not in err
    said = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    assert said[:2] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}] and len(said) == 6


def test_commands(folder, model, tmp_path):
    saved = tmp_path / "saved.jsonl"
    lines = ["hi", "/reset", "hi", "/system be brief", "", "/sav x", "/save", f"/save {saved}", "/quit", "never"]
    out, err = chat(folder, tmp_path, [], lines)
    answer = Chatbot(model, settings=GREEDY).answer("hi")
    assert out == f"{answer}\n{answer}\n"
    assert "there is no command /sav; did you mean /save?" in err and "/save needs the name of a file" in err
    told, *said = [json.loads(line) for line in saved.read_text("utf-8").splitlines()]
    assert told == {"role": "system", "content": "be brief"} and [one["content"] for one in said] == ["hi", answer]
