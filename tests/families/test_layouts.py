"""Three layouts, one model: what is read from any of them, and that every way round is the identity."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoints import native
from ldm.diffusion.schedules import ScheduleConfig, make_schedule
from ldm.errors import UserError
from ldm.families.convert import convert
from ldm.families.load import load, predicts_noise
from ldm.families.source import open_model

FAMILIES = ["sd1", "sd2", "inpainting", "sdxl", "sdxl-refiner"]
# What real single files carry beside the weights.
BURDEN = {
    "alphas_cumprod": torch.linspace(1, 0, 1000, dtype=torch.float64),
    "model_ema.decay": torch.tensor(0.5),
    "model_ema.num_updates": torch.tensor(3, dtype=torch.int32),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
    "cond_stage_model.model.logit_scale": torch.tensor(4.6),
    "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
}


def everything(path: Path) -> dict[str, Tensor]:
    """Every tensor under a path, by the file it is in."""
    if path.is_file():
        return load_file(path)
    return {f"{f.relative_to(path)}:{n}": v for f in path.rglob("*.safetensors") for n, v in load_file(f).items()}


def same(a: Path, b: Path) -> None:
    left, right = everything(a), everything(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(v, right[n]) and v.dtype == right[n].dtype for n, v in left.items())


def foreign(path: Path, out: Path) -> Path:
    """A single file as others write it: without our metadata, and with their burden."""
    tensors = load_file(path)
    roots = {".".join(name.split(".")[:3]) for name in tensors} | {"alphas_cumprod", "model_ema.decay"}
    roots |= {root.rsplit(".", 1)[0] + ".logit_scale" for root in roots}
    save_file(tensors | {name: v for name, v in BURDEN.items() if ".".join(name.split(".")[:3]) in roots}, out)
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_folder_to_all_and_back(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    convert(folders[name], tmp_path / "single", "compvis")
    convert(tmp_path / "single", tmp_path / "ours", "ldm")
    convert(tmp_path / "ours", tmp_path / "folder", "diffusers")
    same(folders[name], tmp_path / "folder")
    specs = []
    for path in (folders[name], tmp_path / "single", tmp_path / "ours", tmp_path / "folder"):
        with open_model(path) as source:
            source.check()
            specs.append(source.spec)
    assert specs[0] == specs[1] == specs[2] == specs[3]
    assert native.read_spec(tmp_path / "ours") == specs[0]


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_single_file_to_all_and_back(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    convert(folders[name], tmp_path / "written", "compvis", "fp16")
    single = foreign(tmp_path / "written", tmp_path / "single")
    convert(single, tmp_path / "folder", "diffusers")
    convert(tmp_path / "folder", tmp_path / "ours", "ldm")
    convert(tmp_path / "ours", tmp_path / "back", "compvis")
    same(single, tmp_path / "back")
    with open_model(single) as file, open_model(folders[name]) as folder:
        assert file.spec.backbone == folder.spec.backbone
        assert file.spec.autoencoder == folder.spec.autoencoder
        assert file.spec.text is not None and folder.spec.text is not None
        # A folder of SD 2 has lost the layer behind the one that is read; the same three layers in a file have not.
        assert replace(file.spec.text, layer=folder.spec.text.layer) == folder.spec.text
    ours, theirs = load(tmp_path / "ours", dtype=None), load(single, dtype=None)
    for prefix, module in ours.modules.items():
        other = theirs.modules[prefix].state_dict()
        assert all(torch.equal(v, other[n]) and v.dtype == torch.float16 for n, v in module.state_dict().items())


def test_a_layer_that_is_never_read_survives_a_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    """SD 2's single files have the last layer that its pipelines skip; a folder has no place for it."""
    with open_model(folders["sd2"]) as source:
        spec = source.spec
    assert spec.text is not None
    deeper = replace(spec, text=replace(spec.text, layers=4, layer=2))
    model = native.build(deeper)
    native.save(tmp_path / "ours", deeper, model.modules, "fp16")
    convert(tmp_path / "ours", tmp_path / "folder", "diffusers")
    assert json.loads((tmp_path / "folder/text_encoder/config.json").read_text())["num_hidden_layers"] == 3
    convert(tmp_path / "folder", tmp_path / "back", "ldm")
    same(tmp_path / "ours", tmp_path / "back")
    prompts, states = ["a red apple"], []
    for path in ("ours", "folder", "back"):
        conditioner = load(tmp_path / path).conditioner
        assert conditioner is not None
        states.append(conditioner(prompts).tokens)
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
    # Without the file beside it the folder is what it says: three layers, the last one read.
    (tmp_path / "folder/extra.safetensors").unlink()
    bare = load(tmp_path / "folder")
    assert bare.spec.text is not None and (bare.spec.text.layers, bare.spec.text.layer) == (3, 1)
    assert bare.conditioner is not None
    assert torch.allclose(bare.conditioner(prompts).tokens, states[0], atol=1e-6)


