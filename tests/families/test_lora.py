"""LoRA files of every trainer's naming, against peft on the same random weights; and what is refused."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import fuzz
from families.lora_files import ALPHA, PARTS, RANK, Peft, as_peft, kohya, numbered, older, oldest, peft, sgm
from safetensors.torch import save_file

from ldm.checkpoints import lora, native, pickled
from ldm.checkpoints.native import Model
from ldm.errors import UserError
from ldm.families import FAMILIES as KNOWN
from ldm.families.inspect import describe
from ldm.families.load import load
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig

FAMILIES = ["sd1", "sd2", "sdxl"]
REAL = Path(__file__).parents[3] / "shared" / "files" / "lora"


def far(model: Model, other: Model, only: str = "") -> float:
    """The largest relative distance of two models' weights."""
    pairs = [
        (name, value, other.modules[prefix].state_dict()[name])
        for prefix, module in model.modules.items()
        for name, value in module.state_dict().items()
    ]
    return max(float((a - b).norm() / b.norm()) for name, a, b in pairs if re.search(only, name))


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_changes_are_those_of_peft(
    folders: dict[str, Path], plain: Callable[[str], Peft], tmp_path: Path, name: str
) -> None:
    base, expected = load(folders[name]), load(plain(name).merged)
    assert far(base, expected) > 0.05
    state = plain(name).state
    metadata = {"lora_adapter_metadata": json.dumps({f"{part}.lora_alpha": ALPHA for part in PARTS})}
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA, "r": RANK}))
    save_file(state, tmp_path / "new", metadata)
    save_file(kohya(state), tmp_path / "kohya")
    save_file(kohya(state, sgm(base)), tmp_path / "kohya-sgm")
    save_file(as_peft(state), folder / "adapter_model.safetensors")
    scaled = {n: v * ALPHA / RANK if "lora_B" in n else v for n, v in state.items()}  # these files know no alpha
    save_file(older(scaled), tmp_path / "older")
    save_file(oldest(scaled), tmp_path / "oldest")
    only = {"adapter": r"down|mid|up", "oldest": r"attn\d\.to_[qkv]"}
    model = load(folders[name])
    for file in ("new", "kohya", "kohya-sgm", "adapter", "older", "oldest"):
        injected = lora.inject(model, lora.read(tmp_path / file))
        assert not injected.unmatched, file
        assert far(model, expected, only.get(file, "")) < 1e-6, file
        injected.eject()
        assert far(model, base) == 0, file


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_dora_is_pefts(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    made = peft(folders[name], tmp_path / "merged", use_dora=True)
    expected = load(made.merged)
    save_file(
        made.state, tmp_path / "new", {"lora_adapter_metadata": json.dumps({f"{p}.lora_alpha": 2 for p in PARTS})}
    )
    save_file(kohya(made.state), tmp_path / "kohya")
    for file in ("new", "kohya"):
        model = load(folders[name])
        assert any("dora" in roles or "magnitude" in roles for roles in lora.read(tmp_path / file).pairs.values())
        lora.fuse(model, lora.read(tmp_path / file))
        assert far(model, expected) < 1e-5


@pytest.mark.filterwarnings("ignore:The following alpha_pattern")  # it is the UNet's, and the tower is told too
def test_ranks_and_alphas_by_pattern(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = {"use_rslora": True, "alpha_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 9}}
    made = peft(folders["sd1"], tmp_path / "merged", **settings)
    said = {f"unet.{k}": v for k, v in settings.items()} | {"unet.lora_alpha": ALPHA}
    said |= {"text_encoder.use_rslora": True, "text_encoder.lora_alpha": ALPHA}
    save_file(made.state, tmp_path / "new", {"lora_adapter_metadata": json.dumps(said)})
    model = load(folders["sd1"])
    lora.fuse(model, lora.read(tmp_path / "new"))
    assert far(model, load(made.merged)) < 1e-6


def test_numbers_in_place_of_names(folders: dict[str, Path], tmp_path: Path) -> None:
    numbers, names = numbered(folders["sd1"])
    save_file(numbers | {"<s1>": torch.ones(64)}, tmp_path / "numbers")
    save_file(names, tmp_path / "names")
    assert describe(tmp_path / "numbers")[0] == "numbers: a LoRA"
    assert describe(tmp_path / "numbers")[2] == f"changes {len(numbers) // 2} weights, at rank 2; not of it: <s1>"
    by_number, by_name = load(folders["sd1"]), load(folders["sd1"])
    injected = lora.inject(by_number, lora.read(tmp_path / "numbers"))
    lora.fuse(by_name, lora.read(tmp_path / "names"))
    assert injected.unmatched == ("<s1>",) and len(injected.matched) == len(numbers) // 2
    assert far(by_number, by_name) == 0
    assert "weights changed; 1 have no place in this model: <s1>" in str(injected)


def test_lists_of_old(folders: dict[str, Path], tmp_path: Path) -> None:
    """cloneofsimo's first files are pickled lists, one for the UNet's attention and one for the tower's."""
    numbers, names = numbered(folders["sd1"], ("Attention", "CLIPAttention"))
    for part in ("unet", "text_encoder"):
        count = sum(name.startswith(part) for name in numbers) // 2
        listed = [numbers[f"{part}:{i}:{half}"] for i in range(count) for half in ("up", "down")]
        torch.save(listed, tmp_path / "list.pt")
        pickled.to_safetensors(tmp_path / "list.pt", tmp_path / part)
    by_list, by_name = load(folders["sd1"]), load(folders["sd1"])
    save_file(names, tmp_path / "names")
    lora.fuse(by_name, lora.read(tmp_path / "names"))
    for part in ("unet", "text_encoder"):
        assert not lora.inject(by_list, lora.read(tmp_path / part)).unmatched
    assert far(by_list, by_name) == 0


def test_damaged_files(folders: dict[str, Path], tmp_path: Path) -> None:
    kernel = {"lora_down.weight": torch.ones(2, 64, 3, 3), "lora_up.weight": torch.ones(64, 2, 1, 1)}
    places = ("lora_unet_mid_block_resnets_0_conv1", "no_place")
    whole = {f"{place}.{role}": value.clone() for place in places for role, value in kernel.items()}
    save_file(whole, tmp_path / "whole", {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {"conv1": 3}})})
    model, raw, said = load(folders["sd1"]), (tmp_path / "whole").read_bytes(), 0
    for case in range(150):
        rng = random.Random(case)
        (tmp_path / "broken").write_bytes(rng.choice([fuzz.damage_bytes, fuzz.damage_header])(rng, raw))
        try:
            lora.inject(model, lora.read(tmp_path / "broken")).eject()
        except UserError as error:
            said += 1
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
    assert 75 < said < 150


def test_a_name_with_a_colon_is_no_number(folders: dict[str, Path], tmp_path: Path) -> None:
    save_file({f"a:b.lora_{half}.weight": torch.ones(2, 2) for half in ("up", "down")}, tmp_path / "a")
    with pytest.raises(UserError, match="none of its 1 places is known here"):
        lora.inject(load(folders["sd1"]), lora.read(tmp_path / "a"))


@pytest.mark.parametrize("said", ["[[1, 2]]", '{"unet.lora_alpha": 1%s}' % ("0" * 400), '{"unet.lora_alpha": true}'])
def test_settings_that_are_none_are_refused_in_one_line(folders: dict[str, Path], tmp_path: Path, said: str) -> None:
    place = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{place}.lora_A.weight": torch.ones(1, 64), f"{place}.lora_B.weight": torch.ones(64, 1)}
    save_file(pair, tmp_path / "a", {"lora_adapter_metadata": said})
    if said == "[[1, 2]]":  # of no part of the model
        assert lora.inject(load(folders["sd1"]), lora.read(tmp_path / "a")).matched == (place,)
        return
    with pytest.raises(UserError, match="settings have the alpha"):
        lora.inject(load(folders["sd1"]), lora.read(tmp_path / "a"))


def test_an_alpha_may_be_a_whole_number(folders: dict[str, Path], plain: Callable[[str], Peft], tmp_path: Path) -> None:
    state = kohya(plain("sd1").state)
    assert any(name.endswith(".alpha") for name in state)
    for name, kind in (("whole", torch.int64), ("real", torch.float32)):
        alphas = {key: torch.tensor(3, dtype=kind) for key in state if key.endswith(".alpha")}
        save_file(state | alphas, tmp_path / name)
    whole, real = load(folders["sd1"]), load(folders["sd1"])
    assert not lora.inject(whole, lora.read(tmp_path / "whole")).unmatched
    lora.inject(real, lora.read(tmp_path / "real"))
    assert far(whole, real) == 0


def test_parse() -> None:
    assert lora.parse("a/b.safetensors") == (Path("a/b.safetensors"), 1.0)
    assert lora.parse("a/b.safetensors:0.8") == (Path("a/b.safetensors"), 0.8)
    assert lora.parse("a:-1.5") == (Path("a"), -1.5)
    assert lora.parse("C:\\b") == (Path("C:\\b"), 1.0)
    for word in ("nan", "inf"):
        with pytest.raises(UserError, match="not a finite number"):
            lora.parse(f"a:{word}")


def test_two_with_weights_add_up(folders: dict[str, Path], plain: Callable[[str], Peft], tmp_path: Path) -> None:
    save_file(kohya(plain("sd1").state), tmp_path / "a")
    base, model = load(folders["sd1"]), load(folders["sd1"])
    first = lora.inject(model, lora.read(tmp_path / "a"), 0.25)
    second = lora.inject(model, lora.read(tmp_path / "a"), 0.75)
    assert far(model, load(plain("sd1").merged)) < 1e-6
    first.eject()
    second.eject()
    assert far(model, base) == 0


def test_the_refiners_single_tower(folders: dict[str, Path], tmp_path: Path) -> None:
    pair = {"lora_down.weight": torch.ones(1, 64), "lora_up.weight": torch.ones(64, 1)}
    place = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{place}.{role}": value for role, value in pair.items()}, tmp_path / "a")
    assert lora.inject(load(folders["sdxl-refiner"]), lora.read(tmp_path / "a")).matched == (place,)


def broken(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    """A file that must be refused."""
    state = {name: value.clone() for name, value in state.items()}
    name = next(name for name in state if "unet" in name and "lora_up" in name)
    if how == "half":
        del state[name]
    elif how == "nan":
        state[name][0] = math.nan
    elif how == "flat":
        state[name] = state[name].flatten()
    elif how == "rank":
        state[name] = torch.cat([state[name], state[name]], dim=1)
    elif how == "strange":
        state = {f"x{name}": value for name, value in state.items()}
    elif how == "magnitude":
        state[name.replace("lora_up.weight", "dora_scale")] = torch.ones(5, 1)
    else:
        state = {"emb_params": torch.ones(1, 64)}
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("half", "1 without both of down and up"),
        ("nan", "1 not finite"),
        ("flat", "1 misshapen"),
        ("rank", "model of other shapes: 1 of its"),
        ("strange", "changes nothing in this model: none of its"),
        ("magnitude", "has a magnitude of \\[5, 1\\] for"),
        ("embedding", "no LoRA: none of its 1 tensors"),
    ],
)
def test_refusals(
    folders: dict[str, Path], plain: Callable[[str], Peft], tmp_path: Path, how: str, message: str
) -> None:
    save_file(broken(kohya(plain("sd1").state), how), tmp_path / "a")
    with pytest.raises(UserError, match=message) as caught:
        lora.inject(load(folders["sd1"]), lora.read(tmp_path / "a"))
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_another_familys(folders: dict[str, Path], plain: Callable[[str], Peft], tmp_path: Path) -> None:
    save_file(plain("sdxl").state, tmp_path / "xl")
    model = load(folders["sd1"])
    before = {name: id(p) for name, p in model.modules["backbone"].named_parameters()}
    with pytest.raises(UserError, match="is for a model of other shapes: .* the model's") as caught:
        lora.inject(model, lora.read(tmp_path / "xl"))
    assert "\n" not in str(caught.value)
    assert before == {name: id(p) for name, p in model.modules["backbone"].named_parameters()}
    with pytest.raises(UserError, match="cannot read"):
        lora.read(tmp_path / "nothing")
    with pytest.raises(UserError, match="a folder without pytorch_lora_weights"):
        lora.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    (tmp_path / "xl").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="its settings cannot be read"):
        lora.read(tmp_path)


