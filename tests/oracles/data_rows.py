"""Rows of documents for the tests of fastlora.data."""

CHAT = [
    {"role": "user", "content": "What is 12 + 34?"},
    {"role": "assistant", "content": "46, I'd say."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes.\n\nQuite."},
]
