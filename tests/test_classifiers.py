"""Exported classifiers: what transformers makes of texts is what we make of them, and what comes back is the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from drawn import drawn
from test_sentiment import train
from test_special_tokens import CHARACTERS, MAKERS, random_texts

import jaxgpt
from jaxgpt import api
from jaxgpt.apps.sentiment import Classifier
from jaxgpt.cli import main
from jaxgpt.config import AdaptConfig, ExamplesConfig, FinetuneConfig, GPTConfig
from jaxgpt.data.batches import WHOLE
from jaxgpt.data.example_batches import EncodedExamples, ExampleBatches, input_forms
from jaxgpt.models.lora import ADAPTER, fold, init_adapter
from jaxgpt.storage.leaves import by_path
from jaxgpt.storage.runs import RunFolder
from jaxgpt.tasks import finetuning, initial
from jaxgpt.tasks.classifiers import load_classifier
from jaxgpt.tasks.trained import Trained, load_pretrained

LABELS = ("bad", "fair", "so so", "good")
FORMS = [
    ({"task": "classification"}, "bytes", {}),
    ({"task": "entailment"}, "bpe", {"bias": False, "tied_head": False, "activation": "relu"}),
    ({"task": "classification", "regression": True, "labels": ("0.0", "5.0")}, "lower-case", {"hidden": 20}),
    ({"task": "entailment", "data": ExamplesConfig(max_length=17)}, "characters", {"norm": "post"}),
    ({"task": "entailment", "regression": True, "labels": ("1.0", "5.0")}, "bytes", {"norm": "post"}),
]
judge = jax.jit(finetuning.judge, static_argnums=0)


def tuned(seed, changes, name, model, unused=0):
    """A classifier of a random shape."""
    rng, tokenizer = np.random.default_rng(seed), MAKERS[name]()
    heads = int(rng.integers(1, 4))
    width, layers = heads * int(rng.choice([3, 5])), int(rng.integers(1, 3))
    size = tokenizer.vocab_size + unused + 3
    shape = {"heads": heads, "width": width, "layers": layers, **model}
    shape = GPTConfig(vocab_size=size, context=24, init_std=0.3, unroll=1, **shape)
    config = FinetuneConfig(**{"labels": LABELS, **changes}, model=shape)
    return Trained(config, drawn(lambda key: initial.separated(config, key, None)[0], seed, 0.3), tokenizer)


def random_examples(seed, task):
    rng = np.random.default_rng(seed)
    columns = [random_texts(rng, 12, 30) for _ in range(1 if task == "classification" else 2)]
    return list(zip(*columns, strict=True))


def our_logits(config, parameters, tokenizer, examples):
    stripped = [tuple(text.strip() for text in one) for one in examples]
    limit = config.data.max_length or config.model.context
    forms = input_forms(tokenizer, config.model.vocab_size, config.task, stripped, limit)
    encoded = EncodedExamples(forms, np.zeros(len(forms), np.int32), [])
    (batch,) = ExampleBatches(encoded, [limit], len(forms), 0).in_order(WHOLE)
    logits = judge(config, parameters, batch)[0]
    return np.asarray(logits)[np.argsort(batch["example"])]


def their_logits(folder, examples):
    """By the documented way alone: what is in the folder says the rest."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer(*map(list, zip(*examples, strict=True)), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.numpy(), model.config


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join([form[0]["task"], *form[2]]))
@pytest.mark.parametrize("seed", [0, 1])
def test_transformers_says_what_we_say(tmp_path, form, seed):
    model = tuned(seed, *form, unused=4 * seed)
    jaxgpt.export(model, tmp_path / "out")
    examples = random_examples(seed, model.config.task)
    ours = our_logits(model.config, model.parameters, model.tokenizer, examples)
    theirs, described = their_logits(tmp_path / "out", examples)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.ptp(ours, axis=0).min() > 1e-2, "what is compared is not always the same"
    regression = model.config.regression
    assert described.problem_type == ("regression" if regression else "single_label_classification")
    assert described.id2label == ({0: "score"} if regression else dict(enumerate(LABELS)))
    assert described.label2id == {label: number for number, label in described.id2label.items()}
    assert described.pad_token_id != model.config.model.vocab_size - 1


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join([form[0]["task"], *form[2]]))
def test_what_is_exported_comes_back(tmp_path, form):
    model = tuned(7, *form, unused=2)
    api.export(model, tmp_path / "out")
    again = load_classifier(tmp_path / "out")
    assert again.config == dataclasses.replace(
        model.config,
        model=dataclasses.replace(model.config.model, unroll=None),
        data=ExamplesConfig(max_length=model.config.data.max_length),
    )
    jax.tree.map(np.testing.assert_array_equal, again.parameters, model.parameters)
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
    # And as a GPT to begin with, it has neither head nor special tokens.
    base = load_pretrained(tmp_path / "out")
    assert base.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert base.config.vocab_size == model.config.model.vocab_size - 3
    leaves, whole = by_path(base.parameters), by_path(model.parameters)
    assert whole.keys() - leaves.keys() == {"task_head/kernel"}
    for name, leaf in leaves.items():
        expected = whole[name][:-3] if name in ("token_embedding/embedding", "head") else whole[name]
        np.testing.assert_array_equal(leaf, expected, err_msg=name)


