"""Decoding against a loop that recomputes every step from the whole prompt, without a cache."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from reference import Whole, fresh, fused, handle, opaque, prompt, registered, whole

from interp.decode import Decoded, decode, generate
from interp.errors import InputError, ModelError
from interp.model import Model
from interp.prompts import Batch, Prompt

FAMILIES = [
    "gpt2", "llama", "mistral", "gemma2", "gpt-oss", "bloom", "deepseek-v2", "deepseek-v3",
]  # fmt: skip
STEPS = 8


def attn_of(family: str) -> str:
    return {"bloom": "", "gemma2": "eager", "gpt-oss": "eager"}.get(family, "sdpa")


@torch.no_grad()
def slow(family: str, one: Prompt, n: int, stop: set[int]) -> tuple[list[int], list[Whole]]:
    """Produced tokens and, for each step, the whole matrices of an eager forward over it all."""
    from reference import _eager

    hf = _eager(family)
    ids, produced, steps = list(one.tokens), [], []
    for _ in range(n):
        inputs = {"input_ids": torch.tensor([ids])}
        steps.append(whole(family, inputs))
        token = int(hf(**inputs, use_cache=False).logits[0, -1].argmax())
        produced.append(token)
        ids.append(token)
        if token in stop:
            break
    return produced, steps


def check(found: Decoded, b: int, family: str, one: Prompt, n: int, stop: set[int]) -> None:
    """One example of a batch against the slow loop: tokens, top keys and their mass."""
    tokens, steps = slow(family, one, n, stop)
    assert found.tokens[b] == tuple(tokens)
    clear = 0
    for t, full in enumerate(steps):
        for layer, pattern in enumerate(full.patterns["text"]):
            for head, row in enumerate(pattern[0, :, -1]):
                top = float(found.top[b, layer, head, t])
                assert top == int(top) and 0 <= top < len(one) + t
                assert row[int(top)] >= row.max() - 1e-5
                assert abs(float(found.mass[b, layer, head, t]) - row.max()) <= 1e-5
                best = np.sort(row)[-2:]
                if best[1] - best[0] > 1e-4:
                    clear += 1
                    assert top == row.argmax()
    assert clear > len(steps) * 4
    assert found.top[b, :, :, len(steps) :].isnan().all()
    assert found.mass[b, :, :, len(steps) :].isnan().all()
    assert not found.top[b, :, :, : len(steps)].isnan().any()


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Iterator[None]:
    with registered("opaque", opaque, "eager"), registered("fused", fused, "flash_attention_2"):
        yield


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("family", "attn"),
    [
        *((family, attn_of(family)) for family in FAMILIES),
        ("llama", "eager"),
        ("llama", "opaque"),
        ("gemma2", "opaque"),
        ("gpt-oss", "opaque"),
        ("mistral", "fused"),
    ],
)
def test_decoding_equals_recomputing_every_step(family: str, attn: str, use_cache: bool) -> None:
    """Prompts longer than the sliding window, one of them padded on the left."""
    made = [prompt(14, 3), prompt(11, 4)]
    batch = Batch.of(made, side="left")
    model = handle(family, attn)
    found = decode(model, batch, max_new_tokens=STEPS, use_cache=use_cache)
    assert found.top.shape == found.mass.shape == (2, 2, 4, STEPS)
    for b, one in enumerate(made):
        check(found, b, family, one, STEPS, set())


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-oss"])
def test_a_batch_padded_on_the_left_equals_each_prompt_alone(family: str) -> None:
    made = [prompt(n, n) for n in (15, 9, 12)]
    model = handle(family, attn_of(family))
    together = decode(model, Batch.of(made, side="left"), max_new_tokens=STEPS)
    assert len(set(together.tokens)) == 3
    for b, one in enumerate(made):
        alone = decode(model, Batch.of([one]), max_new_tokens=STEPS)
        assert alone.tokens[0] == together.tokens[b]
        assert torch.equal(alone.top[0], together.top[b])
        torch.testing.assert_close(alone.mass[0], together.mass[b], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom"])
def test_tokens_are_those_of_the_models_own_generate(family: str) -> None:
    made = [prompt(12, 5), prompt(9, 6)]
    batch = Batch.of(made, side="left")
    model = handle(family, attn_of(family))
    own = model.hf.generate(**batch.inputs(), max_new_tokens=STEPS, do_sample=False)
    want = tuple(tuple(row) for row in own[:, batch.input_ids.shape[1] :].tolist())
    assert decode(model, batch, max_new_tokens=STEPS).tokens == want
    assert generate(model, batch, max_new_tokens=STEPS) == want


def test_examples_end_at_their_first_stop_token() -> None:
    made = [prompt(12, 7), prompt(9, 8)]
    batch = Batch.of(made, side="left")
    model = handle("llama", "sdpa")
    free = generate(model, batch, max_new_tokens=STEPS)
    stop = {free[0][2]}
    at = [next((i for i, t in enumerate(row) if t in stop), STEPS - 1) for row in free]
    assert at[0] != at[1], "this test wants examples of different lengths"
    found = decode(model, batch, max_new_tokens=STEPS, stop_ids=tuple(stop))
    assert [len(x) for x in found.tokens] == [i + 1 for i in at]
    for b, one in enumerate(made):
        check(found, b, "llama", one, STEPS, stop)


@pytest.mark.parametrize("as_list", [False, True])
def test_the_models_own_end_of_text_ends_an_example_too(as_list: bool) -> None:
    hf = fresh("llama", "sdpa")
    model = Model(hf, name="llama")
    batch = Batch.of([prompt(12, 7)])
    (free,) = generate(model, batch, max_new_tokens=STEPS)
    end = free[3]
    hf.generation_config.eos_token_id = [end] if as_list else end
    (found,) = decode(model, batch, max_new_tokens=STEPS).tokens
    assert found == free[: free.index(end) + 1] and len(found) < STEPS


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(50))},
        {"do_sample": True, "temperature": 9.0},
        {"num_beams": 3},
        {"max_length": 14},
    ],
)
def test_decoding_is_greedy_whatever_the_checkpoint_prefers(settings: dict[str, Any]) -> None:
    hf = fresh("llama", "sdpa")
    batch = Batch.of([prompt(12, 7)])
    want = generate(Model(hf, name="llama"), batch, max_new_tokens=STEPS)
    for name, value in settings.items():
        setattr(hf.generation_config, name, value)
    before = hf.generation_config.to_dict()
    assert decode(Model(hf, name="llama"), batch, max_new_tokens=STEPS).tokens == want
    assert hf.generation_config.to_dict() == before


def test_one_layer_and_one_step() -> None:
    found = decode(handle("llama", "sdpa"), Batch.of([Prompt((5,))]), max_new_tokens=1)
    assert found.top.shape == (1, 2, 4, 1)
    assert (found.top == 0).all() and (found.mass - 1).abs().max() < 1e-6


def test_learned_sinks_leave_less_than_everything() -> None:
    found = decode(handle("gpt-oss", "eager"), Batch.of([Prompt((5,))]), max_new_tokens=1)
    assert (found.top == 0).all() and (found.mass < 1 - 1e-3).all()


def test_ties_go_to_the_first_key() -> None:
    """A head that looks nowhere in particular, over copies of one token without positions."""
    hf = fresh("llama", "sdpa")
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    found = decode(Model(hf, name="even"), Batch.of([Prompt((5,) * 7)]), max_new_tokens=2)
    assert (found.top == 0).all()
    assert math.isclose(float(found.mass[0, 0, 0, 1]), 1 / 8, rel_tol=1e-5)


def test_what_cannot_be_decoded_is_refused() -> None:
    llama = handle("llama", "sdpa")
    uneven = [prompt(12, 1), prompt(9, 2)]
    with pytest.raises(InputError, match="padded on the left"):
        decode(llama, Batch.of(uneven, side="right"), max_new_tokens=2)
    with pytest.raises(InputError, match="must fit the 1024 positions"):
        decode(llama, Batch.of([prompt(12, 1)]), max_new_tokens=1013)
    with pytest.raises(ModelError, match="decoding"):
        decode(handle("t5", "sdpa"), Batch.of([prompt(12, 1)]), max_new_tokens=2)
    with pytest.raises(ModelError, match="cannot generate"):
        decode(handle("bert", "sdpa"), Batch.of([prompt(12, 1)]), max_new_tokens=2)


def test_nothing_is_left_when_decoding_breaks_off() -> None:
    from test_interp_seam import traces

    model = handle("llama", "sdpa")
    assert model.towers
    before = traces(model.hf)
    steps = []

    def stop(call: Any) -> None:
        steps.append(call.name)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, Batch.of([prompt(12, 1)]), max_new_tokens=8, observer=stop)
    assert len(steps) == 5 and traces(model.hf) == before
