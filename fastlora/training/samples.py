"""Texts that the model writes during a run, greedily, so that a person sees what it learns."""

from collections.abc import Sequence
from typing import Any

from fastlora.arguments import Rule, describe
from fastlora.generation.many import generate_many
from fastlora.generation.text import PROMPT, Prompt, encode_prompt
from fastlora.models.state import ModelState
from fastlora.text.tokenizer import Tokenizer

_ROWS = 8  # generated at a time: training has left little free memory

SAMPLE_PROMPTS = Rule(
    lambda x: isinstance(x, list | tuple) and len(x) > 0 and all(map(PROMPT.accepts, x)),
    "a list of prompts: texts, or chats (lists of messages)",
)


def sample_problems(prompts: Any, new_tokens: Any, tokenizer: Any, length: int) -> list[str]:
    """Why the model cannot continue these prompts.

    Args:
        prompts: sample_prompts of `train`.
        new_tokens: sample_tokens of `train`.
        tokenizer: with the run's template_kwargs.
        length: max_seq_length.
    """
    if not SAMPLE_PROMPTS.accepts(prompts) or type(new_tokens) is not int:
        return []  # their rules report it
    if not isinstance(tokenizer, Tokenizer):
        return []
    problems = []
    for number, prompt in enumerate(prompts):
        try:
            count = len(encode_prompt(tokenizer, prompt))
        except ValueError as error:
            problems.append(f"sample_prompts[{number}]: {error}")
            continue
        if count + new_tokens > length:
            problems.append(
                f"sample_prompts[{number}]={describe(prompt)}: its {count:,} tokens and"
                f" sample_tokens={new_tokens:,} are more than max_seq_length={length:,}"
            )
    return problems


def write_samples(
    model: ModelState, tokenizer: Tokenizer, prompts: Sequence[Prompt], new_tokens: int
) -> list[dict[str, Any]]:
    """The continuation of each prompt: [{"prompt": ..., "text": ...}, ...], in their order.

    Raises:
        FloatingPointError: the logits of a prompt are NaN or infinite.
    """
    done = generate_many(
        model,
        prompts,
        tokenizer=tokenizer,
        max_batch=min(_ROWS, len(prompts)),
        max_new_tokens=new_tokens,
        temperature=0.0,
    )
    texts = {completion.index: completion.text for completion in done}
    # Dicts of other classes become plain ones, which JSON has.
    plain = [p if isinstance(p, str) else [dict(message) for message in p] for p in prompts]
    return [{"prompt": prompt, "text": texts[i]} for i, prompt in enumerate(plain)]
