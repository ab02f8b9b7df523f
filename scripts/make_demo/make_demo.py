"""Make the demo: a Llama of 3.5 million parameters, trained on Python's standard library.

    python scripts/make_demo/make_demo.py data                # tokenizer, rows, config, tokens
    python scripts/make_demo/make_demo.py train --out DIR     # base training: minutes on one GPU

`data` splits the library by module (demo_data.py) and writes the training tokens to .carry/*.bin.
`train` trains every parameter with fastlora's functions and writes a Hugging Face folder; copy its
model.safetensors to fastlora/checkpoints/demo. The base model reads source text only: no chat rows
and no held-out module.

The shipped model has 3,541,824 parameters in 7 layers. It was trained with --epochs 12 on CPython
3.11.7 (9.0 MB, 2.46 million tokens), which took 30 s on one H200, and has a held-out loss of 3.00
nats per token. More epochs overfit: 20 gave 3.36 and 32 gave 3.32.
"""

import argparse
import math
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from demo_data import BOS, END, PAD, SPECIAL_TOKENS, VOCAB_SIZE, write_data
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastlora import functional as FL
from fastlora.checkpoints.tensors import write_json, write_safetensors
from fastlora.models.config import LlamaConfig
from fastlora.models.config_json import config_from_json
from fastlora.models.names import base_from_tensors, base_tensors, tensors_from_base
from fastlora.models.params import Base
from fastlora.models.spec import Spec
from fastlora.runtime.compiled import Compile
from fastlora.runtime.gradients import value_and_grad

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "fastlora" / "checkpoints" / "demo"
TOKENS = ROOT / ".carry"  # git-ignored

