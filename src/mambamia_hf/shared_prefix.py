"""Many prompts with one beginning, answered at once: the beginning is read, kept and attended to once for all.

Transformers' batches repeat the cache of the beginning for each prompt. Here the ends of all prompts stand one after
another in a single row behind the beginning; a mask lets each see the beginning and itself, and its positions go on
from the beginning's. So each step of the decoding is one row with a token of each prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .auto import MambaMiaForConditionalGeneration


_GROUPED = "mambamia_grouped_sdpa"
_IN_BEGINNING = -1
_switch = RLock()


@torch.no_grad()
def generate_from_prefix(
    model: MambaMiaForConditionalGeneration, cache: Cache, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """What `generate` writes by greedy decoding for each of some prompts, without the prompt.

    Args:
        model: whose language model `can_share_prefix`.
        cache: of the tokens that all prompts begin with; it is filled further.
        prompts: the tokens of each, those in the cache included.
        max_new_tokens: where each answer stops.
    """
    longest, beginning = max(map(len, prompts)), cache.get_seq_length()
    # Rows of one length for logits processors: shorter ones say the beginning's last token more often, so that no
    # token and no sequence of tokens comes in that the prompt lacks.
    rows = [
        prompt[:beginning] + (longest - len(prompt)) * prompt[beginning - 1 : beginning] + prompt[beginning:]
        for prompt in prompts
    ]

    def decode(_: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **__: Any) -> Any:
        return _decode(model, cache, prompts, input_ids, logits_processor, stopping_criteria)

    with attention_implementation(model.model.language_model, _GROUPED):
        answers: Any = model.generate(
            torch.tensor(rows, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            custom_generate=decode,
        )
    return answers


def can_share_prefix(language_model: nn.Module, cache: Cache) -> bool:
    """Whether all tokens of a cache may be attended to from any position, by PyTorch's attention."""
    config: Any = language_model.config
    special = ("attn_logit_softcapping", "final_logit_softcapping", "alibi", "attention_chunk_size")
    return (
        cache.is_croppable
        and not any(cache.is_sliding)
        and config._attn_implementation == "sdpa"
        and not any(getattr(config, name, None) for name in special)
    )


@contextmanager
def attention_implementation(language_model: nn.Module, name: str) -> Iterator[None]:
    """Has a language model attend in another way for a while; only one thread at a time switches."""
    model: Any = language_model
    with _switch:
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation(name)
            yield
        finally:
            model.set_attn_implementation(before)


def _decode(
    model: MambaMiaForConditionalGeneration,
    cache: Cache,
    prompts: list[list[int]],
    sequences: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
) -> list[list[int]]:
    """The loop of `generate`, from `sequences (num_prompts, longest)`, the prompts, to the answers' tokens."""
    language_model: Any = model.model.language_model
    answers: list[list[int]] = [[] for _ in prompts]
    device, start = sequences.device, cache.get_seq_length()
    ends = [prompt[start:] for prompt in prompts]
    tokens = torch.tensor([token for end in ends for token in end], device=device)
    lengths = torch.tensor([len(end) for end in ends], device=device)
    # Of each token in cache and row, the prompt that it belongs to and its place in it.
    rows = unfinished = torch.arange(len(prompts), device=device)
    owners = torch.cat([torch.full((start,), _IN_BEGINNING, device=device), rows.repeat_interleave(lengths)])
    positions = torch.cat([torch.arange(start + len(end), device=device)[start:] for end in ends])
    positions = torch.cat([torch.arange(start, device=device), positions])
    last = lengths.cumsum(0) - 1  # in the row, of each unfinished prompt
    while len(unfinished):
        # Past the wrapper, which would take a placeholder that the model came up with itself for that of a video.
        hidden = language_model(
            inputs_embeds=language_model.get_input_embeddings()(tokens)[None],
            attention_mask=_visible(owners, positions, len(tokens), model.dtype),
            position_ids=positions[None, -len(tokens) :],
            use_cache=True,
            **{model.model.cache_name: cache},
        ).last_hidden_state
        logits = model.lm_head(hidden[0, last]).float()
        scores = logits.new_zeros(len(prompts), logits.shape[1])
        scores[unfinished] = logits
        written = logits_processor(sequences, scores).argmax(dim=1)
        sequences = torch.cat([sequences, written[:, None]], dim=1)
        for row in unfinished.tolist():
            answers[row].append(int(written[row]))
        goes_on = ~stopping_criteria(sequences, None)[unfinished]
        unfinished = unfinished[goes_on]
        tokens = written[unfinished]
        lengths = lengths + 1
        owners = torch.cat([owners, unfinished])
        positions = torch.cat([positions, start + lengths[unfinished] - 1])
        last = torch.arange(len(unfinished), device=device)
    return answers


def _visible(owners: Tensor, positions: Tensor, new: int, dtype: torch.dtype) -> Tensor:
    """What the last `new` tokens of a row see: 0 where they do and the least number where not, `(1, 1, new, all)`."""
    same = (owners == _IN_BEGINNING) | (owners == owners[-new:, None])
    sees = same & (positions <= positions[-new:, None])
    return torch.where(sees, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention by PyTorch, but queries that share keys go together, so no key is repeated.

    Args:
        query: `(batch_size, heads, queries, size)`; `heads` is a multiple of that of key and value.
        key, value: `(batch_size, key_value_heads, keys, size)`.
        attention_mask: `(batch_size or 1, 1, queries, keys)`.

    Returns:
        `(batch_size, queries, heads, size)`, and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    if attention_mask is None or attention_mask.shape[1] != 1 or groups == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    queries = query.shape[2]
    query = query.unflatten(1, (-1, groups)).flatten(2, 3)
    attention_mask = attention_mask.repeat(1, 1, groups, 1)
    output = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return output.unflatten(2, (groups, queries)).flatten(1, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_GROUPED, _grouped_attention)
AttentionMaskInterface.register(_GROUPED, sdpa_mask)


__all__ = ["attention_implementation", "can_share_prefix", "generate_from_prefix"]
