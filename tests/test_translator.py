"""The translator: a line for each line, in order, whatever the lines; and what it says of itself."""

import dataclasses
import json
import random
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import ROOT, environment

from jaxgpt import launch
from jaxgpt.apps.heatmap import draw_attention
from jaxgpt.apps.translator import SETTINGS, Translator, evaluate
from jaxgpt.cli import main
from jaxgpt.config import (
    DataConfig,
    GPTConfig,
    OptimizerConfig,
    PairsConfig,
    ParallelConfig,
    TrainConfig,
    TranslationConfig,
    transformer_size,
)
from jaxgpt.data.phrases import phrases
from jaxgpt.models.transformer import attention_map

SIZE = {"encoder_layers": 1, "decoder_layers": 2, "width": 16, "hidden": 32, "heads": 2, "context": 24}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps: a translator that says something, if not the right thing."""
    folder = tmp_path_factory.mktemp("translator")
    pairs = phrases()[0][:300]
    (folder / "pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    config = TranslationConfig(
        model=transformer_size("tiny", **SIZE),
        data=PairsConfig(path=(str(folder / "pairs.tsv"),), vocab_size=300, batch_tokens=256, buckets=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.0),
        parallel=ParallelConfig("single"),
        steps=12,
        eval_interval=4,
        average=2,
        out=str(folder / "run"),
        quiet=True,
    )
    launch.train(config)
    return folder / "run"


@pytest.fixture(scope="module")
def translator(run):
    return Translator(run)


def random_lines(generator, count):
    """Lines of any characters but the newline, empty and long ones among them."""
    alphabet = "abc déß漢字🙂\t\u2028\x0b\r0123"
    lengths = [generator.choice([0, 1, 3, 10, 200]) for _ in range(count)]
    return ["".join(generator.choice(alphabet) for _ in range(length)) for length in lengths]


def test_results_are_in_order_and_each_as_it_would_be_alone(translator):
    sentences = [source for source, _ in phrases()[1][:23]] + ["", "  ", "漢字"]
    random.Random(0).shuffle(sentences)
    together = translator.translate_batch(sentences, batch_size=5)
    assert [result.source for result in together] == sentences
    for sentence, result in zip(sentences, together, strict=True):
        assert result.text == translator.translate(sentence)
        assert (not sentence.strip()) == (result.hypotheses == ())


def test_streaming_waits_for_nothing_that_is_not_there(translator):
    taken = []

    def lines():
        for number in range(7):
            taken.append(number)
            yield f"{number} {number}"

    results = translator.stream(lines(), batch_size=2, ready=lambda: len(taken) % 3 != 0)
    assert next(results).source == "0 0" and taken == [0, 1, 2], "the third is not followed by one that is ready"
    assert [result.source for result in results] == [f"{number} {number}" for number in range(1, 7)]


def test_hypotheses_are_the_best_first(translator):
    settings = dataclasses.replace(SETTINGS, beams=5, samples=5)
    (result,) = translator.translate_batch(["three hundred and six"], settings)
    scores, texts = [found.score for found in result.hypotheses], [found.text for found in result.hypotheses]
    assert 2 <= len(scores) <= 5 and scores == sorted(scores, reverse=True)
    assert result.text == texts[0] and len(set(texts)) == len(texts)


def test_what_is_too_long_is_cut_and_counted(translator):
    text = "one hundred and " * 30
    (result,) = translator.translate_batch([text])
    ids = translator.tokenizer.encode(text)
    assert result.cut == len(ids) - translator.max_source > 0
    assert result.text == translator.translate(translator.tokenizer.decode(ids[: translator.max_source]))


def test_attention_is_a_share_of_the_source(translator, tmp_path):
    weights, source, target = translator.attention("half past three", "halb vier")
    assert weights.shape == (len(target), len(source)) and source[-1] == target[-1] == "end"
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-5)
    end, encode = translator.tokenizer.separator, translator.tokenizer.encode
    read, said = [*encode("half past three"), end], [end, *encode("halb vier")]
    every = attention_map(translator.config, translator.parameters, jnp.array(read), jnp.array(said))
    np.testing.assert_allclose(weights, every[SIZE["decoder_layers"] - 2].mean(axis=0), atol=1e-6)
    source[0] = "$$"  # which is no formula
    draw_attention(weights, source, target, tmp_path / "look.png")
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("which", ["best", "last", "average"])
def test_each_checkpoint_can_be_asked_for(run, translator, which):
    chosen = Translator(run, checkpoint=which)
    same = [np.array_equal(a, b) for a, b in zip(*map(leaves, (chosen, translator)), strict=True)]
    assert all(same) == (which == "average"), "the mean is the default of a run that averages"


def leaves(translator):
    return jax.tree.leaves(translator.parameters)


def test_one_string_is_not_several(translator):
    with pytest.raises(ValueError, match="translate takes one"):
        translator.translate_batch("four")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_for_each_line(run, translator, tmp_path, capsys, end):
    lines = random_lines(random.Random(1), 60)
    (tmp_path / "in.txt").write_bytes(("\ufeff" + end.join(lines)).encode())
    assert main(["translate", "--model", str(run), "--beam", "2", str(tmp_path / "in.txt")]) == 0
    out, err = capsys.readouterr()
    written = out.split("\n")
    # A file's last line may lack its newline; a last line that is empty is none.
    expected = lines if lines[-1] else lines[:-1]
    assert len(written) - 1 == len(expected) and written[-1] == ""
    alone = translator.translate_batch(expected, dataclasses.replace(SETTINGS, beams=2))
    assert written[:-1] == [result.text for result in alone] and any(written)
    long = [number for number, line in enumerate(expected, 1) if len(line) == 200 and line.strip()]
    assert [f"line {number} has" in err for number in long] == [True] * len(long)


def test_strict_leaves_out_what_does_not_fit(run, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("four\n" + "one hundred " * 50 + "\nfive\n")
    assert main(["translate", "--model", str(run), "--strict", str(tmp_path / "in.txt")]) == 2
    out, err = capsys.readouterr()
    first, second, third = out.splitlines()
    assert first and not second and third
    assert "line 2 has" in err and "it is not translated" in err and len(err.splitlines()) == 1


def test_the_forms_of_the_output(run, translator, tmp_path, capsys):
    source = tmp_path / "in.txt"
    source.write_text("half past three\n\nfour\n")
    common = ["translate", str(source), "--model", str(run), "--beam", "3"]
    assert main([*common, "--json", "--attention", str(tmp_path / "look.png")]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["source"] for record in records] == ["half past three", "", "four"]
    assert records[1]["text"] == "" and records[1]["hypotheses"] == []
    assert records[0]["text"] == records[0]["hypotheses"][0]["text"] and (tmp_path / "look.png").exists()
    source.write_text("\nfour\n")
    assert main([*common, "--attention", str(tmp_path / "nothing.png")]) == 0
    assert "line 1 has no translation to draw" in capsys.readouterr().err and not (tmp_path / "nothing.png").exists()
    source.write_text("half past three\n\nfour\n")
    assert main([*common, "--n-best", "3"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    best = translator.translate_batch(
        ["half past three", "", "four"], dataclasses.replace(SETTINGS, beams=3, samples=3)
    )
    expected = [str(n) for n, found in enumerate(best, 1) for _ in found.hypotheses or "-"]
    assert [row[0] for row in rows] == expected and expected.count("2") == 1 and len(expected) > 3
    assert all(len(row) == 3 for row in rows)


def test_standard_input_is_translated_as_it_comes(run, tmp_path):
    process = started(run, tmp_path)
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    for line in ("four", "", "half past three"):  # each is answered before the next is asked
        process.stdin.write(line + "\n")
        process.stdin.flush()
        assert process.stdout.readline().endswith("\n")
    rest, _ = process.communicate("five\nsix", timeout=120)
    watchdog.cancel()
    assert len(rest.splitlines()) == 2 and process.returncode == 0


def started(run, cache, *flags):
    """`jaxgpt translate` with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "jaxgpt", "translate", "--model", str(run), "--beam", "1", *flags],
        cwd=ROOT, env=environment(cache) | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip


def test_an_error_ends_it_though_more_may_come(tmp_path):
    process = started("nowhere", tmp_path)
    assert process.wait(120) == 2
    assert process.stderr.read().startswith("jaxgpt: nowhere is not a run folder")
    process.communicate()


def test_scores_are_those_of_sacrebleu(run, translator, tmp_path, capsys):
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs sacrebleu, the extra 'eval'")
    pairs = phrases()[1][:40]
    (tmp_path / "source").write_text("".join(f"{source}\n" for source, _ in pairs))
    # Half of the references are what the model says, so that the score is neither 0 nor 100.
    texts = [result.text for result in translator.translate_batch([source for source, _ in pairs])]
    references = [
        text if number % 2 else target for number, (text, (_, target)) in enumerate(zip(texts, pairs, strict=True))
    ]
    (tmp_path / "reference").write_text("".join(f"{text}\n" for text in references))
    scores = evaluate(translator, tmp_path / "source", tmp_path / "reference", tokenize="none")
    bleu = sacrebleu.metrics.BLEU(tokenize="none")
    assert scores.bleu == pytest.approx(bleu.corpus_score(texts, [references]).score)
    assert scores.chrf == pytest.approx(sacrebleu.metrics.CHRF().corpus_score(texts, [references]).score)
    assert scores.exact_match == np.mean(
        [text.split() == ref.split() for text, ref in zip(texts, references, strict=True)]
    )
    files = ["--source", str(tmp_path / "source"), "--reference", str(tmp_path / "reference")]
    assert main(["evaluate", "--model", str(run), *files, "--tokenize", "none", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bleu"] == scores.bleu and "tok:none" in printed["signature"] and printed["sentences"] == 40
    assert main(["evaluate", "--model", str(run), *files]) == 0
    assert "BLEU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("translate", "--model"),
        ("translate --model {run} absent.txt", "there is no file absent.txt"),
        ("translate --model {run} {text} {text}", "one file is translated at a time"),
        ("translate --model absent {text}", "absent is not a run folder"),
        ("translate --model {gpt} {text}", "run of another task, language-modelling; what uses it is: jaxgpt generate"),
        ("translate --model {run} --beam 0 {text}", "beam is 0"),
        ("translate --model {run} --beam 2 --n-best 3 {text}", "n-best is 3, more than beam 2"),
        ("translate --model {run} {folder}", "there is no file"),
        ("translate --model {run} --attention {folder}/none/a.png {text}", "there is no folder"),
        ("translate --model {run} {bytes}", "line 2, is not UTF-8: byte 0xff"),
        ("generate --model {run} --prompt a", "run of another task, translation; what uses it is: jaxgpt translate"),
        ("evaluate --model {run} --source {text}", "--source and --reference are both needed"),
        ("evaluate --model {run} --source {text} --reference {long}", "has 1 lines and .* 2"),
        ("evaluate --model {run} --data {text}", "run of another task, translation"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path_factory, capsys, gpt_run, arguments, message):
    folder = tmp_path_factory.mktemp("bad")
    files = {"text": b"four\n", "long": b"four\n" + b"one hundred " * 50 + b"\n", "bytes": b"four\nf\xff\n"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    named = {name: str(folder / name) for name in files} | {"run": str(run), "gpt": str(gpt_run), "folder": str(folder)}
    assert main([word.format(**named) for word in arguments.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("jaxgpt: ")
    assert re.search(message, err), err


@pytest.fixture(scope="module")
def gpt_run(tmp_path_factory):
    """A language model's run."""
    folder = tmp_path_factory.mktemp("gpt")
    (folder / "text.txt").write_text("the quick brown fox\n" * 50)
    config = TrainConfig(
        model=GPTConfig(layers=1, heads=1, width=8, context=8),
        data=DataConfig(path=(str(folder / "text.txt"),), tokenizer="byte", cache=str(folder / "cache")),
        parallel=ParallelConfig("single"),
        steps=1,
        sample_tokens=0,
        out=str(folder / "run"),
    )
    launch.train(config)
    return folder / "run"
