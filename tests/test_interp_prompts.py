"""Prompts, spans and batches: what is kept, where spans lie after padding, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import handle

from interp.errors import InputError, PairError, SpanError
from interp.prompts import Batch, Prompt, PromptPair
from interp.readings import Same


def test_all_is_every_position_unless_named_otherwise() -> None:
    assert Prompt((4, 5, 6)).positions("all") == [0, 1, 2]
    assert len(Prompt((4, 5, 6))) == 3
    assert Prompt((4, 5, 6), {"all": ((1, 2),)}).positions("all") == [1]


def test_positions_are_in_order_and_each_once() -> None:
    one = Prompt(tuple(range(10)), {"x": ((6, 8), (1, 3), (2, 4))})
    assert one.positions("x") == [1, 2, 3, 6, 7]
    assert one.span("x") == ((6, 8), (1, 3), (2, 4))


@pytest.mark.parametrize("span", [(0, 0), (2, 1), (-1, 2), (0, 4), (3, 4)])
def test_spans_lie_within_their_prompt(span: tuple[int, int]) -> None:
    with pytest.raises(SpanError, match="span 'x' of prompt p must lie within its 3 tokens"):
        Prompt((1, 2, 3), {"x": (span,)}, id="p")


def test_an_unknown_span_names_the_known() -> None:
    with pytest.raises(SpanError, match="prompt p has no span 'y'; it has: x, all"):
        Prompt((1, 2, 3), {"x": ((0, 1),)}, id="p").span("y")


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="at least one token; prompt p is empty"):
        Prompt((), id="p")


def test_a_control_keeps_spans_and_the_first_reference() -> None:
    one = Prompt((1, 2, 3), {"x": ((0, 1),)}, id="p", answer=(9,), meta={"depth": 2})
    control = one.controlled_by([7, 8, 9])
    assert control.tokens == (7, 8, 9) and control.reference == (1, 2, 3)
    assert (control.spans, control.answer, control.meta) == (one.spans, one.answer, one.meta)
    assert control.controlled_by([4, 5, 6]).reference == (1, 2, 3)
    with pytest.raises(PairError, match="prompt p has 3, the control 2"):
        one.controlled_by([7, 8])


def test_a_pair_has_equally_many_tokens() -> None:
    PromptPair(Prompt((1, 2)), Prompt((3, 4)))
    with pytest.raises(PairError, match="pair p has 2 and 3"):
        PromptPair(Prompt((1, 2), id="p"), Prompt((3, 4, 5)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    data=st.data(),
)
def test_padding_moves_spans_with_their_tokens(
    rows: list[list[int]], side: str, data: st.DataObject
) -> None:
    made = []
    for row in rows:
        start = data.draw(st.integers(0, len(row) - 1))
        stop = data.draw(st.integers(start + 1, len(row)))
        made.append(Prompt(tuple(row), {"x": ((start, stop),)}))
    batch = Batch.of(made, pad_id=0, side=side)
    width = max(map(len, rows))
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(rows), width)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.long
    assert torch.equal(batch.attention_mask, (batch.input_ids > 0).long())
    assert batch.padded == (len({len(r) for r in rows}) > 1) and len(batch) == len(rows)
    for one, ids, at, every in zip(
        made, batch.input_ids, batch.positions("x"), batch.positions("all"), strict=True
    ):
        assert tuple(ids[every].tolist()) == one.tokens
        assert ids[at].tolist() == [one.tokens[i] for i in one.positions("x")]
        ends = width - 1 if side == "left" else 0
        assert ends in every
        assert (ids != 0).sum() == len(one)


def test_a_batch_holds_what_its_model_takes() -> None:
    inner = Batch.of([Prompt((7, 8))])
    outer = Batch.of([Prompt((1, 2, 3))])
    images = torch.zeros(1, 3, 4, 4)
    whole = Batch(
        outer.prompts, outer.input_ids, outer.attention_mask, outer.offsets,
        extra={"pixel_values": images}, decoder=inner,
    )  # fmt: skip
    inputs = whole.inputs()
    assert inputs.keys() == {
        "input_ids", "attention_mask", "pixel_values", "decoder_input_ids",
        "decoder_attention_mask",
    }  # fmt: skip
    assert inputs["pixel_values"] is images
    assert inputs["decoder_input_ids"].tolist() == [[7, 8]]
    assert outer.inputs().keys() == {"input_ids", "attention_mask"}


def test_what_makes_no_batch_is_refused() -> None:
    with pytest.raises(InputError, match="at least one prompt"):
        Batch.of([])
    with pytest.raises(InputError, match="'left' or 'right'; got 'both'"):
        Batch.of([Prompt((1,))], side="both")


def test_a_model_refuses_prompts_it_cannot_take() -> None:
    model = handle("llama", "sdpa")
    assert model.context == 1024 and model.vocabulary == 97
    with pytest.raises(InputError, match="prompt p has 1025 tokens"):
        model.batch([Prompt((5,) * 1025, id="p")])
    with pytest.raises(InputError, match=r"0\.\.96 .* prompt p has 97"):
        model.batch([Prompt((5, 97), id="p")])
    with pytest.raises(InputError, match="prompt p has -1"):
        model.batch([Prompt((5, -1), id="p")])
    batch = model.batch([Prompt((5, 6)), Prompt((7,))], side="left")
    assert batch.input_ids.tolist() == [[5, 6], [0, 7]] and batch.offsets == (0, 1)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match="text needs a tokenizer and llama has none"):
        handle("llama", "sdpa").encode("hello")


def test_patches_of_an_image_are_no_copies_of_one_another():
    prompt = Prompt((5, 9, 9, 9, 5, 7), {"image": ((1, 4),)})
    assert Same(0).pairs(prompt).tolist() == [[4, 0]]
    assert Same(1).pairs(prompt).tolist() == [[4, 1]]
    plain = Prompt(prompt.tokens)
    assert len(Same(0).pairs(plain)) == 4