TOKEN_IDS = {
    f"{name}_token_id": SPECIAL_TOKENS.index(token)
    for name, token in (("bos", BOS), ("eos", END), ("pad", PAD))
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    **TOKEN_IDS,
    "dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one base training. With 2.5 million tokens, tune the number of epochs first."""

    epochs: float
    learning_rate: float = 2e-3  # after the warm-up; then a cosine to a tenth of it
    warmup: float = 0.05  # share of the run
    weight_decay: float = 0.1  # matrices only, not norms
    batch_size: int = 64  # sequences per step
    length: int = 512  # tokens per sequence
    eval_every: int = 50  # steps
    compile: Compile = "auto"
    seed: int = 3407


class Trained(NamedTuple):
    heldout: float  # nats per token
    base: Base


def train(out: Path, tokens: Path, recipes: list[Recipe], minutes: float) -> None:
    """Train once per recipe, in `minutes` altogether; save the best weights of all in `out`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_from_json(CONFIG)
    data = {n: _read_tokens(tokens / f"demo_{n}.bin", device) for n in ("train", "heldout")}
    n = sum(math.prod(shape) for shape in base_tensors(config).values())
    print(f"{n:,} parameters, {len(data['train']):,} tokens, {device}, torch {torch.__version__}")
    out.mkdir(parents=True, exist_ok=True)
    for path in DEMO.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, out)
    end, best = time.monotonic() + 60 * minutes, math.inf
    for i, recipe in enumerate(recipes):
        seconds = (end - time.monotonic()) / (len(recipes) - i)
        for trained in train_once(config, recipe, data["train"], data["heldout"], seconds):
            if trained.heldout < best:
                best = trained.heldout
                tensors = tensors_from_base(config, trained.base)
                half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
                write_safetensors(out / "model.safetensors", half)
    print(f"best held-out loss {best:.4f} nats per token, in {out}")


def train_once(
    config: LlamaConfig,
    recipe: Recipe,
    tokens: Int[Tensor, "n"],
    heldout: Int[Tensor, "m"],
    seconds: float,
) -> Iterator[Trained]:
    """Yield at every evaluation. The run stops after the epochs or after `seconds`."""
    spec = Spec(
        config=config,
        name_or_path="demo",
        max_seq_length=recipe.length,
        recompute="none",
        compile=recipe.compile,
    )
    # Master weights are float32 and the model computes in bfloat16; gradients pass the cast.
    loss = lambda base, batch: FL.loss(None, _compute(base), spec, batch)
    generator = torch.Generator().manual_seed(recipe.seed)
    base = tree_map(lambda x: x.to(tokens.device), initial_base(config, generator))
    leaves = tree_leaves(base)
    optimizer = _optimizer(leaves, recipe)
    steps = math.ceil(recipe.epochs * len(tokens) / (recipe.batch_size * recipe.length))
    start, step, progress = time.monotonic(), 0, 0.0
    print(f"{recipe}\n  step  learning rate  train  held-out  seconds")
    while progress < 1:
        progress = max((step + 1) / steps, (time.monotonic() - start) / seconds)
        rate = learning_rate(recipe, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        value, grads = value_and_grad(loss)(base, draw(tokens, recipe, generator))
        for leaf, grad in zip(leaves, tree_leaves(grads), strict=True):
            leaf.grad = grad
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        step += 1
        if step % recipe.eval_every == 0 or progress >= 1:
            trained = Trained(evaluate(base, spec, heldout, recipe), base)
            taken = time.monotonic() - start
            print(f"{step:6} {rate:14.2e} {value:6.3f} {trained.heldout:9.4f} {taken:8.1f}")
            yield trained


def initial_base(config: LlamaConfig, generator: torch.Generator) -> Base:
    """GPT-2's initialisation: N(0, 0.02); o_proj and down_proj are divided by sqrt(2 x layers)."""
    depth = 1 / math.sqrt(2 * config.num_hidden_layers)
    tensors = {}
    for name, shape in base_tensors(config).items():
        std = 0.02 * (depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
        is_norm = len(shape) == 1
        tensors[name] = (
            torch.ones(shape) if is_norm else std * torch.randn(shape, generator=generator)
        )
    return base_from_tensors(config, tensors)


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it; progress in (0, 1]."""
    if progress < recipe.warmup:
        return recipe.learning_rate * progress / recipe.warmup
    cosine = math.cos(math.pi * min(1, (progress - recipe.warmup) / (1 - recipe.warmup)))
    return recipe.learning_rate * (0.55 + 0.45 * cosine)


def draw(tokens: Int[Tensor, "n"], recipe: Recipe, generator: torch.Generator) -> dict[str, Tensor]:
    """A batch of windows at random positions, so that each epoch cuts the text differently."""
    last = len(tokens) - recipe.length
    starts = torch.randint(last + 1, (recipe.batch_size, 1), generator=generator)
    window = (starts + torch.arange(recipe.length)).to(tokens.device)
    return {"input_ids": tokens[window], "labels": tokens[window]}


@torch.no_grad()
def evaluate(base: Base, spec: Spec, heldout: Int[Tensor, "m"], recipe: Recipe) -> float:
    """Held-out loss in nats per token.

    Only full batches count, which leaves out the last 5 %: another shape would compile again.
    """
    size = recipe.batch_size * recipe.length
    batches = heldout[: len(heldout) // size * size].view(-1, recipe.batch_size, recipe.length)
    weights = _compute(base)
    losses = [FL.loss(None, weights, spec, {"input_ids": x, "labels": x}) for x in batches]
    return torch.stack(losses).mean().item()


def _compute(base: Base) -> Base:
    """The weights in bfloat16 on a GPU, and in float32 on a CPU, where that is usually faster."""
    dtype = torch.bfloat16 if base["norm"].is_cuda else torch.float32
    return tree_map(lambda x: x.to(dtype), base)


def _optimizer(leaves: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    groups = [
        {"params": [x for x in leaves if x.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [x for x in leaves if x.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def _read_tokens(path: Path, device: torch.device) -> Int[Tensor, "n"]:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64)).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("data", "train"))
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--tokens", type=Path, default=TOKENS)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--epochs", type=float, nargs="+", default=[12.0, 20.0, 32.0])
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--length", type=int, default=Recipe.length)
    parser.add_argument("--eval-every", type=int, default=Recipe.eval_every)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default="auto")
    given = parser.parse_args()
    if given.what == "data":
        write_data(given.stdlib, DEMO, given.tokens)
        write_json(DEMO / "config.json", CONFIG)
        write_json(DEMO / "generation_config.json", TOKEN_IDS)
        return
    if not (given.tokens / "demo_train.bin").is_file():
        parser.error(f"{given.tokens} has no demo_train.bin; run `make_demo.py data` first")
    recipes = [
        Recipe(
            epochs=epochs,
            learning_rate=given.learning_rate,
            batch_size=given.batch_size,
            length=given.length,
            eval_every=given.eval_every,
            compile=given.compile,
        )
        for epochs in given.epochs
    ]
    train(given.out, given.tokens, recipes, given.minutes)


if __name__ == "__main__":
    main()
