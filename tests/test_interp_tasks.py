"""Tasks: spans stand where they say, seeds decide, lengths and depths are kept."""

import json
import random
import re
from collections import Counter
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from interp import load
from interp.errors import InputError, UnknownNameError, UnsupportedModelError
from interp.prompts import Prompt
from interp.tasks import TASKS, Task, make_task, read_like
from interp.tasks.ids import ordinary_ids, sample_ids, speaks
from interp.tasks.lexicon import (
    KEYS,
    VALUES,
    WORDINGS,
    haystack_sentence,
    haystack_sentences,
    vocabulary,
)

TEXT = sorted(name for name in TASKS if "image" not in TASKS[name].spans)


@pytest.mark.parametrize("name", sorted(set(TASKS) - set(TEXT)))
def test_tasks_with_images_refuse_a_model_that_reads_none(name):
    with pytest.raises((InputError, UnsupportedModelError), match=r"images"):
        make_task(name).prompts(load("zoo:planted-heads"), 2)


class Handle:
    """What a task asks of a model: tokenizer, special ids, vocabulary and context."""

    def __init__(self, *, vocabulary=64, context=512, bos=0, tokenizer=None):
        self.config = LlamaConfig(
            vocab_size=vocabulary, bos_token_id=bos, eos_token_id=None, pad_token_id=None
        )
        self.name, self.tokenizer = "handle", tokenizer
        self.vocabulary, self.context, self.bos_id = vocabulary, context, bos


def words_tokenizer(extra=(), *, bos="<bos>"):
    """Lower-case words and stops, no <unk>; as the trained zoo models have it."""
    from tokenizers import normalizers, processors

    words = [bos, "<pad>", *vocabulary(), *extra]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, pad_token="<pad>")


