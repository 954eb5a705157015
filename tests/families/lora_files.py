"""LoRA files as the trainers in use write them, and what peft makes of the same numbers."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoints import compvis, diffusers
from ldm.checkpoints.native import Model

State = dict[str, Tensor]
PARTS = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "time_emb_proj", "downsamplers.0.conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
ALPHA, RANK = 2, 3


class Peft(NamedTuple):
    """What peft made: its tensors by diffusers' names, and a folder of the model with all of it merged in."""

    state: State
    merged: Path


def peft(folder: Path, out: Path, **settings: Any) -> Peft:
    """Random adapters on a diffusers folder, and their merger by peft itself."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds = dict(zip(PARTS, (UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection), strict=True))
    shutil.copytree(folder, out)
    state: State = {}
    rng = torch.Generator().manual_seed(9)
    for part, kind in kinds.items():
        if not (folder / part).exists():
            continue
        module = kind.from_pretrained(folder / part)
        targets = UNET if part == "unet" else TEXT
        module.add_adapter(LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": targets} | settings))
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.data = parameter.data * (1 + 0.2 * noise) if "magnitude" in name else 0.2 * noise
        state |= {f"{part}.{name}": value.detach().clone() for name, value in get_peft_model_state_dict(module).items()}
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
        weights = {n.replace(".base_layer", ""): v for n, v in module.state_dict().items() if "lora_" not in n}
        (file,) = (out / part).glob("*.safetensors")
        assert weights.keys() == load_file(file).keys()
        save_file(weights, file, {"format": "pt"})
    return Peft(state, out)


def as_peft(state: State) -> State:
    """One part's adapter_model.safetensors, as peft alone writes the UNet's."""
    return {f"base_model.model.{n.removeprefix('unet.')}": v for n, v in state.items() if n.startswith("unet.")}


def older(state: State) -> State:
    """diffusers before peft."""
    found = {}
    for name, value in state.items():
        middle = "lora" if name.startswith("unet.") else "lora_linear_layer"
        found[name.replace("lora_A", f"{middle}.down").replace("lora_B", f"{middle}.up")] = value
    return found


def oldest(state: State) -> State:
    """diffusers' attention processors; they know of attention alone."""
    halves = {"A": "down", "B": "up"}
    found = {}
    for name, value in state.items():
        match = re.fullmatch(r"unet\.(.*attn\d)\.to_(q|k|v|out)(?:\.0)?\.lora_([AB])\.weight", name)
        if match:
            found[f"{match[1]}.processor.to_{match[2]}_lora.{halves[match[3]]}.weight"] = value
    return found


def kohya(state: State, unet: Callable[[str], str] = str) -> State:
    """kohya's, with alpha; a single text tower is `te`."""
    two = any(name.startswith("text_encoder_2.") for name in state)
    found = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        place, _, role = rest.rpartition(".lora_")
        place = unet(place) if part == "unet" else place if place.startswith("text_model.") else f"text_model.{place}"
        flat = f"lora_{PARTS[part] if two or part == 'unet' else 'te'}_{place.replace('.', '_')}"
        leaf = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight", "magnitude_vector": "dora_scale"}[role]
        value = value.reshape(-1, *[1] * (state[name.replace(role, "A.weight")].dim() - 1)) if "dora" in leaf else value
        found[f"{flat}.{leaf}"] = value
        found[f"{flat}.alpha"] = torch.tensor(float(ALPHA))
    return found


def sgm(model: Model) -> Callable[[str], str]:
    """diffusers' names of a UNet in CompVis's words, as kohya's trainer of SDXL has them."""
    assert model.backbone is not None
    config = model.backbone.config
    theirs, others = diffusers.unet(model.backbone).names, compvis.unet(model.backbone, config).names
    known = {theirs[ours][0]: others[ours][0] for ours in theirs}
    return lambda place: known[f"{place}.weight"].removesuffix(".weight")


def numbered(folder: Path, classes: tuple[str, ...] = ("Attention", "GEGLU", "CLIPAttention")) -> tuple[State, State]:
    """cloneofsimo's numbers as its trainer gave them: linear layers of certain classes, as the modules are walked.

    And the same by diffusers' names. In its day a block's feed-forward stood before the second attention.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    rng = torch.Generator().manual_seed(2)
    numbers: State = {}
    names: State = {}
    order = {"attn1": 0, "ff": 1, "attn2": 2}
    for part, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        module = kind.from_pretrained(folder / part)
        walked = [(n, m) for n, m in module.named_modules() if type(m).__name__ in classes]
        blocks: dict[str, list[Any]] = {}
        for place, ancestor in walked:
            if place.startswith(("down_blocks", "up_blocks", "mid_block")) or part != "unet":
                blocks.setdefault(re.split(r"\.(?=attn\d|ff|self_attn)", place)[0], []).append((place, ancestor))
        for held in blocks.values():
            held.sort(key=lambda pair: order.get(pair[0].split(".")[-1].replace("0", "ff"), 1))
        layers = [
            (f"{place}.{leaf}", layer)
            for held in blocks.values()
            for place, ancestor in held
            for leaf, layer in ancestor.named_modules()
            if isinstance(layer, torch.nn.Linear)
        ]
        for i, (place, layer) in enumerate(layers):
            down, up = (torch.randn(s, generator=rng) * 0.2 for s in ((2, layer.in_features), (layer.out_features, 2)))
            numbers |= {f"{part}:{i}:down": down, f"{part}:{i}:up": up}
            names |= {f"{part}.{place}.lora_A.weight": down, f"{part}.{place}.lora_B.weight": up}
    return numbers, names
