"""Translation as a task: sums that no batching changes, scores of held-out sentences, and whole runs."""

import dataclasses
import functools
import math
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from jaxgpt import launch
from jaxgpt.config import (
    GenerationConfig,
    OptimizerConfig,
    PairsConfig,
    ParallelConfig,
    TransformerConfig,
    TranslationConfig,
)
from jaxgpt.data.pair_batches import PairBatches
from jaxgpt.data.pairs import Dropped, EncodedPairs, encode_pairs
from jaxgpt.data.phrases import phrases
from jaxgpt.data.tokenizer import byte_tokenizer
from jaxgpt.generation.translate import translate_tokens, translation_decoder
from jaxgpt.models.losses import unembed
from jaxgpt.models.transformer import Transformer, output_head
from jaxgpt.tasks import translation
from jaxgpt.tasks.scores import bleu
from jaxgpt.tasks.trained import load_trained
from jaxgpt.tasks.translation import Translation
from jaxgpt.training.report import Reporter
from jaxgpt.training.task import Task

MODEL = TransformerConfig(
    vocab_size=257, context=24, heads=2, width=8, hidden=16, encoder_layers=1, decoder_layers=1, dropout=0.0,
    unroll=1, init_std=0.3,
)  # fmt: skip
DOUBLE = dataclasses.replace(MODEL, parameter_dtype="float64", compute_dtype="float64")
SMOOTHING = 0.2


