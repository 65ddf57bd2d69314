"""Head pursuit against explicit matrices, least squares and planted heads."""

import copy
import functools

import numpy as np
import pytest
import torch
from images_kit import case
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import heads.matching_pursuit
import heads.pursuit
from heads.matching_pursuit import per_sample, pursue, unit
from heads.pursuit import head_pursuit, word_directions
from interp import load
from interp.errors import InputError, SiteError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.tasks import make_task
from interp.zoo.planted_vit import UNIFORM


def slow(x, dictionary, k):
    """Pursuit by the definition: whole matrices, a least-squares fit of every sample at each step.

    Returns the atoms, the explained share after each, and the last fit.
    """
    x = x - x.mean(0)
    residual, atoms, curve, fit = x, [], [], np.zeros_like(x)
    for _ in range(k):
        strength = np.abs(residual @ dictionary.T).sum(0)
        for j in range(len(dictionary)):
            basis = dictionary[atoms]
            if j in atoms or np.linalg.matrix_rank(
                np.vstack([basis, dictionary[j : j + 1]]), tol=1e-5
            ) <= len(atoms):
                strength[j] = -1
        if strength.max() <= 1e-9 * np.abs(x).sum():
            break
        atoms.append(int(strength.argmax()))
        basis = dictionary[atoms].T
        coefficients = np.linalg.lstsq(basis, x.T, rcond=None)[0]
        fit = (basis @ coefficients).T
        residual = x - fit
        curve.append(1 - (residual**2).sum() / (x**2).sum())
    return atoms, curve, fit


def drawn(n=60, d_head=9, d=24, v=15, seed=0):
    gen = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    return 3 + make(n, d_head), make(d_head, d), unit(make(v, d))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 4, 9, 15, 18])
def test_pursuit_equals_least_squares_on_whole_matrices(seed, k, monkeypatch):
    z, w_o, dictionary = drawn(seed=seed)
    if seed % 2:
        monkeypatch.setattr(heads.matching_pursuit, "_CHUNK", 40)  # a few samples at a time
    found = pursue(z, w_o, dictionary, k)
    atoms, curve, fit = slow((z @ w_o).numpy(), dictionary.numpy(), k)
    assert list(found.atoms) == atoms and len(set(atoms)) == len(atoms)
    # Nine dimensions of the head are explained by at most so many atoms, or few are left.
    np.testing.assert_allclose(found.curve[: len(curve)], curve, atol=1e-10)
    assert (found.curve[len(curve) :] == found.curve[len(curve) - 1]).all()
    assert len(found.curve) == k and (np.diff(found.curve) >= -1e-12).all()
    np.testing.assert_allclose(found.explained, (fit**2).sum(1), atol=1e-8)
    x = (z - z.mean(0)) @ w_o
    np.testing.assert_allclose(found.norms, x.square().sum(1), rtol=1e-9)
    again = pursue(z, w_o, dictionary, k, gram=dictionary @ dictionary.T)
    assert again.atoms == found.atoms


def test_atoms_in_the_span_of_others_are_never_chosen():
    z, w_o, dictionary = drawn(v=6)
    twice = torch.cat([dictionary, dictionary, unit(dictionary[:1] + dictionary[1:2])])
    found = pursue(z, w_o, twice, 13)
    atoms, curve, _ = slow((z @ w_o).numpy(), twice.numpy(), 13)
    assert list(found.atoms) == atoms and len(atoms) == 6
    assert np.linalg.matrix_rank(twice[atoms].numpy()) == 6
    np.testing.assert_allclose(found.curve[:6], curve, atol=1e-10)
    assert (found.curve[5:] == found.curve[5]).all() and np.isfinite(found.curve).all()


def test_an_atom_all_but_in_the_span_of_others_counts_as_in_it():
    z, w_o, dictionary = drawn(v=3)
    w_o = torch.eye(24).double()[:9]
    torch.manual_seed(0)
    near = unit(dictionary[:1] + 1e-5 * torch.randn(1, 24).double())
    found = pursue(z, w_o, torch.cat([dictionary, near]), 4)
    assert len(found.atoms) == 3 and not {0, 3} <= set(found.atoms)
    further = unit(dictionary[:1] + 3e-3 * torch.randn(1, 24).double())
    found = pursue(z, w_o, torch.cat([dictionary, further]), 4)
    both = torch.cat([dictionary, further]).numpy()
    atoms, curve, _ = slow((z @ w_o).numpy(), both, 4)
    assert list(found.atoms) == atoms and len(atoms) == 4
    np.testing.assert_allclose(found.curve, curve, atol=1e-7)


