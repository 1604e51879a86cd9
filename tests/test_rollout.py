import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aurora.trace import TABLE_VERSION
from drafters import Eagle3, Eagle3Config, TargetWeights, initialise
from drafters.rollout import run_rollouts
from tests.tiny import DRAFT_VOCAB, VOCAB, TinyServer, half_right, prompts, write_target
from trainer.rollout import build_batch
from trainer.sequence import OpenSequence, Sequence


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Eagle3:
    target = TargetWeights.load(directory)
    return initialise(target, Eagle3Config.for_target(target.config, DRAFT_VOCAB), seed=3)


@pytest.fixture(scope="module")
def server(directory: Path) -> TinyServer:
    return TinyServer(directory)


def assemble(traces: list) -> Sequence:
    sequence = OpenSequence.begin(traces[0])
    for trace in traces:
        sequence.append(trace)
    return sequence.snapshot()


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


class PlainDrafter:
    """One request, one token at a time, with an explicit KV cache: EAGLE-3 as a server runs it."""

    def __init__(self, model: Eagle3) -> None:
        self.w = {name: p.detach() for name, p in model.named_parameters()}
        self.c = model.config
        self.embed = model.embed_tokens
        self.cache: list[tuple[Tensor, Tensor]] = []

    def rope(self, x: Tensor, position: int) -> Tensor:
        half = self.c.head_dim // 2
        angle = position * self.c.rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
            torch.ones(half).double(), angle
        )
        return torch.cat([turned.real, turned.imag], -1).float()

    def feed(self, token: int, state: Tensor, position: int) -> Tensor:
        """Read a token with a state at a position; returns the output state."""
        w, c, layer = self.w, self.c, "layers.0."
        embedded = rms(self.embed[token], w[layer + "input_layernorm.weight"], c.rms_norm_eps)
        x = torch.cat([embedded, rms(state, w[layer + "hidden_norm.weight"], c.rms_norm_eps)])
        q, k, v = (w[f"{layer}self_attn.{n}_proj.weight"] @ x for n in "qkv")
        q = self.rope(q.view(-1, c.head_dim), position)
        self.cache.append((self.rope(k.view(-1, c.head_dim), position), v.view(-1, c.head_dim)))
        group = c.num_attention_heads // c.num_key_value_heads
        heads = []
        for h in range(c.num_attention_heads):
            keys = torch.stack([k[h // group] for k, _ in self.cache])
            values = torch.stack([v[h // group] for _, v in self.cache])
            heads.append((keys @ q[h] / c.head_dim**0.5).softmax(-1) @ values)
        state = state + w[layer + "self_attn.o_proj.weight"] @ torch.cat(heads)
        y = rms(state, w[layer + "post_attention_layernorm.weight"], c.rms_norm_eps)
        gate, up = w[layer + "mlp.gate_proj.weight"] @ y, w[layer + "mlp.up_proj.weight"] @ y
        return state + w[layer + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)

    def rollout(self, sequence: Sequence, start: int, path: list[int]) -> list[Tensor]:
        """Output states of a rollout from `start` that reads `path` after its first token."""
        self.cache = []
        for row in range(start + 1):
            fused = self.w["fc.weight"] @ sequence.aux[row].float()
            state = self.feed(int(sequence.ids[row + 1]), fused, sequence.position + row)
        states = [state]
        for depth, token in enumerate(path, 1):
            states.append(self.feed(token, states[-1], sequence.position + start + depth))
        return states


def test_packed_rollouts_equal_token_by_token_drafting(model: Eagle3, server: TinyServer) -> None:
    sequences = [assemble(server.traces(f"r{i}", p, 12, half_right)) for i, p in enumerate(prompts(3))]
    windows = [(s, range(s.first_start + i, s.end_start - i)) for i, s in enumerate(sequences)]
    batch = build_batch(windows, 3, oldest_version=0)
    with torch.no_grad():
        states = list(run_rollouts(model, batch.context, batch.nodes))
    plain = PlainDrafter(model)
    checked = 0
    for i, (sequence, starts) in enumerate(windows):
        for order, start in enumerate(starts):
            path = [int(t) for t in sequence.ids[start + 2 : start + 4]]
            for depth, expected in enumerate(plain.rollout(sequence, start, path)):
                if start + 1 + depth < len(sequence.hidden):
                    node = batch.nodes[depth].bounds[i] + order
                    torch.testing.assert_close(states[depth][node], expected, atol=1e-4, rtol=1e-4)
                    checked += 1
    assert checked > 60


def test_rejected_paths_fork_at_the_first_wrong_token(model: Eagle3, server: TinyServer, directory: Path) -> None:
    traces = server.traces("r", prompts(1)[0], 14, half_right)
    sequence = assemble(traces)
    batch = build_batch([(sequence, range(sequence.first_start, sequence.end_start))], 4, oldest_version=0)
    with torch.no_grad():
        states = list(run_rollouts(model, batch.context, batch.nodes))
    plain = PlainDrafter(model)
    judged = 0
    for trace in traces[1:]:
        start = trace.position - 1
        drafts = trace.input_ids[1:].tolist()
        expected = plain.rollout(sequence, start, drafts)
        for depth in range(trace.accepted + 1, min(trace.k, 3) + 1):
            mine = [n for n in range(len(states[depth])) if batch.labels[depth].rejected[n]]
            near = [n for n in mine if torch.allclose(states[depth][n], expected[depth], atol=1e-4, rtol=1e-4)]
            assert near, f"no node for depth {depth} of the drafts at {trace.position}"
            judge = batch.target_hidden[batch.labels[depth].target[near[0]]]
            served = server.features([*sequence.ids[: trace.position + 1].tolist(), *drafts])[0][trace.position + depth]
            assert (judge.view(torch.uint16).numpy() == served).all()
            judged += 1
    assert judged == sum(int(label.rejected.sum()) for label in batch.labels) > 5


def test_the_judge_of_a_main_node_says_what_the_target_emitted(
    model: Eagle3, server: TinyServer, directory: Path
) -> None:
    sequence = assemble(server.traces("r", prompts(1)[0], 16, half_right))
    head = TargetWeights.load(directory).lm_head
    batch = build_batch([(sequence, range(sequence.first_start, sequence.end_start))], 3)
    for label in batch.labels:
        said = (batch.target_hidden[label.target].float() @ head.T).argmax(-1)
        assert not label.rejected.any()
        agree = (said == label.truth).float().mean()
        assert agree > 0.9, "bf16 features may flip a near tie, not more"


def test_actions_sit_where_the_drafted_tokens_were_chosen(server: TinyServer) -> None:
    traces = server.traces("r", prompts(1)[0], 16, half_right, version=3)
    sequence = assemble(traces)
    starts = range(sequence.first_start, sequence.end_start)
    batch = build_batch([(sequence, starts)], 2, oldest_version=0)
    found = []
    for depth, (nodes, label, actions) in enumerate(zip(batch.nodes, batch.labels, batch.actions, strict=True)):
        assert not label.rejected[actions.node].any()
        for node, token, q, accepted, left in zip(
            *(t.tolist() for t in (actions.node, actions.token, actions.q, actions.accepted, actions.left)), strict=True
        ):
            root = node if depth == 0 else int(nodes.parent[node])
            position = sequence.position + int(batch.nodes[0].parent[root]) + 1
            assert (token == int(label.truth[node])) == (accepted > 0)
            found.append((position, depth, token, q, accepted, left))
    expected = [
        (t.position, depth, int(t.input_ids[1 + depth]), 1.0, t.accepted - depth, t.k - depth)
        for t in traces[1:]
        for depth in range(min(t.accepted + 1, t.k, 2))
    ]
    assert sorted(found) == sorted(expected)
    assert any(accepted > 2 for *_, accepted, _ in found), "accepted tokens beyond the rollout's depths count, too"


def test_actions_of_several_sequences_keep_their_nodes(server: TinyServer) -> None:
    sequences = [assemble(server.traces(f"r{i}", p, 12, half_right)) for i, p in enumerate(prompts(3))]
    windows = [(s, range(s.first_start + 1, s.end_start)) for s in sequences]
    batch = build_batch(windows, 3, oldest_version=0)
    for label, actions in zip(batch.labels, batch.actions, strict=True):
        right = actions.accepted > 0
        assert torch.equal(label.truth[actions.node][right], actions.token[right])
        assert (label.truth[actions.node][~right] != actions.token[~right]).all()
    assert sum(len(actions.node) for actions in batch.actions) > 20


def test_the_table_and_stale_drafters_take_no_actions(server: TinyServer) -> None:
    def actions(version: int, oldest: int | None) -> int:
        sequence = assemble(server.traces("r", prompts(1)[0], 12, half_right, version=version))
        window = [(sequence, range(sequence.first_start, sequence.end_start))]
        return sum(len(a.node) for a in build_batch(window, 3, oldest_version=oldest).actions)

    assert actions(4, 4) > 0
    assert actions(4, 5) == actions(4, None) == 0
    assert actions(TABLE_VERSION, -1) == 0


def test_stale_and_unwanted_rejected_paths_stay_out(server: TinyServer) -> None:
    sequence = assemble(server.traces("r", prompts(1)[0], 12, half_right, version=4))
    window = [(sequence, range(sequence.first_start, sequence.end_start))]

    def rejected(oldest: int | None, wanted: bool = True) -> int:
        batch = build_batch(window, 4, oldest_version=oldest, rejected=wanted)
        return sum(int(label.rejected.sum()) for label in batch.labels)

    assert rejected(4) > 0
    assert rejected(4, wanted=False) == 0
    assert rejected(5) == 0
    assert rejected(None) == 0


def test_a_window_bounds_its_context(server: TinyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.rollout.MAX_CONTEXT", 3)
    sequence = assemble(server.traces("r", prompts(1)[0], 12, half_right))
    batch = build_batch([(sequence, [14, 15])], 2)
    assert batch.context.positions.tolist() == [11, 12, 13, 14, 15]
    assert batch.nodes[0].parent.tolist() == [3, 4]


def test_draft_order_does_not_depend_on_the_batch(model: Eagle3, server: TinyServer) -> None:
    sequences = [assemble(server.traces(f"r{i}", p, 10, half_right)) for i, p in enumerate(prompts(4))]
    windows = [(s, range(s.first_start, s.end_start)) for s in sequences]
    alone = [list(run_rollouts(model, *_run(w))) for w in windows]
    random.Random(1).shuffle(windows)
    together = list(run_rollouts(model, *_run(*windows)))
    position = {id(s): i for i, (s, _) in enumerate(windows)}
    batch = build_batch(windows, 3)
    for sequence, states in zip(sequences, alone, strict=True):
        place = position[id(sequence)]
        for depth, state in enumerate(states):
            first, end = batch.nodes[depth].bounds[place : place + 2]
            torch.testing.assert_close(together[depth][first:end], state, atol=1e-5, rtol=1e-5)
    assert VOCAB > DRAFT_VOCAB


def _run(*windows: tuple[Sequence, range]) -> tuple:
    batch = build_batch(list(windows), 3)
    return batch.context, batch.nodes
