"""Planted models: their patterns, scores and effects against slow references, and the plumbing.

The reference of every pattern is written out here as a rule on tokens ("the keys that this query
attends to evenly") and compared with the whole matrix of an eager forward.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.zoo import ZOO, ZooModel
from interp.zoo.attention_only import AttentionOnlyConfig, AttentionOnlyForCausalLM
from interp.zoo.planted_heads import planted_heads
from interp.zoo.planted_induction import planted_induction, planted_retrieval
from interp.zoo.planted_ioi import ioi_pairs, planted_ioi
from interp.zoo.planted_kit import Kit
from interp.zoo.planted_llama import class_prompts, planted_llama
from interp.zoo.planted_parts import HeadPlan, assemble
from interp.zoo.planted_sink import DELIMITER, planted_nothing, planted_sink

NAMES = [
    "planted-heads",
    "planted-induction",
    "planted-induction-gqa",
    "planted-ioi",
    "planted-ioi-rotated",
    "planted-llama",
    "planted-nothing",
    "planted-retrieval",
    "planted-retrieval-broken",
    "planted-sink",
]
Rule = Callable[[Sequence[int], int], list[int]]


def random_ids(length: int, *, vocab: int = 64, seed: int = 0) -> Tensor:
    """BOS and random tokens, some of them repeated."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(1, vocab, (length - 1,), generator=generator)
    return torch.cat([torch.zeros(1, dtype=torch.long), rest])


def repeated_ids(length: int, repeats: int, *, vocab: int = 64, seed: int = 0) -> Tensor:
    """BOS and copies of a run of different tokens."""
    generator = torch.Generator().manual_seed(seed)
    run = torch.randperm(vocab - 1, generator=generator)[:length] + 1
    return torch.cat([torch.zeros(1, dtype=torch.long), run.repeat(repeats)])