def test_an_adapter_is_folded_in(tmp_path):
    adapt = AdaptConfig("lora", rank=2, targets=("qkv", "down"))
    plain = tuned(3, *FORMS[0])
    adapter = init_adapter(plain.config.model, adapt, jax.random.key(0))
    adapter = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), adapter)
    config = dataclasses.replace(plain.config, adapt=adapt, init_from="a base")
    unfolded = {**plain.parameters, ADAPTER: adapter}
    api.export(Trained(config, fold(unfolded, adapt), plain.tokenizer), tmp_path / "out")
    examples = random_examples(3, "classification")
    ours = our_logits(config, unfolded, plain.tokenizer, examples)
    assert np.abs(ours - our_logits(plain.config, plain.parameters, plain.tokenizer, examples)).max() > 1e-2
    np.testing.assert_allclose(their_logits(tmp_path / "out", examples)[0], ours, atol=1e-4)


CANNOT = [
    ({"task": "similarity"}, {}, r"task is similarity \(both orders of two texts, added up\), which the format of"),
    ({"task": "multiple-choice", "labels": ()}, {}, r"task is multiple-choice \(a score for each answer\), which"),
    (
        {},
        {"positions": "sinusoidal", "width": 4, "heads": 1},
        "model.positions is sinusoidal, which the format",
    ),
    ({}, {"norm": "post", "hidden": 7}, "model.hidden is 7 with model.norm post, which the format"),
]


@pytest.mark.parametrize(("changes", "model", "message"), CANNOT)
def test_what_cannot_be_expressed_is_refused(tmp_path, changes, model, message):
    with pytest.raises(ValueError, match=message):
        api.export(tuned(0, changes, "bytes", model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_with_a_bias_is_refused(tmp_path):
    model = tuned(0, *FORMS[0])
    model.parameters["task_head"]["bias"] = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="the head has a bias, which the format of transformers cannot express"):
        api.export(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jaxgpt": {}}, "is no classifier of jaxgpt's; to make one of it: python train.py finetune --init-from"),
        ({"jaxgpt": {"task": "clasification"}}, r"config.json: task is 'clasification', which is not of the type"),
        ({"jaxgpt": {"task": "entailment", "max_length": "x"}}, "data.max_length is 'x', which is not of the type"),
        ({"id2label": ["a"]}, r"id2label is \['a'\]; it must give each class its name"),
        ({"id2label": {"1": "a"}}, "labels is None, which is not of the type"),
        (
            {"id2label": {"0": "a", "1": "b"}},
            r"tensor score.weight of the shape \(2, .*, and has one of the shape \(4,",
        ),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(tmp_path, change, message):
    api.export(tuned(0, *FORMS[0]), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_classifier(tmp_path / "out")


def test_the_commands(tmp_path, monkeypatch, capsys):
    """A run is exported, judges as before from there, and is what another begins with."""
    monkeypatch.chdir(tmp_path)
    run = train(tmp_path, [(f"film {number} is {word}", word) for number in range(8) for word in ("good", "bad")])
    capsys.readouterr()
    texts = ["so very good", "bad", "good and bad and good and bad and good and bad and good and bad"]
    assert main(["export", "--model", str(run), "--out", "out"]) == 0
    loader = "AutoModelForSequenceClassification.from_pretrained"
    assert capsys.readouterr().out == f"out holds the classifier; transformers loads it with {loader}\n"
    assert Classifier("out").classify_batch(texts) == Classifier(run).classify_batch(texts)
    printed = []
    for model in (str(run), "out"):
        assert main(["classify", "--model", model, "--json", "--text", *texts]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("\n") == 3
    assert main(["export", "--model", "out", "--out", "twice"]) == 0
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert main(["export", "--model", str(run), "--out", "out"]) == 2
    assert "out exists and is not empty" in capsys.readouterr().err
    more = [
        "--data.path",
        "train.tsv",
        "--epochs",
        "None",
        "--steps",
        "1",
        "--samples",
        "0",
        "--out",
        "more",
        "--quiet",
    ]
    assert main(["train", "finetune", "--init-from", "out", *more, "--parallel.strategy", "single"]) == 0
    config = RunFolder(tmp_path / "more").saved_config()
    assert config.model.vocab_size == Classifier(run).config.model.vocab_size


def test_characters_of_the_tests():
    """Lest a text of the character tokenizer have one that it does not know, which transformers drops in silence."""
    assert set("<|extract|> a") <= set(CHARACTERS)
