"""The label of tokens that are not trained, in a file that does not import torch."""

IGNORE = -100  # as in torch.nn.functional.cross_entropy and Hugging Face's models