def test_a_head_without_variance_scores_nothing_and_never_nan():
    _, w_o, dictionary = drawn()
    torch.manual_seed(0)
    row = torch.randn(1, 9).double()
    noise = 1e-8 * torch.randn(50, 9)
    for z in (row.expand(50, 9), row.expand(50, 9).float() + noise, torch.zeros(50, 9)):
        found = pursue(z, w_o, dictionary, 5)
        assert found.atoms == () and found.evr == 0 and (per_sample(found) == 0).all()
    assert pursue(torch.randn(50, 9), 0 * w_o, dictionary, 5).evr == 0
    # Small is not constant.
    assert pursue(1e-9 * torch.randn(50, 9).double(), w_o, dictionary, 5).evr > 0


def test_nothing_that_the_dictionary_does_not_touch_is_explained():
    z = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double()
    w_o = torch.eye(4, 8).double()
    beside = torch.eye(8)[4:].double()
    found = pursue(z, w_o, beside, 3)
    assert found.atoms == () and found.evr == 0
    half = torch.cat([beside, torch.eye(8)[:2].double()])
    found = pursue(z, w_o, half, 6)
    assert set(found.atoms) == {4, 5} and found.curve[1] == found.curve[5]
    x = z - z.mean(0)
    assert found.evr == pytest.approx(float(x[:, :2].square().sum() / x.square().sum()))


def test_values_per_sample_have_the_share_as_mean_and_its_spread():
    z, w_o, dictionary = drawn(n=80)
    found = pursue(z, w_o, dictionary, 3)
    values = per_sample(found)
    assert values.mean() == pytest.approx(found.evr, abs=1e-12)
    assert found.evr == pytest.approx(found.explained.sum() / found.norms.sum())
    # Leaving one sample out moves the ratio as its value says, to first order.
    for i in range(0, 80, 7):
        rest = np.delete(np.arange(80), i)
        left = found.explained[rest].sum() / found.norms[rest].sum()
        assert 79 * (found.evr - left) == pytest.approx(values[i] - found.evr, rel=0.08, abs=1e-6)


@functools.cache
def synthetic():
    """Eight heads of 200 samples in 64 dimensions: one writes along 20 concepts, one off them."""
    gen = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    concepts, others = unit(make(20, 64)), unit(make(20, 64))
    samples = [make(200, 64) for _ in range(6)]
    for atoms in (concepts, others):
        samples.append(make(200, 20) @ atoms + 0.065 * make(200, 64))
    return concepts, samples


def test_the_planted_head_stands_out_from_chance():
    concepts, samples = synthetic()
    eye = torch.eye(64).double()
    found = [pursue(x, eye, concepts, 20) for x in samples]
    shares = np.array([p.evr for p in found])
    planted, rest = shares[6], np.delete(shares, 6)
    assert planted == pytest.approx(0.987, abs=0.006)
    assert rest[:6] == pytest.approx(20 / 64, abs=0.03)  # k of 64 dimensions
    assert 0.15 < rest[6] < 0.45  # the decoy, whose 20 dimensions overlap with theirs by chance
    early = np.array([p.curve[4] for p in found])
    assert 0.3 < early[6] < 0.5 and early[:6].max() < 0.13
    for x, p in zip(samples, found, strict=True):
        atoms, curve, _ = slow(x.numpy(), concepts.numpy(), 20)
        assert list(p.atoms) == atoms
        np.testing.assert_allclose(p.curve, curve, atol=1e-9)


# ---------------------------------------------------------------- on models


@functools.cache
def random_llama():
    """Grouped queries, values narrower than the residual stream, a norm with a gain."""
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, bos_token_id=0,
        eos_token_id=None, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        hf = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            hf.model.norm.weight.copy_(1 + 0.5 * torch.randn(32))
    return load(hf)


@functools.cache
def random_gpt2():
    config = GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=3, n_positions=64,
                        bos_token_id=0, eos_token_id=0, initializer_range=0.4)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        hf = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            hf.transformer.ln_f.weight.copy_(1 + 0.5 * torch.randn(24))
    return load(hf)


def prompts(n=30, vocab=60, seed=0):
    gen = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        length = 5 + i % 7
        tokens = torch.randint(1, vocab, (length,), generator=gen).tolist()
        out.append(Prompt((0, *tokens), id=f"s{i}"))
    return out


@torch.no_grad()
def written(model, projections, n_heads, listed):
    """What each head writes at the last token: [layer, head, sample, d_model], by hooks."""
    hf = copy.deepcopy(model.hf).double()
    hf.set_attn_implementation("eager")
    out = []
    for name in projections:
        module, seen = hf.get_submodule(name), []
        handle = module.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0][0, -1]))
        for p in listed:
            hf(torch.tensor([p.tokens]))
        handle.remove()
        z = torch.stack(seen).unflatten(-1, (n_heads, -1))
        weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
        parts = weight.reshape(n_heads, -1, weight.shape[-1])
        out.append([(z[:, h] @ parts[h]).numpy() for h in range(n_heads)])
    return np.array(out)


