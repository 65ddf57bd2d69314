"""What the training scripts share: a word tokenizer, a Llama, a previous-token start, a loop."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole lower-case words and stops; a text begins with <bos>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = {word: i for i, word in enumerate([*SPECIALS, *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def small_llama(
    vocab_size: int, *, layers: int, heads: int, kv_heads: int, context: int
) -> LlamaForCausalLM:
    """A Llama of width 192 and heads of 64 that starts with the seed of a copying circuit.

    On contexts of random facts the loss stays on a plateau for thousands of steps until a
    previous-token head and a matching head exist together. So training starts from a rough
    hand-made pair and is free to change every weight. The residual stream has three blocks of 64:
    the token (and one component shared by all tokens), the token before, the token before that.

    - layer 0, heads 0 and 1 look back by one and two (q and k made from the shared component, so
      that their rotation agrees at that distance) and copy the token into the other two blocks;
    - layer 1, head 0 matches its token with "the token before" of each key, and the head that
      begins kv group 1 matches "the token before" with "the token before that"; both in the slowly
      rotating channels alone, and both write the token they find.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3 * parameter.shape[1] ** -0.5)
        table = model.model.embed_tokens.weight
        table.normal_(std=0.01)
        table[:, 1:HEAD].normal_(std=HEAD**-0.5)
        table[:, 0] = 1.0
        _look_back(model.model.layers[0].self_attn)
        _match(model.model.layers[1].self_attn, heads // kv_heads)
    return model


WIDTH, HEAD = 192, 64
_PAIRS = HEAD // 2
_THETA = 1e6 ** (-torch.arange(_PAIRS) / _PAIRS)


def _look_back(attention: Any, amplitude: float = 12.0) -> None:
    size = amplitude * (torch.arange(_PAIRS) < 8)
    shared = math.sqrt(WIDTH / 2)  # what the norm leaves of the shared component

    def turned(by: float) -> Tensor:
        return torch.cat([size * torch.cos(by * _THETA), size * torch.sin(by * _THETA)]) / shared

    attention.k_proj.weight[:HEAD] *= 0.1
    attention.k_proj.weight[:HEAD, 0] = turned(1)
    attention.v_proj.weight[:HEAD] *= 0.1
    attention.v_proj.weight[:HEAD, :HEAD] += torch.eye(HEAD) / shared
    attention.v_proj.weight[:HEAD, 0] = 0
    for head, distance in ((0, 1), (1, 2)):
        rows = slice(HEAD * head, HEAD * (head + 1))
        attention.q_proj.weight[rows] *= 0.1
        attention.q_proj.weight[rows, 0] = turned(1 - distance)
        block = slice(HEAD * distance, HEAD * (distance + 1))
        attention.o_proj.weight[block, rows] += torch.eye(HEAD)


def _match(attention: Any, per_group: int, gain: float = 0.6) -> None:
    slow = torch.cat([_THETA, _THETA]) < 6e-4
    select = torch.eye(HEAD)[torch.randperm(HEAD - 1) + 1][: int(slow.sum())]
    spread = torch.zeros(HEAD, HEAD)
    spread[slow] = select * gain
    for group, (q_block, k_block) in enumerate(((0, 1), (1, 2))):
        head = group * per_group
        rows, kv = slice(HEAD * head, HEAD * (head + 1)), slice(HEAD * group, HEAD * (group + 1))
        attention.q_proj.weight[rows] *= 0.1
        attention.k_proj.weight[kv] *= 0.1
        attention.q_proj.weight[rows, HEAD * q_block : HEAD * (q_block + 1)] += spread
        attention.k_proj.weight[kv, HEAD * k_block : HEAD * (k_block + 1)] += spread
        attention.v_proj.weight[kv, :HEAD] += torch.eye(HEAD) / math.sqrt(WIDTH / 4)
        attention.v_proj.weight[kv, 0] = 0
        attention.o_proj.weight[:HEAD, rows] += 2 * torch.eye(HEAD)


def answers_loss(model: Any, ids: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of each next token, weighted; `weight` [batch, pos] belongs to the token."""
    logits = model(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    w = weight[:, 1:].flatten()
    return (loss * w).sum() / w.sum()


Stage = tuple[int, Callable[[], tuple[Tensor, ...]], float]


def train(
    model: Any,
    stages: Iterable[Stage],
    *,
    report: Callable[[int, float], None],
    device: str = "cpu",
    save: Callable[[], None] | None = None,
    loss_of: Callable[..., Tensor] = answers_loss,
) -> None:
    """AdamW through stages of (steps, batch maker, peak rate), each warmed up and cooled down.

    `loss_of` takes the model and what the batch maker returned.
    """
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    done = 0
    for steps, make, rate in stages:
        for step in range(steps):
            warm = min(1.0, (step + 1) / 50)
            cool = 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * (0.1 + 0.9 * cool)
            loss = loss_of(model, *(x.to(device) for x in make()))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            if done % 50 == 0:
                report(done, loss.item())
        if save is not None:
            save()
    model.eval()


def store(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, card: str) -> None:
    """Save weights, tokenizer and a card that says how they came to be."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)
    for file in folder.iterdir():
        file.chmod(0o644)  # weights are written readable by their owner alone
