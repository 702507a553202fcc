"""What tests of samplers ask for: specs of rows, alike and mixed, and masks of allowed ids."""

import numpy as np

from llamita.backend.interface import SampleSpec
from llamita.backend.sampling_params import SamplingParams

SIZE = 45  # no multiple of 32


def mask_of(ids: set[int], size: int) -> np.ndarray:
    bits = np.zeros((size + 31) // 32 * 32, dtype=np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def spec(params: SamplingParams | None = None, history: tuple[int, ...] = (), prompt_length: int = 0) -> SampleSpec:
    return SampleSpec(params or SamplingParams(temperature=0), 7, 5, history, prompt_length)


def mixed_specs() -> list[SampleSpec]:
    history = [3, 3, 8, 40, 41]
    each = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_p=0.7, top_k=9),
        SamplingParams(temperature=0, presence_penalty=2, repetition_penalty=1.4),
        SamplingParams(temperature=0.5, frequency_penalty=1, min_p=0.1, logit_bias={4: 3.0}, top_logprobs=4),
        SamplingParams(top_p=0.99, temperature=1.5),
        SamplingParams(temperature=2),
    ]
    masks = [None, mask_of(set(range(0, SIZE, 2)), SIZE)] * 4
    return [
        SampleSpec(params, 2**63 + row, 100 + row, history, 2, (5, 6), mask)
        for row, (params, mask) in enumerate(zip(each, masks, strict=False))
    ]
