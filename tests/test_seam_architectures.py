"""The seam on 24 families: nothing is changed by reading, and what is read is the model's own.

Each model is built tiny and random (`benchmarks.tiny_models`). Readings are compared with full
matrices that the model itself returns under eager attention; the families that return none are
held to the doctor's identities alone.
"""

import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import interp
from interp.doctor import _tensors
from interp.engine import Collector
from interp.example import example_inputs
from interp.prompts import Batch, Prompt
from interp.readings import Distance, Entropy, KeyMass, Offset, PairMass

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.tiny_models import tiny_config, tiny_model

# Type, towers it must have, and how their layers are reached.
FAMILIES = {
    "gpt2": {"text": "interface"},
    "llama": {"text": "interface"},
    "mistral": {"text": "interface"},
    "gemma2": {"text": "interface"},
    "gemma3": {"text": "interface", "vision": "interface"},
    "qwen2": {"text": "interface"},
    "qwen3": {"text": "interface"},
    "gpt_oss": {"text": "interface"},
    "deepseek_v3": {"text": "interface"},
    "bloom": {"text": "functions"},
    "falcon": {"text": "functions"},
    "gptj": {"text": "functions"},
    "gpt_neox": {"text": "interface"},
    "xglm": {"text": "functions"},
    "opt": {"text": "interface"},
    "bert": {"text": "interface"},
    "modernbert": {"text": "interface"},
    "t5": {"encoder": "interface", "text": "interface", "cross": "interface"},
    "bart": {"encoder": "interface", "text": "interface", "cross": "interface"},
    "whisper": {"audio": "interface", "text": "interface", "cross": "interface"},
    "vit": {"vision": "interface"},
    "clip": {"text": "interface", "vision": "interface"},
    "llava": {"text": "interface", "vision": "interface"},
    "qwen2_5_vl": {"text": "interface", "vision": "interface"},
}
# Where a model's own output carries its patterns, for each tower.
RETURNED = {
    "text": ("attentions", "decoder_attentions"),
    "encoder": ("encoder_attentions",),
    "audio": ("encoder_attentions",),
    "cross": ("cross_attentions",),
    "vision": ("attentions",),
}
# Towers whose patterns the output does not carry under that name.
NOT_RETURNED = {("clip", "text"), ("clip", "vision"), ("gemma3", "vision"), ("llava", "vision"),
                ("qwen2_5_vl", "vision")}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model(model_type: str) -> interp.Model:
    return interp.load(tiny_model(model_type))


@cache
def inputs(model_type: str) -> dict[str, torch.Tensor]:
    return example_inputs(model(model_type).hf, length=24)


def collected(model_type: str, tower: str, readings):
    """Readings of one tower on the example, and the output they were read from."""
    handle, given = model(model_type), inputs(model_type)
    ids = given.get("input_ids", torch.zeros(len(next(iter(given.values()))), 4, dtype=torch.long))
    batch = Batch.of([Prompt(tuple(row)) for row in ids.tolist()])
    if "decoder_input_ids" in given:
        rows = given["decoder_input_ids"].tolist()
        decoder = Batch.of([Prompt(tuple(row)) for row in rows])
        batch = Batch(batch.prompts, batch.input_ids, batch.attention_mask, batch.offsets,
                      decoder=decoder)  # fmt: skip
    collector = Collector(handle.towers[tower], batch, readings)
    with handle.observe(collector, columns=collector.columns):
        output = handle.forward(given)
    return collector.answers(), output


