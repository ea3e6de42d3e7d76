"""Our GPT is PyTorch's: the same logits, gradients, AdamW steps and generated tokens from the same files."""

import json
import math

import numpy as np
import pytest

from jaxgpt import api, reference, verify
from jaxgpt.cli import main
from jaxgpt.config import GenerationConfig
from jaxgpt.data.tokenizer import byte_tokenizer, load_tokenizer

torch = pytest.importorskip("torch", reason="needs torch, which only the comparison with PyTorch installs")
transformers = pytest.importorskip("transformers", reason="needs transformers, which only that comparison installs")

END = 256  # end-of-text of the byte tokenizer
CONTEXT = 24
SEEDS = range(10)
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "tanh")


def random_model(seed):
    """A GPT-2 of a random shape with every field of its config drawn; seed 10 is the first GPT."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    heads = int(rng.integers(1, 5))
    shape = {
        "vocab_size": int(rng.integers(257, 300)),
        "n_positions": CONTEXT,
        "n_embd": heads * int(rng.choice([3, 5, 7, 9])),
        "n_layer": 1 + seed % 3,
        "n_head": heads,
        "initializer_range": 0.2,
        "layer_norm_epsilon": float(rng.choice([1e-5, 1e-3])),
        "bos_token_id": END,
        "eos_token_id": END,
    }
    if seed == 10:
        model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**shape, afn="gelu"))
    else:
        more = {
            "activation_function": ACTIVATIONS[seed % 5],
            "n_inner": int(rng.integers(5, 60)) if seed % 2 else None,
            "scale_attn_by_inverse_layer_idx": bool(seed % 3 == 1),
            "scale_attn_weights": bool(seed % 4 != 3),
            "reorder_and_upcast_attn": bool(seed % 5 == 4),
            "tie_word_embeddings": bool(seed % 3 != 2),
        }
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **more))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: at zero and one they would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=[*SEEDS, 10], ids=lambda seed: "first" if seed == 10 else str(seed))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(f"model{request.param}")
    random_model(request.param).save_pretrained(path)
    byte_tokenizer().save(path / "tokenizer.json")
    return path


def test_logits_gradients_and_steps_are_equal(folder):
    model = api.load(folder)
    tokens = verify.random_tokens(model.config, 3, seed=1)
    apart = reference.compare(model.config, model.parameters, reference.load_torch(folder), tokens)
    assert apart.logits <= 1e-4 and apart.gradient <= 1e-4 and apart.logits_after_steps <= 1e-3, apart
    assert apart.largest_logit > 0.1, "the test's premise: there is something to compare"


@pytest.mark.parametrize("beams", [1, 4])
def test_generated_tokens_are_equal(folder, x64, beams):
    """In float64 on both sides; prompts of several lengths, whose batch here is one by one there."""
    ours, theirs = api.load(folder, dtype="float64"), reference.load_torch(folder, "float64")
    for block in theirs.transformer.h:
        block.attn.reorder_and_upcast_attn = False  # which in PyTorch means float32, not more
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, length).tolist() for length in (1, 4, 11)]
    settings = GenerationConfig(max_new_tokens=12, beams=beams, **({} if beams > 1 else {"temperature": 0.0}))
    for prompt, generated in zip(prompts, ours.generate_batch(prompts, settings), strict=True):
        inputs = torch.tensor([prompt])
        expected = theirs.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, num_beams=beams, do_sample=False,
            pad_token_id=END,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert list(generated.tokens) == [token for token in expected if token != END]


@pytest.mark.parametrize(
    "changes",
    [
        {"length_penalty": 2.0},
        {"length_penalty": 0.0, "early_stopping": "never"},
        {"early_stopping": "true", "samples": 3},
        {"no_repeat_ngram": 2, "min_new_tokens": 6},
        {"repetition_penalty": 1.5},
        {"beams": 1, "temperature": 0.0, "repetition_penalty": 1.5, "no_repeat_ngram": 2, "min_new_tokens": 5},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_rules_of_generation_are_equal(tmp_path, x64, changes):
    random_model(0).save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path / "tokenizer.json")
    ours, theirs = api.load(tmp_path, dtype="float64"), reference.load_torch(tmp_path, "float64")
    settings = GenerationConfig(**({"max_new_tokens": 12, "beams": 4, "stop_tokens": (END, 65, 66, 67)} | changes))
    names = {
        "beams": "num_beams", "samples": "num_return_sequences", "no_repeat_ngram": "no_repeat_ngram_size",
        "repetition_penalty": "repetition_penalty", "length_penalty": "length_penalty",
    }  # fmt: skip
    given = {theirs: getattr(settings, ours) for ours, theirs in names.items() if getattr(settings, ours) is not None}
    if settings.beams > 1:
        given["early_stopping"] = {"true": True, "false": False, "never": "never"}[settings.early_stopping]
    for prompt in ([5, 9, 5, 9], [100]):
        inputs = torch.tensor([prompt])
        expected = theirs.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, min_new_tokens=settings.min_new_tokens,
            do_sample=False, eos_token_id=list(settings.stop_tokens), pad_token_id=END, **given,
        )[:, len(prompt) :].tolist()  # fmt: skip
        generated = ours.generate_batch([prompt], settings)
        assert [list(text.tokens) for text in generated] == [_before(row, settings.stop_tokens) for row in expected]


def _before(tokens, stops):
    return tokens[: next((place for place, token in enumerate(tokens) if token in stops), len(tokens))]


@pytest.mark.parametrize("flags", ["", "--model.bias False --model.tied-head False --model.activation relu"])
def test_what_train_writes_speaks_in_transformers(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the cat and the dog and the bird\n" * 100)
    small = "--model.layers 2 --model.heads 2 --model.width 16 --model.context 32 --data.vocab-size 270"
    run = f"{small} {flags} --data.path text.txt --steps 20 --sample-tokens 0 --out run --quiet"
    assert main(["train", *run.split()]) == 0
    assert main(["export", "--model", "run", "--out", "exported"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained("exported", local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("exported", local_files_only=True)
    ours = api.load("run")
    prompt = "the cat and"
    inputs = tokenizer(prompt, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == ours.tokenizer.encode(prompt)
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    generated = ours.generate(prompt, max_new_tokens=20, temperature=0.0)
    assert list(generated.tokens) == _before(expected, ours.stop_tokens)
    assert tokenizer.decode(expected, skip_special_tokens=True) == generated.text


@pytest.mark.parametrize("seed", [4, 10])
def test_a_certificate_is_given(seed, tmp_path, capsys):
    random_model(seed).save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path / "tokenizer.json")
    assert main(["verify", "--model", str(tmp_path), "--reference", "hf", "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = " ".join(result["check"] for result in results)
    assert all(word in names for word in ("cached", "batched", "padded", "export", "logits", "gradient", "AdamW"))
    assert all(result["passed"] and math.isfinite(result["measured"]) for result in results)


def test_the_tokenizer_is_gpt2s(shared_data):
    files = shared_data / "gpt2"
    theirs = transformers.GPT2Tokenizer(vocab=str(files / "encoder.json"), merges=str(files / "vocab.bpe"))
    ours = load_tokenizer(files)
    rng = np.random.default_rng(0)
    planes = np.array([0x20, 0x250, 0x3000, 0xD7FF, 0x1FFFF, 0x10FFFF])

    def random_text():
        points = rng.integers(0, planes[rng.integers(len(planes), size=rng.integers(0, 40))], endpoint=True)
        return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)

    texts = [random_text() for _ in range(10_000)] + ["a<|endoftext|>b", "it's  \n\n  I'LL", "e\u0301", "\u00a0\u2003"]
    for name in ("raw.train.en", "raw.train.de", "raw.val.en", "raw.val.de", "raw.test_2016_flickr.de"):
        texts += (shared_data / "multi30k" / name).read_text("utf-8").splitlines()
    texts.append((shared_data / "tinyshakespeare.txt").read_text("utf-8"))
    expected = theirs(texts, split_special_tokens=True, add_special_tokens=False).input_ids
    for text, ids, own in zip(texts, expected, ours.encode_batch(texts), strict=True):
        assert own.tolist() == ids, repr(text[:80])
        assert ours.decode(ids) == text
