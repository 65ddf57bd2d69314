"""Relevance across two sides against loops over whole eager matrices, and where truth is known."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from reference import fresh, handle
from torch import Tensor

from benchmarks.tiny_models import model_class, tiny_config, tiny_model
from interp.errors import InputError, SiteError
from interp.example import example_inputs
from interp.images.patches import Patch, PatchMap
from interp.model import Model
from interp.prompts import Prompt
from patching.relevance import Relevance, relevance_maps
from patching.relevance_hiding import perturbation

# A slow reference ---------------------------------------------------------------------------


@contextmanager
def softmaxes(change: Callable[[int, Tensor], Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Every softmax of an eager model, in order; each may be changed."""
    seen: list[Tensor] = []
    real = torch.nn.functional.softmax

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        out = out if change is None else change(len(seen), out)
        seen.append(out)
        return out

    torch.nn.functional.softmax = noted  # type: ignore[assignment]
    try:
        yield seen
    finally:
        torch.nn.functional.softmax = real


def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros((a.shape[0], b.shape[1]))
    for i in range(a.shape[0]):
        for j in range(b.shape[1]):
            for k in range(a.shape[1]):
                out[i, j] += a[i, k] * b[k, j]
    return out


def barred(r: np.ndarray) -> np.ndarray:
    out = np.zeros_like(r)
    for i in range(len(r)):
        row = [r[i, j] - (i == j) for j in range(len(r))]
        for j in range(len(r)):
            out[i, j] = (row[j] / sum(row) if sum(row) else 0) + (i == j)
    return out


def by_hand(maps: Sequence[tuple[str, np.ndarray]], n_t: int, n_i: int) -> dict[str, np.ndarray]:
    """The rules one by one; `x` stands for a pair of calls, both ways from the same states."""
    tt, ii = np.eye(n_t), np.eye(n_i)
    ti, it = np.zeros((n_t, n_i)), np.zeros((n_i, n_t))
    for kind, a in maps:
        if kind == "tt":
            tt, ti = tt + times(a, tt), ti + times(a, ti)
        elif kind == "ii":
            ii, it = ii + times(a, ii), it + times(a, it)
        elif kind == "ti":
            ti = ti + times(times(barred(tt).T, a), barred(ii))
        elif kind == "x":
            there, back = a
            new_ti = ti + times(times(barred(tt).T, there), barred(ii))
            new_it = it + times(times(barred(ii).T, back), barred(tt))
            new_tt, new_ii = tt + times(there, it), ii + times(back, ti)
            tt, ti, it, ii = new_tt, new_ti, new_it, new_ii
    return {"tt": tt, "ti": ti, "it": it, "ii": ii}


