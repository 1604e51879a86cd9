"""Plain modules with the parameter names of vLLM's EAGLE-3 drafter, and checkpoints for them."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

HIDDEN, VOCAB, DRAFT = 8, 30, 12


class Operator:
    """Computes with weights of its own, as vLLM's packed operators on a CPU do."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.clone()

    def __call__(self, x: Tensor, _weight: Tensor, _bias: Tensor | None) -> Tensor:
        return x @ self.weight.T


class PackedLinear(nn.Module):
    """A linear layer whose weight went into an operator; the parameter is empty."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.cpu_linear = Operator(torch.zeros(output_size, input_size))


def pack(_live: nn.Module, weight: Tensor) -> Operator:
    """In the place of `serve.swap._packed`, which asks vLLM for an operator."""
    return Operator(weight)


class Drafter(nn.Module):
    """The parameter names of vLLM's EAGLE-3 drafter."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.model = nn.Module()
        self.model.fc = PackedLinear(3 * HIDDEN, HIDDEN) if packed else nn.Linear(3 * HIDDEN, HIDDEN, bias=False)
        self.model.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        layer = nn.Module()
        layer.qkv_proj = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.model.layers = nn.ModuleList([layer])
        self.lm_head = nn.Linear(HIDDEN, DRAFT, bias=False)
        self.draft_id_to_target_id = nn.Parameter(torch.zeros(DRAFT, dtype=torch.int64), requires_grad=False)


def weights(seed: int) -> dict[str, Tensor]:
    """A checkpoint in the published format."""
    g = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randn(HIDDEN, 3 * HIDDEN, generator=g),
        **{f"midlayer.{p}_proj.weight": torch.randn(HIDDEN, HIDDEN, generator=g) for p in "qkv"},
        "lm_head.weight": torch.randn(DRAFT, HIDDEN, generator=g),
        "d2t": torch.arange(DRAFT),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool),
    }


def plain_pair(packed: bool = False) -> tuple[nn.Module, nn.Module]:
    """A drafter and its target, whose embedding both use as they do in vLLM. packed: one layer's weight is."""
    torch.manual_seed(0)
    target = nn.Module()
    target.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
    target.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
    drafter = Drafter(packed)
    drafter.model.embed_tokens = target.embed_tokens
    return drafter, target