def random_pairs(seed: int, count: int) -> EncodedPairs:
    """Sentences of 1 to 20 letters."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 21))) for _ in range(2 * count)]
    pairs = list(zip(texts[:count], texts[count:], strict=True))
    return encode_pairs(byte_tokenizer(), pairs, 23, 23, Dropped(""))


def make_task(train=None, held_out=None, model=MODEL, data=None, **changes) -> Translation:
    config = TranslationConfig(
        model=model, data=data or PairsConfig(batch_tokens=100, buckets=3, row_multiple=2), label_smoothing=SMOOTHING
    )
    train, held_out = train or random_pairs(0, 40), held_out or random_pairs(1, 20)
    return Translation(dataclasses.replace(config, **changes), byte_tokenizer(), train, held_out)


def numbers(*values):
    return [np.array(value) for value in values]


def parameters_of(task):
    return drawn(lambda key: task.init(key)[0], std=0.2)


def rows_of(batch, rows):
    """Some rows of a batch, in any order."""
    return {name: jnp.asarray(values[rows]) for name, values in batch.items()}


def a_batch(rows=8):
    """A batch of eight sentences, one of them without weight, weights of all sizes."""
    rng = np.random.default_rng(2)
    data = PairsConfig(batch_tokens=10_000, buckets=1, row_multiple=rows)
    batch = make_task(random_pairs(3, rows - 1), data=data).pairs.batch(0)
    assert len(batch["source"]) >= rows
    return rows_of(batch | {"weights": batch["weights"] * rng.uniform(0, 2, batch["weights"].shape)}, slice(rows))


def test_it_is_a_task():
    assert isinstance(make_task(), Task)


def test_the_sums_are_those_of_the_formula(x64):
    """Divergence of the smoothed target from what the model says, and minus the log-probability of the target."""
    task, batch = make_task(model=DOUBLE), a_batch()
    parameters = parameters_of(task)
    mask = np.arange(batch["source"].shape[1]) < batch["source_length"][:, None]
    hidden = jax.jit(Transformer(DOUBLE).apply)({"params": parameters}, batch["source"], mask, batch["target"])
    logits = np.array(unembed(hidden, output_head(parameters)))
    divergence = nll = 0.0
    for row, place in np.ndindex(batch["targets"].shape):
        logprobs = logits[row, place] - np.log(np.exp(logits[row, place]).sum())
        wanted = np.full(257, SMOOTHING / 257)
        wanted[batch["targets"][row, place]] += 1 - SMOOTHING
        weight = float(batch["weights"][row, place])
        divergence += weight * (wanted * (np.log(wanted) - logprobs)).sum()
        nll -= weight * logprobs[batch["targets"][row, place]]
    expected = (divergence, float(batch["weights"].sum()), nll)
    np.testing.assert_allclose(jax.jit(task.evaluation_sums)(parameters, batch), expected, rtol=1e-10)
    np.testing.assert_allclose(jax.jit(task.loss)(parameters, batch, None), expected[:2], rtol=1e-10)


def sums_and_gradients(task):
    """A function of (batch, keys): everything that is added up over the parts of a batch, as one flat list."""
    program, parameters = jax.jit(jax.value_and_grad(task.loss, has_aux=True)), parameters_of(task)
    return lambda batch, keys=None: [np.asarray(leaf) for leaf in jax.tree.leaves(program(parameters, batch, keys))]


def test_sums_add_up_over_any_split_of_the_batch(x64):
    model = dataclasses.replace(DOUBLE, dropout=0.3)
    task, batch, keys = make_task(model=model), a_batch(), jax.random.split(jax.random.key(1), 8)
    compute, order = sums_and_gradients(task), np.random.default_rng(0).permutation(8)
    whole = compute(batch, keys)
    for cuts in ([2], [4], [2, 6]):
        parts = [compute(rows_of(batch, part), keys[part]) for part in np.split(order, cuts)]
        for total, *of_parts in zip(whole, *parts, strict=True):
            np.testing.assert_allclose(sum(of_parts), total, rtol=1e-10, atol=1e-12)


def test_dropout_follows_the_keys_alone(x64):
    task, batch = make_task(model=dataclasses.replace(DOUBLE, dropout=0.3)), a_batch()
    parameters = parameters_of(task)
    loss = jax.jit(lambda keys: task.loss(parameters, batch, keys)[0])
    drawn = [float(loss(jax.random.split(jax.random.key(seed), 8))) for seed in (0, 0, 1)]
    without = float(loss(None))
    assert drawn[0] == drawn[1] and len({*drawn, without}) == 3


def test_rows_without_weight_change_nothing(x64):
    task, batch = make_task(model=DOUBLE), a_batch()
    compute, rng = sums_and_gradients(task), np.random.default_rng(4)
    counts = np.array([0, 2, 3, 6])
    expected = compute(rows_of(batch, counts))
    others = np.setdiff1d(np.arange(8), counts)
    changed = {name: np.array(values) for name, values in batch.items()}
    changed["weights"][others] = 0
    for length in (1, 7):
        for name in ("source", "target", "targets"):
            changed[name][others] = rng.integers(0, 257, changed[name][others].shape)
        changed["source_length"][others] = length
        for ours, theirs in zip(compute(changed), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_padding_to_any_bucket_changes_nothing(x64):
    pairs = random_pairs(5, 3)
    task = make_task(pairs, model=DOUBLE, data=PairsConfig(batch_tokens=1, buckets=50, row_multiple=1))
    compute, alone = sums_and_gradients(task), list(task.pairs.in_order())
    assert [len(batch["source"]) for batch in alone] == [1, 1, 1]
    parts = [compute(batch | {"weights": batch["weights"].astype(float)}) for batch in alone]
    expected = [sum(of_parts) for of_parts in zip(*parts, strict=True)]
    for bound in (21, 24):
        (batch,) = PairBatches(pairs, byte_tokenizer().separator, [bound], 4 * bound, 1, 0).in_order()
        assert batch["source"].shape == (4, bound)
        for ours, theirs in zip(compute(batch | {"weights": batch["weights"].astype(float)}), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_evaluation_does_not_depend_on_the_batches(x64):
    results = []
    for tokens, buckets, multiple in [(50, 1, 1), (100, 3, 2), (1_000, 2, 8)]:
        data = PairsConfig(batch_tokens=tokens, buckets=buckets, row_multiple=multiple)
        task = make_task(model=DOUBLE, data=data)
        parameters, program = parameters_of(task), jax.jit(task.evaluation_sums)
        results.append(np.sum([program(parameters, batch) for batch in task.evaluation_batches()], axis=0))
    for result in results:
        np.testing.assert_allclose(result, results[0], rtol=1e-10)
    assert results[0][1] == sum(len(target) + 1 for target in random_pairs(1, 20).target)


def test_perplexity_is_unsmoothed_and_the_loss_is_smoothed():
    task = make_task(validation_sentences=0)
    metrics = task.evaluation_metrics(numbers(60.0, 40.0, 20.0), parameters_of(task))
    assert metrics == {"eval/loss": 1.5, "eval/perplexity": pytest.approx(math.exp(0.5))}
    hopeless = task.evaluation_metrics(numbers(1e6, 1.0, 1e6), parameters_of(task))
    assert math.isfinite(hopeless["eval/perplexity"])


@pytest.mark.parametrize("count", [1, 7, 1_000])
def test_scores_are_of_the_first_held_out_sentences(count):
    """The references are what the model says, but for every third sentence."""
    task, held_out = make_task(), random_pairs(1, 20)
    parameters = parameters_of(task)
    separator = byte_tokenizer().separator
    greedy = GenerationConfig(temperature=0.0, early_stopping="true")
    decoder, sources = translation_decoder(MODEL, separator), [source.tolist() for source in held_out.source]
    found = translate_tokens(decoder, parameters, sources, greedy, separator)
    said = [byte_tokenizer().decode(beams[0].tokens) for beams in found]
    references = [f"other {text}" if n % 3 == 2 else text for n, text in enumerate(said)]
    text = [(source, reference) for (source, _), reference in zip(held_out.text, references, strict=True)]
    task = make_task(held_out=dataclasses.replace(held_out, text=text), validation_sentences=count)
    metrics = task.evaluation_metrics(numbers(1.0, 1.0, 1.0), parameters)
    assert metrics["eval/exact_match"] == {1: 1.0, 7: 5 / 7, 1_000: 14 / 20}[count]
    assert metrics["eval/bleu"] == bleu(said[:count], references[:count])


def test_batches_go_on_where_a_run_stopped():
    task = make_task()
    whole, resumed = list(task.batches(0, 12)), list(task.batches(7, 12))
    for ours, theirs in zip(resumed, whole[7:], strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert len({batch["source"].tobytes() for batch in whole}) > 6


def phrase_config(folder, **changes) -> TranslationConfig:
    """A recipe in small: twenty short phrases, which are the held-out ones too."""
    pairs = [pair for pair in phrases()[0] if len(pair[0]) < 30][:20]
    path = folder / "phrases.tsv"
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs), "utf-8")
    config = TranslationConfig(
        model=TransformerConfig(
            context=40, heads=2, width=32, hidden=64, encoder_layers=1, decoder_layers=1, dropout=0.0, unroll=1
        ),
        data=PairsConfig(
            path=(str(path),), validation=(str(path),), vocab_size=330, batch_tokens=128, buckets=2, row_multiple=8
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-2, schedule="inverse-sqrt", warmup_steps=10, beta2=0.98, weight_decay=0.0
        ),
        parallel=ParallelConfig("single"),
        steps=200,
        eval_interval=100,
        out=str(folder / "run"),
    )
    return dataclasses.replace(config, **changes)


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def with_model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def prepared(config):
    said = []
    return translation.prepare(config, said.append), said


def test_preparing_fills_the_config_in(tmp_path, monkeypatch):
    config = phrase_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    relative = with_data(config, path=("phrases.tsv",), validation=("phrases.tsv",))
    result, said = prepared(relative)
    path = str(tmp_path / "phrases.tsv")
    expected = with_model(config, vocab_size=result.tokenizer.vocab_size)
    assert result.config == with_data(expected, path=(path,), validation=(path,)) and said == []
    result.tokenizer.save(tmp_path / "tokenizer.json")
    given, _ = prepared(with_data(config, tokenizer="tokenizer.json"))
    assert given.config.data.tokenizer == str(tmp_path / "tokenizer.json")
    larger, _ = prepared(with_model(config, vocab_size=500))
    assert larger.config.model.vocab_size == 500 and larger.tokenizer.vocab_size <= 330
    with pytest.raises(ValueError, match=r"tokens, more than model\.vocab-size 260"):
        prepared(with_model(config, vocab_size=260))


def test_the_fingerprint_is_of_the_data_and_how_it_becomes_tokens(tmp_path):
    config = phrase_config(tmp_path)
    (tmp_path / "other").mkdir()
    moved = phrase_config(tmp_path / "other")
    lines = (tmp_path / "phrases.tsv").read_text("utf-8").splitlines()
    (tmp_path / "changed.tsv").write_text("\n".join([*lines[:-1], lines[-1] + " x"]), "utf-8")
    same = [
        config,
        moved,
        with_data(config, batch_tokens=64, buckets=1, row_multiple=2),
        with_data(config, max_source=39, max_target=39),
        dataclasses.replace(config, steps=3, parallel=ParallelConfig("pmap", 2), seed=1),
    ]
    different = [
        with_data(config, path=(str(tmp_path / "changed.tsv"),)),
        with_data(config, validation=(str(tmp_path / "changed.tsv"),)),
        with_data(config, vocab_size=300),
        with_data(config, max_source=20),
        with_data(config, max_target=20),
        with_model(config, context=30),
    ]
    fingerprints = [prepared(c)[0].data_fingerprint for c in same + different]
    assert len(set(fingerprints[: len(same)])) == 1
    assert len(set(fingerprints)) == 1 + len(different)


def test_what_is_left_out_is_said(tmp_path):
    config = phrase_config(tmp_path)
    (tmp_path / "more.tsv").write_text(f"a\tb\n\tnothing\n{'long ' * 60}\tlang\n", "utf-8")
    result, said = prepared(with_data(config, validation=(str(tmp_path / "more.tsv"),)))
    assert len(said) == 2 and all(line.startswith("held out: 1 of 3 pairs left out") for line in said)
    assert result.task.evaluation_metrics(numbers(1.0, 1.0, 1.0), parameters_of(result.task))["eval/loss"] == 1.0
    with pytest.raises(ValueError, match=r"no pair is left: training: .* source has more than 1 tokens"):
        prepared(with_data(config, max_source=1))


def test_it_is_announced_with_its_numbers(tmp_path):
    result, _ = prepared(phrase_config(tmp_path))
    layout = launch.choose_layout(ParallelConfig("single"), 8)
    text = "\n".join(result.announcement(layout))
    pairs = result.task.pairs
    assert "20 pairs to train on, 20 held out" in text and f"{pairs.order.batches_per_epoch} batches an epoch" in text
    for bucket in pairs.order.buckets:
        assert f"{bucket.rows} x {bucket.length}" in text
    assert f"{pairs.padding_share:.0%} of the target places" in text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = phrase_config(tmp_path_factory.mktemp("trained"), average=3, checkpoint_interval=25)
    outcome, run = launch.train(config, recipe="tiny")
    return config, outcome, run


def test_a_small_model_learns_twenty_phrases_by_heart(trained):
    config, outcome, run = trained
    assert outcome.step == config.steps and not outcome.interrupted
    assert outcome.evaluation["eval/exact_match"] == 1.0 and outcome.evaluation["eval/bleu"] == pytest.approx(100)
    evaluations = {record["step"]: record for record in run.history() if "eval/loss" in record}
    assert list(evaluations) == [0, 100, 200] and evaluations[0]["eval/exact_match"] == 0.0
    assert all({"eval/bleu", "eval/exact_match", "eval/perplexity"} <= record.keys() for record in evaluations.values())
    assert evaluations[200].items() >= outcome.evaluation.items()
    assert 1 <= outcome.evaluation["eval/perplexity"] < 1.3 < evaluations[0]["eval/perplexity"]


def test_the_mean_of_the_newest_checkpoints_is_measured(trained):
    _, _, run = trained
    (averaged,) = (record for record in run.history() if "average/loss" in record)
    assert averaged["step"] == 200 and averaged["average/checkpoints"] == 3
    names = {"average/loss", "average/perplexity", "average/bleu", "average/exact_match"}
    assert names <= averaged.keys() and averaged["average/exact_match"] > 0.8
    assert {int(path.name) for path in run.checkpoints.iterdir()} >= {150, 175, 200}


def test_the_run_shows_what_it_translates(trained):
    config, _, run = trained
    lines = Path(config.data.path[0]).read_text("utf-8").splitlines()
    pairs = [line.split("\t") for line in lines[: config.samples]]
    sample = run.samples.read_text("utf-8")
    shown = "".join(f"source     {source}\nmodel      {target}\nreference  {target}\n\n" for source, target in pairs)
    assert shown.strip() in sample and sample.count("reference") == config.samples


def test_the_trained_model_is_read_back(trained):
    config, outcome, run = trained
    assert run.describe()["task"] == "translation" and run.describe()["recipe"] == "tiny"
    last = load_trained(run, TranslationConfig, "last")
    result, _ = prepared(config)
    assert last.config == result.config and last.tokenizer.fingerprint == result.tokenizer.fingerprint
    program = jax.jit(result.task.evaluation_sums)
    sums = np.sum([program(last.parameters, batch) for batch in result.task.evaluation_batches()], axis=0)
    assert result.task.evaluation_metrics(numbers(*sums), last.parameters) == pytest.approx(
        outcome.evaluation, rel=1e-5
    )


class Interruption(Reporter):
    """Asks the run to stop, as a batch system does, once a step is done."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, step, *args, **named):
        super().step(step, *args, **named)
        if step == self.at:
            signal.raise_signal(signal.SIGTERM)


