"""A decoder of attention layers alone, so that weights written by formula have exact effects.

The residual stream is `token embedding + learned position embedding`, every layer adds the output
of its heads, and the logits are an untied linear map of the final stream: no norm, no MLP, no
bias. The attention itself goes through transformers' attention interface like any stock decoder,
so eager, SDPA and registered implementations, caches, padding and `generate` all work.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interp.errors import InputError


class AttentionOnlyConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes of an `AttentionOnlyForCausalLM`; none is derived from another unless left out.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream (d_model).
        num_hidden_layers: number of attention layers.
        num_attention_heads: query heads of a layer.
        num_key_value_heads: key-value heads of a layer; must divide the query heads.
        head_dim: size of a query or key (d_head).
        v_head_dim: size of a value; `head_dim` when None.
        max_position_embeddings: number of positions.
        residual_blocks: name of a block of residual dimensions to its half-open range, for models
            whose residual stream is an address book; only a record, the forward does not use it.
        bos_token_id, eos_token_id, pad_token_id: special tokens, or None.
        use_cache: whether a forward returns a key-value cache by default.
        **kwargs: the common fields of `PreTrainedConfig`.

    Raises:
        InputError: the key-value heads do not divide the query heads.
    """

    model_type = "attention_only"

    def __init__(
        self,
        vocab_size: int = 64,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int = 16,
        v_head_dim: int | None = None,
        max_position_embeddings: int = 512,
        residual_blocks: Mapping[str, tuple[int, int]] | None = None,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = None,
        pad_token_id: int | None = 0,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        kv_heads = num_key_value_heads or num_attention_heads
        if num_attention_heads % kv_heads:
            raise InputError(
                "key-value heads must divide the query heads; got "
                f"{kv_heads} for {num_attention_heads}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = kv_heads
        self.head_dim = head_dim
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.max_position_embeddings = max_position_embeddings
        self.residual_blocks = {k: list(v) for k, v in (residual_blocks or {}).items()}
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with the whole pattern in memory.

    Args:
        module: the attention layer; gives the size of a key-value group.
        query: [batch, head, query, d_head].
        key: [batch, kv_head, key, d_head].
        value: [batch, kv_head, key, d_v].
        attention_mask: additive, broadcastable to [batch, head, query, key], or None.
        scaling: factor on the scores.
        dropout: probability of dropping an entry of the pattern in training.

    Returns:
        z [batch, query, head, d_v] and the pattern [batch, head, query, key].
    """
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    pattern = nn.functional.dropout(pattern, p=dropout, training=module.training)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


class AttentionOnlyAttention(nn.Module):
    """Multi-head attention with free sizes, without bias and without positional rotation."""

    def __init__(self, config: AttentionOnlyConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.v_head_dim = config.v_head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = 0.0
        self.is_causal = True
        width, heads = config.hidden_size, config.num_attention_heads
        kv_heads = config.num_key_value_heads
        self.q_proj = nn.Linear(width, heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * config.v_head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, width, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output [batch, pos, d_model], and the pattern where the kernel has one."""
        batch_pos = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*batch_pos, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*batch_pos, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*batch_pos, -1, self.v_head_dim).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        z, pattern = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(z.reshape(*batch_pos, -1).contiguous()), pattern


class AttentionOnlyLayer(nn.Module):
    """One layer: the residual stream plus the output of its heads."""

    def __init__(self, config: AttentionOnlyConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = AttentionOnlyAttention(config, layer_idx)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The new residual stream, and the pattern where the kernel has one."""
        attn_out, pattern = self.self_attn(hidden_states, **kwargs)
        return hidden_states + attn_out, pattern


class AttentionOnlyPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What both classes below tell transformers about themselves."""

    config_class = AttentionOnlyConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False


def _positions(mask: Tensor | None, past: int, new: int, device: torch.device) -> Tensor:
    """Position ids that count real tokens only, so that left padding changes nothing."""
    if mask is None or mask.dim() != 2:
        return torch.arange(past, past + new, device=device).unsqueeze(0)
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]


class AttentionOnlyModel(AttentionOnlyPreTrainedModel):
    """The decoder without its unembedding."""

    def __init__(self, config: AttentionOnlyConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            AttentionOnlyLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The final residual stream [batch, pos, d_model], with what else was asked for.

        Position ids, where none are given, count the real tokens of `attention_mask`.

        Raises:
            InputError: neither or both of `input_ids` and `inputs_embeds` are given, or a
                position lies beyond the last position embedding.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("exactly one of input_ids and inputs_embeds must be given")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = _positions(attention_mask, past, hidden.shape[1], hidden.device)
        last, limit = int(position_ids.max()), self.config.max_position_embeddings
        if last >= limit:
            raise InputError(
                f"a prompt must fit the model's {limit} positions; got {last + 1} tokens",
                hint="shorten the prompt, or build the model with more positions",
            )
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden = hidden + self.embed_positions(position_ids)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        streams: list[Tensor] = [hidden]
        patterns: list[Any] = []
        for layer in self.layers:
            hidden, pattern = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            streams.append(hidden)
            patterns.append(pattern)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=tuple(streams) if output_hidden_states else None,
            attentions=tuple(patterns) if output_attentions else None,
        )


class AttentionOnlyForCausalLM(AttentionOnlyPreTrainedModel, GenerationMixin):
    """The decoder with an untied unembedding without bias."""

    def __init__(self, config: AttentionOnlyConfig) -> None:
        super().__init__(config)
        self.model = AttentionOnlyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, pos, d_vocab]; with `labels`, also the mean next-token loss.

        `logits_to_keep` is a number of last positions (0 for all) or their indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