def want(
    hf: Any, inputs: dict[str, Tensor], order: Sequence[str], at: int, target: int | None = None
) -> tuple[int, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Target, both deciding rows, and the per-head mass of each call in that row."""
    with softmaxes() as seen:
        out = hf(**inputs)
    logits = out.logits if hasattr(out, "logits") else out[0]
    logits = logits[0, -1] if logits.dim() == 3 else logits[0]
    target = int(logits.argmax()) if target is None else target
    slopes = torch.autograd.grad(logits[target], seen, allow_unused=True)
    assert len(seen) == len(order)
    pulled = []
    for a, g in zip(seen, slopes, strict=True):
        g = torch.zeros_like(a) if g is None else g
        pulled.append((a.detach() * g)[0].clamp(min=0).double().numpy())
    maps: list[Any] = []
    sizes: dict[str, int] = {}
    masses = []
    for kind, heads in zip(order, pulled, strict=True):
        if kind == "-":
            continue
        a = heads.mean(0)
        sizes[kind[0]], sizes[kind[1]] = a.shape
        if kind[0] == "t":
            masses.append(heads[:, at].sum(-1))
        if kind == "it":
            assert maps[-1][0] == "ti"
            maps[-1] = ("x", (maps[-1][1], a))
        else:
            maps.append((kind, a))
    done = by_hand(maps, sizes["t"], sizes["i"])
    return target, done["tt"][at], done["ti"][at], masses


def eager(hf: Any) -> Any:
    hf = copy.deepcopy(hf)
    if hf.config._attn_implementation != "eager":
        hf.set_attn_implementation("eager")
    return hf.requires_grad_(True)  # idefics freezes its vision tower


def agree(found: Relevance, i: int, wanted: tuple[Any, ...]) -> None:
    target, tokens, source, masses = wanted
    assert found.target[i] == target
    np.testing.assert_allclose(found.tokens[i], tokens, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(found.source[i], source, atol=1e-5, rtol=1e-4)
    assert source.max() > 1e-3  # or agreement says nothing
    by_tower: dict[str, list[float]] = {}
    for head, mass in zip(found.heads, found.by_head[i], strict=True):
        by_tower.setdefault(head.tower, []).append(mass)
    got = np.sort(np.concatenate([np.array(x) for x in by_tower.values()]))
    np.testing.assert_allclose(got, np.sort(np.concatenate(masses)), atol=1e-5, rtol=1e-3)


# Models ------------------------------------------------------------------------------------

DECODER = ("ii", "ii", "tt", "ti", "tt", "ti")


@functools.cache
def tiny(name: str) -> Model:
    hf = tiny_model(name)
    if name == "whisper":  # few frames: the reference loops over all of them
        config = tiny_config(name)
        config.max_source_positions = 11
        torch.manual_seed(0)
        hf = model_class(name)(config).eval()
    with torch.no_grad():
        for key, weight in hf.named_parameters():
            if "alpha_cross_attn" in key:  # gates of idefics, closed at first
                weight.fill_(0.7)
    return Model(hf, name=name)


@functools.cache
def mllama() -> Model:
    """Two of four layers look at the image, by grouped heads; gates open."""
    config = tiny_config("mllama")
    config.text_config.num_hidden_layers = 4
    config.text_config.cross_attention_layers = [1, 3]
    torch.manual_seed(0)
    hf = model_class("mllama")(config).eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(std=min(0.3, 1.5 * weight[0].numel() ** -0.5))
            elif "gate" in name:
                weight.fill_(0.7)
    return Model(hf, name="mllama")


@functools.cache
def lxmert() -> Model:
    torch.manual_seed(0)
    config = tf.LxmertConfig(
        vocab_size=97, hidden_size=32, num_attention_heads=4, num_qa_labels=7, intermediate_size=48,
        l_layers=2, x_layers=2, r_layers=1, visual_feat_dim=12, max_position_embeddings=64,
    )  # fmt: skip
    hf = tf.LxmertForQuestionAnswering(config).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.25)
    example = {
        "input_ids": torch.randint(3, 90, (2, 9)),
        "attention_mask": torch.ones(2, 9, dtype=torch.long),
        "visual_feats": torch.randn(2, 6, 12),
        "visual_pos": torch.rand(2, 6, 4),
    }
    return Model(hf, name="lxmert", example=example)


def ids(n: int, seed: int, most: int = 90) -> tuple[int, ...]:
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, most, (n,), generator=gen).tolist())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The rules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart", "t5gemma", "seamless_m4t"])
@pytest.mark.parametrize("target", ["top", "answer"])
def test_encoder_decoders_of_text_equal_the_rules_by_hand(name: str, target: str) -> None:
    """Grouped heads in t5gemma; the towers of seamless_m4t have other names."""
    model = handle("t5") if name == "t5" else tiny(name)
    lengths = ((9, 4), (6, 4), (9, 4), (9, 2))
    prompts = [Prompt(ids(n, i), id=f"p{i}", answer=(7,)) for i, (n, _) in enumerate(lengths)]
    decoder = [Prompt((0, *ids(m - 1, 20 + i))) for i, (_, m) in enumerate(lengths)]
    found = relevance_maps(model, prompts, target=target, decoder=decoder, batch_size=3)
    named = {"text-text_decoder", "cross", "text"}
    assert set(found.through) == (named if "m4t" in name else {"text", "cross", "encoder"})
    hf = eager(model.hf)
    for i, (prompt, read) in enumerate(zip(prompts, decoder, strict=True)):
        inputs = {
            "input_ids": torch.tensor([prompt.tokens]),
            "decoder_input_ids": torch.tensor([read.tokens]),
        }
        answer = 7 if target == "answer" else None
        agree(found, i, want(hf, inputs, DECODER, len(read) - 1, answer))
        assert found.prompts[i] == read and found.sources[i] == prompt


def test_what_is_gained_may_be_far_less_than_one() -> None:
    """Logits so small that R − I would be noise in single precision, and R̄ with it."""
    hf = fresh("t5")
    hf.lm_head.weight = torch.nn.Parameter(1e-6 * hf.shared.weight.detach())
    prompt, read = Prompt(ids(8, 2)), Prompt((0, *ids(3, 1)))
    found = relevance_maps(Model(hf, name="t5"), [prompt], decoder=[read])
    inputs = {
        "input_ids": torch.tensor([prompt.tokens]),
        "decoder_input_ids": torch.tensor([read.tokens]),
    }
    _, _, source, _ = want(eager(hf), inputs, DECODER, 3, found.target[0])
    assert 0 < source.max() < 1e-6
    np.testing.assert_allclose(found.source[0] / source.max(), source / source.max(), atol=1e-4)


def test_padding_of_either_side_changes_nothing() -> None:
    """Lengths differ on both sides: each prompt has the rows that it has alone."""
    model = handle("t5")
    prompts = [Prompt(ids(n, n), id=str(n)) for n in (7, 5, 11, 7)]
    decoder = [Prompt((0, *ids(m, m))) for m in (1, 3, 3, 2)]
    many = relevance_maps(model, prompts, decoder=decoder, batch_size=4)
    for i, (p, d) in enumerate(zip(prompts, decoder, strict=True)):
        alone = relevance_maps(model, [p], decoder=[d])
        assert len(many.source[i]) == len(p) and len(many.tokens[i]) == len(d)
        np.testing.assert_allclose(many.source[i], alone.source[0], atol=1e-5)
        np.testing.assert_allclose(many.tokens[i], alone.tokens[0], atol=1e-5)
        np.testing.assert_allclose(many.by_head[i], alone.by_head[0], atol=1e-5)


def test_every_way_to_name_the_tower_and_the_decoder_is_one_map() -> None:
    model = handle("t5")
    prompt = Prompt(ids(8, 1), inputs={"decoder_input_ids": torch.tensor([[0]])})
    plain = relevance_maps(model, [Prompt(prompt.tokens)])  # the start token alone
    for tower in ("text", "cross", None):
        same = relevance_maps(model, [prompt], tower=tower)
        np.testing.assert_allclose(same.source[0], plain.source[0])
        assert same.prompts[0].tokens == (0,)
    said = Prompt(prompt.tokens, inputs={"decoder_input_ids": torch.tensor([[0, 5]])})
    found = relevance_maps(model, [said])
    same = relevance_maps(model, [Prompt(prompt.tokens)], decoder=[Prompt((0, 5))])
    np.testing.assert_allclose(found.source[0], same.source[0])
    assert found.prompts[0].tokens == (0, 5)
    with pytest.raises(InputError, match="decides nothing by itself"):
        relevance_maps(model, [prompt], tower="encoder")
    with pytest.raises(InputError, match="one prompt for each of 1"):
        relevance_maps(model, [prompt], decoder=[])
    with pytest.raises(InputError, match="has no decoder beside"):
        relevance_maps(handle("llama"), [prompt], decoder=[prompt])


@pytest.mark.parametrize("name", ["vision-encoder-decoder", "whisper", "blip", "idefics"])
def test_images_and_sounds_that_a_decoder_looks_at(name: str) -> None:
    model = tiny(name)
    inputs: dict[str, Tensor] = {}
    n = 17
    if name == "whisper":
        n = model.hf.config.max_source_positions
        inputs["input_features"] = noise(1, model.hf.config.num_mel_bins, 2 * n)
    else:
        inputs["pixel_values"] = noise(1, 3, 32, 32)
    read = Prompt(ids(5, 3))
    order = DECODER
    if name == "idefics":  # cross-attention stands before each layer, in a list of its own
        order = ("ii", "ii", "ti", "tt", "ti", "tt")
        inputs = {
            "pixel_values": inputs["pixel_values"][:, None],
            "image_attention_mask": torch.ones(1, 5, 1, dtype=torch.long),
        }
    if name in ("blip", "idefics"):
        found = relevance_maps(model, [Prompt(read.tokens, inputs=inputs)])
        inputs["input_ids"] = torch.tensor([read.tokens])
    else:
        prompt = Prompt((0,) * n, spans={"image": ((1, n),)}, inputs=inputs)
        found = relevance_maps(model, [prompt], decoder=[read])
        inputs["decoder_input_ids"] = torch.tensor([read.tokens])
    agree(found, 0, want(eager(model.hf), inputs, order, len(read) - 1))
    assert len(found.source[0]) == n and found.prompts[0].tokens == read.tokens


def _picture(model: Model, n: int, seed: int) -> Prompt:
    vision = model.hf.config.vision_config
    side = vision.image_size
    inputs = {
        "pixel_values": noise(1, 1, vision.max_num_tiles, 3, side, side, seed=seed),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, vision.max_num_tiles, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, n, 1, vision.max_num_tiles, dtype=torch.long),
    }
    return Prompt(ids(n, seed), inputs=inputs, id=str(seed))


def test_layers_of_cross_attention_in_a_decoder_with_grouped_heads() -> None:
    model = mllama()
    prompts = [_picture(model, 7, 1), _picture(model, 5, 2), _picture(model, 7, 3)]
    found = relevance_maps(model, prompts, batch_size=2)
    # Its vision towers attend over padded tiles: maps stop at what they made.
    assert set(found.through) == {"text", "cross"}
    hf = eager(model.hf)
    for i, prompt in enumerate(prompts):
        inputs = {"input_ids": torch.tensor([prompt.tokens]), **prompt.inputs}
        order = ("-",) * 4 + ("tt", "ti", "tt", "ti")
        agree(found, i, want(hf, inputs, order, len(prompt) - 1))
        assert len(found.source[i]) == len(found.sources[i] or ())
    np.testing.assert_allclose(
        found.source[0], relevance_maps(model, prompts[:1], tower="cross").source[0], atol=1e-5
    )
    # Without an image these layers do not run, and the rest is the rule of self-attention.
    bare = relevance_maps(model, [Prompt(prompts[0].tokens), prompts[0]])
    assert len(bare.source[0]) == 0 and bare.sources[0] is None and len(bare.source[1])
    across = [h.tower == "cross" for h in bare.heads]
    assert np.isnan(bare.by_head[0][across]).all() and not np.isnan(bare.by_head[1]).any()


@pytest.mark.parametrize("n", [9, 6])
def test_co_attention_equals_the_rules_by_hand(n: int) -> None:
    """Six boxes; six tokens are told from them by a masked seventh."""
    model = lxmert()
    prompts = [
        Prompt(
            ids(n, i),
            spans={"cls": ((0, 1),)},
            inputs={
                "visual_feats": noise(1, 6, 12, seed=i),
                "visual_pos": torch.rand(1, 6, 4),
                "token_type_ids": torch.zeros(1, n, dtype=torch.long),
            },
        )
        for i in range(3)
    ]
    order = ("tt", "tt", "ii", *(("ti", "it", "tt", "ii") * 2))
    for tower in (None, "cross", "text-encoder"):
        found = relevance_maps(model, prompts, tower=tower, batch_size=2)
        for i, prompt in enumerate(prompts):
            inputs = {"input_ids": torch.tensor([prompt.tokens]), **prompt.inputs}
            agree(found, i, want(model.hf, inputs, order, 0))
    blind = [Prompt(p.tokens, inputs=p.inputs) for p in prompts]
    with pytest.raises(InputError, match="does not say which"):
        relevance_maps(model, blind)


@pytest.mark.parametrize("n", [9, 6])
@pytest.mark.parametrize("side", ["source", "tokens"])
def test_hiding_one_of_two_sides_that_look_at_each_other(side: str, n: int) -> None:
    """As the model masks boxes and tokens itself; hidden ones may go on seeing each other."""
    model = lxmert()
    prompt = Prompt(
        ids(n, 8),
        spans={"cls": ((0, 1),), "some": ((1, 4),)},
        inputs={"visual_feats": noise(1, 6, 12), "visual_pos": noise(1, 6, 4, seed=1).abs()},
        views={"cross/keys": (Prompt((0,) * 6, spans={"some": ((1, 4),)}),)},
    )
    found = relevance_maps(model, [prompt])
    curves = perturbation(model, found, [prompt], span="some", side=side, shares=(0.0, 0.34, 1.0))
    values = found.source[0] if side == "source" else found.tokens[0]
    best = np.array([1, 2, 3])[np.argsort(-values[1:4], kind="stable")]
    assert np.ptp(curves.deletion) > 0.005
    for j, count in enumerate((0, 1, 3)):
        mask = torch.ones(1, 6 if side == "source" else n)
        mask[0, best[:count].tolist()] = 0
        name = "visual_attention_mask" if side == "source" else "attention_mask"
        with torch.no_grad():
            out = model.hf(
                input_ids=torch.tensor([prompt.tokens]), **prompt.inputs, **{name: mask}
            )[0]
        share = float(out[0].softmax(-1)[found.target[0]])
        assert curves.deletion[0, j] == pytest.approx(share, abs=1e-5)


def test_rollout_and_attention_across() -> None:
    model = handle("t5")
    prompt, read = Prompt(ids(6, 4)), Prompt((0, *ids(2, 5)))
    hf = eager(model.hf)
    with softmaxes() as seen, torch.no_grad():
        hf(input_ids=torch.tensor([prompt.tokens]), decoder_input_ids=torch.tensor([read.tokens]))
    maps = [a[0].double().mean(0).numpy() for a in seen]
    # Both sides as one sequence of 3 + 6 positions, whose rows always sum to one.
    total = np.eye(9)
    for kind, a in zip(DECODER, maps, strict=True):
        step = np.eye(9)
        rows = slice(0, 3) if kind[0] == "t" else slice(3, 9)
        keys = slice(0, 3) if kind[1] == "t" else slice(3, 9)
        step[rows, keys] += a
        total = step / step.sum(1, keepdims=True) @ total
    found = relevance_maps(model, [prompt], decoder=[read], method="rollout")
    np.testing.assert_allclose(found.tokens[0], total[2, :3], atol=1e-5)
    np.testing.assert_allclose(found.source[0], total[2, 3:], atol=1e-5)
    assert found.tokens[0].sum() + found.source[0].sum() == pytest.approx(1, abs=1e-5)
    found = relevance_maps(model, [prompt], decoder=[read], method="attention")
    np.testing.assert_allclose(found.tokens[0], maps[4][2], atol=1e-5)
    np.testing.assert_allclose(found.source[0], maps[5][2], atol=1e-5)


# Truth known -------------------------------------------------------------------------------

MARK, ANSWERS, FILLERS = 1, range(20, 32), range(2, 20)


@functools.cache
def courier() -> Model:
    """An encoder head brings the answer to the mark; the decoder reads nothing but the mark.

    Dimension i of the stream is token i, dimension 32 + i an answer i that was brought.
    """
    torch.manual_seed(0)
    hf: Any = tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=32, d_model=64, d_kv=16, d_ff=8, num_layers=1, num_heads=2,
            decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    hf.lm_head.weight = torch.nn.Parameter(torch.zeros(32, 64))
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "layer_norm" not in name:
                weight.zero_()
        hf.shared.weight[:, :32] = torch.eye(32)
        carry = hf.encoder.block[0].layer[0].SelfAttention
        look = hf.decoder.block[0].layer[1].EncDecAttention
        carry.q.weight[0, MARK], look.q.weight[0, 0] = 1.0, 5.0
        look.k.weight[0, MARK] = 1.0
        for i, answer in enumerate(ANSWERS):
            carry.k.weight[0, answer] = 1.0
            carry.v.weight[1 + i, answer] = look.v.weight[1 + i, 32 + answer] = 1.0
            carry.o.weight[32 + answer, 1 + i] = look.o.weight[32 + answer, 1 + i] = 1.0
            hf.lm_head.weight[answer, 32 + answer] = 20.0
    return Model(hf, name="courier")


def errands(count: int) -> list[Prompt]:
    gen = np.random.default_rng(0)
    out = []
    for i in range(count):
        tokens = gen.choice(list(FILLERS), 10).tolist()
        here, mark = gen.choice(10, 2, replace=False).tolist()
        answer = int(gen.choice(list(ANSWERS)))
        tokens[here], tokens[mark] = answer, MARK
        spans = {"answer": ((here, here + 1),), "mark": ((mark, mark + 1),)}
        out.append(Prompt(tuple(tokens), spans, id=str(i), answer=(answer,)))
    return out


def test_relevance_finds_the_one_token_that_carries_the_answer() -> None:
    model, prompts = courier(), errands(12)
    found = relevance_maps(model, prompts)
    seen = relevance_maps(model, prompts, method="attention")
    for i, prompt in enumerate(prompts):
        assert (found.target[i],) == prompt.answer
        (here,), (mark,) = prompt.positions("answer"), prompt.positions("mark")
        source = found.source[i].copy()
        # The decoder looks at the mark alone; what the mark gained is the answer's, in full.
        assert int(seen.source[i].argmax()) == mark
        assert seen.source[i][here] == pytest.approx(seen.source[i].min(), abs=1e-6)
        assert source[here] == pytest.approx(source[mark], rel=1e-5)
        assert source[here] > 0.1
        source[[here, mark]] = 0
        np.testing.assert_allclose(source, 0, atol=1e-6)
        by = {str(h): found.by_head[i][j] for j, h in enumerate(found.heads)}
        assert by.pop("cross.L0H0") > 0.1 and max(by.values()) < 1e-6


def test_hiding_what_is_relevant_takes_the_answer_away() -> None:
    model, prompts = courier(), errands(8)
    found = relevance_maps(model, prompts)
    curves = perturbation(model, found, prompts, span="all", shares=(0.0, 0.2, 0.8, 1.0))
    # Two of ten tokens matter: hidden first they leave chance, shown first they are enough.
    assert (curves.deletion[:, 0] > 0.99).all() and (curves.insertion[:, 1] > 0.99).all()
    np.testing.assert_allclose(curves.deletion[:, 1:], 1 / 32, atol=0.01)
    assert curves.area("deletion").mean() < curves.area("random").mean()


# Hiding ------------------------------------------------------------------------------------


def test_hiding_encoder_tokens_is_masking_them() -> None:
    model = sharp_t5()
    prompts = [Prompt(ids(8, i), spans={"middle": ((2, 7),)}) for i in range(2)]
    decoder = [Prompt((0, *ids(3, 9 + i))) for i in range(2)]
    found = relevance_maps(model, prompts, decoder=decoder)
    curves = perturbation(model, found, prompts, span="middle", shares=(0.0, 0.4, 1.0))
    places = np.arange(2, 7)
    assert np.ptp(curves.deletion, axis=1).min() > 0.01
    for i, (p, d) in enumerate(zip(prompts, decoder, strict=True)):
        best = places[np.argsort(-found.source[i][places], kind="stable")]
        for j, count in enumerate((0, 2, 5)):
            for curve, gone in (("deletion", best[:count]), ("insertion", best[count:])):
                mask = torch.ones(1, 8, dtype=torch.long)
                mask[0, gone.tolist()] = 0
                with torch.no_grad():
                    out = model.hf(
                        input_ids=torch.tensor([p.tokens]),
                        attention_mask=mask,
                        decoder_input_ids=torch.tensor([d.tokens]),
                    ).logits
                share = out[0, -1].softmax(-1)[found.target[i]]
                assert getattr(curves, curve)[i, j] == pytest.approx(float(share), abs=1e-5)


def test_with_nothing_left_to_see_cross_attention_gives_nothing() -> None:
    model = sharp_t5()
    prompt, read = Prompt(ids(6, 0)), Prompt((0, *ids(2, 1)))
    found = relevance_maps(model, [prompt], decoder=[read])
    curves = perturbation(model, found, [prompt], span="all", shares=(0.0, 1.0))
    hooks = [
        model.hf.get_submodule(layer.projection).register_forward_pre_hook(
            lambda _, args: (torch.zeros_like(args[0]),)
        )
        for layer in model.tower("cross").layers
    ]
    with torch.no_grad():
        out = model.hf(
            input_ids=torch.tensor([prompt.tokens]), decoder_input_ids=torch.tensor([read.tokens])
        ).logits
    for hook in hooks:
        hook.remove()
    share = float(out[0, -1].softmax(-1)[found.target[0]])
    assert curves.deletion[0, 1] == pytest.approx(share, abs=1e-6)
    assert curves.insertion[0, 0] == pytest.approx(share, abs=1e-6)
    assert abs(curves.deletion[0, 0] - share) > 1e-3


@functools.cache
def sharp_t5() -> Model:
    """Logits large enough that probabilities say something."""
    hf = fresh("t5")
    hf.lm_head.weight = torch.nn.Parameter(20 * hf.shared.weight.detach())
    return Model(hf, name="t5")


@pytest.mark.parametrize("name", ["vision-encoder-decoder", "blip", "mllama"])
def test_hiding_patches_by_hand(name: str) -> None:
    """Columns cut out of every softmax that sees the patches, in an eager copy."""
    if name == "mllama":
        model = mllama()
        prompts = [_picture(model, 5, 4)]
        n, reading = 68, prompts[0].tokens
        inputs = {"input_ids": torch.tensor([reading]), **prompts[0].inputs}
        n_vision = 0  # the towers before are no part of the map, and keep what they see
        found = relevance_maps(model, prompts)
    else:
        model, n, n_vision = tiny(name), 17, 2
        pixels = {"pixel_values": noise(1, 3, 32, 32)}
        reading = ids(5, 3)
        if name == "blip":
            prompts = [Prompt(reading, inputs=pixels)]
            found = relevance_maps(model, prompts)
            inputs = {**pixels, "input_ids": torch.tensor([reading])}
        else:
            prompts = [Prompt((0,) * 17, inputs=pixels)]
            found = relevance_maps(model, prompts, decoder=[Prompt(reading)])
            inputs = {**pixels, "decoder_input_ids": torch.tensor([reading])}
    curves = perturbation(model, found, prompts, span="all", shares=(0.0, 0.25, 1.0))
    best = np.argsort(-found.source[0], kind="stable")[: round(0.25 * n)]

    def cut(i: int, a: Tensor) -> Tensor:
        if a.shape[-1] != n or (n_vision == 0 and a.shape[-2] != 5):
            return a
        kept = a.clone()
        kept[..., best.tolist()] = 0
        kept = kept / kept.sum(-1, keepdim=True)
        if i < n_vision:  # hidden patches are read by nobody
            kept[..., best.tolist(), :] = a[..., best.tolist(), :]
        return kept

    hf = eager(model.hf)
    for j, change in enumerate((None, cut)):
        with softmaxes(change), torch.no_grad():
            logits = hf(**inputs).logits[0, -1]
        share = float(logits.softmax(-1)[found.target[0]])
        assert curves.deletion[0, j] == pytest.approx(share, abs=2e-5)
    assert abs(curves.deletion[0, 1] - curves.deletion[0, 0]) > 1e-4


def test_the_tokens_of_a_decoder_can_be_hidden_too() -> None:
    model = sharp_t5()
    prompt, read = Prompt(ids(6, 0)), Prompt((0, *ids(4, 1)), spans={"said": ((1, 4),)})
    found = relevance_maps(model, [prompt], decoder=[read])
    curves = perturbation(
        model, found, [prompt], span="said", side="tokens", shares=(0.0, 0.34, 1.0)
    )
    assert np.ptp(curves.deletion) > 0.01
    best = np.array([1, 2, 3])[np.argsort(-found.tokens[0][1:4], kind="stable")]
    for j, count in enumerate((0, 1, 3)):
        mask = torch.ones(1, 5, dtype=torch.long)
        mask[0, best[:count].tolist()] = 0
        with torch.no_grad():
            out = model.hf(
                input_ids=torch.tensor([prompt.tokens]),
                decoder_input_ids=torch.tensor([read.tokens]),
                decoder_attention_mask=mask,
            ).logits[0, -1]
        share = float(out.softmax(-1)[found.target[0]])
        assert curves.deletion[0, j] == pytest.approx(share, abs=1e-5)
    # The deciding token hidden too: it goes on reading, but no other row reads it.
    curves = perturbation(model, found, [prompt], span="all", side="tokens", shares=(0.0, 0.6, 1.0))
    best = np.argsort(-found.tokens[0], kind="stable")[:3].tolist()
    assert 4 in best

    def cut(i: int, a: Tensor) -> Tensor:
        if i not in (2, 4):
            return a
        kept = a.clone()
        kept[..., best] = 0
        kept = kept / kept.sum(-1, keepdim=True)
        kept[..., best, :] = a[..., best, :]
        return kept

    with softmaxes(cut), torch.no_grad():
        out = eager(model.hf)(
            input_ids=torch.tensor([prompt.tokens]), decoder_input_ids=torch.tensor([read.tokens])
        ).logits[0, -1]
    share = float(out.softmax(-1)[found.target[0]])
    assert curves.deletion[0, 1] == pytest.approx(share, abs=1e-6)
    assert abs(curves.deletion[0, 1] - curves.deletion[0, 0]) > 5e-5
    with pytest.raises(InputError, match="side must be source or tokens"):
        perturbation(model, found, [prompt], side="both", span="said")
    plain = relevance_maps(handle("llama"), [prompt])
    with pytest.raises(InputError, match="looked at nothing across"):
        perturbation(handle("llama"), plain, [prompt], side="source", span="all")


# Maps and refusals -------------------------------------------------------------------------


def test_keys_of_a_view_are_drawn_and_hidden_by_their_spans() -> None:
    model = mllama()
    spans = {"image": ((1, 17),), "cls": ((0, 1),)}
    keys = Prompt((0,) * 68, spans, patches=_grid(68))
    none = PatchMap((), ((32, 32),), 5)
    prompt = replace(_picture(model, 5, 6), views={"cross/keys": (keys,)}, patches=none)
    found = relevance_maps(model, [prompt])
    assert found.sources == (keys,)
    assert found.heat(0)[0, 31] == found.source[0][4]
    curves = perturbation(model, found, [prompt], shares=(0.0, 1.0))
    shown = torch.ones(1, 5, 1, 68, dtype=torch.bool)
    shown[..., 1:17] = False

    def cut(i: int, a: Tensor) -> Tensor:
        if a.shape[-1] != 68:
            return a
        return a * shown / (a * shown).sum(-1, keepdim=True)

    shown = shown.transpose(1, 2)
    with softmaxes(cut), torch.no_grad():
        logits = eager(model.hf)(input_ids=torch.tensor([prompt.tokens]), **prompt.inputs).logits
    share = float(logits[0, -1].softmax(-1)[found.target[0]])
    assert curves.deletion[0, 1] == pytest.approx(share, abs=2e-5)
    assert abs(curves.deletion[0, 1] - curves.deletion[0, 0]) > 1e-4


def test_patches_that_were_looked_at_are_drawn() -> None:
    model = tiny("vision-encoder-decoder")
    grid = PatchMap(tuple(Patch(1 + i, _box(i), i // 4, i % 4) for i in range(16)), ((32, 32),), 17)
    prompt = Prompt((0,) * 17, inputs={"pixel_values": noise(1, 3, 32, 32)}, patches=grid)
    found = relevance_maps(model, [prompt], decoder=[Prompt(ids(3, 3))])
    np.testing.assert_array_equal(found.patches(0), found.source[0][1:])
    heat = found.heat(0)
    assert heat.shape == (32, 32) and heat[0, 31] == found.source[0][4]


def _grid(n: int) -> PatchMap:
    return PatchMap(
        tuple(Patch(1 + i, _box(i), i // 4, i % 4) for i in range(16)), ((32, 32),), n
    )  # fmt: skip


def _box(i: int) -> tuple[int, int, int, int]:
    return (i % 4 * 8, i // 4 * 8, i % 4 * 8 + 8, i // 4 * 8 + 8)


@pytest.mark.parametrize("name", ["bridgetower", "blip-2", "perceiver"])
def test_sides_that_are_no_one_chain_are_refused(name: str) -> None:
    model = tiny(name)
    prompt = Prompt(ids(12, 0), inputs={"pixel_values": noise(1, 3, 32, 32)})
    if name != "blip-2":
        with pytest.raises(InputError, match="looks across after it"):
            relevance_maps(model, [prompt if name == "bridgetower" else Prompt(ids(12, 0))])
    else:
        for tower in ("cross", "vision", "vision-encoder"):
            with pytest.raises(InputError, match="decides nothing by itself"):
                relevance_maps(model, [prompt], tower=tower)


def test_positions_that_are_not_the_prompts_are_refused() -> None:
    """Patches that the model puts before the tokens by itself; windows instead of whole rows."""
    pixels = {"pixel_values": noise(1, 3, 32, 32)}
    with pytest.raises(SiteError, match="reads 12 positions and attends over 29"):
        relevance_maps(tiny("git"), [Prompt(ids(12, 0), inputs=pixels)])
    with pytest.raises(SiteError, match="attends in groups"):
        relevance_maps(tiny("swin"), [Prompt((0,) * 64, {"cls": ((0, 1),)}, inputs=pixels)])


@pytest.mark.parametrize("name", ["cross", "text-encoder"])
def test_a_layer_that_does_not_run_is_an_error(name: str) -> None:
    hf = lxmert()
    model = Model(hf.hf, name="ghost", example=hf._example)
    tower = model.tower(name)
    ghost = replace(tower.layers[0], name="lxmert.encoder.x_layers.9")
    towers = {**model.towers, name: replace(tower, layers=(*tower.layers, ghost))}
    known = replace(model.structure, towers=towers)
    prompt = Prompt(
        ids(9, 0),
        {"cls": ((0, 1),)},
        inputs={"visual_feats": noise(1, 6, 12), "visual_pos": torch.rand(1, 6, 4)},
    )
    relevance_maps(model, [prompt])
    model.__dict__["structure"] = known
    with pytest.raises(SiteError, match="every layer of the tower"):
        relevance_maps(_unwatched(model), [prompt])


def _unwatched(model: Model) -> Model:
    """The model observed as it is, though its structure tells of more."""
    true = Model(model.hf, name="true", example=model._example)
    model.observe = true.observe  # type: ignore[method-assign]
    return model


def test_an_encoder_of_text_and_patches_behind_windows() -> None:
    model = tiny("florence2")
    example = example_inputs(model.hf)
    inputs = {n: x[:1] for n, x in example.items() if n not in ("input_ids", "attention_mask")}
    found = relevance_maps(model, [Prompt(tuple(example["input_ids"][0].tolist()), inputs=inputs)])
    assert set(found.through) == {"text", "cross", "encoder"}
    assert len(found.source[0]) == example["input_ids"].shape[1] and found.source[0].max() > 0


def test_an_encoder_that_is_not_reached_is_an_error() -> None:
    with pytest.raises(SiteError, match="every layer of the encoder"):
        relevance_maps(tiny("led"), [Prompt(ids(12, 0))], decoder=[Prompt((0, 5))])
