"""Runs a written GGUF file in llama.cpp, and compares it with the model."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.request import ProxyHandler, Request, build_opener

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora import functional
from fastlora.formats.gguf.metadata import context_length
from fastlora.formats.gguf.packages import engine_package
from fastlora.formats.gguf.report import Verification
from fastlora.models.config import LlamaConfig
from fastlora.models.params import Base
from fastlora.models.state import ModelState
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.quant.weights import Quantized
from fastlora.text.tokenizer import Tokenizer

# Tokens whose log-probabilities are compared at each position.
_LIKELIEST = 10
_NEW_TOKENS = 24
_CONTEXT = 128

_TEXTS = (
    "The rank of a matrix is the number of its independent rows.",
    "def add(a, b):\n    return a + b\n\n\nprint('it\\'s', 12 + 345)",
    "Don't you think so? 3.14159 ~ pi!",
)


def verify_model(model: ModelState, path: Path, tokenizer: Tokenizer) -> Verification:
    """Compare a merged file with the model that it was written from.

    Greedy continuations of three texts, 24 tokens each, and the ids of these texts.
    """
    rows = [tokenizer.encode(text) for text in _TEXTS]
    prompts, new = _that_fit(rows, model.spec.config)
    with Engine(path, context=_CONTEXT) as engine:
        found = [engine.continuation(ids, new) for ids in prompts]
        pairs = zip(_TEXTS, rows, strict=True)
        equal_texts = sum(engine.tokenize(text) == ids for text, ids in pairs)
    return _compared(model, prompts, found, len(_TEXTS), equal_texts)


def verify_adapter(model: ModelState, base: Path, adapter: Path) -> Verification:
    """Compare base file and adapter file together with the model: greedy continuations of ids."""
    prompts, new = _that_fit(_id_rows(model.spec.config), model.spec.config)
    with Engine(base, adapter, context=_CONTEXT) as engine:
        found = [engine.continuation(ids, new) for ids in prompts]
    return _compared(model, prompts, found, 0, 0)


def _that_fit(rows: Sequence[list[int]], config: LlamaConfig) -> tuple[list[list[int]], int]:
    """Prompts of at most half of the context of the file, and how many tokens to add."""
    room = min(context_length(config), _CONTEXT)
    prompts = [row[: room // 2] for row in rows]
    return prompts, min(_NEW_TOKENS, room - max(map(len, prompts)))


def _id_rows(config: LlamaConfig) -> list[list[int]]:
    """Two rows of ids, spread over the vocabulary."""
    step = 1_000_003
    return [[(k + step * i) % config.vocab_size for i in range(1, 13)] for k in (0, 7)]


# One at a time: of several, the server leaves out those whose bytes end inside a character.
_ONE_TOKEN = {
    "n_predict": 1,
    "temperature": 0.0,
    "n_probs": _LIKELIEST,
    "return_tokens": True,
    "cache_prompt": True,
}


class Engine:
    """llama.cpp's server on a port of this machine, in this process. Close it by `with`."""

    def __init__(self, model: Path, adapter: Path | None = None, *, context: int = 512) -> None:
        """Start it.

        Args:
            model: a GGUF file.
            adapter: a GGUF LoRA file.
            context: tokens of prompt and continuation together.

        Raises:
            RuntimeError: llama.cpp cannot load the files.
        """
        package = engine_package()
        params = package.CommonParams()
        params.model.path = str(model)
        if adapter is not None:
            params.lora_adapters = [package.CommonAdapterLoraInfo(str(adapter), 1.0)]
        params.n_ctx = context
        params.n_gpu_layers = 0
        params.cache_type_k = params.cache_type_v = package.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = package.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = params.ui = False
        for threads in (params.cpuparams, params.cpuparams_batch):
            threads.n_threads = torch.get_num_threads()
            threads.poll = 0  # threads that wait sleep
        params.verbosity = -1
        params.hostnames = ["127.0.0.1"]
        params.port = 0  # any that is free
        try:
            self._server: Any = package.Server(params)
        except RuntimeError as error:
            files = " with ".join(path.name for path in (model, adapter) if path is not None)
            raise RuntimeError(
                f"llama.cpp cannot load {files}: {error} Is its memory too small for the model?"
            ) from error

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self._server = None

    @property
    def address(self) -> str:
        """Of the HTTP server: "http://127.0.0.1:4711"."""
        return self._server.listening_address

    def post(self, path: str, body: Any) -> Any:
        """The reply of the HTTP server to a JSON body."""
        data = json.dumps(body).encode()
        request = Request(self.address + path, data, {"Content-Type": "application/json"})
        # A proxy of the environment would not reach this machine.
        with build_opener(ProxyHandler({})).open(request, timeout=600) as reply:
            return json.load(reply)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, with BOS if the file says so."""
        body = {"content": text, "add_special": True, "parse_special": True}
        return self.post("/tokenize", body)["tokens"]

    def continuation(self, prompt: Sequence[int], new: int) -> list[dict[int, float]]:
        """The greedy continuation: for each token the likeliest ids and their log-probabilities.

        The chosen id comes first; it is alone, with NaN, if its bytes end inside a character, for
        which the server gives no numbers.
        """
        found: list[dict[int, float]] = []
        while len(found) < new:
            ids = [*prompt, *(next(iter(token)) for token in found)]
            reply = self.post("/completion", {"prompt": ids, **_ONE_TOKEN})
            if not reply["tokens"]:
                break
            likeliest = [_likeliest(t) for t in reply.get("completion_probabilities", [])]
            found.append(likeliest[0] if likeliest else {reply["tokens"][0]: math.nan})
            if reply["stop_type"] == "eos":
                break
        return found


def _likeliest(token: dict[str, Any]) -> dict[int, float]:
    chosen = {token["id"]: token["logprob"]}
    return chosen | {t["id"]: t["logprob"] for t in token["top_logprobs"]}


@torch.no_grad()
def _compared(
    model: ModelState,
    prompts: Sequence[Sequence[int]],
    found: Sequence[Sequence[dict[int, float]]],
    texts: int,
    equal_texts: int,
) -> Verification:
    difference, equal, total = 0.0, 0, 0
    for prompt, tokens in zip(prompts, found, strict=True):
        chosen = [next(iter(t)) for t in tokens]
        logprobs = _logprobs(model, [*prompt, *chosen])[len(prompt) - 1 :]
        total += len(chosen)
        for row, token, wanted in zip(logprobs[:-1], tokens, chosen, strict=True):
            gaps = [abs(float(row[i]) - x) for i, x in token.items() if math.isfinite(x)]
            difference = max((difference, *gaps))
            if int(row.argmax()) != wanted:
                break
            equal += 1
    return Verification(
        logprob_difference=difference,
        equal_ids=equal,
        greedy_ids=total,
        texts=texts,
        equal_texts=equal_texts,
    )


def _logprobs(model: ModelState, ids: Sequence[int]) -> Tensor:
    """The model's log-probabilities [t, v] in float64, computed in float32 from its weights.

    In the model's own 16 bits, rounding would be most of the difference.
    """
    spec = replace(model.spec, compile=False)
    wide: Any = {k: x.float() for k, x in model.base.items() if isinstance(x, Tensor)}
    base = cast(Base, wide | {"layers": _Float32Layers(model.base["layers"])})
    row = torch.tensor([ids], device=model.base["norm"].device)
    logits = functional.forward(model.adapter, base, spec, row)[0]
    return logits.double().log_softmax(-1).cpu()


class _Float32Layers(Sequence):
    """The layers of a base tree; indexing gives one in float32, dequantised if it needs to be."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: Any) -> Any:
        wide = lambda x: x.float() if isinstance(x, Tensor) else dense(x, torch.float32)
        return tree_map(wide, self.layers[i], is_leaf=lambda x: isinstance(x, Quantized | Tensor))
