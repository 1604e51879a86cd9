"""The separate small draft model of Online Speculative Decoding (Liu et al. 2023, arXiv:2310.07177).

A Llama decoder of few layers that reads tokens only, no state of the target's, so it can catch up on any text at any
time. It begins as some of the target's own layers between the target's embedding and head; layers and final norm are
trained, embedding and head stay the target's. Only the head rows of a draft vocabulary are computed. How queries meet
keys is the caller's affair (`Attend`): packed texts in training (`attend_packed`), a cache for each request in drafting
(`drafters.draft_cache`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafters.config import DecoderConfig
from drafters.eagle3 import GatedMLP, RMSNorm
from drafters.rotary import inverse_frequencies, rotate
from drafters.target import TargetWeights

# (layer, queries [n, heads, D], keys [n, KV heads, D], values [n, KV heads, D]) -> attention output [n, heads, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class DraftModelConfig(DecoderConfig):
    """Sizes of one draft model; all but the number of layers are the target's."""

    num_hidden_layers: int
    tied: bool  # the head is the embedding

    @classmethod
    def for_target(cls, target: dict[str, Any], layers: int) -> "DraftModelConfig":
        """The draft model of the target whose `config.json` is `target`. Raises ValueError for too many layers."""
        if not 0 < layers < target["num_hidden_layers"]:
            raise ValueError(
                f"draft_layers {layers} must be below the target's {target['num_hidden_layers']} layers: "
                "lower speculation.draft_layers"
            )
        return cls(**cls.sizes(target), num_hidden_layers=layers, tied=bool(target.get("tie_word_embeddings")))


class _Attention(nn.Module):
    """The projections of grouped-query attention."""

    def __init__(self, config: DraftModelConfig) -> None:
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(h, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(h, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(h, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, h, bias=False)


class _Layer(nn.Module):
    """One decoder layer, its tensors named as in Hugging Face's Llama."""

    def __init__(self, config: DraftModelConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DraftModel(nn.Module):
    """The network. Parameters are trained; embedding and head belong to the target, are frozen and never written.

    A new instance holds PyTorch's random weights: fill it by `drafters.initialise_draft_model` or `load_draft_model`.
    """

    inv_freq: Tensor  # [D / 2]
    embed_tokens: Tensor  # [V, H], the target's
    lm_head: Tensor  # [V, H], the target's
    draft_ids: Tensor  # [draft vocabulary] int64, ascending: the tokens that can be drafted
    head: Tensor  # [draft vocabulary, H]: their rows

    def __init__(self, config: DraftModelConfig, target: TargetWeights, draft_ids: Tensor) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)
        self.register_buffer("embed_tokens", target.embed_tokens.detach(), persistent=False)
        self.register_buffer("lm_head", target.lm_head.detach(), persistent=False)
        self.register_buffer("draft_ids", draft_ids.clone())
        self.to(target.embed_tokens.device)
        self.use_vocabulary(self.draft_ids)

    def use_vocabulary(self, draft_ids: Tensor) -> None:
        """Draft the tokens `draft_ids` from now on: ascending target ids, int64, as many as before."""
        self.draft_ids.copy_(draft_ids)
        self.register_buffer("head", self.lm_head[self.draft_ids], persistent=False)

    def copy_from(self, state: dict[str, Tensor]) -> None:
        """Take over the `state_dict` of another draft model of these sizes."""
        self.load_state_dict(state)
        self.use_vocabulary(self.draft_ids)

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Output states, final norm applied, of tokens [n] (target ids) at positions [n]: [n, H]."""
        config = self.config
        state = F.embedding(ids, self.embed_tokens)
        for number, module in enumerate(self.layers):
            layer = cast("_Layer", module)
            x = layer.input_layernorm(state)
            q = layer.self_attn.q_proj(x).view(len(x), config.num_attention_heads, config.head_dim)
            k = layer.self_attn.k_proj(x).view(len(x), config.num_key_value_heads, config.head_dim)
            v = layer.self_attn.v_proj(x).view(len(x), config.num_key_value_heads, config.head_dim)
            q, k = (
                rotate(torch.cat([q, k], dim=1), positions, self.inv_freq)
                .to(v.dtype)
                .split([q.shape[1], k.shape[1]], 1)
            )
            state = state + layer.self_attn.o_proj(attend(number, q, k, v).flatten(1))
            state = state + layer.mlp(layer.post_attention_layernorm(state))
        return cast("Tensor", self.norm(state))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the draft vocabulary of output states [n, H]: [n, draft vocabulary]."""
        return F.linear(hidden, self.head)


def attend_packed(bounds: tuple[int, ...]) -> Attend:
    """Causal attention within texts that are packed one after another; text i owns rows bounds[i] .. bounds[i + 1]."""

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attention(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(bounds)])

    return attend


def attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal grouped-query attention of the last n of m positions: q [n, heads, D], keys, values [m, KV, D]."""
    n, m = len(q), len(keys)
    mask = None
    if 1 < n < m:
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=n == m,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
