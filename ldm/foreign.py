"""Recipes in other programs' pictures: what AUTOMATIC1111's web UI and ComfyUI write, as a Request of ours."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.spacings import SPACINGS
from ldm.request import Request

# AUTOMATIC1111's web UI has these names for ours, so that its users and tools can read the `parameters` chunk.
A1111_SAMPLERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "lms": "LMS",
    "plms": "PLMS",
    "dpm_adaptive": "DPM adaptive",
    "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "restart": "Restart",
    "lcm": "LCM",
}
SCHEDULES = {"normal": "linspace", "ddim_uniform": "leading", "uniform": "linspace"}
FIELD = re.compile(r'\s*([\w ]+?):\s*("(?:\\.|[^\\"])*"|[^,\n]*)(?:,|$)')
NUMBERS: dict[str, tuple[str, type]] = {
    "Steps": ("steps", int),
    "CFG scale": ("cfg_scale", float),
    "Seed": ("seed", int),
    "Clip skip": ("clip_skip", int),
    "Variation seed": ("variation_seed", int),
    "Variation seed strength": ("variation", float),
}


def fields_of(parameters: str) -> dict[str, str]:
    """The `Steps: 20, Sampler: ..` fields of A1111's text."""
    line = next((line for line in parameters.splitlines()[::-1] if line.startswith("Steps: ")), "")
    return {m[1]: _unquoted(m[2]) for m in FIELD.finditer(line)}


def a1111(parameters: str) -> Request:
    """The request in A1111's text. What its fields do not tell, or what is unknown here, is the model's default."""
    known = fields_of(parameters)
    above = re.split(r"^Steps: ", parameters, maxsplit=1, flags=re.MULTILINE)[0]
    prompt, _, negative = above.partition("Negative prompt:")
    found = {ours: _number(known.get(theirs, ""), kind) for theirs, (ours, kind) in NUMBERS.items()}
    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", known.get("Size", ""))
    found |= {"width": int(size[1]), "height": int(size[2])} if size else {}
    name, schedule = known.get("Sampler", ""), known.get("Schedule type", "")
    for word in ("Karras", "Exponential"):
        name, schedule = (name[: -len(word)].strip(), word) if name.endswith(f" {word}") else (name, schedule)
    sampler = {theirs: ours for ours, theirs in A1111_SAMPLERS.items()}.get(name)
    return _request(prompt.strip(), negative.strip(), sampler, schedule.lower().replace(" ", "_"), found)


def comfyui(graph: str) -> Request | None:
    """The request in ComfyUI's graph: that of its first sampler, from noise if one is. None where there is none."""
    try:
        nodes = json.loads(graph)
    except (ValueError, RecursionError):
        nodes = None
    parts = nodes.values() if isinstance(nodes, dict) else []
    samplers = [node for node in parts if {"positive", "latent_image"} <= _inputs(node).keys()]
    if not samplers:
        return None
    first = next((s for s in samplers if "width" in _inputs(_linked(nodes, s, "latent_image"))), samplers[0])
    inputs, size = _inputs(first), _inputs(_linked(nodes, first, "latent_image"))
    values = {"steps": "steps", "cfg_scale": "cfg", "seed": "seed" if "seed" in inputs else "noise_seed"}
    said = {ours: inputs.get(theirs) for ours, theirs in values.items()} | {s: size.get(s) for s in ("width", "height")}
    found = {k: v for k, v in said.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    name = str(inputs.get("sampler_name", ""))
    sampler = re.sub("^dpm_2", "dpm2", name.replace("uni_pc", "unipc").replace("_ancestral", "_a"))
    texts = [_text(nodes, _linked(nodes, first, side)) for side in ("positive", "negative")]
    return _request(texts[0], texts[1], sampler, str(inputs.get("scheduler", "")), found)


def _request(prompt: str, negative: str, sampler: str | None, schedule: str, found: Mapping[str, Any]) -> Request:
    """A request of what is known; those programs space the steps from the last to the first where they say nothing."""
    spacing = SCHEDULES.get(schedule, schedule)
    if spacing not in SPACINGS:
        spacing = "leading" if sampler == "ddim" else "linspace"
    chosen = sampler if sampler in SAMPLERS else None
    values = {name: value for name, value in found.items() if value is not None}
    return Request(prompt, negative, sampler=chosen, schedule=spacing, **values)


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text[:40])
    except ValueError:
        return None


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text.strip()
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _inputs(node: Any) -> dict[str, Any]:
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def _linked(nodes: dict[str, Any], node: Any, name: str) -> Any:
    link = _inputs(node).get(name)
    return nodes.get(str(link[0])) if isinstance(link, list) and link else None


def _text(nodes: dict[str, Any], node: Any) -> str:
    """The text that a conditioning comes from, through whatever nodes stand between, each looked at once."""
    waiting, seen = [node], set[int]()
    while waiting:
        here = waiting.pop(0)
        inputs = _inputs(here)
        for name in ("text", "text_g", "string", "value"):
            if isinstance(inputs.get(name), str):
                return str(inputs[name]).strip()
        if id(here) not in seen:
            seen.add(id(here))
            waiting += [_linked(nodes, here, name) for name in inputs]
    return ""
