"""Tasks of pairs: the planted vocabulary, random tokens, and texts under three tokenizers."""

import copy
import itertools
from typing import Any

import pytest
import torch
from patching_kit import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import interp
from interp.errors import InputError, UnknownNameError
from interp.model import Model
from interp.prompts import PromptPair
from interp.tasks import TASKS, make_task
from interp.tasks.coloured_objects import COLOURS, OBJECTS, SURFACES, ColouredObjects
from interp.tasks.coloured_objects import TEMPLATE as QUESTION
from interp.tasks.ioi import NAMES, PLACES, TEMPLATES, THINGS, Ioi
from interp.tasks.pairs import PairTask, single_tokens
from interp.zoo.planted_ioi import ioi_pairs
from patching import head_effects

CASES = [
    ("ioi", {"corruption": "abc"}),
    ("ioi", {"corruption": "flip"}),
    ("coloured-objects", {"corruption": "object"}),
    ("coloured-objects", {"corruption": "colour"}),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def corpus() -> list[str]:
    texts = [
        t.format(first=n, second=m, third=n, place=p, thing=x)
        for t in TEMPLATES
        for n, m in itertools.pairwise(NAMES)
        for p, x in zip(PLACES, THINGS, strict=True)
    ]
    for k in range(len(OBJECTS) - 6):
        words = {f"o{i}": OBJECTS[k + i] for i in range(1, 7)}
        words |= {f"c{i}": COLOURS[(k + i) % len(COLOURS)] for i in range(1, 7)}
        for surface in SURFACES:
            texts.append(QUESTION.format(**words, asked=words["o2"], surface=surface))
    return texts


def speaking(kind: str, *, size: int = 1200) -> Model:
    """A tiny Llama with a tokenizer trained on the texts of both tasks."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer: Any = trainers.WordLevelTrainer(special_tokens=[*special.values()])
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        if kind == "bytes":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        else:
            tokenizer.normalizer = normalizers.Prepend("▁")
            split = pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation()
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(split))
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*special.values()])
    tokenizer.train_from_iterator(corpus(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    torch.manual_seed(0)
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    )  # fmt: skip
    return interp.load(hf.eval(), tokenizer=fast)


@pytest.fixture(scope="module", params=["bytes", "metaspace", "words"])
def speaker(request: pytest.FixtureRequest) -> Model:
    return speaking(request.param)


def word(model: Model, token: int) -> str:
    return str(model.tokenizer.convert_ids_to_tokens(token)).strip("Ġ▁")


def at(pair: PromptPair, name: str, *, corrupted: bool = False) -> list[int]:
    prompt = pair.corrupted if corrupted else pair.clean
    return [prompt.tokens[i] for i in pair.clean.positions(name)]


def check_ioi(pair: PromptPair, corruption: str) -> None:
    clean, other = pair.clean, pair.corrupted
    (io,), (s1,), (s2,) = at(pair, "io"), at(pair, "s1"), at(pair, "s2")
    assert s1 == s2 != io and clean.answer == (io,) and clean.meta["wrong"] == s1
    assert clean.tokens.count(io) == 1 and clean.tokens.count(s1) == 2
    assert at(pair, "end") == [clean.tokens[-1]]
    places = {*clean.positions("io"), *clean.positions("s1"), *clean.positions("s2")}
    changed = {i for i, (a, b) in enumerate(zip(clean.tokens, other.tokens, strict=True)) if a != b}
    assert other.answer == clean.answer and other.meta["wrong"] == clean.meta["wrong"]
    if corruption == "flip":
        assert changed == set(clean.positions("s2"))
        assert at(pair, "s2", corrupted=True) == [io]
    else:
        assert changed == places
        new = [other.tokens[i] for i in places]
        assert len(set(new)) == 3 and not {io, s1} & set(new)


def check_colours(pair: PromptPair, corruption: str) -> None:
    clean, other = pair.clean, pair.corrupted
    (colour,), (thing,), (asked,) = at(pair, "colour"), at(pair, "object"), at(pair, "asked")
    wrong, decoys = clean.meta["wrong"], at(pair, "decoys")
    assert thing == asked and clean.answer == (colour,) and wrong in decoys
    assert len({colour, *decoys}) == 3
    assert pair.clean.positions("object")[0] == pair.clean.positions("colour")[0] + 1
    changed = [i for i, (a, b) in enumerate(zip(clean.tokens, other.tokens, strict=True)) if a != b]
    if corruption == "object":
        assert changed == clean.positions("asked")
        # The thing asked for instead follows the colour that is the wrong answer.
        places = [i for i, t in enumerate(clean.tokens) if t == other.tokens[changed[0]]]
        assert any(clean.tokens[i - 1] == wrong for i in places)
    else:
        assert len(changed) == 2 and set(changed) <= {
            *clean.positions("colour"), *clean.positions("decoys"),
        }  # fmt: skip
        assert at(pair, "colour", corrupted=True) == [wrong]


CHECKS = {"ioi": check_ioi, "coloured-objects": check_colours}


@pytest.mark.parametrize(("name", "params"), CASES)
def test_texts(speaker: Model, name: str, params: dict[str, str]) -> None:
    task = make_task(name, {**params, "style": "text"})
    assert isinstance(task, PairTask)
    pairs = task.pairs(speaker, 30, seed=3)
    for pair in pairs:
        CHECKS[name](pair, params["corruption"])
        text = [word(speaker, t) for t in pair.clean.tokens]
        if name == "ioi":
            assert {text[i] for s in ("io", "s1", "s2") for i in pair.clean.positions(s)} <= {
                *NAMES
            }
            assert text[-1] == "to" and "template" in pair.clean.meta
        else:
            assert all(text[i] in COLOURS for i in pair.clean.positions("decoys"))
            assert all(text[i] in OBJECTS for i in pair.clean.positions("asked"))
    if name == "ioi":
        assert {p.clean.meta["order"] for p in pairs} == {"abba", "baba"}
        assert {p.clean.meta["template"] for p in pairs} == set(range(len(TEMPLATES)))
    else:
        assert {p.clean.meta["place"] for p in pairs} == {1, 2, 3}
    assert [p.clean for p in pairs] == task.prompts(speaker, 30, seed=3)
    assert pairs == task.pairs(speaker, 30, seed=3) != task.pairs(speaker, 30, seed=4)
    assert task.pairs(speaker, 5, seed=3) == pairs[:5]
    auto = make_task(name, params)
    assert isinstance(auto, PairTask) and auto.pairs(speaker, 30, seed=3) == pairs


@pytest.mark.parametrize(("name", "params"), CASES)
def test_random_tokens_where_there_are_no_words(name: str, params: dict[str, str]) -> None:
    model = tiny("llama")
    task = make_task(name, params)
    assert isinstance(task, PairTask)
    pairs = task.pairs(model, 10)
    for pair in pairs:
        CHECKS[name](pair, params["corruption"])
        assert at(pair, "bos") == [0]
        assert set(task.spans) <= set(pair.clean.spans)
    assert len({len(p.clean) for p in pairs}) == 1
    assert head_effects(model, pairs).per_example.shape == (10, 12)


@pytest.mark.parametrize("name", ["zoo:planted-ioi", "zoo:planted-ioi-rotated"])
def test_the_planted_vocabulary(name: str) -> None:
    model = interp.load(name)
    for corruption in ("abc", "flip"):
        pairs = Ioi(corruption=corruption).pairs(model, 6, seed=2)
        assert pairs == ioi_pairs(6, corruption=corruption, seed=2)
        for pair in pairs:
            check_ioi(pair, corruption)
    assert head_effects(model, pairs).values[0] == pytest.approx(-13.2, abs=1e-3)


def test_words_that_are_several_tokens_are_left_out() -> None:
    """A tokenizer trained on so few merges that most names are split."""
    model = speaking("bytes", size=330)
    found = single_tokens(model, NAMES)
    assert 0 < len(found) < len(NAMES)
    for name, token in found.items():
        ids = model.tokenizer(f"When {name} and", add_special_tokens=False).input_ids
        assert ids.count(token) == 1 and word(model, token) == name
    letters = speaking("bytes", size=262)
    for task in (Ioi(style="text"), ColouredObjects(style="text")):
        with pytest.raises(InputError, match="must be single tokens"):
            task.pairs(letters, 1)
    (pair,) = Ioi().pairs(letters, 1)
    assert "template" not in pair.clean.meta  # random tokens instead of words


def test_a_tokenizer_that_adds_a_token_at_the_start() -> None:
    model = speaking("bytes")
    fast = copy.deepcopy(model.tokenizer)
    from tokenizers.processors import TemplateProcessing

    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    begun = interp.load(model.hf, tokenizer=fast)
    plain = Ioi(style="text").pairs(model, 5)
    for a, b in zip(plain, Ioi(style="text").pairs(begun, 5), strict=True):
        assert b.clean.tokens == (0, *a.clean.tokens) and at(b, "bos") == [0]
        check_ioi(b, "abc")


def test_bad_input() -> None:
    small = interp.load(LlamaForCausalLM(LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )).eval())  # fmt: skip
    with pytest.raises(InputError, match="abc or flip"):
        Ioi(corruption="none")
    with pytest.raises(InputError, match="object or colour"):
        ColouredObjects(corruption="abc")
    with pytest.raises(InputError, match="auto, text or ids"):
        Ioi(style="words")
    with pytest.raises(InputError, match="need a tokenizer"):
        Ioi(style="text").pairs(tiny("llama"), 1)
    with pytest.raises(InputError, match="vocabulary offers"):
        ColouredObjects(style="ids").pairs(small, 1)
    with pytest.raises(UnknownNameError):
        make_task("ioi", {"templates": "3"})
    assert {"ioi", "coloured-objects"} <= set(TASKS)
