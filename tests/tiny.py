"""A tiny random Llama as the target, and the traces that serving it with some drafter would send."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aurora.config import AuroraConfig
from aurora.trace import DraftTrace
from drafters import TargetWeights
from trainer.buffer import Replay
from trainer.recording import Manifest

VOCAB, HIDDEN, LAYERS = 300, 48, 7
DRAFT_VOCAB = 256
AUX_LAYERS = (2, 3, 4)  # vLLM's defaults (2, n // 2, n - 3) at 7 layers
Drafts = Callable[[list[int], int], list[int]]  # (true continuation, step) -> drafted tokens


def write_target(directory: Path, seed: int = 0, **fields: Any) -> Path:
    """Save a random Llama whose greedy text is not one token repeated."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    LlamaForCausalLM(LlamaConfig(**sizes | fields)).save_pretrained(directory)
    return directory


def tiny_config(run_dir: Path, **trainer: Any) -> AuroraConfig:
    """A configuration for the tiny target; keywords go to its trainer branch."""
    plain = {
        "batch_rows": 64,
        "warmup_steps": 2,
        "learning_rate": 3e-3,
        "holdout": 0.3,
        "gate_sequences": 4,
        "precision": "fp32",
        "rejected_weight": 0.5,
    }
    branches = {"speculation": {"draft_vocab": DRAFT_VOCAB, "k_max": 3}, "trainer": plain | trainer}
    return AuroraConfig.model_validate({"run_dir": run_dir, **branches})


def bits(x: torch.Tensor) -> np.ndarray:
    """bf16 bit patterns as uint16, as traces carry them."""
    return x.to(torch.bfloat16).view(torch.uint16).numpy()


class TinyServer:
    """Plays the server: greedy text of the target, traced as if a drafter had proposed `drafts`."""

    def __init__(self, directory: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.no_grad()
    def features(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Last hidden states [n, H] and tapped states [n, 3H] after each token, as bits."""
        out = self.model.model(torch.tensor([ids]), output_hidden_states=True)
        aux = torch.cat([out.hidden_states[layer][0] for layer in AUX_LAYERS], -1)
        return bits(out.last_hidden_state[0]), bits(aux)

    @torch.no_grad()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The target's continuation."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    def traces(
        self, request: str, prompt: list[int], count: int, drafts: Drafts, *, version: int = 1, domain: str = ""
    ) -> list[DraftTrace]:
        """The request's traces in order: its prefill, then verification steps until `count` tokens are out."""
        ids = prompt + self.greedy(prompt, count)
        hidden, aux = self.features(prompt)
        common = {"request_id": request, "prompt_tokens": len(prompt), "drafter_version": version, "domain": domain}
        found = [_trace(common, 0, prompt, ids[len(prompt) : len(prompt) + 1], 0, hidden, aux)]
        at = len(prompt)  # position of the newest token, which the next step feeds
        while at + 1 < len(ids):
            path = drafts(ids[at + 1 :], len(found))
            accepted = next(
                (i for i, t in enumerate(path) if i + at + 1 >= len(ids) or t != ids[at + 1 + i]), len(path)
            )
            hidden, aux = self.features([*ids[: at + 1], *path])
            emitted = ids[at + 1 : at + 2 + accepted]
            if len(emitted) <= accepted:
                break
            found.append(_trace(common, at, [ids[at], *path], emitted, len(path), hidden[at:], aux[at:]))
            at += accepted + 1
        return found


def _trace(
    common: dict[str, Any],
    position: int,
    ids: list[int],
    emitted: list[int],
    k: int,
    hidden: np.ndarray,
    aux: np.ndarray,
) -> DraftTrace:
    return DraftTrace(
        **common,
        step=position,
        time_s=float(position),
        position=position,
        input_ids=np.array(ids, np.int32),
        emitted_ids=np.array(emitted, np.int32),
        k=k,
        accepted=len(emitted) - 1,
        draft_q=np.ones(k, np.float32),
        top_q_ids=np.zeros((k, 0), np.int32),
        top_q=np.zeros((k, 0), np.float32),
        hidden=hidden,
        aux=aux,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
    )


def greedy_manifest(directory: Path, max_tokens: int) -> Manifest:
    """How a recording of greedy answers of that target would be made."""
    return Manifest(
        model=str(directory),
        fingerprint=TargetWeights.load(directory).fingerprint,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        max_tokens=max_tokens,
        seed=0,
    )


def half_right(truth: list[int], step: int) -> list[int]:
    """Three drafts, of which the first `step % 4` are right."""
    return [t if i < step % 4 else (t + 1 + i) % VOCAB for i, t in enumerate([*truth, 5, 6, 7][:3])]


def prompts(count: int, length: int = 12, seed: int = 0) -> list[list[int]]:
    """Random prompts."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, length).tolist() for _ in range(count)]


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


def filled_replay(directory: Path, requests: int) -> Replay:
    """A replay of so many requests, half of whose drafts were right."""
    server, replay = TinyServer(directory), Replay(HIDDEN, VOCAB, 64, 0.01)
    for i, prompt in enumerate(prompts(requests)):
        for trace in server.traces(f"r{i}", prompt, 14, half_right):
            replay.add(trace)
    return replay
