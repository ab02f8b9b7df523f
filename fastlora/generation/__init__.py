"""Generation: the next tokens of a prompt, one at a time, with cached keys and values.

forward.py     a model prepared for generation, its cache, and the two passes that use it
sampling.py    from logits to the next token
generate.py    the loop over new tokens, for one batch of prompts
text.py        prompts to ids, and ids to text as they arrive
"""
