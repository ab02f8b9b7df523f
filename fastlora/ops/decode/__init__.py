"""Operations of generation, most of them on one new token per row.

linear.py      products with a layer's matrices and their low-rank terms; also for prompts
attention.py   attention over the cache
next_token.py  the two ends of a step: the first layer's inputs, and the next tokens
"""
