"""load(): folders and settings that mean two things or nothing are refused by name."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from fastlora.errors import CheckpointError
from fastlora.loading import load
from faults import folders
from faults.case import tuned


def edit_json(path, **changed) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def small(tmp_path):
    """The fault suite's model and tokenizer, in tmp_path/base."""
    return folders.write_all(tmp_path) / "base"


def test_a_folder_with_the_weights_of_a_model_and_an_adapter_is_refused(tmp_path):
    base = small(tmp_path)
    tuned(load(base)[0]).save_pretrained(tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "adapter", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*adapter_model\.safetensors"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("scaling", "key"),
    [
        ({"rope_type": "linear", "factor": 2.0, "facter": 3.0}, "facter"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fats": 3.0}, "beta_fats"),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "low_freq_factor"),
        ({"rope_typ": "linear", "factor": 2.0}, "rope_typ"),
    ],
)
def test_keys_of_rope_scaling_that_mean_nothing_are_refused(tmp_path, scaling, key):
    with pytest.raises(ValueError, match=rf"rope_scaling has '{key}'"):
        load(small(tmp_path), rope_scaling=scaling)


def test_all_keys_of_rope_scaling_that_a_file_has_are_accepted(tmp_path):
    scaling = {"rope_type": "linear", "type": "linear", "factor": 2.0, "rope_theta": 5e4}
    scaling |= {"original_max_position_embeddings": 32}
    model, _ = load(small(tmp_path), rope_scaling=scaling)
    assert model.spec.config.rope_parameters.factor == 2.0


def test_too_many_layers_are_refused_by_the_field(tmp_path):
    base = small(tmp_path)
    edit_json(base / "config.json", num_hidden_layers=1001)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1001"):
        load(base)


def test_loading_in_4_bits_names_a_matrix_with_nan(tmp_path):
    base = small(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {k: x.clone() for k, x in load_file(base / "model.safetensors").items()}
    tensors[name].fill_(float("nan"))
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load(base, load_in_4bit=True)
    assert load(base)[0] is not None  # in 16 bits the weights are not looked at


def test_a_special_id_of_a_wrong_type_names_its_file(tmp_path):
    base = small(tmp_path)
    edit_json(base / "generation_config.json", pad_token_id="x")
    with pytest.raises(CheckpointError, match=r"pad_token_id in generation_config\.json is 'x'"):
        load(base)
