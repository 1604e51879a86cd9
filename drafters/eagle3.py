"""The EAGLE-3 drafter (Li et al. 2025, arXiv:2503.01840) exactly as vLLM's `llama_eagle3.py` computes it.

One decoder layer reads, at position t, the embedding of token t+1 and a state: at depth 0 `fc` of the target's tapped
states at t, deeper its own previous output. Its output state (before the final norm) predicts token t+2 and is the next
depth's input state. The layer is split into its steps (`inputs`, `keys_values`, `queries`, `finish`) because training
runs many rollouts over one set of context keys and values; `drafters.rollout` puts them together.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafters.config import Eagle3Config
from drafters.rotary import inverse_frequencies, rotate


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """The projections of grouped-query attention over the 2H-wide layer input."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(2 * h, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(2 * h, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(2 * h, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, h, bias=False)


class GatedMLP(nn.Module):
    """SiLU-gated feed-forward block."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class DecoderLayer(nn.Module):
    """The parameters of the drafter's only layer; `Eagle3` runs them."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Eagle3(nn.Module):
    """The drafter. Parameters are trained; the embedding belongs to the target, is frozen and is not saved.

    A new instance holds PyTorch's random weights: fill it by `drafters.initialise` or `drafters.load_drafter`.
    """

    inv_freq: Tensor  # [D / 2]
    embed_tokens: Tensor  # [V, H], shared with the target
    d2t: Tensor  # [draft vocabulary] int64: target id of draft row i is i + d2t[i]
    t2d: Tensor  # [V] bool

    def __init__(self, config: Eagle3Config, embed_tokens: Tensor) -> None:
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.fc = nn.Linear(3 * h, h, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(config)])
        self.norm = RMSNorm(h, config.rms_norm_eps)
        self.lm_head = nn.Linear(h, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.register_buffer("embed_tokens", embed_tokens.detach(), persistent=False)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)
        self.to(embed_tokens.device)

    @property
    def layer(self) -> DecoderLayer:
        return cast("DecoderLayer", self.layers[0])

    @property
    def draft_ids(self) -> Tensor:
        """Target ids that can be drafted, ascending, [draft vocabulary] int64."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def fuse(self, aux: Tensor) -> Tensor:
        """Depth-0 state of tapped target states: [n, 3H] -> [n, H]."""
        return cast("Tensor", self.fc(aux))

    def inputs(self, tokens: Tensor, state: Tensor) -> Tensor:
        """Layer input of tokens [n] (target ids) and states [n, H]: [n, 2H]."""
        embedded = self.layer.input_layernorm(F.embedding(tokens, self.embed_tokens))
        return torch.cat([embedded, self.layer.hidden_norm(state)], dim=-1)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of layer inputs [n, 2H] at positions [n]: each [n, KV heads, D]."""
        shape = (len(x), self.config.num_key_value_heads, self.config.head_dim)
        keys = rotate(self.layer.self_attn.k_proj(x).view(shape), positions, self.inv_freq)
        return keys, self.layer.self_attn.v_proj(x).view(shape)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries, scaled by D ** -0.5, of layer inputs [n, 2H] at positions [n]: [n, heads, D]."""
        shape = (len(x), self.config.num_attention_heads, self.config.head_dim)
        queries = rotate(self.layer.self_attn.q_proj(x).view(shape), positions, self.inv_freq)
        return queries * (1.0 / math.sqrt(self.config.head_dim))

    def finish(self, state: Tensor, attended: Tensor) -> Tensor:
        """Output state (before the final norm) of input state [n, H] and attention output [n, heads, D]: [n, H]."""
        state = state + self.layer.self_attn.o_proj(attended.flatten(1))
        return cast("Tensor", state + self.layer.mlp(self.layer.post_attention_layernorm(state)))

    def logits(self, state: Tensor) -> Tensor:
        """Logits over the draft vocabulary of output states [n, H]: [n, draft vocabulary]."""
        return cast("Tensor", self.lm_head(self.norm(state)))
