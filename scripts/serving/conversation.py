"""A chat with one engine row: its messages, and the pieces of the reply to the last of them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fastlora.arguments import setting_problems
from fastlora.errors import raise_problems
from fastlora.generation.engine import Engine, RowSettings
from fastlora.generation.sampling import Sampling
from serving.models import Served
from serving.text import TextPieces


@dataclass(slots=True)
class Statistics:
    """Of the last reply."""

    tokens: int = 0
    seconds: float = 0.0  # from the prompt to the last token
    dropped: int = 0  # messages that left the chat to make room
    end: str = ""  # "stop", "length", or "stopped" by the user


class Conversation:
    """Messages of a chat. The adapter may change between two replies."""

    def __init__(self, served: Served, *, system: str | None, max_new_tokens: int) -> None:
        """`system` is the first message; None: no such message."""
        self.served, self.system, self.max_new_tokens = served, system, max_new_tokens
        self.base = next(iter(served.adapter_ids))
        self.name = self.base
        self.seed: int | None = None
        self.sampling = Sampling(temperature=0.7)
        self.messages: list[dict[str, str]] = []
        self.last = Statistics()
        self._longest = served.model.spec.max_seq_length
        self._engine = Engine(served.model, slots=1, max_length=self._longest)
        on_cuda = served.model.base["norm"].is_cuda
        self._steps = 16 if on_cuda else 2  # tokens between two pieces of text

    def use(self, name: str) -> None:
        """Let the base or an adapter write the next replies.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self.served.adapter_ids:
            known = ", ".join(self.served.adapter_ids)
            raise ValueError(f"there is no {name!r}; loaded: {known}")
        self.name = name

    def set_temperature(self, value: float) -> None:
        """Change the temperature; 0 takes the likeliest tokens.

        Raises:
            ValueError: the value is not a number >= 0.
        """
        changed = replace(self.sampling, temperature=value)
        raise_problems(ValueError, "wrong setting:", setting_problems(changed))
        self.sampling = changed

    def reply(self, text: str, is_stopped: Callable[[], bool]) -> Iterator[str]:
        """Pieces of the reply to a new message of the user.

        The message and the reply join the chat, also if the reply is stopped. If the iterator is
        not used up, what came so far joins.

        Args:
            text: the message.
            is_stopped: asked after every few tokens.

        Raises:
            ValueError: the chat template fails, or the message is too long for the model. The
                message does not join the chat then.
        """
        self.last = Statistics()
        begin = time.perf_counter()
        prompt, kept = self._prompt([*self.messages, {"role": "user", "content": text}])
        settings = RowSettings(
            max_new_tokens=min(self.max_new_tokens, self._longest - len(prompt)),
            sampling=self.sampling,
            seed=self.seed,
            stop=self.served.stop_ids,
            adapter_id=self.served.adapter_ids[self.name],
        )
        answer = {"role": "assistant", "content": ""}
        self.messages = [*kept, answer]
        for piece in self._generate(prompt, settings, is_stopped):
            answer["content"] += piece
            self.last.seconds = time.perf_counter() - begin
            yield piece

    def _generate(
        self, prompt: list[int], settings: RowSettings, is_stopped: Callable[[], bool]
    ) -> Iterator[str]:
        pieces = TextPieces(self.served.tokenizer.decode)
        (slot,) = self._engine.admit([(prompt, settings)])
        try:
            while slot in self._engine.running:
                (new,) = self._engine.advance(self._steps)
                self.last.tokens += len(new.ids)
                self.last.end = new.finish_reason or ""
                yield pieces.push(new.ids)
                if new.finish_reason is None and is_stopped():
                    self.last.end = "stopped"
                    break
            yield pieces.finish()
        finally:
            if slot in self._engine.running:  # not after NaN logits, which free the slot
                self._engine.release(slot)

    def _prompt(self, messages: list[dict[str, str]]) -> tuple[list[int], list[dict[str, str]]]:
        """The ids of the chat, and its messages without the oldest, if it had become too long."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        # A quarter of the context, or less, is kept for the reply.
        room = min(self.max_new_tokens, self._longest // 4)
        while True:
            prompt = self.served.tokenizer.apply_chat_template(
                [*head, *messages], add_generation_prompt=True
            )
            if len(prompt) + room <= self._longest:
                return prompt, messages
            if len(messages) == 1:
                raise ValueError(
                    f"the message makes {len(prompt)} tokens; the model's limit is "
                    f"{self._longest}, {room} of them for the reply. Write a shorter one."
                )
            messages = messages[2:]  # a question and its reply
            self.last.dropped += 2

    def clear(self) -> None:
        """Forget all messages but the system message."""
        self.messages = []

    def close(self) -> None:
        """Free the engine's memory."""
        self._engine.close()
