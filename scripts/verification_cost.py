"""What verifying the drafts of sampled requests costs on a CPU: vLLM's rejection sampling and drawing, in turn.

python scripts/verification_cost.py

Random logits at temperature 1; milliseconds are medians, beside those of sampling a token for each request.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

ROUNDS = 40


def _milliseconds(calls: list[Callable[[], object]]) -> list[float]:
    """Median of each, all in turn."""
    took: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, mine in zip(calls, took, strict=True):
            start = time.perf_counter()
            call()
            mine.append(1e3 * (time.perf_counter() - start))
    return [float(np.median(mine[2:])) for mine in took]


def _row(requests: int, drafts: int, vocabulary: int) -> list[float]:
    """Plain sampling, vLLM's verification and ours."""
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    ids = [[5] * drafts for _ in range(requests)]
    sampling = SamplingMetadata(
        temperature=torch.ones(requests),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(requests),
        presence_penalties=torch.zeros(requests),
        repetition_penalties=torch.ones(requests),
        output_token_ids=[[] for _ in range(requests)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        spec_token_ids=ids,
    )
    sampler = Sampler()
    verifier = rejection_sampler.RejectionSampler(sampler)
    metadata = SpecDecodeMetadata.make_dummy(ids, torch.device("cpu"))
    one, all_rows = torch.randn(requests, vocabulary), torch.randn(requests * (drafts + 1), vocabulary)
    theirs, ours = rejection_sampler.rejection_sample, _ours()

    def verify(how: Callable[..., torch.Tensor]) -> None:
        rejection_sampler.rejection_sample = how
        verifier(metadata, None, all_rows.clone(), sampling)
        rejection_sampler.rejection_sample = theirs

    return _milliseconds([lambda: sampler(one.clone(), sampling), lambda: verify(theirs), lambda: verify(ours)])


def _ours() -> Callable[..., torch.Tensor]:
    """The function that `serve.verification` puts in the place of vLLM's, which is left as it is."""
    from vllm.v1.sample import rejection_sampler

    from serve import verification

    theirs = rejection_sampler.rejection_sample
    verification.install()
    ours: Callable[..., torch.Tensor] = rejection_sampler.rejection_sample
    rejection_sampler.rejection_sample = theirs
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=49152, help="of the target (default: %(default)s)")
    options = parser.parse_args()
    from vllm.platforms import current_platform

    from serve import sampling_shim

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    sampling_shim.install()
    table = Table("requests", "drafts each", "sampling, ms", "vLLM's verification, ms", "drawing, ms")
    for requests in (1, 4, 16):
        for drafts in (1, 3):
            found = _row(requests, drafts, options.vocabulary)
            table.add_row(str(requests), str(drafts), *(f"{each:.2f}" for each in found))
    Console().print(table)


if __name__ == "__main__":
    main()
