"""Model: the frozen value that users hold. Its methods call down; none changes its receiver."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from fastlora import export, functional, generation, saving
from fastlora.checks import raise_problems
from fastlora.combine import disable
from fastlora.functional import Batch, Seed
from fastlora.llama.decoder import requires_grad
from fastlora.llama.params import Adapter, Base, tensors_from_base
from fastlora.llama.spec import Compile, Kernels, Recompute, Spec, is_recompute
from fastlora.llama.start import equivalent, without_start
from fastlora.ops.dispatch import kernel_problem, transforms_active
from fastlora.ops.linear_cross_entropy import IGNORE
from fastlora.originals import originals_away
from fastlora.quantized import numel
from fastlora.tokenizer import Tokenizer

KEEP: Any = object()  # "as it was", for settings whose None, False and "auto" all mean something


@dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """A base, perhaps an adapter, and how to run them. Only `adapter`'s leaves are ever trained."""

    spec: Spec
    base: Base
    adapter: Adapter | None = None

    # ── another Model ─────────────────────────────────────────────────────────────────────

    def with_adapter(self, adapter: Adapter | None) -> "Model":
        """The same model with another adapter's tensors of the same shapes; None: the base.

        Raises:
            ValueError: if the tree, a shape or a dtype kind differs from the present adapter's.
        """
        if adapter is None:
            return disable(self)
        _check_adapter(self.adapter, adapter)
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
        problems = _spec_problems(changed, self.base["norm"].device)
        raise_problems(ValueError, "with_spec cannot do this:", problems)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, **changed))

    def to(self, device: torch.device | str) -> "Model":
        """The same model on another device; tensors already there are shared, not copied."""
        # Originals that wait in a file (lora's temporary_location) stay there.
        waiting = {id(x) for x in originals_away(self.base).values()}
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
        _check_inputs(self, {"input_ids": input_ids} | optional)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._records()):
            return functional.forward(
                self.adapter, self.base, self.spec, input_ids, seed=seed, **optional
            )

    def loss(self, batch: Batch, *, seed: Seed = None) -> Float[Tensor, ""]:
        """Mean of -log p over labels != -100. See `functional.loss`.

        Raises:
            ValueError: as `__call__`, and for missing or unknown entries of the batch.
        """
        _check_batch(self, batch)
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
        sampling = generation.Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty
        )
        _check_inputs(self, {"input_ids": input_ids, "attention_mask": attention_mask})
        _check_generation(self, input_ids, attention_mask, max_new_tokens, sampling)
        if eos_token_id is None:
            eos_token_id = self.spec.config.eos_token_id
        return generation.generate(
            self.adapter,
            self.base,
            self.spec,
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
        pieces = generation.TextStream(tokenizer.decode, stream)
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
        whole = tensors_from_base(self.spec.config, without_start(self.base)).values()
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
        spec, adapter = equivalent(self.spec, self.base, self.adapter)
        export.save_adapter(spec, self.base, adapter, Path(folder))

    def save_pretrained_merged(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        save_method: str = "merged_16bit",
        *,
        base: str | Path = "auto",
    ) -> saving.MergeReport | None:
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
        model = (self.spec, self.base, self.adapter)
        return saving.save_merged(*model, folder, tokenizer, save_method, base)

    def push_to_hub(
        self, repo_id: str, *, token: str | None = None, private: bool | None = None
    ) -> None:
        """Upload the adapter's PEFT folder to the Hub."""
        spec, adapter = equivalent(self.spec, self.base, self.adapter)
        export.push_to_hub(spec, self.base, adapter, repo_id, token=token, private=private)


# ── checks ────────────────────────────────────────────────────────────────────────────────


def _spec_problems(changed: dict[str, Any], device: torch.device) -> list[str]:
    """What is wrong with new values of recompute, compile, kernels and deterministic."""
    impossible = kernel_problem(device) if changed.get("kernels") == "triton" else None
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "recompute": (is_recompute, '"none", "selective", "full", "offload" or a number in [0, 1]'),
        "compile": (lambda x: x == "auto" or isinstance(x, bool), '"auto", True or False'),
        "kernels": (lambda x: x in ("auto", "torch", "triton"), '"auto", "torch" or "triton"'),
        "deterministic": (lambda x: isinstance(x, bool), "True or False"),
    }
    return [
        f"{name} must be {rules[name][1]}, got {value!r}"
        for name, value in changed.items()
        if not rules[name][0](value)
    ] + ([impossible] if impossible else [])