def small_run(folder, **changes):
    config = phrase_config(folder, steps=9, eval_interval=4, validation_sentences=0, samples=0)
    config = with_model(dataclasses.replace(config, **changes), dropout=0.2, width=8, hidden=16)
    return with_data(config, buckets=1)


def recorded(run):
    """metrics.jsonl without what the clock says."""
    clock = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in record.items() if k not in clock} for record in run.history()]


def test_an_interrupted_run_resumed_is_the_unbroken_run(tmp_path):
    unbroken = small_run(tmp_path, average=3, out=str(tmp_path / "unbroken"))
    _, whole = launch.train(unbroken)
    broken = dataclasses.replace(unbroken, out=str(tmp_path / "broken"))
    outcome, run = launch.train(broken, report=Interruption(at=5))
    assert outcome.interrupted and 5 <= outcome.step < 9
    again, run = launch.train(dataclasses.replace(broken, resume="latest"))
    assert again.step == 9
    assert recorded(run) == recorded(whole)
    assert [r["step"] for r in recorded(run) if "train/loss" in r] == list(range(1, 10))
    ours, theirs = (load_trained(each, TranslationConfig, "last").parameters for each in (run, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (functools.partial(with_data, batch_tokens=64), r"was trained with data\.batch-tokens 128, not 64"),
        (functools.partial(dataclasses.replace, label_smoothing=0.0), "was trained with label-smoothing 0.1, not 0.0"),
        (functools.partial(with_data, max_target=30), "was trained on other data"),
    ],
)
def test_a_run_is_not_resumed_as_another(trained, change, message):
    config, _, run = trained
    before = run.config.read_bytes()
    with pytest.raises(ValueError, match=message):
        launch.train(change(dataclasses.replace(config, resume="latest")))
    assert run.config.read_bytes() == before


