"""Fine-tuning: the loss and gradients of PyTorch's GPT-2 heads, any batch the same, only what is to change changes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from jaxgpt import launch
from jaxgpt.cli import main
from jaxgpt.config import (
    AdaptConfig,
    DataConfig,
    ExamplesConfig,
    FinetuneConfig,
    GPTConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from jaxgpt.data.example_batches import EncodedExamples, ExampleBatches, Sequences
from jaxgpt.models.heads import HEAD
from jaxgpt.models.partition import combine
from jaxgpt.recipes import recipe
from jaxgpt.storage.leaves import by_path
from jaxgpt.storage.runs import RunFolder
from jaxgpt.storage.weights import export_tensors
from jaxgpt.tasks import finetuning, initial
from jaxgpt.tasks.trained import load_pretrained, load_trained
from jaxgpt.training.report import Reporter

LABELS = ("bad", "fair", "good")
MODEL = GPTConfig(vocab_size=29, context=24, layers=2, heads=2, width=12, init_std=0.3, unroll=1)
CONFIG = FinetuneConfig(
    model=MODEL, labels=LABELS, head_dropout=0.0, data=ExamplesConfig(batch_size=6, buckets=2), lm_weight=0.5
)
loss = jax.jit(finetuning.loss, static_argnums=0)
judge = jax.jit(finetuning.judge, static_argnums=0)
gradients = jax.jit(jax.grad(lambda p, c, b: finetuning.loss(c, p, b, None)[0]), static_argnums=1)


def random_examples(config, seed, count=6, options=1):
    """Sequences of random lengths and random labels, as `encode_examples` makes them."""
    rng = np.random.default_rng(seed)
    sequences = [
        Sequences(tuple(rng.integers(0, 29, rng.integers(3, 15)).astype(np.int32) for _ in range(options)), 0)
        for _ in range(count)
    ]
    if config.regression:
        labels = rng.normal(size=count).astype(np.float32)
    else:
        labels = rng.integers(0, options if options > 1 else len(LABELS), count).astype(np.int32)
    return EncodedExamples(sequences, labels, [])


def random_batch(config, seed, **kwargs):
    examples = random_examples(config, seed, **kwargs)
    return ExampleBatches(examples, [int(examples.lengths.max())], len(examples), 0, config.class_weights).batch(0)


def random_parameters(config, seed=0):
    return drawn(lambda key: initial.separated(config, key, None)[0], seed, 0.3)


def double(config):
    model = dataclasses.replace(config.model, parameter_dtype="float64", compute_dtype="float64")
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("options", [1, 3], ids=["GPT2ForSequenceClassification", "GPT2DoubleHeadsModel"])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_transformers_gpt2_with_a_head(seed, options, weight):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    task = "classification" if options == 1 else "multiple-choice"
    config = dataclasses.replace(CONFIG, task=task, labels=LABELS if options == 1 else (), lm_weight=weight)
    parameters, batch = random_parameters(config, seed), random_batch(config, seed, options=options)
    gpt = {name: leaf for name, leaf in parameters.items() if name != HEAD}
    # Id 29, which no example has, is there for its padding alone: the classifier finds the last token by that.
    shape = {
        "vocab_size": 30 if options == 1 else 29,
        "n_positions": 24,
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 2,
        "num_labels": len(LABELS),
    }
    described = transformers.GPT2Config(
        **shape, pad_token_id=29 if options == 1 else None, bos_token_id=0, eos_token_id=0
    )
    if options > 1:
        described.num_labels = 1
        theirs = transformers.GPT2DoubleHeadsModel(described).eval()
    else:
        theirs = transformers.GPT2ForSequenceClassification(described).eval()
    named = dict(theirs.named_parameters())
    heads = {"multiple_choice_head.summary.weight": parameters[HEAD]["kernel"].T}
    if options == 1:
        heads = {"score.weight": parameters[HEAD]["kernel"].T}
    with torch.no_grad():
        for name, value in (export_tensors(config.model, by_path(gpt)) | heads).items():
            named[name][: len(value)].copy_(torch.tensor(np.array(value)))
        if options > 1:
            named["multiple_choice_head.summary.bias"].zero_()

    real = np.arange(batch["tokens"].shape[2]) <= batch["last"][..., None]
    ids = torch.tensor(np.where(real, batch["tokens"], 29 if options == 1 else 0), dtype=torch.long)
    labels = torch.tensor(batch["label"], dtype=torch.long)
    total, count = loss(config, parameters, batch, None)
    if options > 1:
        told = torch.where(torch.tensor(real), ids, -100)
        out = theirs(ids, mc_token_ids=torch.tensor(batch["last"], dtype=torch.long), labels=told, mc_labels=labels)
        theirs_logits, expected = out.mc_logits, out.mc_loss + weight * out.loss
    else:
        out = theirs(ids[:, 0], attention_mask=torch.tensor(real[:, 0]), labels=labels)
        theirs_logits, expected = out.logits, out.loss
        if weight:
            hidden = theirs.transformer(ids[:, 0], attention_mask=torch.tensor(real[:, 0])).last_hidden_state
            scores = (hidden @ named["transformer.wte.weight"][:29].T)[:, :-1].transpose(1, 2)
            wanted = torch.where(torch.tensor(real[:, 0, 1:]), ids[:, 0, 1:], -100)
            expected = expected + weight * torch.nn.functional.cross_entropy(scores, wanted)
    ours = judge(config, parameters, batch)[0]
    np.testing.assert_allclose(ours, theirs_logits.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(total / count, float(expected.detach()), atol=1e-4)
    expected.backward()
    own = jax.tree.map(lambda x: x / count, gradients(parameters, config, batch))
    own_heads = {next(iter(heads)): own[HEAD]["kernel"].T}
    of_gpt = {name: leaf for name, leaf in own.items() if name != HEAD}
    for name, value in (export_tensors(config.model, by_path(of_gpt)) | own_heads).items():
        wanted = named[name].grad.numpy()[: len(value)]
        assert np.linalg.norm(value - wanted) <= 1e-4 * max(np.linalg.norm(wanted), 1e-3), name


TASKS = [
    {"task": "classification", "class_weights": (1.0, 2.5, 0.5)},
    {"task": "similarity", "regression": True, "labels": ("0.0", "5.0"), "select": "loss"},
    {"task": "multiple-choice", "labels": ()},
]


@pytest.mark.parametrize("changes", TASKS, ids=lambda changes: changes["task"])
def test_any_batch_and_any_padding_is_the_same(x64, changes):
    """Losses and gradients add up over the parts of a batch, whatever each is padded to."""
    config = double(dataclasses.replace(CONFIG, **changes))
    options = 1 if config.task == "classification" else 2
    parameters, batch = random_parameters(config), random_batch(config, 3, options=options)
    whole = loss(config, parameters, batch, None), gradients(parameters, config, batch)
    parts = []
    for start, stop, longer in ((0, 2, 5), (2, 6, 0)):
        part = {name: x[start:stop] for name, x in batch.items()}
        for name in ("tokens", "targets", "lm_weights"):
            part[name] = np.pad(part[name], ((0, 0), (0, 0), (0, longer)), constant_values=7 * (name != "lm_weights"))
        parts.append((loss(config, parameters, part, None), gradients(parameters, config, part)))
    added = jax.tree.map(jnp.add, *parts)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(added), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_class_weights_are_what_they_say():
    config = dataclasses.replace(CONFIG, class_weights=(1.0, 2.5, 0.5), lm_weight=0.0)
    parameters, batch = random_parameters(config), random_batch(config, 4)
    logits = judge(config, parameters, batch)[0]
    plain = np.array(finetuning.task_losses(config, logits, jax.tree.map(jnp.array, batch)))
    weights = np.array(config.class_weights)[batch["label"]]
    total, weight = loss(config, parameters, batch, None)
    np.testing.assert_allclose(total / weight, (plain * weights).sum() / weights.sum(), rtol=1e-5)


def test_the_order_of_a_similar_pair_does_not_matter(x64):
    config = double(dataclasses.replace(CONFIG, **TASKS[1]))
    parameters, batch = random_parameters(config), random_batch(config, 5, options=2)
    turned = batch | {name: batch[name][:, ::-1] for name in ("tokens", "targets", "lm_weights", "last", "real")}
    np.testing.assert_allclose(judge(config, parameters, batch)[0], judge(config, parameters, turned)[0], atol=1e-12)


def test_dropout_is_by_row(x64):
    model = dataclasses.replace(CONFIG.model, dropout=0.3)
    config = double(dataclasses.replace(CONFIG, model=model, head_dropout=0.4))
    parameters, batch = random_parameters(config), random_batch(config, 6)
    keys = jax.random.split(jax.random.key(0), 6)
    whole = loss(config, parameters, batch, keys)[0]
    rows = [loss(config, parameters, {k: v[r : r + 1] for k, v in batch.items()}, keys[r : r + 1])[0] for r in range(6)]
    np.testing.assert_allclose(whole, sum(rows), rtol=1e-12)
    assert float(whole) != float(loss(config, parameters, batch, None)[0])
    embeddings = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    assert float(loss(embeddings, parameters, batch, keys)[0]) not in (
        float(whole),
        float(loss(config, parameters, batch, None)[0]),
    )


WRONG = [
    (
        {"task": "multiple-choice", "labels": (), "select": "f1"},
        "with the task multiple-choice it is one of loss, accuracy",
    ),
    ({"regression": True, "select": "accuracy"}, "select is accuracy; with regression it is one of loss, pearson"),
    ({"select": "pearson"}, "with the task classification it is one of loss, accuracy, f1, matthews"),
    ({"task": "multiple-choice"}, "labels has no meaning with the task multiple-choice"),
    ({"labels": ("a", "b", "a")}, "labels names one twice: a, b, a"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def write_examples(path, count, seed=0):
    """Texts whose label is the word they end with."""
    rng = np.random.default_rng(seed)
    words = ["red", "green", "blue"]
    rows = [(" ".join(rng.choice(words, rng.integers(1, 5))), rng.choice(words)) for _ in range(count)]
    path.write_text("".join(f"{text} {label}\t{label}\n" for text, label in rows))
    return path


def run_config(folder, examples=40, **changes):
    config = FinetuneConfig(
        model=GPTConfig(context=24, layers=2, heads=2, width=16, unroll=1, dropout=0.1),
        data=ExamplesConfig(
            path=(str(write_examples(folder / "train.tsv", examples)),), vocab_size=300, batch_size=8, buckets=2
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        parallel=ParallelConfig("single"),
        epochs=2.0,
        seed=3,
        out=str(folder / "run"),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A language model to begin with."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "text.txt").write_text("red green blue " * 200)
    config = TrainConfig(
        model=GPTConfig(context=24, layers=2, heads=2, width=16, unroll=1),
        data=DataConfig(path=(str(folder / "text.txt"),), vocab_size=300, batch_size=4, cache=str(folder / "cache")),
        parallel=ParallelConfig("single"), steps=2, sample_tokens=0, out=str(folder / "run"),
    )  # fmt: skip
    launch.train(config, recipe="pretrained")
    return str(folder / "run")


MATRICES = ("attention/qkv", "attention/out", "mlp/up", "mlp/down")
ADAPTATIONS = [
    AdaptConfig(),
    AdaptConfig("head"),
    AdaptConfig("last", last_layers=1),
    AdaptConfig("lora", rank=2, targets=("qkv", "out", "up", "down")),
]


@pytest.mark.parametrize("adapt", ADAPTATIONS, ids=lambda adapt: adapt.method)
def test_only_what_is_chosen_changes(pretrained, tmp_path, adapt):
    """The others are bit-equal; and the run is read back as it was, with its base where it is needed."""
    config = run_config(tmp_path, init_from=pretrained, adapt=adapt, epochs=None, steps=3)
    prepared = finetuning.prepare(config, lambda line: None)
    started = by_path(combine(*prepared.task.init(jax.random.key(config.seed))))
    whole = by_path(load_pretrained(pretrained).parameters)
    for name in whole.keys() - {"token_embedding/embedding"}:
        np.testing.assert_array_equal(started[name], whole[name], err_msg="it begins with the base")
    launch.train(config, recipe="tuned")
    ended = by_path(load_trained(RunFolder(tmp_path / "run"), FinetuneConfig, "last").parameters)
    changed = {name for name in ended if not np.array_equal(started[name], ended[name])}
    blocks = {name for name in ended if name.startswith("blocks/")}
    expected = {
        "all": set(ended),
        "head": {"task_head/kernel"},
        "last": blocks | {"task_head/kernel", "final_norm/scale", "final_norm/bias"},
        "lora": {"task_head/kernel", *(f"blocks/{matrix}/kernel" for matrix in MATRICES)},
    }[adapt.method]
    assert changed == expected
    if adapt.method == "last":
        for name in blocks:
            np.testing.assert_array_equal(started[name][0], ended[name][0], err_msg="the lower layer stays")


def test_a_resumed_run_is_the_unbroken_run(pretrained, tmp_path):
    ends = []
    for name, steps in (("whole", [6]), ("broken", [3, 6])):
        folder = tmp_path / name
        folder.mkdir()
        for number in steps:
            config = run_config(
                folder, init_from=pretrained, adapt=ADAPTATIONS[3], epochs=None, steps=number, eval_interval=3,
                evaluations=None, resume="latest", optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
            )  # fmt: skip
            _, run = launch.train(config, recipe="tuned")
        ends.append({r["step"]: r["train/loss"] for r in run.history() if "train/loss" in r})
    assert ends[0] == ends[1] and len(ends[0]) == 6


def test_another_base_is_refused(pretrained, tmp_path):
    config = run_config(tmp_path, init_from=pretrained, adapt=ADAPTATIONS[1], epochs=None, steps=1)
    _, run = launch.train(config, recipe="tuned")
    other = dataclasses.replace(RunFolder(Path(pretrained)).saved_config(), seed=7, out=str(tmp_path / "other"))
    launch.train(other, recipe="other")
    with pytest.raises(ValueError, match=r"trained on another model than .*other: the base has the fingerprint"):
        load_trained(run, FinetuneConfig, base=str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="give --base PATH"):
        load_trained(run, FinetuneConfig, base=str(tmp_path / "gone"))


def test_it_learns_and_shows_what_it_learned(tmp_path):
    said = []

    class Listening(Reporter):
        def say(self, text):
            said.append(text)

    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=0)
    config = run_config(tmp_path, 300, epochs=20.0, select="accuracy", lm_weight=0.0, optimizer=optimizer)
    outcome, run = launch.train(config, recipe="x", report=Listening())
    assert outcome.evaluation["eval/accuracy"] == 1.0
    table = (run.path / "confusion.txt").read_text()
    assert table.rstrip() == said[-1].strip() and "labelled (down)" in table
    assert (run.path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert "judged    " in run.samples.read_text()


def test_without_a_model_to_begin_with_the_settings_are_those_for_that(tmp_path, capsys):
    flags = ["--data.path", str(write_examples(tmp_path / "a.tsv", 30)), "--out", str(tmp_path / "run"), "--quiet"]
    small = ["--model.width", "8", "--data.vocab-size", "270", "--steps", "1"]
    assert main(["train", "finetune", *flags, *small, "--epochs", "3"]) == 2
    assert "--steps 1 and --epochs 3 are both given; one is enough" in capsys.readouterr().err
    assert main(["train", "finetune", *flags, *small]) == 0
    run = RunFolder(tmp_path / "run")
    assert run.describe()["recipe"] == "finetune-from-scratch"
    assert run.saved_config().optimizer == recipe("finetune-from-scratch").optimizer
    assert main(["train", "finetune", "--resume", "--steps", "2", "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert len(run.history()) == 3, "two evaluations and the one step that was asked for"
    more = ["--steps", "5", "--eval-interval", "2"]
    assert main(["train", "--resume", *more, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    evaluated = {record["step"]: record for record in run.history() if "eval/loss" in record}
    assert list(evaluated) == [0, 1, 2, 4, 5], "as often as was asked for, which counts"
    for record in evaluated.values():
        assert record["eval/objective"] == pytest.approx(record["eval/loss"] + 0.5 * record["eval/lm_loss"])
    assert {"train/loss", "examples_per_second"} <= run.history()[-2].keys() | run.history()[1].keys()
