"""Adapters for mlx-lm. Oracle: its loader and its layers, written again with torch from
mlx_lm/tuner/utils.py and tuner/lora.py (ml-explore/mlx-lm@0367286); mlx itself needs a Mac."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_map

import fastlora
from fastlora.formats.mlx import save_mlx_adapter
from fastlora.models.names import tensors_from_base
from oracles.gguf_models import adapted, model_of


def modules_of(model) -> dict[str, torch.Tensor]:
    """Name of every module with a matrix, as mlx-lm's models have them -> the matrix."""
    block = {"mixtral": "block_sparse_moe"}.get(model.spec.config.model_type, "mlp")
    modules = {}
    for name, x in tensors_from_base(model.spec.config, model.base).items():
        if name.endswith("experts.gate_up_proj"):
            layer = name.partition(".mlp.")[0]
            gate, up = x.chunk(2, dim=1)
            modules[f"{layer}.{block}.switch_mlp.gate_proj"] = gate
            modules[f"{layer}.{block}.switch_mlp.up_proj"] = up
        elif name.endswith("experts.down_proj"):
            modules[f"{name.partition('.mlp.')[0]}.{block}.switch_mlp.down_proj"] = x
        elif x.dim() == 2:
            short = name.removesuffix(".weight")
            modules[
                short.replace(".mlp.gate", f".{block}.gate") if short.endswith(".gate") else short
            ] = x
    return modules


def load_adapters(modules, folder) -> dict[str, torch.Tensor]:
    """The matrices after `load_adapters`, fused. Each adapted module starts with a random A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    settings = config["lora_parameters"]
    assert config["fine_tune_type"] == "lora" and settings["dropout"] == 0.0
    layers = max(int(n.split(".")[2]) for n in modules if n.startswith("model.layers.")) + 1
    chosen = range(layers)[-max(config["num_layers"], 0) :]
    weights, fused = load_file(folder / "adapters.safetensors"), dict(modules)
    for name, w in modules.items():
        inside = name.split(".", 3)[3] if name.startswith("model.layers.") else None
        in_layer = inside in settings["keys"] and int(name.split(".")[2]) in chosen
        if not (in_layer or name in settings["keys"]):
            continue
        a, b = weights.pop(f"{name}.lora_a"), weights.pop(f"{name}.lora_b")
        r = settings["rank"]
        if w.dim() == 3:  # LoRASwitchLinear
            assert a.shape == (w.shape[0], r, w.shape[2]) and b.shape == (*w.shape[:2], r)
            fused[name] = w + settings["scale"] * b @ a
        else:  # LoRALinear
            assert a.shape == (w.shape[1], r) and b.shape == (r, w.shape[0])
            fused[name] = w + (settings["scale"] * b.T) @ a.T
    assert not weights, "strict=False would drop these in silence"
    return fused


@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama2", {}),
        ("qwen3", dict(use_rslora=True, rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 3.0})),
        ("smollm3", dict(layers_to_transform=[1, 3], init_lora_weights="pissa")),
        ("llama1", dict(target_modules=["q_proj", "lm_head"])),
        ("mixtral", dict(rank_pattern={"experts.down_proj": 2})),
        ("qwen3_moe", {}),
        ("phi3", {}),
    ],
)
def test_mlx_lm_computes_the_merged_matrices(family, settings, tmp_path):
    model = adapted(model_of(family, tmp_path / "base", 96), **settings)
    save_mlx_adapter(model, tmp_path / "mlx")
    base = modules_of(fastlora.load(tmp_path / "base", device="cpu")[0])
    found, expected = load_adapters(base, tmp_path / "mlx"), modules_of(fastlora.merge(model))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n], x, atol=1e-5) for n, x in expected.items())
    changed = [n for n, x in expected.items() if not torch.equal(x, base[n])]
    assert len(changed) == sum(len(t) for t in model.spec.lora.targets) + (
        2 * ("switch" in "".join(expected)) + ("lm_head" in changed)
    )


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    model = model_of("llama2", tmp_path / "base", 96)
    with pytest.raises(ValueError, match="use_dora"):
        save_mlx_adapter(fastlora.lora(model, r=2, use_dora=True), tmp_path / "mlx")
    merged = fastlora.merge(adapted(model))
    with pytest.raises(ValueError, match="not the checkpoint's"):
        save_mlx_adapter(adapted(merged), tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_only_an_adapter_of_the_same_format_is_replaced(tmp_path):
    """PEFT's adapter_config.json has the same name, and a model would be read with this config."""
    model = adapted(model_of("llama2", tmp_path / "base", 96))
    peft, mlx, merged = (tmp_path / name for name in ("peft", "mlx", "merged"))
    model.save_pretrained(peft)
    save_mlx_adapter(model, mlx)
    model.save_pretrained_merged(merged)
    save = lambda folder: save_mlx_adapter(model, folder)
    for write, folder in ((save, peft), (save, merged), (model.save_pretrained, mlx)):
        before = contents(folder)
        with pytest.raises(ValueError, match="holds files of another model"):
            write(folder)
        assert contents(folder) == before
    model.save_pretrained(peft)
    save(mlx)


def test_nan_is_refused(tmp_path):
    model = adapted(model_of("llama2", tmp_path / "base", 96))
    save_mlx_adapter(model, tmp_path / "mlx")
    before = contents(tmp_path / "mlx")
    broken = model.with_adapter(tree_map(lambda x: x * torch.nan, model.adapter))
    with pytest.raises(ValueError, match=r"NaN or infinity in:\s+model.layers.0.*lora_a"):
        save_mlx_adapter(broken, tmp_path / "mlx")
    assert contents(tmp_path / "mlx") == before


def test_an_adapter_that_cannot_be_merged_is_saved_by_peft(tmp_path):
    model = fastlora.lora(model_of("llama2", tmp_path / "base", 96), r=2, lora_bias=True)
    with pytest.raises(ValueError, match="cannot be merged") as refused:
        save_mlx_adapter(model, tmp_path / "mlx")
    assert "save_pretrained(folder)" in str(refused.value) and "Merge" not in str(refused.value)