def bytes_tokenizer(words=()):
    """A byte-level tokenizer: words are cut into letters, spaces belong to what follows."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def worded(context=2048, make=words_tokenizer):
    tokenizer = make()
    bos = 0 if make is words_tokenizer else None
    return Handle(vocabulary=len(tokenizer), context=context, bos=bos, tokenizer=tokenizer)


IDS, WORDS, BYTES = Handle(), worded(), worded(8192, bytes_tokenizer)
HANDLES = {"ids": IDS, "words": WORDS, "bytes": BYTES}


def text_of(handle, prompt, name):
    """The texts of the ranges of a span."""
    decode = handle.tokenizer.decode
    return [decode(prompt.tokens[a:b]).strip() for a, b in prompt.spans[name]]


# ---------------------------------------------------------------- every task


@pytest.mark.parametrize("kind", HANDLES)
@pytest.mark.parametrize("name", TEXT)
def test_the_same_seed_makes_the_same_prompts_and_another_makes_others(name, kind):
    handle, task = HANDLES[kind], make_task(name)
    first, again = (task.prompts(handle, 4, seed=3) for _ in range(2))
    assert first == again and len(first) == 4
    assert [p.tokens for p in first] != [p.tokens for p in task.prompts(handle, 4, seed=4)]
    state = random.getstate()
    torch.manual_seed(1)
    task.prompts(handle, 2)
    assert random.getstate() == state
    assert torch.equal(torch.rand(3), torch.manual_seed(1) and torch.rand(3))


@pytest.mark.parametrize("kind", HANDLES)
@pytest.mark.parametrize("name", TEXT)
def test_prompts_of_a_task_fit_the_model_and_have_its_spans(name, kind):
    handle, cls = HANDLES[kind], TASKS[name]
    prompts = cls().prompts(handle, 6)
    assert len({p.id for p in prompts}) == 6 and all(p.id for p in prompts)
    for prompt in prompts:
        assert set(cls.spans) <= set(prompt.spans)
        assert all(0 <= t < handle.vocabulary for t in prompt.tokens)
        assert len(prompt) + len(prompt.answer or ()) <= handle.context
        assert ("bos" in prompt.spans) == (handle.bos_id is not None)
        if handle.bos_id is not None:
            assert prompt.spans["bos"] == ((0, 1),) and prompt.tokens[0] == handle.bos_id
            assert handle.bos_id not in prompt.tokens[1:]
        json.dumps(prompt.meta, allow_nan=False)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_says_what_it_is_and_its_parameters_survive_json(name):
    cls = TASKS[name]
    assert issubclass(cls, Task) and cls.__dataclass_params__.frozen and cls.summary
    assert len(cls.summary) < 80
    task = cls()
    params = {f.name: getattr(task, f.name) for f in fields(cls)}
    texts = {k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v)
             for k, v in params.items()}  # fmt: skip
    assert make_task(name, texts) == task
    assert hash(task) == hash(make_task(name))
    for field in params:
        assert f"{field}:" in cls.__doc__


# ---------------------------------------------------------------- parameters as texts


@pytest.mark.parametrize(
    ("default", "text", "value"),
    [(3, "7", 7), (0.5, "1e-2", 0.01), (False, "yes", True), (True, "No", False),
     ((1, 2), "3,4,5", (3, 4, 5)), ((0.0,), "1", (1.0,)), ((), "a,b", ("a", "b")),
     ("x", "4", "4"), ("", "", "")],
)  # fmt: skip
def test_texts_are_read_as_the_type_of_the_default(default, text, value):
    found = read_like(default, text, "t:x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("default", "text"), [(3, "a"), (3, "1.5"), (True, "maybe"), ((1,), "1,b"), (0.1, "")]
)
def test_texts_of_another_type_are_refused_with_an_example(default, text):
    with pytest.raises(InputError, match=re.escape(f"such as {default}; got {text!r}")):
        read_like(default, text, "t:x")


def test_unknown_tasks_and_parameters():
    with pytest.raises(UnknownNameError) as caught:
        make_task("neddle")
    assert "needle" in caught.value.hint
    with pytest.raises(UnknownNameError, match="parameter of task 'needle'") as caught:
        make_task("needle", {"lenghts": "3"})
    assert "lengths" in caught.value.hint


# ---------------------------------------------------------------- ids


def test_ordinary_ids_leave_out_every_special_token():
    config = LlamaConfig(vocab_size=12, bos_token_id=0, eos_token_id=[3, 4], pad_token_id=11)
    config.image_token_id = 7
    handle = Handle(vocabulary=12)
    handle.config = config
    assert ordinary_ids(handle) == [1, 2, 5, 6, 8, 9, 10]
    assert ordinary_ids(WORDS) == list(range(2, WORDS.vocabulary))


def test_sampling_more_ids_than_there_are():
    assert sorted(sample_ids(random.Random(0), [1, 2, 3], 3)) == [1, 2, 3]
    with pytest.raises(InputError, match="4 different tokens are needed; the vocabulary offers 3"):
        sample_ids(random.Random(0), [1, 2, 3], 4)


def test_a_model_speaks_if_its_tokenizer_knows_every_word():
    assert speaks(WORDS, haystack_sentence(random.Random(0))) and speaks(BYTES, "anything")
    assert not speaks(IDS, "The baker") and not speaks(WORDS, "")
    assert not speaks(WORDS, "The zyzzyva")  # a bare exception: no <unk>
    unknown = words_tokenizer(["<unk>"])
    unknown.add_special_tokens({"unk_token": "<unk>"})
    unknown._tokenizer.model.unk_token = "<unk>"
    assert not speaks(worded(make=lambda: unknown), "The zyzzyva")


# ---------------------------------------------------------------- lexicon


def test_needle_words_are_told_from_their_surroundings():
    text = " ".join(haystack_sentence(random.Random(i)) for i in range(3000)).lower()
    hay = set(re.findall(r"\w+", text))
    keys, values = {k.lower() for k in KEYS}, {v.lower() for v in VALUES}
    assert len(keys) == len(KEYS) and len(values) == len(VALUES)
    assert not keys & values and not hay & (keys | values)
    glue = set()
    for form in WORDINGS.values():
        glue |= set(re.findall(r"\w+", form.fact.format(key="", value="").lower()))
    assert not glue & (keys | values)
    assert hay | keys | values | glue <= set(vocabulary())
    assert len(set(vocabulary())) == len(vocabulary())


def test_sentences_are_ten_or_eleven_words_and_never_end():
    stream = haystack_sentences(random.Random(0))
    sizes = Counter(len(next(stream).split()) for _ in range(2000))
    assert set(sizes) == {10, 11}


# ---------------------------------------------------------------- needle


@pytest.mark.parametrize("kind", ["words", "bytes"])
@pytest.mark.parametrize("wording", WORDINGS)
def test_spans_of_a_needle_text_decode_to_what_they_name(kind, wording):
    handle = HANDLES[kind]
    task = make_task("needle", {"wording": wording, "lengths": (400, 700) if kind == "bytes"
                                else (80, 200)})  # fmt: skip
    form = WORDINGS[wording]
    for prompt in task.prompts(handle, 12):
        lower = str.lower if kind == "words" else str
        (needle,), (fact,), (question,) = (
            text_of(handle, prompt, s) for s in ("needle", "fact", "question")
        )
        assert len(needle.split()) == 3 and set(needle.split()) <= set(VALUES)
        assert needle in fact
        squeeze = {"text": lambda t: re.sub(r"\s+([.:?])", r"\1", t)}["text"]
        pattern = lower(form.fact).replace("{key}", r"(\w+)").replace("{value}", "(.+)")
        key, value = re.fullmatch(pattern, squeeze(fact)).groups()
        assert value == needle
        assert squeeze(question) == lower(form.question).replace("{key}", key)
        assert handle.tokenizer.decode(prompt.answer).strip() == needle
        # The answer's own tokens stand in the needle, in order; letters have a blank of their own.
        span = prompt.positions("needle")
        blank = kind == "bytes"
        assert tuple(prompt.tokens[i] for i in span) == prompt.answer[blank:]
        assert tuple(prompt.tokens[span[0] - blank : span[-1] + 1]) == prompt.answer
        decoys = text_of(handle, prompt, "decoys")
        assert len(decoys) == 3 and all(len(d.split()) == 3 for d in decoys)
        said = [w for d in [needle, *decoys] for w in d.split()]
        assert len(set(said)) == 12
        whole = handle.tokenizer.decode(prompt.tokens)
        assert whole.count(needle) == 1 and all(whole.count(d) == 1 for d in decoys)
        assert whole.lower().count(key.lower()) == (2 if wording == "direct" else 3)
        assert prompt.spans["question"][0][1] == len(prompt)
        assert prompt.spans["haystack"] == ((0, prompt.spans["question"][0][0]),)
        taken = [i for s in ("needle", "decoys") for i in prompt.positions(s)]
        assert len(set(taken)) == len(taken)


def in_needle_order(handle, task, n):
    """Number of facts and sentences before the needle, and in all."""
    out = []
    for prompt in task.prompts(handle, n):
        start = prompt.spans["fact"][0][0]
        ends = [i for i, t in enumerate(prompt.tokens[: prompt.spans["question"][0][0]])
                if handle.tokenizer.decode([t]) == "."]  # fmt: skip
        out.append((sum(e < start for e in ends), len(ends), prompt.meta))
    return out


def test_prompts_run_through_the_grid_of_lengths_and_depths():
    task = make_task("needle", {"lengths": (100, 300), "depths": (0.0, 0.5, 1.0)})
    found = in_needle_order(WORDS, task, 13)
    grid = [(x, d) for x in (100, 300) for d in (0.0, 0.5, 1.0)]
    assert [(m["length"], m["depth"]) for _, _, m in found] == [grid[i % 6] for i in range(13)]
    for before, total, meta in found:
        assert before == round(meta["depth"] * (total - 1))
    for prompt in task.prompts(WORDS, 13):
        # As long as may be: the next sentence (13 tokens at most) would not have fitted.
        assert prompt.meta["length"] - 13 < len(prompt) <= prompt.meta["length"]
    assert any(len(p) == p.meta["length"] for p in task.prompts(WORDS, 100))


def test_needles_of_ids_stand_at_their_depth_in_exactly_the_length():
    task = make_task("needle", {"lengths": (60, 90), "depths": (0.0, 0.5, 1.0), "facts": 1})
    for prompt in task.prompts(IDS, 12):
        assert len(prompt) == prompt.meta["length"]
        (start, stop), (fact, end) = prompt.spans["needle"][0], prompt.spans["fact"][0]
        assert (fact, end) == (start - 1, stop) and stop - start == 6
        assert fact - 1 == round(prompt.meta["depth"] * (len(prompt) - 1 - 7 - 1))
        assert prompt.tokens[start:stop] == prompt.answer
        assert prompt.tokens[-1] == prompt.tokens[fact] and "decoys" not in prompt.spans
        counts = Counter(prompt.tokens)
        assert counts[prompt.tokens[fact]] == 2
        assert all(counts[t] == 1 for t in prompt.answer)


def test_decoys_of_ids_are_facts_of_other_tokens():
    for prompt in make_task("needle").prompts(IDS, 10):
        counts = Counter(prompt.tokens)
        assert len(prompt.spans["decoys"]) == 3
        for start, stop in prompt.spans["decoys"]:
            assert stop - start == 6
            assert all(counts[t] == 1 for t in prompt.tokens[start - 1 : stop])
        assert len(prompt) == 256  # 512 and 1024 do not fit this model with an answer


def test_lengths_beyond_the_model_are_left_out():
    wide = Handle(context=2048, vocabulary=200)
    assert [len(p) for p in make_task("needle").prompts(wide, 15)] == [256] * 5 + [512] * 5 + (
        [1024] * 5
    )
    narrow = Handle(context=120)
    assert {len(p) for p in make_task("needle").prompts(narrow, 5)} == {120 - 12 - 2}
    endless = Handle(context=None, vocabulary=200)
    assert len(make_task("needle", {"lengths": (3000,)}).prompts(endless, 1)[0]) == 3000


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(60, 400), depth=st.floats(0, 1), facts=st.integers(1, 4),
    words=st.integers(1, 4), seed=st.integers(0, 1000), wording=st.sampled_from(sorted(WORDINGS)),
)  # fmt: skip
def test_any_needle_text_holds_its_promises(length, depth, facts, words, seed, wording):
    task = make_task(
        "needle",
        {"lengths": (length,), "depths": (depth,), "facts": facts, "words": words,
         "wording": wording},
    )  # fmt: skip
    try:
        (prompt,) = task.prompts(WORDS, 1, seed=seed)
    except InputError as error:
        assert "facts and the question take" in str(error)
        return
    assert len(prompt) <= length
    assert tuple(prompt.tokens[i] for i in prompt.positions("needle")) == prompt.answer
    assert len(prompt.answer) == words
    assert len(prompt.spans.get("decoys", ())) == facts - 1
    assert prompt.spans["question"][0][1] == len(prompt)
    ends = [i for i in prompt.positions("haystack") if prompt.tokens[i] == WORDS_STOP]
    start = prompt.spans["fact"][0][0]
    assert sum(e < start for e in ends) == round(depth * (len(ends) - 1))


WORDS_STOP = WORDS.tokenizer.convert_tokens_to_ids(".")


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(40, 300), depth=st.floats(0, 1), facts=st.integers(1, 4),
    words=st.integers(1, 3), seed=st.integers(0, 1000), bos=st.sampled_from([0, None]),
)  # fmt: skip
def test_any_needle_of_ids_holds_its_promises(length, depth, facts, words, seed, bos):
    handle = Handle(bos=bos)
    task = make_task("needle", {"lengths": (length,), "depths": (depth,), "facts": facts,
                                "words": words})  # fmt: skip
    (prompt,) = task.prompts(handle, 1, seed=seed)
    assert len(prompt) == length
    assert len(prompt.answer) == 2 * words
    place = [prompt.tokens[i] for i in prompt.positions("needle")]
    assert tuple(place) == prompt.answer
    taken = [i for s in ("fact", "decoys", "question") for i in prompt.spans.get(s, ())]
    flat = [i for a, b in taken for i in range(a, b)]
    assert len(set(flat)) == len(flat)
    counts = Counter(prompt.tokens)
    assert all(counts[t] == 1 for t in prompt.answer) and counts[prompt.tokens[-1]] == 2
    # Nothing but needle, question and decoys stands between two pieces of filler.
    before = prompt.spans["fact"][0][0] - (bos is not None)
    decoys_before = sum(b <= prompt.spans["fact"][0][0] for _, b in prompt.spans.get("decoys", ()))
    room = (
        length - (bos is not None) - 1 - (len(prompt.spans.get("decoys", ())) + 1) * (2 * words + 1)
    )
    assert before - decoys_before * (2 * words + 1) == round(depth * room)


def test_a_free_needle_is_asked_for_its_answer():
    params = {
        "needle": "The code of Amber is orange violin.",
        "question": "What is the code of Amber? The code of Amber is",
        "answer": "orange violin",
        "lengths": (120,),
    }
    for prompt in make_task("needle", params).prompts(WORDS, 5):
        assert text_of(WORDS, prompt, "needle") == ["orange violin"]
        assert text_of(WORDS, prompt, "fact") == ["the code of amber is orange violin ."]
        assert WORDS.tokenizer.decode(prompt.answer) == "orange violin"
        assert "decoys" not in prompt.spans


def test_an_answer_that_occurs_twice_in_its_sentence_is_the_last():
    params = {
        "needle": "The old old castle", "question": "What is the", "answer": "old",
        "lengths": (60,), "depths": (0.5,),
    }  # fmt: skip
    (prompt,) = make_task("needle", params).prompts(WORDS, 1)
    (start, stop), (fact, _) = prompt.spans["needle"][0], prompt.spans["fact"][0]
    assert (start, stop) == (fact + 2, fact + 3)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"wording": "odd"}, "wording must be one of direct, sentence; got 'odd'"),
        ({"style": "odd"}, "style must be auto, text or ids"),
        ({"depths": ()}, "depths must lie in 0..1"),
        ({"depths": (0.5, 1.1)}, "depths must lie in 0..1"),
        ({"facts": 0}, "facts x words"),
        ({"facts": 40}, "facts x words"),
        ({"needle": "a b", "question": "q", "answer": "c"}, "answer that is part of it"),
        ({"needle": "a b", "question": "", "answer": "b"}, "needs a question"),
        ({"needle": "a b", "question": "q"}, "needs a question"),
    ],
)
def test_needles_that_make_no_sense_are_refused(params, text):
    with pytest.raises(InputError, match=re.escape(text)):
        make_task("needle", params)


def test_needles_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"4 facts and the question take 3\d tokens; length 20"):
        make_task("needle", {"lengths": (20,)}).prompts(WORDS, 1)
    with pytest.raises(InputError, match="do not fit a length of 20"):
        make_task("needle", {"lengths": (20,)}).prompts(IDS, 1)
    with pytest.raises(InputError, match="needle texts need a tokenizer and handle has none"):
        make_task("needle", {"style": "text"}).prompts(IDS, 1)
    with pytest.raises(InputError, match="too small for values of 6 tokens"):
        make_task("needle").prompts(Handle(vocabulary=10), 1)


def test_words_may_be_asked_to_be_ids():
    (prompt,) = make_task("needle", {"style": "ids", "lengths": (64,)}).prompts(WORDS, 1)
    assert len(prompt) == 64 and len(prompt.answer) == 6


def test_a_slow_tokenizer_is_refused_with_a_way_out():
    handle = worded()

    class Slow:
        is_fast = False
        unk_token_id = None

        def __call__(self, text, **_):
            return type("Encoded", (), {"input_ids": [2] * len(text.split())})()

    handle.tokenizer = Slow()
    with pytest.raises(InputError, match="where its tokens stand") as caught:
        make_task("needle", {"lengths": (100,)}).prompts(handle, 1)
    assert "use_fast" in caught.value.hint


# ---------------------------------------------------------------- repeated tokens


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(2, 30), repeats=st.integers(2, 5), vary=st.booleans(),
    seed=st.integers(0, 99), bos=st.sampled_from([0, None]),
)  # fmt: skip
def test_repeated_tokens_are_copies_of_one_block(length, repeats, vary, seed, bos):
    task = make_task("repeated-tokens", {"length": length, "repeats": repeats, "vary": vary})
    for prompt in task.prompts(Handle(bos=bos), 5, seed=seed):
        size = prompt.meta["length"]
        start = len(prompt.spans.get("bos", ()))
        block = prompt.tokens[start : start + size]
        assert start == (bos is not None)
        assert prompt.tokens == (*([0] * start), *block * repeats)
        assert len(set(block)) == size and (bos is None or 0 not in block)
        assert prompt.spans["first"] == ((start, start + size),)
        assert prompt.spans["repeats"] == ((start + size, len(prompt)),)
        assert (0.6 * length - 1 <= size <= 1.4 * length + 1) if vary else size == length


def test_varied_blocks_have_several_lengths():
    prompts = make_task("repeated-tokens", {"vary": True}).prompts(IDS, 30)
    assert len({p.meta["length"] for p in prompts}) > 8
    assert {p.meta["length"] for p in prompts} <= set(range(15, 36))


@pytest.mark.parametrize("params", [{"length": 1}, {"repeats": 1}])
def test_a_block_without_a_repeat_is_refused(params):
    with pytest.raises(InputError, match="2 tokens and 2 copies"):
        make_task("repeated-tokens", params)
    with pytest.raises(InputError, match="70 different tokens are needed; the vocabulary offers"):
        make_task("repeated-tokens", {"length": 70}).prompts(IDS, 1)


# ---------------------------------------------------------------- text


def test_windows_of_a_file_are_its_own_text(tmp_path):
    rng = random.Random(0)
    text = " ".join(haystack_sentence(rng) for _ in range(60))
    path = tmp_path / "own.txt"
    path.write_text(text, encoding="utf-8")
    stream = WORDS.tokenizer(text, add_special_tokens=False).input_ids
    prompts = make_task("text", {"file": str(path), "length": "32"}).prompts(WORDS, 10)
    starts = set()
    for prompt in prompts:
        assert len(prompt) == 32 and prompt.tokens[0] == 0
        found = [
            i for i in range(0, len(stream) - 30, 31) if stream[i : i + 31] == [*prompt.tokens[1:]]
        ]
        assert found
        starts.add(found[0])
    assert len(starts) == 10  # no window twice


def test_generated_text_is_words_or_ids():
    prompt = make_task("text").prompts(WORDS, 1)[0]
    assert len(prompt) == 64
    assert set(WORDS.tokenizer.decode(prompt.tokens[1:]).split()) <= set(vocabulary())
    assert len(make_task("text").prompts(IDS, 1)[0]) == 64
    assert all(len(p) == 2 for p in make_task("text", {"length": 2}).prompts(WORDS, 50))


def test_files_that_cannot_be_used_are_refused(tmp_path):
    def make(path, handle=WORDS, **params):
        return make_task("text", {"file": str(path), **params}).prompts(handle, 3)

    with pytest.raises(InputError, match="cannot be read as text"):
        make(tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="must hold text"):
        make(tmp_path / "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as text"):
        make(tmp_path / "bytes.txt")
    (tmp_path / "short.txt").write_text("the old baker walked")
    with pytest.raises(InputError, match=r"3 windows of 64 tokens need 189 tokens;.* has 4"):
        make(tmp_path / "short.txt")
    with pytest.raises(InputError, match="needs a tokenizer"):
        make(tmp_path / "short.txt", IDS)
    with pytest.raises(InputError, match="at least 2 tokens"):
        make_task("text", {"length": 1})


def test_tasks_run_on_a_model_in_hand():
    config = LlamaConfig(
        vocab_size=len(WORDS.tokenizer), hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=300,
        bos_token_id=0, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    model = load(LlamaForCausalLM(config), tokenizer=WORDS.tokenizer)
    for name in TEXT:
        for prompt in make_task(name).prompts(model, 3):
            assert isinstance(prompt, Prompt)
            model.batch([prompt])