def test_any_number_of_devices_computes_the_same(tmp_path):
    layouts = {
        "one": ParallelConfig("single"),
        "eight": ParallelConfig("pmap", 8),
        "mesh": ParallelConfig("mesh", 4),
    }
    histories = {}
    for name, parallel in layouts.items():
        sentences = 4 if name == "eight" else 0  # what is spread over devices can be translated with, too
        config = small_run(
            tmp_path, out=str(tmp_path / name), parallel=parallel, steps=4, validation_sentences=sentences
        )
        histories[name] = recorded(launch.train(config)[1])
    assert [r["step"] for r in histories["one"]] == [0, 1, 2, 3, 4, 4]
    assert "eval/bleu" in histories["eight"][0]
    for name, history in histories.items():
        for ours, theirs in zip(history, histories["one"], strict=True):
            assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-5), name


def test_bad_input_is_found_before_a_folder_is_made(tmp_path):
    config = small_run(tmp_path)
    for wrong, message in [
        (with_data(config, path=(str(tmp_path / "nowhere.tsv"),)), "there is no file"),
        (with_model(config, vocab_size=260), "more than model.vocab-size 260"),
        (with_data(config, max_target=1), "no pair is left"),
        (dataclasses.replace(config, parallel=ParallelConfig("pmap", 3)), "data.row-multiple 8 does not divide"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            launch.train(wrong)
    assert not (tmp_path / "run").exists()
