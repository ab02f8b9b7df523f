"""The demo's chats for torchtune, which reads only the tokenizers of known models."""

from typing import Any

from tokenizers import Tokenizer


class DemoTokenizer:
    """A torchtune model tokenizer over the demo's tokenizer.json: <|role|>content<|end|>."""

    pad_id, max_seq_len = 0, 512

    def __init__(self, folder: str) -> None:
        """`folder` holds tokenizer.json."""
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:
        """Adds "tokens", and "mask", which is True where a token is not trained."""
        tokens, mask = self._encode("<|begin|>"), [True]
        for message in sample.pop("messages"):
            content = "".join(item["content"] for item in message.content)
            for text, masked in ((f"<|{message.role}|>", True), (content, message.masked)):
                ids = self._encode(text)
                tokens, mask = tokens + ids, mask + [masked] * len(ids)
            tokens, mask = [*tokens, *self._encode("<|end|>")], [*mask, message.masked]
        return sample | {"tokens": tokens, "mask": mask}

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids
