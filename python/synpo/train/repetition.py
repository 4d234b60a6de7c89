"""How much a model repeats itself when it writes greedily: the first sign of a language that collapses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from synpo.data.tokenize import EncodedPair
from synpo.model.adapter import CaptionModel, evaluating

ORDER = 4


def repeated_share(tokens: Sequence[int], order: int = ORDER) -> float:
    """Share of the n-grams of `tokens` that occurred before: 0 when none did, or there are too few tokens for one."""
    grams = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def repetition(lm: CaptionModel, pairs: Sequence[EncodedPair], tokens: int) -> float:
    """Mean share of repeated 4-grams in greedy answers of up to `tokens` tokens to the prompts of `pairs`, one at a time."""
    shares = []
    with evaluating(lm.model):
        for pair in pairs:
            ids = pair.prompt[None].to(lm.device)
            vision = {name: value.to(lm.device) for name, value in pair.vision.items()}
            inputs = lm.forward_kwargs(ids, torch.ones_like(ids), lm.encode_vision([vision]))
            inputs.pop("position_ids")  # generate counts on from the prompt itself
            written = lm.model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                repetition_penalty=1.0,  # a checkpoint's own settings would hide what is looked for
                no_repeat_ngram_size=0,
                eos_token_id=list(lm.eos_token_ids),
                pad_token_id=lm.pad_token_id,
                use_cache=True,
            )[0]
            answer = written[ids.shape[1] :] if "input_ids" in inputs else written
            ended = [i for i, token in enumerate(answer.tolist()) if token in lm.eos_token_ids]
            shares.append(repeated_share(answer.tolist()[: ended[0]] if ended else answer.tolist()))
    return sum(shares) / len(shares) if shares else 0.0
