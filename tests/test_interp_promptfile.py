"""Prompt files: what is read is what was written, and every mistake names its line."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from interp.errors import PromptFileError
from interp.promptfile import Line, parse, read_file, read_prompts, to_prompts


class Stub:
    """What `to_prompts` asks of a model: a tokenizer, its size, its first token; no images."""

    name = "stub"
    reads_tokens = True
    config = None
    vocabulary = 300
    bos_id: int | None = 1

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer = tokenizer


def words() -> Stub:
    """One token per word or sign, the text begun with <s>."""
    names = ["<unk>", "<s>", *string.ascii_lowercase, "the", "code", "is", "red", "?", "."]
    ids = {name: i for i, name in enumerate(dict.fromkeys(names))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>"
    )
    return Stub(tokenizer)


def line(**content: object) -> bytes:
    return json.dumps(content).encode()


def test_plain_text_is_one_prompt_a_line() -> None:
    lines = parse(b"\xef\xbb\xbfa b\r\n\r\n  \nc {\n", "x.txt")
    assert [(x.text, x.id) for x in lines] == [("a b", "line-1"), ("c {", "line-4")]


@pytest.mark.parametrize(("name", "json_read"), [("x.txt", False), ("x", True), ("x.jsonl", True)])
def test_the_name_or_the_first_brace_tells_jsonl(name: str, json_read: bool) -> None:
    text = '{"text": "a"}'
    assert parse(text.encode(), name)[0].text == ("a" if json_read else text)


def test_a_line_separator_inside_json_does_not_end_the_line() -> None:
    text = "a\u2028b\x85c"
    data = json.dumps({"text": text}, ensure_ascii=False).encode()
    assert [x.text for x in parse(data, "x.jsonl")] == [text]


def test_spans_by_characters_and_by_piece() -> None:
    [found] = parse(
        line(text="the code is red", spans={"a": [[0, 3]], "b": "red", "c": ["code", [12, 15]]}),
        "x.jsonl",
    )
    assert found.spans == {"a": ((0, 3),), "b": ((12, 15),), "c": ((4, 8), (12, 15))}


def test_tokens_with_spans_in_tokens() -> None:
    [found] = parse(line(tokens=[4, 5, 6], spans={"x": [[1, 3]]}, answer=[7], id=3), "x.jsonl")
    assert found == Line("x.jsonl, line 1", None, (4, 5, 6), {"x": ((1, 3),)}, answer=(7,), id="3")


BAD = {
    "broken": (b'{"text": "a"}\n{"text": "b"', "x.jsonl, line 2: every line must be JSON"),
    "not a mapping": (b"[1]", "line 1: every line must be a JSON mapping; got [1]"),
    "unknown key": (line(text="a", answr="b"), "line 1: there is no key 'answr'"),
    "twice": (b'{"text": "a", "text": "b"}', "'text' stands twice"),
    "both": (line(text="a", tokens=[1]), "either text or tokens; got both"),
    "neither": (line(id="a"), "either text or tokens; got neither"),
    "text is null": (line(text=None), "text must be a text"),
    "text is empty": (line(text=""), "text must be a text"),
    "text is a number": (line(text=3), "text must be a text that is not empty; got 3"),
    "tokens empty": (line(tokens=[]), "tokens must be token ids, at least one; got []"),
    "tokens are texts": (line(tokens=["a"]), "tokens must be token ids"),
    "tokens are truths": (line(tokens=[True]), "tokens must be token ids"),
    "tokens are negative": (line(tokens=[-1]), "tokens must be token ids"),
    "answer": (line(text="a", answer=3), "answer must be a text or token ids"),
    "id": (line(text="a", id=[1]), "id must be a text or a number"),
    "spans are a list": (line(text="a", spans=[1]), "spans must map names to lists of ranges"),
    "span is a number": (line(text="a", spans={"x": 3}), "span 'x' must be a list of ranges"),
    "span is empty": (line(text="a", spans={"x": []}), "span 'x' must be a list of ranges"),
    "range of three": (line(text="abc", spans={"x": [[0, 1, 2]]}), "ranges [start, stop]"),
    "range of texts": (line(text="abc", spans={"x": [["0", 1]]}), "ranges [start, stop]"),
    "beyond the text": (line(text="abc", spans={"x": [[0, 4]]}), "within the 3 characters"),
    "beyond the tokens": (line(tokens=[1, 2], spans={"x": [[0, 3]]}), "within the 2 tokens"),
    "empty range": (line(text="abc", spans={"x": [[1, 1]]}), "got 1:1"),
    "negative range": (line(text="abc", spans={"x": [[-1, 1]]}), "got -1:1"),
    "piece not there": (line(text="abc", spans={"x": "d"}), "stands there 0 times"),
    "piece there twice": (line(text="aaa", spans={"x": "aa"}), "stands there 2 times"),
    "empty piece": (line(text="aaa", spans={"x": ""}), "stands there 0 times"),
    "span called all": (line(text="a", spans={"all": [[0, 1]]}), "cannot be called 'all'"),
    "same id": (line(text="a", id="q") + b"\n\n" + line(text="b", id="q"), "x.jsonl, line 3: ids"),
    "not utf-8": (b'{"text": "a"}\n\xff', "x.jsonl, line 2: prompts must be UTF-8; got byte 0xff"),
    "empty": (b"\n  \n", "x.jsonl: a prompt file must hold at least one prompt; it is empty"),
    "deep": (b"[" * 100_000, "nested too deep"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_that_names_its_place(case: str) -> None:
    data, part = BAD[case]
    with pytest.raises(PromptFileError) as caught:
        parse(data, "x.jsonl")
    assert part in str(caught.value)
    assert str(caught.value).startswith("x.jsonl") and "\n" not in str(caught.value)


def test_a_near_miss_is_named() -> None:
    with pytest.raises(PromptFileError) as caught:
        parse(line(text="a", span={}), "x.jsonl")
    assert caught.value.hint == "did you mean spans?"


def test_no_such_file(tmp_path) -> None:
    with pytest.raises(PromptFileError, match="there is no such file") as caught:
        read_file(tmp_path / "none.txt")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(PromptFileError, match="directory"):
        read_file(tmp_path)


def test_text_becomes_tokens_with_the_spans_that_its_characters_touch(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    text = "the code is red . the code is ?"
    path.write_bytes(
        line(text=text, spans={"needle": "red", "part": [[5, 7]], "two": [[4, 11]]}, answer="red")
    )
    model = words()
    [prompt] = read_prompts(path, model)  # type: ignore[arg-type]
    names = model.tokenizer.convert_ids_to_tokens(prompt.tokens)  # type: ignore[attr-defined]
    assert names == ["<s>", *text.split()]
    at = {name: names[a:b] for name, ((a, b),) in prompt.spans.items()}
    assert at == {"bos": ["<s>"], "needle": ["red"], "part": ["code"], "two": ["code", "is"]}
    assert prompt.answer == tuple(model.tokenizer.convert_tokens_to_ids(["red"]))  # type: ignore[attr-defined]


@given(
    st.lists(st.sampled_from(["the", "code", "is", "red", "?"]), min_size=1, max_size=12), st.data()
)
def test_a_span_covers_exactly_the_words_it_touches(picked: list[str], data: st.DataObject) -> None:
    text = "  ".join(picked)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    owner: list[int | None] = []
    for i, word in enumerate(picked):
        owner += ([None, None] if i else []) + [i] * len(word)
    touched = sorted({o for o in owner[start:stop] if o is not None})
    lines = parse(line(text=text, spans={"x": [[start, stop]]}), "x.jsonl")
    if not touched:
        with pytest.raises(PromptFileError, match="at least one token"):
            to_prompts(lines, words())  # type: ignore[arg-type]
        return
    [prompt] = to_prompts(lines, words())  # type: ignore[arg-type]
    assert prompt.span("x") == ((touched[0] + 1, touched[-1] + 2),)  # one further: <s>


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 299), min_size=1, max_size=9), st.integers(0, 8)),
        min_size=1,
        max_size=6,
    )
)
def test_token_prompts_come_back_as_they_were_written(content: list) -> None:
    rows = [{"tokens": t, "spans": {"x": [[min(a, len(t) - 1), len(t)]]}} for t, a in content]
    data = b"\n\n".join(line(**row) for row in rows)
    prompts = to_prompts(parse(data, "-"), Stub(None))  # type: ignore[arg-type]
    assert [list(p.tokens) for p in prompts] == [row["tokens"] for row in rows]
    assert [[list(r) for r in p.spans["x"]] for p in prompts] == [r["spans"]["x"] for r in rows]
    assert [("bos" in p.spans) for p in prompts] == [row["tokens"][0] == 1 for row in rows]


def test_text_without_a_tokenizer_says_what_to_give() -> None:
    with pytest.raises(PromptFileError, match="line 1: text needs a tokenizer") as caught:
        to_prompts(parse(b"a", "x.txt"), Stub(None))  # type: ignore[arg-type]
    assert "tokens" in (caught.value.hint or "")
    with pytest.raises(PromptFileError, match="line 1: text needs a tokenizer"):
        to_prompts(parse(line(text="a", spans={"x": "a"}), "x.jsonl"), Stub(None))  # type: ignore[arg-type]


def test_ids_beyond_the_vocabulary_name_their_line() -> None:
    for row in (line(tokens=[1, 300]), line(tokens=[1], answer=[300])):
        with pytest.raises(PromptFileError, match=r"line 2: token ids must lie in 0\.\.299"):
            to_prompts(parse(b"\n" + row, "x.jsonl"), Stub(None))  # type: ignore[arg-type]


def test_a_tokenizer_that_refuses_a_text_is_a_line_too() -> None:
    def refuse(text: str, **options: bool) -> None:
        raise Exception("WordLevel error: Missing [UNK] token")

    refuse.is_fast = True  # type: ignore[attr-defined]
    with pytest.raises(PromptFileError, match="line 1: the tokenizer of stub"):
        to_prompts(parse(b"a", "x.txt"), Stub(refuse))  # type: ignore[arg-type]


def test_spans_in_text_need_a_tokenizer_with_places() -> None:
    def slow(text: str, **options: bool) -> None:
        raise AssertionError("must not be asked")

    slow.is_fast = False  # type: ignore[attr-defined]
    with pytest.raises(PromptFileError, match="says where its tokens stand"):
        to_prompts(parse(line(text="a", spans={"x": "a"}), "x.jsonl"), Stub(slow))  # type: ignore[arg-type]
