"""Model: the frozen value that users hold. Its methods call down; none changes its receiver."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastlora import functional
from fastlora.adapters.edits.combining import disable
from fastlora.errors import raise_problems
from fastlora.formats import merged
from fastlora.formats.peft import writing
from fastlora.generation import generate
from fastlora.generation import sampling as sampling_rules
from fastlora.generation.generate import check_generation
from fastlora.models.decoder import requires_grad
from fastlora.models.input_checks import check_adapter, check_batch, check_inputs, spec_problems
from fastlora.models.names import tensors_from_base
from fastlora.models.params import Adapter
from fastlora.models.self_contained import parked_originals, self_contained
from fastlora.models.spec import Recompute
from fastlora.models.state import Batch, ModelState, Seed
from fastlora.ops.dispatch import Kernels, transforms_active
from fastlora.ops.quant.weights import numel
from fastlora.runtime.compiled import Compile
from fastlora.text.tokenizer import Tokenizer

KEEP: Any = object()  # "as it was", for settings whose None, False and "auto" all mean something


@dataclass(frozen=True, eq=False, kw_only=True)
class Model(ModelState):
    """A base, an adapter if there is one, and how to run them. Only the adapter is ever trained."""

    # ── another Model ─────────────────────────────────────────────────────────────────────

    def with_adapter(self, adapter: Adapter | None) -> "Model":
        """The same model with another adapter's tensors of the same shapes; None: the base.

        Raises:
            ValueError: if the tree, a shape or a dtype kind differs from the present adapter's.
        """
        if adapter is None:
            return disable(self)
        check_adapter(self.adapter, adapter)
        return dataclasses.replace(self, adapter=adapter)

    def with_spec(
        self,
        *,
        recompute: Recompute = KEEP,
        compile: Compile = KEEP,
        kernels: Kernels = KEEP,
        deterministic: bool = KEEP,
    ) -> "Model":
        """The same tensors, run another way.

        Args:
            recompute: "none", "selective", "full", "offload" or a number in [0, 1].
            compile: "auto" (on CUDA), True or False.
            kernels: "auto" (Triton kernels on CUDA), "torch" (none), or "triton": they must run, on
                the CPU too, where TRITON_INTERPRET=1 is set.
            deterministic: True: the same bits every run. With the Triton kernels of attention (16
                bits, heads of 64 or 128) it is so anyway, but for long rows of one document, which
                then run up to a third longer in attention; elsewhere on CUDA attention is written
                out, some ten times slower.

        Raises:
            ValueError: for any other value.
        """
        given = dict(
            recompute=recompute, compile=compile, kernels=kernels, deterministic=deterministic
        )
        changed = {name: value for name, value in given.items() if value is not KEEP}
        problems = spec_problems(changed, self.base["norm"].device)
        raise_problems(ValueError, "with_spec cannot do this:", problems)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, **changed))

    def to(self, device: torch.device | str) -> "Model":
        """The same model on another device; tensors already there are shared, not copied."""
        # Originals that wait in a file (lora's temporary_location) stay there.
        waiting = {id(x) for x in parked_originals(self.base).values()}
        move = lambda tree: tree_map(lambda x: x if id(x) in waiting else x.to(device), tree)
        adapter = None if self.adapter is None else move(self.adapter)
        return dataclasses.replace(self, base=move(self.base), adapter=adapter)

    def for_training(self) -> "Model":
        """A Model whose adapter leaves require gradients, so that `model(...)` records history.

        The leaves are new tensor objects over the same memory: an optimiser that steps them in
        place writes there. `train` and `value_and_grad` need none of this.
        """
        track = lambda x: x.detach().requires_grad_()
        return dataclasses.replace(self, adapter=self._map_adapter(track))

    def for_inference(self) -> "Model":
        """A Model that records no autograd history."""
        return dataclasses.replace(self, adapter=self._map_adapter(lambda x: x.detach()))

    def _map_adapter(self, fn: Callable[[Tensor], Tensor]) -> Adapter | None:
        return None if self.adapter is None else tree_map(fn, self.adapter)

    # ── running it ────────────────────────────────────────────────────────────────────────

    def __call__(
        self,
        input_ids: Int[Tensor, "b t"],
        *,
        attention_mask: Int[Tensor, "b t"] | None = None,
        position_ids: Int[Tensor, "#b t"] | None = None,
        segment_ids: Int[Tensor, "b t"] | None = None,
        seed: Seed = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits, in the base's dtype. See `functional.forward`.

        Raises:
            ValueError: for a wrong shape or dtype, an id outside the vocabulary, or an input
                longer than `spec.max_seq_length`.
        """
        optional = dict(
            attention_mask=attention_mask, position_ids=position_ids, segment_ids=segment_ids
        )
        check_inputs(self, {"input_ids": input_ids} | optional)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._records()):
            return functional.forward(
                self.adapter, self.base, self.spec, input_ids, seed=seed, **optional
            )

    def loss(self, batch: Batch, *, seed: Seed = None) -> Float[Tensor, ""]:
        """Mean of -log p over labels != -100. See `functional.loss`.

        Raises:
            ValueError: as `__call__`, and for missing or unknown entries of the batch.
        """
        check_batch(self, batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._records()):
            return functional.loss(self.adapter, self.base, self.spec, batch, seed=seed)

    def _records(self) -> bool:
        return transforms_active() or requires_grad((self.adapter, self.base))

    def generate(
        self,
        input_ids: Int[Tensor, "b t"],
        *,
        attention_mask: Int[Tensor, "b t"] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
        stream: Callable[[Int[Tensor, "b"]], None] | None = None,
    ) -> Int[Tensor, "b t_new"]:
        """Prompt and continuation [b, t + new], new <= max_new_tokens. See `generation.generate`.

        Args:
            input_ids: prompts; shorter ones padded on the left.
            attention_mask: 1 = real token.
            max_new_tokens: tokens to add at most.
            temperature: 0 is greedy.
            top_k: sample among the k likeliest only.
            top_p: sample among the likeliest that together reach this probability.
            repetition_penalty: divides the positive scores of ids already seen; 1 is none.
            eos_token_id: stops a row; None is the checkpoint's own, () is never.
            seed: of the sampling; None draws fresh entropy.
            stream: called after every step with the new token of each row.

        Raises:
            ValueError: as `__call__`; also if prompt and new tokens together exceed
                `spec.max_seq_length`, or a sampling value is out of range.
        """
        sampling = sampling_rules.Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty
        )
        check_inputs(self, {"input_ids": input_ids, "attention_mask": attention_mask})
        check_generation(self, input_ids, attention_mask, max_new_tokens, sampling)
        if eos_token_id is None:
            eos_token_id = self.spec.config.eos_token_id
        return generate.generate(
            self,
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_token_id=(eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id),
            seed=seed,
            stream=stream,
        )

    def generate_text(
        self,
        tokenizer: Tokenizer,
        prompt: str | Sequence[dict[str, Any]],
        *,
        stream: Callable[[str], None] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        **same: Any,
    ) -> str:
        """The continuation of a text, or the reply to a list of chat messages, without its prompt.

        Takes what `generate` takes; `stream` is called with pieces of text that join to the result.
        """
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        else:
            ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)
        if eos_token_id is None:
            eos_token_id = sorted({*self.spec.config.eos_token_id, *tokenizer.eos_token_ids})
        pieces = generate.TextStream(tokenizer.decode, stream)
        device = self.base["norm"].device
        out = self.generate(
            torch.tensor([ids], dtype=torch.int64, device=device),
            eos_token_id=eos_token_id,
            stream=pieces,
            **same,
        )
        pieces.finish()
        return tokenizer.decode(out[0, len(ids) :].tolist())

    # ── counting and saving ───────────────────────────────────────────────────────────────

    def num_parameters(self, trainable: bool = False) -> int:
        """Number of elements of base and adapter together, or of the adapter alone.

        Start factors are neither, and a quantised matrix counts what it stands for: the numbers are
        PEFT's.
        """
        adapter = sum(x.numel() for x in tree_leaves(self.adapter) if isinstance(x, Tensor))
        if trainable:
            return adapter
        copies = {} if self.adapter is None else self.adapter.get("replaced", {})
        # PEFT trains a bias in its place, and a copy of anything else beside the original.
        twice = sum(x.numel() for name, x in copies.items() if self._is_of_bias(name))
        base = self_contained(self, unpark=False).base
        whole = tensors_from_base(self.spec.config, base).values()
        return adapter - twice + sum(numel(x) for x in whole)

    def _is_of_bias(self, name: str) -> bool:
        """Whether a copy comes from `bias` and not from modules_to_save."""
        module, _, leaf = name.rpartition(".")
        lora = self.spec.lora
        saved = lora is not None and any(module.endswith(n) for n in lora.modules_to_save)
        return leaf == "bias" and not saved

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line."""
        trainable, total = self.num_parameters(trainable=True), self.num_parameters()
        print(  # noqa: T201  api.md says that this one prints
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter as a PEFT folder. See `export.save_adapter`.

        One that counts from start factors is written as what it is over the untouched base: an
        adapter of twice the rank.
        """
        writing.save_adapter(self, Path(folder))

    def save_pretrained_merged(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        save_method: str = "merged_16bit",
        *,
        base: str | Path = "auto",
    ) -> merged.MergeReport | None:
        """Write a Hugging Face folder with the adapter folded in. See `saving.save_merged`.

        Args:
            folder: is made if need be.
            tokenizer: written beside the model.
            save_method: "merged_16bit", "merged_4bit" or "lora".
            base: of a model in 4 or 8 bits, what the adapter is added to: "original" (the matrices
                in 16 bits, from what `load` was given), their folder, "dequantized", or "auto":
                the original where it is still at hand.

        Returns:
            For a model in 4 or 8 bits, what was taken and the largest difference of logits between
            this model and the folder, read back; else None.
        """
        return merged.save_merged(self, folder, tokenizer, save_method, base)

    def push_to_hub(
        self, repo_id: str, *, token: str | None = None, private: bool | None = None
    ) -> None:
        """Upload the adapter's PEFT folder to the Hub."""
        writing.push_to_hub(self, repo_id, token=token, private=private)