@torch.no_grad()
def full(zoo: ZooModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Patterns [layer, head, query, key] and logits [pos, d_vocab] of one eager forward."""
    before = zoo.hf.config._attn_implementation
    zoo.hf.set_attn_implementation("eager")
    out = zoo.hf(ids[None], output_attentions=True)
    zoo.hf.set_attn_implementation(before)
    return torch.stack(out.attentions)[:, 0], out.logits[0]


@contextmanager
def scaled(zoo: ZooModel, *heads: HeadId, by: float = 0.0):
    """Scale the z of heads by a hook before the output projection."""
    n_heads = zoo.hf.config.num_attention_heads
    with ExitStack() as stack:
        for head in heads:

            def edit(module, args, index=head.head):
                z = args[0].clone()
                size = z.shape[-1] // n_heads
                z[..., index * size : (index + 1) * size] *= by
                return (z,)

            o_proj = zoo.hf.model.layers[head.layer].self_attn.o_proj
            stack.callback(o_proj.register_forward_pre_hook(edit).remove)
        yield


# The keys that each kind of head attends to, evenly.
def previous(t: Sequence[int], i: int) -> list[int]:
    return [max(i - 1, 0)]


def duplicate(t: Sequence[int], i: int) -> list[int]:
    return ([j for j in range(i) if t[j] == t[i]] or [0])[:1] if i else [0]


def induction(t: Sequence[int], i: int) -> list[int]:
    return [j for j in range(2, i + 1) if t[j - 1] == t[i]] or [0]


def bos(t: Sequence[int], i: int) -> list[int]:
    return [0]


def uniform(t: Sequence[int], i: int) -> list[int]:
    return list(range(i + 1))


def itself(t: Sequence[int], i: int) -> list[int]:
    return [i]


def window(t: Sequence[int], i: int) -> list[int]:
    return list(range(max(0, i - 3), i + 1))


def fourth(t: Sequence[int], i: int) -> list[int]:
    return [4 if i >= 4 else 0]


def delimiter(t: Sequence[int], i: int) -> list[int]:
    return [j for j in range(i + 1) if t[j] == DELIMITER] or [0]


HEADS = [
    [previous, duplicate, bos, uniform, itself],
    [induction, window, bos, uniform, previous],
]
INDUCTION = [
    [previous, itself, window, bos, uniform, bos],
    [bos, uniform, itself, induction, induction, induction],
]
RETRIEVAL = [[previous, bos, uniform, itself], [induction, bos, window, uniform]]
SINK = [[bos, bos, fourth, delimiter], [uniform, itself, previous, window]]
KINDS = {
    "planted-heads": (planted_heads, HEADS),
    "planted-heads, one kv head": (lambda: planted_heads(n_kv_heads=1), HEADS),
    "planted-induction": (planted_induction, INDUCTION),
    "planted-induction, two kv heads": (lambda: planted_induction(n_kv_heads=2), INDUCTION),
    "planted-retrieval": (planted_retrieval, RETRIEVAL),
    "planted-retrieval, broken": (lambda: planted_retrieval(copies=False), RETRIEVAL),
    "planted-sink": (planted_sink, SINK),
    "planted-sink, one kv head": (lambda: planted_sink(n_kv_heads=1), SINK),
}


def expected(rules: list[list[Rule]], ids: Tensor) -> Tensor:
    tokens = ids.tolist()
    pattern = torch.zeros(len(rules), len(rules[0]), len(tokens), len(tokens))
    for layer, row in enumerate(rules):
        for head, rule in enumerate(row):
            for i in range(len(tokens)):
                keys = rule(tokens, i)
                pattern[layer, head, i, keys] = 1 / len(keys)
    return pattern


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [random_ids(64), random_ids(300, seed=1), repeated_ids(20, 4)])
def test_every_pattern_is_its_rule_and_one_hot(kind, ids):
    build, rules = KINDS[kind]
    pattern, _ = full(build(), ids)
    want = expected(rules, ids)
    torch.testing.assert_close(pattern, want, rtol=1e-6, atol=1e-20)
    assert pattern[want == 0].max() < 1e-20


def test_patterns_hold_at_the_last_positions():
    ids = random_ids(512, seed=2)
    pattern, _ = full(planted_heads(), ids)
    torch.testing.assert_close(pattern, expected(HEADS, ids), rtol=1e-6, atol=1e-20)


def scores_by_loop(pattern: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """The scores of the truth by loops over queries and keys."""
    t = ids.tolist()
    targets: dict[str, Rule] = {
        "previous-token": lambda t, i: [i - 1] if i else [],
        "duplicate-token": lambda t, i: [j for j in range(i) if t[j] == t[i]],
        "induction": lambda t, i: [j + 1 for j in range(i) if t[j] == t[i]],
    }
    scores = {"sink": pattern[..., 0].mean(-1)}
    for name, keys in targets.items():
        rows = [pattern[:, :, i, keys(t, i)].sum(-1) for i in range(len(t)) if keys(t, i)]
        scores[name] = torch.stack(rows).mean(0)
    return scores


@pytest.mark.parametrize(("length", "repeats"), [(20, 4), (12, 3), (31, 2)])
def test_scores_of_planted_heads_equal_their_closed_forms(length, repeats):
    zoo = planted_heads(length=length, repeats=repeats)
    ids = repeated_ids(length, repeats, seed=3)
    found = scores_by_loop(full(zoo, ids)[0], ids)
    for name in ("previous-token", "duplicate-token", "induction", "sink"):
        assert len(zoo.truth.scores[name]) == 10
        for head, score in zoo.truth.scores[name].items():
            assert found[name][head.layer, head.head].item() == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("name", ["planted-heads", "planted-induction", "planted-induction-gqa"])
def test_true_heads_stand_apart_on_repeated_tokens(name):
    zoo, ids = ZOO[name](), repeated_ids(20, 4)
    scores = scores_by_loop(full(zoo, ids)[0], ids)
    for kind in ("previous-token", "duplicate-token", "sink"):
        high = {HeadId(*at) for at in (scores[kind] > 0.3).nonzero().tolist()}
        assert high == zoo.truth.heads[kind]


def test_published_normalisations_of_card_forms():
    """Scores with other denominators: mass per query, stripes, entries instead of queries."""
    zoo, ids = planted_heads(), repeated_ids(20, 4)
    pattern, _ = full(zoo, ids)
    t, total = ids.tolist(), 81
    same = torch.tensor([[j < i and t[i] == t[j] for j in range(total)] for i in range(total)])
    after = same.roll(1, dims=1)
    after[:, 0] = False
    assert pattern[0, 0].diagonal(-1).sum() / total == pytest.approx(80 / 81)
    assert pattern[0, 3].diagonal(-1).sum() / total == pytest.approx(0.0491, abs=5e-5)
    assert pattern[0, 1][same].sum() / total == pytest.approx(60 / 81)
    assert pattern[1, 0][after].sum() / total == pytest.approx(60 / 81)
    assert pattern[1, 0][after].mean() == pytest.approx(2 / 4)
    twice = repeated_ids(20, 2)
    pattern, _ = full(zoo, twice)
    assert pattern[1, 0].diagonal(1 - 20).mean() == pytest.approx(21 / 22)
    assert pattern[0, 2].diagonal(1 - 20).mean() == pytest.approx(1 / 22)


def test_matchless_text_parks_content_heads_on_bos():
    pattern, _ = full(planted_heads(), repeated_ids(63, 1))
    alpha = pattern[..., 0].mean(-1)
    harmonic = sum(1 / n for n in range(1, 65))
    want = [
        [2 / 64, 1, 1, harmonic / 64, 1 / 64],
        [1, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 64, 1, harmonic / 64, 2 / 64],
    ]
    torch.testing.assert_close(alpha, torch.tensor(want))
    for k in range(64):
        assert pattern[0, 4, k:, k].mean() == pytest.approx(1 / (64 - k))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_kernels_agree_and_the_model_is_plain(name):
    zoo = ZOO[name]()
    assert not zoo.hf.training
    ids = random_ids(16, vocab=zoo.hf.config.vocab_size)
    _, eager = full(zoo, ids)
    assert zoo.hf.config._attn_implementation == "sdpa"
    torch.testing.assert_close(zoo.hf(ids[None]).logits[0], eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_building_is_deterministic_and_draws_nothing(name):
    torch.manual_seed(0)
    first = ZOO[name]().hf.state_dict()
    state = torch.random.get_rng_state()
    second = ZOO[name]().hf.state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(1)
    third = ZOO[name]().hf.state_dict()
    assert all(torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_truth_names_heads_of_the_model(name):
    zoo = ZOO[name]()
    config = zoo.hf.config
    every = {
        HeadId(layer, head)
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_attention_heads)
    }
    for heads in zoo.truth.heads.values():
        assert heads <= every
    for scores in zoo.truth.scores.values():
        assert set(scores) <= every
    assert zoo.truth.note
    assert zoo.tokenizer.bos_token_id == config.bos_token_id
    text = zoo.tokenizer.decode([2, 3])
    assert zoo.tokenizer(text)["input_ids"] == [config.bos_token_id, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["planted-heads", "planted-induction-gqa", "planted-retrieval"])
def test_padding_and_cache_change_nothing(name, attention):
    zoo = ZOO[name]()
    hf = zoo.hf
    hf.set_attn_implementation(attention)
    short, long = repeated_ids(9, 2)[:14], repeated_ids(12, 2, seed=1)[:20]
    batch = torch.zeros(2, 20, dtype=torch.long)
    batch[0, 6:], batch[1] = short, long
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    padded = hf(batch, attention_mask=mask).logits
    for row, ids in enumerate((short, long)):
        torch.testing.assert_close(padded[row, 20 - len(ids) :], hf(ids[None]).logits[0])

    def said(ids: Tensor, mask: Tensor, cache: bool) -> Tensor:
        return hf.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=cache
        )[:, ids.shape[1] :]

    together = said(batch, mask, True)
    assert torch.equal(together, said(batch, mask, False))
    for row, ids in enumerate((short, long)):
        alone = said(ids[None], torch.ones_like(ids)[None], True)
        assert torch.equal(together[row], alone[0])
    # What is copied: position p of a copy is followed by what followed it before.
    assert together[0].tolist() == [int(short[1 + (13 + n) % 9]) for n in range(6)]


def needle_prompt(seed: int) -> tuple[Tensor, list[int], range]:
    """BOS, haystack, key, needle of six, haystack, key; the haystack shares no token with them."""
    generator = torch.Generator().manual_seed(seed)
    key, *needle = (torch.randperm(20, generator=generator)[:7] + 1).tolist()
    hay = torch.randint(30, 64, (40,), generator=generator).tolist()
    cut = int(torch.randint(1, 39, (1,), generator=generator))
    tokens = [0, *hay[:cut], key, *needle, *hay[cut:], key]
    return torch.tensor(tokens), needle, range(cut + 2, cut + 8)


@torch.no_grad()
@pytest.mark.parametrize("name", ["planted-heads", "planted-retrieval", "planted-induction"])
def test_retrieval_scores_are_exactly_zero_or_one(name):
    zoo = ZOO[name]()
    zoo.hf.set_attn_implementation("eager")
    for seed in range(10):
        ids, needle, span = needle_prompt(seed)
        out = zoo.hf.generate(
            ids[None],
            max_new_tokens=6,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
        assert out.sequences[0, len(ids) :].tolist() == needle
        hits = torch.zeros(2, zoo.hf.config.num_attention_heads)
        for step, token in enumerate(needle):
            top = torch.stack([a[0, :, -1] for a in out.attentions[step]]).argmax(-1)
            for layer, row in enumerate(top.tolist()):
                for head, at in enumerate(row):
                    hits[layer, head] += at in span and int(ids[at]) == token
        for layer, row in enumerate((hits / 6).tolist()):
            for head, score in enumerate(row):
                true = HeadId(layer, head) in zoo.truth.heads["retrieval"]
                assert score == float(true)


@torch.no_grad()
@pytest.mark.parametrize("name", ["planted-retrieval-broken", "planted-nothing"])
def test_models_without_retrieval_never_answer(name):
    zoo = ZOO[name]()
    for seed in range(10):
        ids, needle, _ = needle_prompt(seed)
        said = zoo.hf.generate(ids[None], max_new_tokens=6, do_sample=False)[0, len(ids) :]
        assert sum(a == b for a, b in zip(said.tolist(), needle, strict=True)) < 2
    assert zoo.truth.heads["retrieval"] == frozenset()


@torch.no_grad()
def test_induction_heads_copy_and_decoys_do_not():
    zoo, grouped = planted_induction(), planted_induction(n_kv_heads=2)
    ids = repeated_ids(20, 4)
    pattern, logits = full(zoo, ids)
    torch.testing.assert_close(full(grouped, ids)[1], logits)
    want = torch.zeros_like(logits)
    # The last token of the first copy has no follower yet.
    for i in range(21, 81):
        want[i, ids[i - 19]] = 6.0
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)
    prefix = scores_by_loop(pattern, ids)["induction"]
    for head, score in zoo.truth.scores["prefix-matching"].items():
        assert prefix[head.layer, head.head] == pytest.approx(score, abs=1e-6)
    attention = zoo.hf.model.layers[1].self_attn
    embedded = zoo.hf.model.embed_tokens(ids[1:21])
    for head in range(6):
        at = slice(64 * head, 64 * head + 64)
        out = embedded @ attention.v_proj.weight[at].T @ attention.o_proj.weight[:, at].T
        ratio = copying_ratio(zoo.hf.lm_head(out)[:, ids[1:21]])
        assert ratio == pytest.approx({3: 1.0, 5: -1.0}.get(head), abs=1e-6)


def copying_ratio(logits: Tensor) -> float | None:
    """Raised logit of the attended token over those of all tokens in the sample, from -1 to 1."""
    raised = (logits - logits.mean(-1, keepdim=True)).clamp(min=0)
    if not raised.any():
        return None
    own = raised.diagonal()
    return float((own / raised.sum(-1)).mean() * 2 - 1)


@torch.no_grad()
def test_wrong_key_value_heads_are_noticed():
    zoo, ids = planted_induction(n_kv_heads=2), repeated_ids(20, 4)
    _, logits = full(zoo, ids)
    for name in ("k_proj", "v_proj"):
        for layer in range(2):
            weight = getattr(zoo.hf.model.layers[layer].self_attn, name).weight
            kept = weight.clone()
            weight.copy_(torch.cat([weight[64:], weight[:64]]))
            assert (full(zoo, ids)[1] - logits).abs().max() > 1
            weight.copy_(kept)


@torch.no_grad()
def test_sinks_with_and_without_effect():
    zoo, ids = planted_sink(), random_ids(64)
    pattern, clean = full(zoo, ids)
    assert pattern[0, 2, 4:, 4].min() == 1
    v = zoo.hf.model.layers[0].self_attn.v_proj(zoo.hf.model.embed_tokens(ids[None]))
    assert not v[0, :, :64].any()
    for head, effect in zoo.truth.scores["zero-ablation"].items():
        with scaled(zoo, head):
            change = zoo.hf(ids[None]).logits[0] - clean
        want = torch.zeros_like(change)
        want[:, 2] = effect
        torch.testing.assert_close(change, want, atol=1e-6, rtol=0)


def test_nothing_stands_out_where_nothing_is_planted():
    zoo = planted_nothing()
    found = [scores_by_loop(full(zoo, ids)[0], ids) for ids in map(_sample, range(8))]
    for name in ("previous-token", "duplicate-token", "induction", "sink"):
        scores = torch.stack([s[name] for s in found]).mean(0)
        assert scores.max() < 0.1
        even = scores[0, 0]
        assert (scores[:, 2:] / even - 1).abs().max() < 0.35
    assert not any(zoo.truth.heads.values())


def _sample(seed: int) -> Tensor:
    return repeated_ids(20, 4, seed=seed)


@torch.no_grad()
def ioi_diff(zoo: ZooModel, ids: Tensor, pairs) -> Tensor:
    logits = zoo.hf(ids).logits[:, -1]
    rows = torch.arange(len(pairs))
    right = torch.tensor([p.clean.answer[0] for p in pairs])
    wrong = torch.tensor([p.clean.meta["wrong"] for p in pairs])
    return logits[rows, right] - logits[rows, wrong]


def outputs(zoo: ZooModel, ids: Tensor) -> list[Tensor]:
    """The z of every layer [batch, pos, head * d_head]."""
    kept: list[Tensor] = []
    with ExitStack() as stack, torch.no_grad():
        for layer in zoo.hf.model.layers:
            hook = layer.self_attn.o_proj.register_forward_pre_hook(
                lambda module, args: kept.append(args[0].clone())
            )
            stack.callback(hook.remove)
        zoo.hf(ids)
    return kept


@contextmanager
def patched(zoo: ZooModel, head: HeadId, z: list[Tensor]):
    size = zoo.hf.config.v_head_dim
    at = slice(head.head * size, (head.head + 1) * size)

    def edit(module, args):
        changed = args[0].clone()
        changed[..., at] = z[head.layer][..., at]
        return (changed,)

    hook = zoo.hf.model.layers[head.layer].self_attn.o_proj.register_forward_pre_hook(edit)
    yield
    hook.remove()


def stack_ids(prompts) -> Tensor:
    return torch.tensor([p.tokens for p in prompts])


IOI = {"plain": planted_ioi, "rotated": ZOO["planted-ioi-rotated"]}


@pytest.mark.parametrize("kind", IOI)
def test_indirect_object_effects_equal_the_table(kind):
    zoo = IOI[kind]()
    for corruption in ("abc", "flip"):
        pairs = ioi_pairs(12, corruption=corruption, seed=4)
        clean = stack_ids(p.clean for p in pairs)
        other = stack_ids(p.corrupted for p in pairs)
        base, bad = ioi_diff(zoo, clean, pairs), ioi_diff(zoo, other, pairs)
        spoilt = {"abc": 0.0, "flip": -6.6}[corruption]
        assert torch.allclose(base, torch.full_like(base, 6.6), atol=1e-3)
        assert torch.allclose(bad, torch.full_like(bad, spoilt), atol=1e-3)
        z_clean, z_other = outputs(zoo, clean), outputs(zoo, other)
        for head, effect in zoo.truth.scores[f"noise-{corruption}"].items():
            with patched(zoo, head, z_other):
                assert torch.allclose(
                    ioi_diff(zoo, clean, pairs) - base, torch.tensor(effect), atol=1e-3
                )
        if corruption == "abc":
            for head, fraction in zoo.truth.scores["denoise-abc"].items():
                with patched(zoo, head, z_clean):
                    got = (ioi_diff(zoo, other, pairs) - bad) / (base - bad)
                assert torch.allclose(got, torch.tensor(fraction), atol=1e-3)


@pytest.mark.parametrize("kind", IOI)
def test_indirect_object_ablations_and_direct_effects(kind):
    zoo, pairs = IOI[kind](), ioi_pairs(12, seed=5)
    clean = stack_ids(p.clean for p in pairs)
    base = ioi_diff(zoo, clean, pairs)
    for head, effect in zoo.truth.scores["zero-ablation"].items():
        with scaled(zoo, head):
            got = ioi_diff(zoo, clean, pairs) - base
        assert torch.allclose(got, torch.tensor(effect), atol=1e-3), head
    first, second, negative, backup = (HeadId(2, 0), HeadId(2, 1), HeadId(2, 2), HeadId(3, 0))
    joint = {
        (first, second): -4.2,
        (first, second, backup): -9.0,
        (first, second, negative, backup): -6.6,
    }
    for heads, effect in joint.items():
        with scaled(zoo, *heads):
            got = ioi_diff(zoo, clean, pairs) - base
        assert torch.allclose(got, torch.tensor(effect), atol=1e-3), heads
    size = zoo.hf.config.v_head_dim
    right = torch.tensor([p.clean.answer[0] for p in pairs])
    wrong = torch.tensor([p.clean.meta["wrong"] for p in pairs])
    direction = (zoo.hf.lm_head.weight[right] - zoo.hf.lm_head.weight[wrong]).detach()
    z = outputs(zoo, clean)
    for head, effect in zoo.truth.scores["direct-effect"].items():
        at = slice(head.head * size, (head.head + 1) * size)
        weight = zoo.hf.model.layers[head.layer].self_attn.o_proj.weight[:, at].detach()
        result = z[head.layer][:, -1, at] @ weight.T
        assert torch.allclose((result * direction).sum(-1), torch.tensor(effect), atol=1e-3)


def test_rotation_hides_the_address_book():
    plain, turned = planted_ioi(junk=6), planted_ioi(junk=6, rotate=True)
    weight = turned.hf.model.embed_tokens.weight
    assert (weight.abs() > 1e-4).float().mean() > 0.9
    pairs = ioi_pairs(4)
    ids = stack_ids(p.clean for p in pairs)
    torch.testing.assert_close(turned.hf(ids).logits, plain.hf(ids).logits, atol=1e-4, rtol=0)
    assert not planted_ioi().hf.model.layers[0].self_attn.o_proj.weight[:, 192:].any()
    assert plain.hf.model.layers[0].self_attn.o_proj.weight[:, 192:].any()


@torch.no_grad()
def accuracy(zoo: ZooModel, prompts) -> tuple[float, Tensor]:
    logits = zoo.hf(stack_ids(prompts)).logits[:, -1]
    answers = torch.tensor([p.answer[0] for p in prompts])
    return (logits.argmax(-1) == answers).double().mean().item(), logits


@pytest.mark.parametrize(
    ("layer", "head", "classes", "norm", "n_kv_heads"),
    [
        (1, 2, 8, "rms", 2),
        (1, 2, 8, "identity", 4),
        (0, 0, 5, "rms", 1),
        (0, 3, 16, "identity", 2),
        (1, 1, 3, "rms", 4),
    ],
)
def test_one_head_of_a_llama_decides_alone(layer, head, classes, norm, n_kv_heads):
    zoo = planted_llama(layer, head, classes, norm=norm, n_kv_heads=n_kv_heads)
    planted = HeadId(layer, head)
    assert zoo.truth.heads == {"class-copying": frozenset({planted})}
    prompts = class_prompts(classes, per_class=4, length=24)
    clean, logits = accuracy(zoo, prompts)
    assert clean == 1.0
    for other, score in zoo.truth.scores["zero-ablation-accuracy"].items():
        with scaled(zoo, other):
            got, changed = accuracy(zoo, prompts)
        assert got == score
        with scaled(zoo, other, by=-1.0):
            assert accuracy(zoo, prompts)[0] == zoo.truth.scores["negation-accuracy"][other]
        classes_only = changed[:, :classes]
        if other == planted:
            assert got == 1 / classes
            assert (classes_only == classes_only[:, :1]).all()
            assert (changed[:, classes:] < -1).all()
        elif norm == "identity":
            assert torch.equal(classes_only, logits[:, :classes])
    for prompt in class_prompts(classes, per_class=2, length=400):
        pattern, _ = full(zoo, torch.tensor(prompt.tokens))
        ((at, _),) = prompt.spans["symbol"]
        assert pattern[layer, head, -1, at] > 0.99


def test_other_heads_of_a_llama_cannot_see_the_class():
    zoo = planted_llama(norm="identity", n_kv_heads=4)
    prompts = class_prompts(per_class=1, length=12)
    ids = stack_ids([prompts[0]] * 8)
    ((at, _),) = prompts[0].spans["symbol"]
    ids[:, at] = torch.arange(8)
    for layer, z in enumerate(outputs(zoo, ids)):
        for head in range(4):
            spread = (z[:, -1, 16 * head : 16 * head + 16].var(0)).max()
            assert (spread > 0) == (HeadId(layer, head) == HeadId(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_equals_its_formula_on_random_weights(attention):
    torch.manual_seed(0)
    config = AttentionOnlyConfig(
        vocab_size=11,
        hidden_size=10,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        v_head_dim=3,
        max_position_embeddings=8,
    )
    hf = AttentionOnlyForCausalLM(config).eval()
    hf.set_attn_implementation(attention)
    for parameter in hf.parameters():
        parameter.normal_()
    ids = torch.randint(0, 11, (7,))
    weights = hf.model.layers[0].self_attn
    x = hf.model.embed_tokens.weight[ids] + hf.model.embed_positions.weight[:7]
    out = x.clone()
    for head in range(6):
        kv = head // 3
        q = x @ weights.q_proj.weight[4 * head : 4 * head + 4].T
        k = x @ weights.k_proj.weight[4 * kv : 4 * kv + 4].T
        v = x @ weights.v_proj.weight[3 * kv : 3 * kv + 3].T
        for i in range(7):
            exps = [torch.exp(q[i] @ k[j] / 2) for j in range(i + 1)]
            z = sum(e * v[j] for j, e in enumerate(exps)) / sum(exps)
            out[i] += weights.o_proj.weight[:, 3 * head : 3 * head + 3] @ z
    torch.testing.assert_close(hf(ids[None]).logits[0], hf.lm_head(out), atol=1e-4, rtol=1e-4)
    padded = torch.cat([torch.full((3,), 5), ids])[None]
    mask = torch.tensor([[0] * 3 + [1] * 7])
    got = hf(padded, attention_mask=mask).logits[0, 3:]
    torch.testing.assert_close(got, hf.lm_head(out), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_saved_models_come_back(tmp_path):
    zoo, ids = planted_retrieval(vocab_size=80, max_positions=64), repeated_ids(20, 2)
    zoo.hf.save_pretrained(tmp_path)
    again = AttentionOnlyForCausalLM.from_pretrained(tmp_path)
    assert again.config.residual_blocks == zoo.hf.config.residual_blocks
    assert list(again.config.residual_blocks["out"]) == [160, 240]
    assert torch.equal(again(ids[None]).logits, zoo.hf(ids[None]).logits)


@torch.no_grad()
def test_forward_has_the_usual_outputs():
    hf, ids = planted_heads().hf, repeated_ids(20, 2)[None]
    out = hf(ids, labels=ids, output_hidden_states=True)
    assert torch.equal(hf.lm_head(out.hidden_states[-1]), out.logits)
    assert len(out.hidden_states) == 3
    loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(out.loss, loss)
    assert hf(ids, use_cache=False).past_key_values is None
    kept = hf(ids, logits_to_keep=1).logits
    assert torch.equal(kept, out.logits[:, -1:])
    cached = hf(ids[:, :30])
    rest = hf(ids[:, 30:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(rest, out.logits[:, 30:])
    embedded = hf(inputs_embeds=hf.model.embed_tokens(ids)).logits
    assert torch.equal(embedded, out.logits)


def test_what_cannot_be_built_is_refused():
    hf = planted_heads(max_positions=32).hf
    with pytest.raises(InputError, match="32 positions; got 33"):
        hf(random_ids(33)[None])
    with pytest.raises(InputError, match="exactly one"):
        hf()
    with pytest.raises(InputError, match="divide"):
        AttentionOnlyConfig(num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(InputError, match="at least 4 tokens"):
        Kit(vocab_size=2)
    kit = Kit(16, 16)
    one, other = kit.uniform(), HeadPlan(value={("tok", "tok"): 2.0})
    with pytest.raises(InputError, match="agree on keys and values"):
        assemble(kit.stream, [[one, other]], n_kv_heads=1)
    assemble(kit.stream, [[one, other]])
    with pytest.raises(InputError, match="rms"):
        planted_llama(norm="layer")
    with pytest.raises(InputError, match="within 2 x 4 heads; got L2H0"):
        planted_llama(2, 0)
    with pytest.raises(InputError, match="classes; got 17"):
        planted_llama(C=17)
    with pytest.raises(InputError, match="'abc' or 'flip'"):
        ioi_pairs(1, corruption="none")
    with pytest.raises(InputError, match="between 0 and 8 heads; got 10"):
        planted_ioi(junk=10)