@pytest.mark.parametrize("through_norm", [False, True])
@pytest.mark.parametrize(
    ("make", "projections", "n_heads"),
    [(random_llama, [f"model.layers.{i}.self_attn.o_proj" for i in range(2)], 4),
     (random_gpt2, [f"transformer.h.{i}.attn.c_proj" for i in range(2)], 3)],
)  # fmt: skip
def test_shares_of_a_random_model_equal_explicit_outputs(make, projections, n_heads, through_norm):
    model, listed = make(), prompts()
    words = [3, 17, 5, 41, 8, 23, 30]
    found = head_pursuit(
        model, listed, words, k=4, draws=3, batch_size=7, through_norm=through_norm
    )
    rows = model.hf.get_output_embeddings().weight.detach().double().numpy()
    dictionary = rows[words] / np.linalg.norm(rows[words], axis=1, keepdims=True)
    x = written(model, projections, n_heads, listed)
    if through_norm and make is random_gpt2:
        x = x - x.mean(-1, keepdims=True)
    if through_norm:
        norm = model.hf.model.norm if make is random_llama else model.hf.transformer.ln_f
        x = x * norm.weight.detach().double().numpy()
    for at, head in enumerate(found.scores.heads):
        atoms, curve, fit = slow(x[head.layer, head.head], dictionary, 4)
        assert found.atoms[head] == tuple(str(words[i]) for i in atoms)
        np.testing.assert_allclose(found.curves[head], curve, atol=1e-5)
        assert found.scores.values[at] == pytest.approx(curve[-1], abs=1e-5)
        whole = x[head.layer, head.head] - x[head.layer, head.head].mean(0)
        a, b = (fit**2).sum(1), (whole**2).sum(1)
        want = curve[-1] + (a - curve[-1] * b) / b.mean()
        np.testing.assert_allclose(found.scores.per_example[:, at], want, atol=2e-4)
    assert found.scores.examples == tuple(p.id for p in listed)
    other = head_pursuit(model, listed, words, k=4, draws=3, batch_size=30,
                         through_norm=through_norm)  # fmt: skip
    assert other.atoms == found.atoms and found.scores.same_values(other.scores, atol=1e-5)


def test_the_null_is_the_best_of_random_dictionaries_of_equal_size():
    model, listed, words = random_llama(), prompts(), [3, 17, 5, 41, 8, 23, 30]
    many = head_pursuit(model, listed, words, k=4, draws=30, seed=2)
    few = head_pursuit(model, listed, words, k=4, draws=5, seed=2)
    assert (many.scores.null >= few.scores.null - 1e-12).all()
    assert (many.scores.extras["random"] < many.scores.null).all()
    p = many.scores.extras["random_p"]
    assert p.min() >= 1 / 31 and p.max() <= 1
    beaten = many.scores.values > many.scores.null
    assert (p[beaten] == 1 / 31).all() and (p[~beaten] > 1 / 31).all()
    again = head_pursuit(model, listed, words, k=4, draws=5, seed=2)
    assert again.scores.to_bytes() == few.scores.to_bytes()
    other = head_pursuit(model, listed, words, k=4, draws=5, seed=3)
    assert not np.array_equal(other.scores.null, few.scores.null)


def test_random_dictionaries_hold_tokens_that_are_no_concept(monkeypatch):
    model, listed, words = random_llama(), prompts(), [3, 17, 5, 41, 8, 23, 30]
    original, seen = heads.pursuit.pursue, []

    def noted(z, w_o, dictionary, k, **options):
        seen.append((z, w_o, dictionary))
        return original(z, w_o, dictionary, k, **options)

    monkeypatch.setattr(heads.pursuit, "pursue", noted)
    found = head_pursuit(model, listed, words, k=4, draws=6)
    rows = unit(model.hf.get_output_embeddings().weight.detach().double())
    assert len(seen) == 8 * (1 + 6)
    for at in range(8):
        mine, *controls = seen[7 * at : 7 * at + 7]
        torch.testing.assert_close(mine[2], rows[words])
        shares, drawn_ids = [], set()
        for z, w_o, dictionary in controls:
            ids = (dictionary @ rows.T).argmax(1).tolist()
            torch.testing.assert_close(dictionary, rows[ids])
            assert len(set(ids)) == len(words) and not set(ids) & {0, *words}
            drawn_ids.add(tuple(ids))
            shares.append(slow((z @ w_o).numpy(), dictionary.numpy(), 4)[1][-1])
        assert len(drawn_ids) == 6
        assert found.scores.null[at] == pytest.approx(max(shares), abs=1e-9)
        assert found.scores.extras["random"][at] == pytest.approx(np.mean(shares), abs=1e-9)
        n = sum(x >= found.scores.values[at] for x in shares)
        assert found.scores.extras["random_p"][at] == pytest.approx((1 + n) / 7)