def real_shapes(name: str) -> Model:
    """A family's shapes and no numbers, for files whose places are asked for alone."""
    text = KNOWN[name].text
    return native.skeleton(native.ModelSpec(AutoencoderConfig(), 512, UNetConfig(context_dim=text.width), text))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
@pytest.mark.parametrize(
    ("name", "family", "places", "spare"),
    [
        ("analog_svd_rank4.safetensors", "sd1", 192, ()),
        ("lora_disney.safetensors", "sd1", 192, ("<s1>", "<s2>")),
        ("catundchat_sd15_r4_processor_keys.safetensors", "sd1", 128, ()),
        ("catundchat_sd15_r4_processor_keys.bin", "sd1", 128, ()),
        ("lora_weight_e357_s124500.pt", "sd2", 128, ()),
        ("lora_weight_e357_s124500.text_encoder.pt", "sd2", 92, ()),
    ],
)
def test_real_files_fit(tmp_path: Path, name: str, family: str, places: int, spare: tuple[str, ...]) -> None:
    path = REAL / name
    if path.suffix != ".safetensors":
        pickled.to_safetensors(path, tmp_path / "converted")
        path = tmp_path / "converted"
    read = lora.read(path)
    found = lora.find(real_shapes(family), read)
    assert (len(found), read.spare) == (places, spare)
    assert len({place for place, _ in found.values()}) == places