def _check_adapter(old: Adapter | None, new: Adapter) -> None:
    if old is None:
        raise ValueError(
            "this model has no LoRA spec; call fastlora.lora or fastlora.load_adapter."
        )
    old_leaves, old_structure = tree_flatten(old)
    new_leaves, new_structure = tree_flatten(new)
    if old_structure != new_structure:
        raise ValueError("with_adapter got a tree of another structure than model.adapter.")
    shapes = [
        f"leaf {i}: {tuple(n.shape)} {n.dtype}, expected {tuple(o.shape)} of a floating-point dtype"
        for i, (o, n) in enumerate(zip(old_leaves, new_leaves, strict=True))
        if n.shape != o.shape or not n.is_floating_point()
    ]
    raise_problems(ValueError, "with_adapter got tensors that do not fit model.adapter:", shapes)


def _check_inputs(model: Model, inputs: dict[str, Tensor | None]) -> None:
    """Shapes, dtypes, length and range of the [b, t] integer inputs of a forward pass."""
    ids = inputs["input_ids"]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids must be a non-empty int64 tensor [b, t], got {got}.")
    problems = [
        f"{name} must be an integer tensor {list(ids.shape)}, got {list(x.shape)} {x.dtype}"
        for name, x in inputs.items()
        if x is not None
        and (
            x.is_floating_point() or (x.shape != ids.shape and not _shared_positions(name, x, ids))
        )
    ]
    if ids.shape[1] > (longest := model.spec.max_seq_length):
        problems.append(
            f"input_ids has {ids.shape[1]} tokens a row; max_seq_length is {longest}. "
            "Load with a larger max_seq_length, or shorten the input: nothing is cut off in silence"
        )
    if (device := model.base["norm"].device) != ids.device:
        problems.append(f"input_ids is on {ids.device}, the model on {device}; move one of them")
    else:
        problems += _range_problems(model, inputs)
    raise_problems(ValueError, "the model cannot run this input:", problems)


def _shared_positions(name: str, x: Tensor, ids: Tensor) -> bool:
    return name == "position_ids" and x.shape == (1, ids.shape[1])


def _range_problems(model: Model, inputs: dict[str, Tensor | None]) -> list[str]:
    """Values that cannot be. Looks at them, so on CUDA it waits for the device."""
    if transforms_active() or torch.compiler.is_compiling():
        return []  # values are not to be looked at there
    v = model.spec.config.vocab_size
    rules: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
        "input_ids": (lambda x: (x < 0) | (x >= v), f"ids of the vocabulary [0, {v})"),
        "labels": (
            lambda x: ((x < 0) | (x >= v)) & (x != IGNORE),
            f"ids of the vocabulary [0, {v}), or {IGNORE}",
        ),
        "attention_mask": (lambda x: (x != 0) & (x != 1), "0 and 1"),
        "position_ids": (lambda x: x < 0, "0 or more"),
    }
    problems = []
    for name, (is_wrong, expected) in rules.items():
        if (x := inputs.get(name)) is not None and bool((wrong := is_wrong(x)).any()):
            values = sorted(set(x[wrong].tolist()))[:5]
            problems.append(f"{name} holds {values}; expected {expected}")
    return problems


def _check_batch(model: Model, batch: Batch) -> None:
    optional = ("attention_mask", "position_ids", "segment_ids")
    known = {"input_ids", "labels", *optional}
    problems = [f"missing {name}" for name in ("input_ids", "labels") if name not in batch]
    problems += [f"unknown entry {name!r}" for name in sorted(set(batch) - known)]
    raise_problems(ValueError, f"a batch is a dict of {sorted(known)}:", problems)
    _check_inputs(model, {k: batch.get(k) for k in ("input_ids", "labels", *optional)})


def _check_generation(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    sampling: generation.Sampling,
) -> None:
    problems = sampling.problems()
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        problems.append(f"max_new_tokens must be a whole number >= 1, got {max_new_tokens!r}")
    elif (total := input_ids.shape[1] + max_new_tokens) > model.spec.max_seq_length:
        problems.append(
            f"{input_ids.shape[1]} prompt tokens and max_new_tokens={max_new_tokens} make {total}; "
            f"max_seq_length is {model.spec.max_seq_length}"
        )
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        problems.append("a row ends in padding; pad prompts on the left, so that all end together")
    raise_problems(ValueError, "cannot generate:", problems)