def test_a_head_that_copies_is_explained_by_what_it_copies_and_silent_heads_score_0():
    model = load("zoo:planted-heads", device="cpu")
    listed = []
    for i, word in enumerate([7, 9, 11, 13] * 5):
        # The last token stood before `word`.
        listed.append(Prompt((0, 20, word, 30 + i, 20), id=f"c{i}"))
    found = head_pursuit(model, listed, ["t7", "t9", "t11", "t13"], k=4, draws=9)
    head = HeadId(1, 0)
    at = found.scores.heads.index(head)
    assert found.scores.values[at] == pytest.approx(1, abs=1e-6)
    # Centred, four outputs vary in three directions; the fourth word adds none.
    assert found.curves[head][2] < 1 and set(found.atoms[head]) == {"t7", "t9", "t11", "t13"}
    assert found.scores.select() == (head,)
    assert found.scores.null[at] == pytest.approx(0, abs=1e-6)
    for i, other in enumerate(found.scores.heads):
        # L0H0 writes its previous token elsewhere; all others write nothing.
        if other != head:
            assert found.scores.values[i] == 0 and found.atoms[other] == ()
    assert not np.isnan(found.scores.per_example).any()
    assert not np.isnan(found.scores.null_per_example).any()


def test_words_are_unit_rows_and_means_of_unit_rows():
    model = load("zoo:needle", device="cpu")
    rows = model.hf.get_output_embeddings().weight.detach().double()
    ids = model.tokenizer("the code", add_special_tokens=False).input_ids
    assert len(ids) == 2
    made = word_directions(model, ["the", "the code", 5])
    assert list(made) == ["the", "the code", "5"]
    torch.testing.assert_close(made["5"], rows[5] / rows[5].norm())
    mean = (rows[ids] / rows[ids].norm(dim=1, keepdim=True)).mean(0)
    torch.testing.assert_close(made["the code"], mean / mean.norm())
    with pytest.raises(InputError, match="given twice"):
        word_directions(model, ["the", "the"])
    with pytest.raises(InputError, match="token ids must lie in"):
        word_directions(model, [len(rows)])
    with pytest.raises(InputError, match="got none"):
        word_directions(model, [])
    with pytest.raises(InputError, match="need a tokenizer"):
        word_directions(random_llama(), ["the"])


def test_directions_of_a_vision_tower_explain_what_its_class_token_gets():
    model = load("zoo:planted-vit", device="cpu")
    listed = make_task("tiles").prompts(model, 12)
    # L1H0 writes the mean colour into three dimensions of u, and its negative into −u.
    names = ("red", "green", "blue")
    weight = model.hf.vit.layers[1].attention.o_proj.weight.detach()[:, :3]
    known = dict(zip(names, weight.T, strict=True))
    found = head_pursuit(model, listed, directions=known, k=3, draws=9)
    at = found.scores.heads.index(UNIFORM)
    assert found.scores.values[at] == pytest.approx(1, abs=1e-6)
    assert set(found.atoms[UNIFORM]) == set(names)
    assert found.scores.select() == (UNIFORM,)
    assert found.scores.extras["random_p"][at] == pytest.approx(0.1)
    assert (np.delete(found.scores.values, at) == 0).all()
    one = head_pursuit(model, listed, directions={"red": known["red"]}, k=3)
    shown = torch.stack([p.inputs["pixel_values"].mean((0, 2, 3)) for p in listed]).double()
    spread = shown.var(0)
    assert one.scores.values[at] == pytest.approx(float(spread[0] / spread.sum()), abs=1e-5)
    with pytest.raises(SiteError, match="has no unembedding"):
        head_pursuit(model, listed, [1, 2])
    # A tower beside a text model has directions of its own width.
    it = case("llava").model
    both = make_task("tiles").prompts(it, 3)
    head_pursuit(it, both, directions={"a": torch.ones(16)}, draws=1, tower="vision")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "words or directions"),
        ({"words": [1], "directions": {"a": torch.ones(32)}}, "words or directions"),
        ({"words": [1], "k": 0}, "at least 2 prompts"),
        ({"words": [1], "draws": 0}, "at least 2 prompts"),
        ({"directions": {}}, "at least one direction"),
        ({"directions": {"a": torch.ones(31)}}, r"must be \[32\]"),
        ({"directions": {"a": torch.zeros(32)}}, "must not be zero"),
        ({"words": list(range(1, 40))}, "fewer words"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(InputError, match=message) as caught:
        head_pursuit(random_llama(), prompts(3), **options)
    assert str(caught.value) or message
    with pytest.raises(InputError, match="at least 2 prompts"):
        head_pursuit(random_llama(), prompts(1), [1])
