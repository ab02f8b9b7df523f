"""Model: what users hold. Its methods check their arguments and call the wings below."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora import functional
from fastlora.adapters.edits.combining import disable
from fastlora.arguments import FLAG, FUNCTION, PATH, TEXT, check_arguments, optional, settings_from
from fastlora.checkpoints.hub import REPO_ID
from fastlora.errors import raise_problems
from fastlora.formats import merged
from fastlora.formats.gguf.methods import GGUFMethods
from fastlora.formats.peft import writing
from fastlora.generation.generate import check_generation, generate, stop_ids
from fastlora.generation.sampling import Sampling
from fastlora.generation.text import PROMPT, continuation
from fastlora.models.capture_checks import prepared_inputs
from fastlora.models.graph_input import requires_grad
from fastlora.models.input_checks import check_adapter, check_batch, check_inputs, spec_problems
from fastlora.models.moving import moved
from fastlora.models.parameter_count import count_parameters, parameter_line
from fastlora.models.params import Adapter
from fastlora.models.spec import Recompute
from fastlora.models.state import Batch, Seed
from fastlora.ops.dispatch import Kernels, transforms_active
from fastlora.runtime.compiled import Compile
from fastlora.runtime.devices import device_problem
from fastlora.text.tokenizer import TOKENIZER, Tokenizer

_UNCHANGED: Any = object()  # default of settings for which None, False and "auto" are values


# eq=False: == on tensors gives a tensor and no bool, and comparing two 8B bases reads 32 GB.
@dataclass(frozen=True, eq=False, kw_only=True)
class Model(GGUFMethods):
    """A frozen base, an optional adapter, and the spec that says how to run them.

    `fastlora.load` makes one. Immutable: no method changes its receiver, and methods that seem to
    change something return another Model over the same tensors. Only the adapter is ever trained.
    """

    def with_adapter(self, adapter: Adapter | None) -> "Model":
        """The model with other adapter tensors of the same shapes; with None, the base model.

        Raises:
            ValueError: the model has no adapter, or the tree, a shape or the kind of a dtype
                differs from its adapter's.
        """
        if adapter is None:
            return disable(self)
        check_adapter(self.adapter, adapter)
        return dataclasses.replace(self, adapter=adapter)

    def with_spec(
        self,
        *,
        recompute: Recompute = _UNCHANGED,
        compile: Compile = _UNCHANGED,
        kernels: Kernels = _UNCHANGED,
        deterministic: bool = _UNCHANGED,
    ) -> "Model":
        """The model with the same tensors and other settings of how to run it.

        Args:
            recompute: "none", "selective", "full", "offload" or a number in [0, 1].
            compile: "auto" (on CUDA), True or False.
            kernels: "auto" (Triton kernels on CUDA), "torch" (none), or "triton" (always, on the
                CPU only with TRITON_INTERPRET=1).
            deterministic: True gives the same bits in every run. On CUDA, in 16 bits with heads of
                64 or 128, attention on long unpacked rows takes up to a third longer; with other
                dtypes or heads attention is about ten times slower.

        Raises:
            ValueError: a setting has another value, or Triton kernels cannot run here.
        """
        given = dict(
            recompute=recompute, compile=compile, kernels=kernels, deterministic=deterministic
        )
        changed = {name: value for name, value in given.items() if value is not _UNCHANGED}
        problems = spec_problems(changed, self.base["norm"].device)
        raise_problems(ValueError, "with_spec cannot do this:", problems)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, **changed))

    def to(self, device: torch.device | str) -> "Model":
        """The model on another device. Tensors that are there already are shared, not copied.

        Raises:
            ValueError: not a device of this machine.
        """
        problem = device_problem(device)
        raise_problems(ValueError, "Model.to cannot do this:", [problem] if problem else [])
        return moved(self, device)

    def for_training(self) -> "Model":
        """A model whose adapter leaves require gradients, so that `model(...)` records history.

        The leaves are new tensor objects over the same memory: an optimizer that updates them in
        place changes the given model's adapter too. `train` and `value_and_grad` do not need this.
        """
        return self._map_adapter(lambda x: x.detach().requires_grad_())

    def for_inference(self) -> "Model":
        """A model that records no autograd history."""
        return self._map_adapter(lambda x: x.detach())

    def _map_adapter(self, fn: Callable[[Tensor], Tensor]) -> "Model":
        adapter = None if self.adapter is None else tree_map(fn, self.adapter)
        return dataclasses.replace(self, adapter=adapter)

    def __call__(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        *,
        attention_mask: Int[Tensor, "b t"] | None = None,
        position_ids: Int[Tensor, "#b t"] | None = None,
        segment_ids: Int[Tensor, "b t"] | None = None,
        seed: Seed = None,
        capture: Sequence[str] | None = None,
        add: functional.Added | None = None,
        inputs_embeds: functional.Embeds | None = None,
    ) -> Any:  # Float[Tensor, "b t v"]; with capture a pair
        """Logits, in the base's dtype; with `capture` a pair. See `functional.forward`.

        Args:
            input_ids: int64 in [0, v); None with inputs_embeds.
            attention_mask: 1 = real token, 0 = padding, left or right.
            position_ids: None counts real tokens, from 0 in each segment.
            segment_ids: packed documents; attention is causal within a run of equal ids.
            seed: of LoRA dropout; None applies no dropout.
            capture: names of intermediate tensors to return, as in `functional.forward`.
            add: tensors to add to intermediate ones, such as steering vectors.
            inputs_embeds: the input of the first layer, in place of embedded input_ids.

        Raises:
            ValueError: a wrong type, shape or dtype, an id outside the vocabulary, or an input
                longer than `spec.max_seq_length`.
        """
        places: dict[str, Any] = dict(capture=capture, add=add, inputs_embeds=inputs_embeds)
        inputs: dict[str, Any] = dict(input_ids=input_ids, attention_mask=attention_mask)
        inputs |= dict(position_ids=position_ids, segment_ids=segment_ids)
        check_inputs(self, *prepared_inputs(self.base, self.spec, inputs, **places))
        with self._history(places):
            inputs |= places
            return functional.forward(self.adapter, self.base, self.spec, **inputs, seed=seed)

    def loss(self, batch: Batch, *, seed: Seed = None) -> Float[Tensor, ""]:
        """Mean of -log p over labels != -100. See `functional.loss`.

        Args:
            batch: input_ids and labels [b, t]; optional attention_mask, position_ids, segment_ids.
            seed: of LoRA dropout; None applies no dropout.

        Raises:
            ValueError: as `__call__`, and for missing or unknown entries of the batch.
        """
        check_batch(self, batch)
        with self._history({}):
            return functional.loss(self.adapter, self.base, self.spec, batch, seed=seed)

    def _history(self, places: dict[str, Any]) -> torch.set_grad_enabled:
        # In grad mode the layers save activations, which is waste if nothing needs a gradient.
        needed = transforms_active() or requires_grad((self.adapter, self.base, places))
        return torch.set_grad_enabled(torch.is_grad_enabled() and needed)

    def generate(
        self,
        input_ids: Int[Tensor, "b t"],
        *,
        attention_mask: Int[Tensor, "b t"] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | Sequence[int] | None = None,
        stream: Callable[[Int[Tensor, "b"]], Any] | None = None,
        adapter_ids: Sequence[int] | Int[Tensor, "b"] | None = None,
        return_logprobs: bool = False,
        add: functional.Added | None = None,
    ) -> Int[Tensor, "b t_new"] | Any:  # with return_logprobs a pair
        """Prompt and continuation [b, t + new] with new <= max_new_tokens, int64.

        A row that has stopped is filled with the config's pad_token_id, or else the first stop id.
        With `return_logprobs` also the log-probabilities of the new tokens, [b, new] in float32:
        of the model's own logits, and 0 where a row is filled.

        Args:
            input_ids: prompts; shorter ones are padded on the left.
            attention_mask: 1 = real token; None means all are.
            max_new_tokens: tokens to add at most.
            temperature: 0 always takes the likeliest token.
            top_k: sample among the k likeliest tokens only.
            top_p: sample among the likeliest tokens that together reach this probability.
            min_p: sample among tokens with at least this share of the likeliest one's probability.
            repetition_penalty: makes ids already seen less likely; 1 changes nothing.
            eos_token_id: ids that stop a row; None uses the checkpoint's, () stops no row.
            seed: of the sampling, one for all rows or one for each; None draws fresh entropy.
            stream: called for every new token with that of each row, up to 16 tokens late.
            adapter_ids: the number of each row's adapter, if model.adapter is a stack.
            return_logprobs: whether to return log-probabilities too.
            add: name of a place, as in `functional.forward` -> a vector that is added there at
                every position of prompt and continuation.

        Raises:
            ValueError: as `__call__`; also if prompt and new tokens exceed `spec.max_seq_length`,
                a prompt is padded on the right, or a setting is out of range.
            FloatingPointError: the model gives NaN or infinity; names a tensor that holds one.
        """
        sampling = settings_from(Sampling, locals())
        # First, because the checks of generation read the shape of input_ids.
        check_inputs(self, {"input_ids": input_ids, "attention_mask": attention_mask})
        inputs = (self, input_ids, attention_mask)
        extra = (seed, stream, adapter_ids, return_logprobs, add)
        check_generation(*inputs, max_new_tokens, sampling, eos_token_id, *extra)
        stop = stop_ids(eos_token_id, self.spec.config.eos_token_id)
        ids, logprobs = generate(*inputs, max_new_tokens, sampling, stop, *extra)
        return ids if logprobs is None else (ids, logprobs)

    def generate_text(
        self,
        tokenizer: Tokenizer,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        stream: Callable[[str], Any] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        **settings: Any,
    ) -> str:
        """The continuation of a text, or the reply to a chat, without the prompt.

        Args:
            tokenizer: the model's.
            prompt: a text (BOS is not added twice), or a list of messages with role and content.
            stream: called with pieces of text that join to the result.
            eos_token_id: ids that stop; None: the checkpoint's, tokenizer's and chat template's.
            settings: as for `generate`, without return_logprobs.

        Raises:
            ValueError: as `generate`; also if the prompt has no token, its chat template fails, or
                return_logprobs is given.
        """
        rules = dict(
            tokenizer=(tokenizer, TOKENIZER), prompt=(prompt, PROMPT),
            stream=(stream, optional(FUNCTION)),
        )  # fmt: skip
        check_arguments("Model.generate_text", **rules)
        settings["eos_token_id"] = eos_token_id
        return continuation(self, self.generate, tokenizer, prompt, stream, settings)

    def num_parameters(self, trainable: bool = False) -> int:
        """Number of parameters of base and adapter together, or of the adapter alone.

        The numbers are PEFT's: a quantised matrix counts the elements that it approximates.
        """
        check_arguments("Model.num_parameters", trainable=(trainable, FLAG))
        return count_parameters(self)[0 if trainable else 1]

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line: trainable parameters, all parameters, and their ratio."""
        print(parameter_line(self))  # noqa: T201  printing is what this method is for

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter as a PEFT folder, which PEFT loads over the untouched checkpoint.

        An adapter with an initial offset (PiSSA and others) is written at twice its rank, with the
        offset folded in.

        Raises:
            ValueError: before any file is written, if the model has no adapter, a tensor holds NaN
                or infinity, the base is not the checkpoint's (after `merge`), or `folder` is not a
                path, is a file, or is the base model's folder.
            PermissionError: the folder cannot be written to.
        """
        check_arguments("Model.save_pretrained", folder=(folder, PATH))
        writing.save_adapter(self, folder)

    def save_pretrained_merged(
        self,
        folder: str | os.PathLike[str],
        tokenizer: Tokenizer | None = None,
        save_method: str = "merged_16bit",
        *,
        base: str | os.PathLike[str] = "auto",
    ) -> merged.MergeReport | None:
        """Write a Hugging Face folder with the adapter merged into the base weights.

        Args:
            folder: created if it does not exist.
            tokenizer: written next to the model; None writes none.
            save_method: "merged_16bit", "merged_4bit" or "lora".
            base: only for a model in 4 or 8 bits: the weights that the adapter is added to.
                "original": those in 16 bits, from what `load` was given; a folder that has them;
                "dequantized": those that the model computes with; "auto": the original ones if
                they can still be read.

        Returns:
            For a model in 4 or 8 bits, which weights were used, and the largest difference between
            the logits of this model and of the written folder. Otherwise None.

        Raises:
            ValueError: before any file is written, if an argument is wrong, a merged weight is NaN
                or infinite, or the folder must not be overwritten.
            FileNotFoundError: the original weights do not exist.
            CheckpointError: the original weights belong to another model.
            PermissionError: the folder cannot be written to.
        """
        check_arguments(
            "Model.save_pretrained_merged",
            folder=(folder, PATH),
            tokenizer=(tokenizer, optional(TOKENIZER)),
            save_method=(save_method, merged.SAVE_METHOD),
            base=(base, PATH),
        )
        return merged.save_merged(self, folder, tokenizer, save_method, base)

    def push_to_hub(
        self, repo_id: str, *, token: str | None = None, private: bool | None = None
    ) -> None:
        """Upload the adapter's PEFT folder to the Hub. The path of a local base is left out.

        Args:
            repo_id: "user/name"; created if it does not exist.
            token: Hub token; None uses the stored one.
            private: of a new repository; None is the account's default.

        Raises:
            ValueError, PermissionError, ConnectionError: as `peft.writing.push_to_hub`.
        """
        check_arguments(
            "Model.push_to_hub",
            repo_id=(repo_id, REPO_ID),
            token=(token, optional(TEXT)),
            private=(private, optional(FLAG)),
        )
        writing.push_to_hub(self, repo_id, token=token, private=private)
