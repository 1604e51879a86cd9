"""`aurora record` against a forward pass of the same model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from aurora.prompts import Conversation
from trainer.recording import Recording, request_key

pytestmark = pytest.mark.engine


@torch.no_grad()
def test_a_recording_holds_what_the_model_computes(tiny_model: Path, tmp_path: Path) -> None:
    talks = [Conversation((f"question {i}",), "easy") for i in range(5)] + [Conversation(("one", "and two"), "hard")]
    rows = [json.dumps({"turns": list(c.turns), "domain": c.domain}) for c in talks]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    out = tmp_path / "recording"
    flags = ["--out", str(out), "--max-tokens", "12", "--concurrency", "3", "--max-model-len", "512"]
    command = [sys.executable, "-m", "aurora.cli", "record", str(tmp_path / "prompts.jsonl"), str(tiny_model), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"6 of 6 conversations in {out}" in done.stdout
    recording = Recording(out)
    assert len(recording) == 7
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for talk in talks:
        request = recording.read(request_key(talk.turns, 0))
        asked = tokenizer.apply_chat_template([{"role": "user", "content": talk.turns[0]}], return_dict=False)
        assert request.ids[: request.prompt_tokens].tolist() == asked
        assert request.domain == talk.domain
        assert len(request.ids) == request.prompt_tokens + 12
        computed = model(torch.from_numpy(request.ids[None, :-1]), output_hidden_states=True)
        said = computed.logits[0, request.prompt_tokens - 1 :].argmax(-1)
        assert request.ids[request.prompt_tokens :].tolist() == said.tolist()
        assert torch.allclose(request.hidden.float(), computed.hidden_states[-1][0], rtol=0.02, atol=0.02)
        tapped = torch.cat([computed.hidden_states[layer][0] for layer in (2, 3, 4)], dim=-1)
        assert torch.allclose(request.aux.float(), tapped, rtol=0.02, atol=0.02)
    second = recording.read(request_key(talks[-1].turns, 1))
    assert second.prompt_tokens > recording.read(request_key(talks[-1].turns, 0)).prompt_tokens
