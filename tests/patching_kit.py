"""Tiny random models of several families, and random pairs, for the tests of patching."""

import functools
import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import interp
from interp.model import Model
from interp.prompts import Prompt, PromptPair

VOCAB = 60
_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_ENDS,
}
_GPT = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, **_ENDS}
_GEMMA = {
    **_LLAMA,
    "head_dim": 8,
    "sliding_window": 6,
    "query_pre_attn_scalar": 8,
    "attn_implementation": "eager",
}
_MAKERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "llama-eager": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, attn_implementation="eager")),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_LLAMA, sliding_window=6)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GEMMA)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**_GPT, rotary_dim=4)),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, **_ENDS)
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"})
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32, **_ENDS,
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_LLAMA, head_dim=8)),
}  # fmt: skip
FAMILIES = tuple(_MAKERS)


@functools.cache
def tiny(kind: str) -> Model:
    """A random model whose heads matter: its weights are larger than a fresh model's."""
    torch.manual_seed(0)
    hf = _MAKERS[kind]().eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            else:  # gains and biases that do nothing would hide mistakes
                parameter.add_(0.2 * torch.randn_like(parameter))
    return interp.load(hf)


def random_pairs(
    n: int = 3, *, length: int = 10, seed: int = 1, first: int = 3
) -> list[PromptPair]:
    """Random tokens; the corrupted prompt differs at three positions from `first` on."""
    rng = random.Random(seed)
    pairs = []
    for i in range(n):
        clean = [rng.randrange(3, VOCAB) for _ in range(length)]
        other = list(clean)
        other[first : first + 3] = [rng.randrange(3, VOCAB) for _ in range(3)]
        spans = {"early": ((1, 3),), "late": ((length - 2, length),)}
        answer, wrong = rng.sample(range(3, VOCAB), 2)
        pairs.append(
            PromptPair(
                Prompt(tuple(clean), spans, id=f"{length}-{i}", answer=(answer,),
                       meta={"wrong": wrong}),
                Prompt(tuple(other), spans),
            )
        )  # fmt: skip
    return pairs


def logits_of(
    model: Model, prompt: Prompt, changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None
) -> Tensor:
    """[d_vocab] last logits of one unpadded prompt, run whole.

    Args:
        model: the model.
        prompt: the prompt.
        changes: name of an attention module to a function of its z [pos, head, d_v].
    """
    handles = []
    for name, change in (changes or {}).items():
        layer = model.structure.layers[name]

        def hook(module, args, layer=layer, change=change):  # type: ignore[no-untyped-def]
            z = args[0].reshape(-1, layer.n_heads, layer.d_v)
            return (change(z.clone()).reshape(args[0].shape), *args[1:])

        module = model.hf.get_submodule(layer.projection)
        handles.append(module.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            return model.hf(torch.tensor([prompt.tokens])).logits[0, -1].float()
    finally:
        for handle in handles:
            handle.remove()


def seen_z(model: Model, prompt: Prompt) -> dict[str, Tensor]:
    """z [pos, head, d_v] of every attention module on one unpadded prompt."""
    out: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Tensor], Tensor]:
        def change(z: Tensor) -> Tensor:
            out[name] = z.clone()
            return z

        return change

    logits_of(model, prompt, {name: note(name) for name in model.structure.layers})
    return out


def difference(logits: Tensor, prompt: Prompt) -> float:
    """Logit of the answer minus logit of the wrong answer."""
    assert prompt.answer is not None
    return float(logits[prompt.answer[0]] - logits[prompt.meta["wrong"]])
