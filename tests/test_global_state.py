"""fastlora changes nothing that another library in the process could see, and torch's default dtype
and device change nothing in fastlora."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import fastlora
from fastlora import functional as FL
from fastlora import research
from fastlora.formats.mlx import save_mlx_adapter
from oracles.trees import same_bits

ROOT = Path(__file__).parents[1]

# One process for all verbs, import first; `state()` reads all that is watched, around each of them.
SCRIPT = """
import json, os, random, sys, tempfile, warnings
import numpy as np
import torch, torch._dynamo, torch._functorch.config, torch._inductor.config
from torch.utils._pytree import tree_leaves

def contents(config):
    return {k: repr(v) for k, v in config.get_config_copy().items()}

def state():
    random_states = (torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate())
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": [torch.is_autocast_enabled(d) for d in ("cpu", "cuda")],
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "sdp": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "random": random_states,
        "environ": dict(os.environ),
        "warnings": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "dynamo": contents(torch._dynamo.config),
        "functorch": contents(torch._functorch.config),
        "inductor": contents(torch._inductor.config),
        "hooks": (sys.excepthook, sys.displayhook),
        "cwd": os.getcwd(),
        "recursion": sys.getrecursionlimit(),
        "patched": (torch.nn.Linear.forward, torch.compile, torch.Tensor.__getattribute__),
    }

def changed(verb):
    before = state()
    verb()
    after = state()
    return [k for k in before if before[k] != after[k]]

def read():
    import fastlora
    return fastlora.load("demo", device="cpu")

def adapt():
    import fastlora
    model, tokenizer = read()
    return fastlora.lora(model, r=2, lora_dropout=0.1, recompute="full"), tokenizer

def batch(tokenizer):
    ids = torch.tensor([tokenizer.encode("def add(a, b): return a + b")])
    return {"input_ids": ids, "labels": ids}

def differentiate():
    import fastlora
    model, tokenizer = adapt()
    fn = fastlora.value_and_grad(fastlora.functional.loss)
    return fn(model.adapter, model.base, model.spec, batch(tokenizer), seed=1)

def importing():
    import fastlora

def loading():
    read()

def adapting():
    adapt()

def gradients():
    differentiate()

def compiling():
    model, tokenizer = adapt()
    model.with_spec(compile=True).loss(batch(tokenizer))

def training():
    import fastlora
    model, tokenizer = adapt()
    rows = [{"text": "def add(a, b): return a + b"}] * 4
    with tempfile.TemporaryDirectory() as folder:
        how = dict(max_steps=2, batch_size=2, save_every=1, progress=False)
        fastlora.train(model, tokenizer, rows, output_dir=folder, **how)

def generating():
    model, tokenizer = read()
    model.generate_text(tokenizer, "def", max_new_tokens=4, temperature=1.0, seed=1)
    model.generate_text(tokenizer, "def", max_new_tokens=4, temperature=1.0)

def saving():
    import fastlora
    model, tokenizer = adapt()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder + "/adapter")
        model.save_pretrained_merged(folder + "/merged", tokenizer)
        fastlora.load_adapter(read()[0], folder + "/adapter")
    fastlora.merge(model)

def refusing():
    import fastlora
    try:
        fastlora.load("/nowhere/at/all", local_files_only=True)
    except (ValueError, OSError):
        pass