def test_config_json_has_the_last_word(folders: dict[str, Path], tmp_path: Path) -> None:
    convert(folders["sd1"], tmp_path / "folder", "diffusers")
    place = tmp_path / "folder/scheduler/scheduler_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"prediction_type": "v_prediction"}))
    assert load(tmp_path / "folder").spec.prediction == "v"


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder to change."""
    return Path(shutil.copytree(folders["sd1"], tmp_path / "folder"))


def test_shards_and_variants(folder: Path, folders: dict[str, Path]) -> None:
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-{i:05}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / "unet" / shard)
    placed = {name: shard for shard, part in shards.items() for name in part}
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    whole.unlink()
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    model, expected = load(folder), load(folders["sd1"])
    for prefix, module in model.modules.items():
        other = expected.modules[prefix].state_dict()
        assert all(torch.equal(value, other[n]) for n, value in module.state_dict().items())
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(UserError, match="does not list shards that lie beside it"):
        load(folder)


def test_older_names_of_the_vaes_attention(folder: Path, tmp_path: Path) -> None:
    place = folder / "vae/diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(place).items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        tensors[name] = value
    save_file(tensors, place)
    convert(folder, tmp_path / "ours", "ldm")
    convert(tmp_path / "ours", tmp_path / "back", "diffusers")
    same(folder, tmp_path / "back")


def change(folder: Path, place: str, **values: object) -> None:
    path = folder / place
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("place", "values", "message"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, "unet: act_fn 'gelu' is not known"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "unet: class_embed_type 'timestep' is not known"),
        ("unet/config.json", {"down_block_types": ["X", "DownBlock2D"]}, r"unet: down_block_types \['X'"),
        ("unet/config.json", {"block_out_channels": [32, 10**9]}, "block_out_channels|channels"),
        ("unet/config.json", {"layers_per_block": 10**9}, "res_blocks is 1000000000"),
        ("unet/config.json", {"block_out_channels": "wide"}, "block_out_channels is 'wide'"),
        ("unet/config.json", {"attention_head_dim": 7}, "not divisible by heads 7"),
        ("unet/config.json", {"cross_attention_dim": 48}, "misshapen"),
        ("unet/config.json", {"up_block_types": ["UpBlock2D"] * 2}, "unet: up_block_types .* is not known"),
        ("unet/config.json", {"layers_per_block": [1, 2]}, r"unet: layers_per_block \[1, 2\] is not known"),
        ("unet/config.json", {"cross_attention_dim": [64, 32]}, "unet: cross_attention_dim .* is not known"),
        ("unet/config.json", {"mid_block_type": "X"}, "unet: mid_block_type 'X' is not known"),
        ("unet/config.json", {"addition_embed_type": "image"}, "unet: addition_embed_type 'image' is not known"),
        ("vae/config.json", {"up_block_types": ["X", "X"]}, "vae: up_block_types .* is not known"),
        ("vae/config.json", {"use_post_quant_conv": False}, "vae: use_post_quant_conv False is not known"),
        ("vae/config.json", {"act_fn": "gelu"}, "vae: act_fn 'gelu' is not known"),
        ("vae/config.json", {"scaling_factor": 10**400}, "vae: scaling_factor 1000"),
        ("vae/config.json", {"latents_std": [0.0]}, "std"),
        ("vae/config.json", {"scaling_factor": 0}, "vae: scaling_factor 0"),
        ("vae/config.json", {"latent_channels": 8}, "misshapen"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "text_encoder: hidden_act 'relu'"),
        ("text_encoder/config.json", {"num_hidden_layers": 4}, "12 missing|missing"),
        ("scheduler/scheduler_config.json", {"prediction_type": "w"}, "prediction_type 'w'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "w"}, "beta_schedule 'w'"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 50}, "1000 training steps"),
        ("model_index.json", {"unet": None, "transformer": ["diffusers", "X"]}, "no family known here"),
    ],
)
def test_folders_that_are_refused(folder: Path, place: str, values: dict[str, object], message: str) -> None:
    change(folder, place, **values)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "what", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json", "unet"]
)
def test_a_part_that_is_missing_is_named(folder: Path, what: str) -> None:
    place = folder / what
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(UserError, match=what.split("/")[0]):
        load(folder)


def test_the_tokenizer_says_how_to_pad(folder: Path) -> None:
    assert load(folder).spec.text.pad == "end"  # type: ignore[union-attr]
    change(folder, "tokenizer/special_tokens_map.json", pad_token={"content": "!"})
    assert load(folder).spec.text.pad == "zero"  # type: ignore[union-attr]


def test_another_tokenizer_is_refused(folder: Path) -> None:
    change(folder, "tokenizer/vocab.json", **{"<|endoftext|>": 3})
    with pytest.raises(UserError, match="tokenizer: its vocabulary is not CLIP's 1000 words"):
        load(folder)


def test_settings_of_a_scheduler(folder: Path) -> None:
    place = "scheduler/scheduler_config.json"
    change(
        folder, place, prediction_type="v_prediction", rescale_betas_zero_snr=True, _class_name="EulerDiscreteScheduler"
    )
    spec = load(folder).spec
    assert (spec.prediction, spec.schedule.zero_snr, spec.schedule.beta_range) == ("v", True, None)
    assert (spec.defaults.sampler, spec.defaults.schedule) == ("euler", "trailing")
    change(folder, place, rescale_betas_zero_snr=False, timestep_spacing="linspace", beta_end=0.02)
    spec = load(folder).spec
    assert (spec.defaults.schedule, spec.schedule.beta_range) == ("linspace", (0.00085, 0.02))


def test_markers_of_a_prediction(folders: dict[str, Path], tmp_path: Path) -> None:
    convert(folders["sdxl"], tmp_path / "a", "compvis")
    tensors = load_file(tmp_path / "a")
    save_file(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "b")
    spec = load(tmp_path / "b").spec
    assert (spec.prediction, spec.schedule.zero_snr, spec.defaults.schedule) == ("v", True, "trailing")
    save_file(tensors, tmp_path / "c", {"modelspec.prediction_type": "v"})
    assert load(tmp_path / "c").spec.prediction == "v"
    save_file(tensors, tmp_path / "d")
    assert load(tmp_path / "d").spec.prediction == "eps"


def test_a_network_is_asked_what_it_predicts(folders: dict[str, Path]) -> None:
    """SD 2's two kinds have the same names and shapes; at pure noise one returns it, the other does not."""
    unet = load(folders["sd2"]).backbone
    assert unet is not None
    schedule = make_schedule(ScheduleConfig())
    assert not predicts_noise(unet, schedule)
    unet.forward = lambda z, label, cond: z + 0.1 * torch.randn(z.shape)  # type: ignore[method-assign,assignment]
    assert predicts_noise(unet, schedule)


def test_what_stands_there_stays(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        convert(folders["sd1"], tmp_path / "there", "diffusers")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    place = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(place)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, place)
    with pytest.raises(UserError, match=r"1 not finite in float32 \(backbone\.conv_in\.weight\)"):
        load(folder)
    tensors["conv_in.weight"][0, 0, 0, 0] = 1e6  # more than fp16 can hold
    save_file(tensors, place)
    load(folder)
    with pytest.raises(UserError, match="not finite in float16"):
        load(folder, dtype=torch.float16)