def same_bits(a, b) -> bool:
    pairs = list(zip(_tensors(a), _tensors(b), strict=True))
    return len(pairs) > 0 and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_towers_are_found(model_type):
    found = {
        name: "+".join({layer.reached for layer in tower.layers})
        for name, tower in model(model_type).towers.items()
    }
    assert found == FAMILIES[model_type]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_reading_keeps_every_bit(model_type):
    plain = model(model_type).forward(inputs(model_type))
    for name, tower in model(model_type).towers.items():
        if max(layer.calls for layer in tower.layers) > 1:
            continue  # windows have no reading per prompt; the doctor observes their calls
        readings = {"entropy": Entropy(), "keys": KeyMass()}
        if name == "text":
            readings["previous"] = PairMass(Offset(1))
        answers, output = collected(model_type, name, readings)
        assert same_bits(plain, output), name
        assert torch.isfinite(answers["entropy"].values).all()
        # A pattern that were uniform everywhere could be read wrong and pass all the same.
        assert answers["entropy"].values.std() > 1e-3


@pytest.mark.parametrize("model_type", FAMILIES)
def test_doctor_passes(model_type):
    report = model(model_type).doctor()
    assert report.ok, str(report)
    names = {c.name: c for c in report.checks}
    assert names["heads through W_O plus bias equal attention output"].ok


def _cases():
    for model_type, towers in FAMILIES.items():
        for tower in towers:
            if (model_type, tower) not in NOT_RETURNED:
                yield model_type, tower


@pytest.mark.parametrize(("model_type", "tower"), list(_cases()))
def test_readings_equal_the_models_own_matrices(model_type, tower):
    eager = tiny_model(model_type, attn="eager")
    eager.load_state_dict(model(model_type).hf.state_dict())
    with torch.no_grad():
        output = eager(**inputs(model_type), output_attentions=True)
    own = next(_tensors(model(model_type).forward(inputs(model_type))))
    torch.testing.assert_close(next(_tensors(output)), own, rtol=1e-4, atol=1e-4)
    pattern = next(p for n in RETURNED[tower] if (p := getattr(output, n, None)) is not None)
    matrices = torch.stack(list(pattern), dim=1).double()  # [example, layer, head, query, key]
    readings = {"entropy": Entropy()}
    entropy = -torch.special.xlogy(matrices, matrices).sum(-1).mean(-1)
    expected = {"entropy": entropy}
    if tower == "text":
        readings["previous"] = PairMass(Offset(1))
        expected["previous"] = matrices.diagonal(-1, -2, -1).mean(-1)
    answers, _ = collected(model_type, tower, readings)
    for name, want in expected.items():
        torch.testing.assert_close(
            answers[name].values.double(),
            want,
            rtol=0,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_a_window_shorter_than_the_prompt_is_seen():
    answers, _ = collected(
        "mistral", "text", {"far": PairMass(Offset(20)), "near": PairMass(Offset(1))}
    )
    assert model("mistral").text_config.sliding_window < 20
    assert (answers["far"].values == 0).all()
    assert (answers["near"].values > 0).all()


@pytest.mark.parametrize("head_dim", [4, 8, 12, 16, 24, 32])
def test_columns_in_the_kernel_keep_bits_for_every_head_size(head_dim):
    """Appending columns to v may change the order in which the kernel adds: for some sizes only."""
    config = tiny_config("llama")
    config.head_dim = head_dim
    torch.manual_seed(0)
    handle = interp.load(type(model("llama").hf)(config))
    given = example_inputs(handle.hf, length=24)
    batch = Batch.of([Prompt(tuple(row)) for row in given["input_ids"].tolist()])
    plain = handle.forward(given)
    collector = Collector(handle.towers["text"], batch, {"mean": Distance()})
    with handle.observe(collector, columns=collector.columns):
        read = handle.forward(given)
    assert same_bits(plain, read)
    assert torch.isfinite(collector.answers()["mean"].values).all()


def test_the_page_lists_every_family_as_passing():
    page = (Path(__file__).resolve().parents[1] / "docs" / "architectures.md").read_text()
    passing = page.split("# Not passing")[0]
    assert [t for t in FAMILIES if f"| {t} | {type(model(t).hf).__name__} |" not in passing] == []
    assert int(re.search(r"\*\*(\d+) of these pass\*\*", page)[1]) >= 100