torch.manual_seed(1), np.random.seed(2), random.seed(3)
"""

VERBS = [
    "importing",
    "loading",
    "adapting",
    "gradients",
    "training",
    "generating",
    "saving",
    "refusing",
]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def changes() -> dict[str, list[str]]:
    """What each verb changed, by name."""
    return json.loads(
        run(f"print(json.dumps({{v.__name__: changed(v) for v in ({', '.join(VERBS)})}}))")
    )


@pytest.mark.parametrize("verb", VERBS)
def test_global_state_is_the_same_before_and_after(verb, changes):
    assert changes[verb] == []


@pytest.mark.compile
def test_compiling_a_region_does_not_change_global_state():
    """What torch leaves behind at a process's first compilation (a cache folder in os.environ, a
    higher recursion limit where it is not from the cache) is torch's: something else compiles
    first."""
    how = "options={'fx_graph_cache': False}"
    first = f"torch.compile(lambda x: x + 1, {how})(torch.ones(2)); loading()"
    assert run(f"{first}; print(changed(compiling))") == "[]"


CHANGES = {
    "random": "torch.manual_seed(9)",
    "environ": "os.environ.update(X='1')",
    "warnings": "warnings.simplefilter('error')",
    "dynamo": "setattr(torch._dynamo.config, 'recompile_limit', 99)",
    "dtype": "torch.set_default_dtype(torch.float64)",
}


def test_the_watch_sees_a_change():
    seen = "".join(f"+ changed(lambda: {change})" for change in CHANGES.values())
    assert json.loads(run(f"print(json.dumps([] {seen}))")) == list(CHANGES)


# ── torch's default dtype and device ──────────────────────────────────────────────────────


@contextmanager
def default(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def quantises() -> bool:
    """Whether fastlora quantises to 4 bits under this default dtype of torch."""
    return torch.get_default_dtype() == torch.float32


def initial_adapters(base) -> list[Any]:
    """Adapters of all kinds that draw random numbers."""
    inits = [False, True, "gaussian", "orthogonal", "pissa_niter_2"]
    models = [fastlora.lora(base, r=2, init_lora_weights=init) for init in inits]
    edges = dict(target_modules=["q_proj", "embed_tokens"])
    models += [fastlora.lora(base, r=2, init_lora_weights=init, **edges) for init in (True, False)]
    biased = dict(lora_bias=True, target_modules=["q_proj"])
    models.append(fastlora.lora(base, r=2, init_lora_weights=False, **biased))
    if quantises():  # the last one
        models.append(fastlora.lora(base, r=2, init_lora_weights="loftq"))
    return [(model.adapter, model.base) for model in models]


def written(folder: Path) -> dict[str, bytes]:
    return {
        str(x.relative_to(folder)): x.read_bytes() for x in sorted(folder.rglob("*.safetensors"))
    }


def results(folder: Path) -> dict[str, Any]:
    """The results of public functions, by name."""
    ids = torch.tensor([[1, 5, 9, 11], [3, 4, 5, 6]], device="cpu")
    batch = {"input_ids": ids, "labels": ids}
    base, tokenizer = fastlora.load("demo", max_seq_length=64, dtype="float32", device="cpu")
    model = fastlora.lora(base, r=2, lora_dropout=0.1)
    model = model.with_adapter(tree_map(lambda x: x + 0.01, model.adapter))
    rows, how = [{"text": "def add(a, b): return a + b"}] * 4, dict(progress=False, batch_size=2)
    args = (model.adapter, model.base, model.spec, batch)
    loss = lambda adapter: FL.loss(adapter, *args[1:])
    values = lambda adapter, batch: FL.row_losses(adapter, *args[1:3], batch)[0]
    sketch = fastlora.Sketch(8)
    found: dict[str, Any] = {"base": base.base}
    found |= {f"adapter {i}": x for i, x in enumerate(initial_adapters(base))}
    found["loss"] = fastlora.value_and_grad(FL.loss)(*args, seed=1)
    found["sketches"] = fastlora.value_and_grad(values, per_example=sketch)(model.adapter, batch)
    sampling = dict(max_new_tokens=4, temperature=1.0, seed=1, repetition_penalty=1.1)
    found["generate"] = model.generate(ids, return_logprobs=True, **sampling)
    many = fastlora.generate_many(model, [[1, 2], [3]], max_new_tokens=3)
    found["generate_many"] = torch.tensor([x.ids for x in many], device="cpu")
    dare = dict(method="dare_ties", density=0.5, seed=1)
    found["combine"] = fastlora.combine([model, model], [0.5, 0.2], **dare).adapter
    fresh = fastlora.lora(base, r=2)
    lora_ga = dict(method="lora_ga", direction="random")
    found["initialize"] = fastlora.initialize(fresh, [batch], **lora_ga).adapter
    first = dict(max_steps=1, save_every=1, eval_data=rows, eval_every=1, output_dir=folder / "run")
    trained, _ = fastlora.train(model, tokenizer, rows, **how, **first)
    both, _ = fastlora.train([model, model], tokenizer, rows, max_steps=1, **how)
    private = dict(clip_per_example=1.0, noise_multiplier=1.0, packing=False, max_steps=1)
    noisy, _ = fastlora.train(fresh, tokenizer, rows, **how, **private)
    found["train"] = [x.adapter for x in (trained, *both, noisy)]
    points = research.training_points(model, folder / "run")
    found["influence"] = research.influence(values, points, [batch], [batch], method="tracin")
    product = research.hvp(loss, model.adapter)
    operator = research.as_linear_operator(product, model.adapter)
    found["product"] = torch.from_numpy(operator.matvec(np.ones(operator.shape[0])))
    return found | reread(model, base, tokenizer, folder)


def reread(model, base, tokenizer, folder: Path) -> dict[str, Any]:
    """Write folders, and read some of them."""
    model.save_pretrained(folder / "adapter")
    model.save_pretrained_merged(folder / "merged", tokenizer)
    save_mlx_adapter(model, folder / "mlx")
    found = {"read": fastlora.load_adapter(base, folder / "adapter").adapter}
    if quantises():
        model.save_pretrained_merged(folder / "4 bits", save_method="merged_4bit")
        found["quantize"] = fastlora.quantize(base).base
    return found


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> tuple[dict[str, Any], dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("usual")
    return results(folder), written(folder)


@pytest.mark.filterwarnings("ignore:the noise", "ignore:seed")
@pytest.mark.parametrize(
    "changed",
    [dict(dtype=torch.float64), dict(dtype=torch.bfloat16), dict(dtype=torch.float16),
     dict(device="meta")],
    ids=lambda changed: str(*changed.values()),
)  # fmt: skip
def test_the_default_dtype_and_device_change_no_bits(changed, usual, tmp_path):
    with default(**changed):
        found = results(tmp_path)
        if not quantises():
            with pytest.raises(RuntimeError, match="torch's default dtype"):
                fastlora.load("demo", load_in_4bit=True, device="cpu")
    for name, value in found.items():
        assert same_bits(usual[0][name], value), name
    files = written(tmp_path)
    assert {name: usual[1][name] for name in files} == files


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_folders_in_4_bits_are_read_under_every_default_dtype(dtype, quantised_folder):
    folder = quantised_folder("nf4 nested", torch.bfloat16)
    usual = fastlora.load(folder, device="cpu")[0].base
    with default(dtype=dtype):
        assert same_bits(fastlora.load(folder, device="cpu")[0].base, usual)
