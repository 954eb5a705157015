"""What other programs write into their pictures, read as requests of ours; real ones where they lie beside."""

import json
from pathlib import Path

import pytest
from PIL import ExifTags
from PIL import Image as Pillow

from ldm import recipe
from ldm.errors import UserError
from ldm.foreign import a1111, comfyui
from ldm.images import read_text
from ldm.request import Request

REAL = Path(__file__).parents[2] / "shared/files/png"
TEXT = (
    "a (red:1.2) apple,\non a table\nNegative prompt: blur, noise\n"
    "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, "
    'Seed: 12345678901, Size: 512x768, Model hash: 0123456789, Model: "a, b: c", Clip skip: 2, Variation seed: 9, '
    "Variation seed strength: 0.25, Version: v1.9.4"
)
REQUEST = Request(
    "a (red:1.2) apple,\non a table",
    "blur, noise",
    12345678901,
    "dpmpp_2m",
    "karras",
    20,
    7.5,
    512,
    768,
    2,
    variation=0.25,
    variation_seed=9,
)
GRAPH = {
    "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 640, "height": 512}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat ", "clip": ["9", 1]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": ["8", 0]}},
    "8": {"class_type": "PrimitiveString", "inputs": {"value": "blurry"}},
    "4": {"class_type": "ConditioningCombine", "inputs": {"a": ["2", 0], "b": ["2", 0]}},
    "6": {
        "class_type": "KSampler",
        "inputs": {"positive": ["2", 0], "negative": ["3", 0], "latent_image": ["5", 0], "seed": 1},
    },
    "5": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 77,
            "steps": 12,
            "cfg": 6.5,
            "sampler_name": "dpm_2_ancestral",
            "scheduler": "sgm_uniform",
            "positive": ["4", 0],
            "negative": ["3", 0],
            "latent_image": ["1", 0],
        },
    },
}


def test_a1111() -> None:
    assert a1111(TEXT) == REQUEST


def test_what_a1111_leaves_unsaid_is_as_it_does() -> None:
    found = a1111("a cat\nSteps: 5, Sampler: DDIM, Schedule type: Automatic, Seed: 1, Size: huge\nTemplate: x")
    assert found == Request("a cat", seed=1, sampler="ddim", schedule="leading", steps=5)
    assert a1111("a\nSteps: 5, Sampler: Euler, Schedule type: SGM Uniform").schedule == "sgm_uniform"
    assert a1111("a\nSteps: x, Sampler: Unheard, Seed: " + "9" * 5000).sampler is None


def test_comfyui() -> None:
    expected = Request("a cat", "blurry", 77, "dpm2_a", "sgm_uniform", 12, 6.5, 640, 512)
    assert comfyui(json.dumps(GRAPH)) == expected


@pytest.mark.parametrize("graph", ["", "{", "[]", "{}", '{"1": 3}', '{"1": {"inputs": []}}', "[" * 100_000])
def test_graphs_that_are_none(graph: str) -> None:
    assert comfyui(graph) is None


def test_a_graph_without_an_end() -> None:
    loop = {"1": {"inputs": {"positive": ["1", 0], "negative": ["1", 0], "latent_image": ["1", 0]}}}
    found = comfyui(json.dumps(loop))
    assert found is not None and found.prompt == ""


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("code", ["unicode", "ascii"])
def test_the_comment_of_a_photograph(tmp_path: Path, suffix: str, code: str) -> None:
    text = TEXT + (" é" if code == "unicode" else "")
    value = b"UNICODE\0" + text.encode("utf-16-be") if code == "unicode" else b"ASCII\0\0\0" + text.encode()
    exif = Pillow.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = value
    Pillow.new("RGB", (8, 8)).save(tmp_path / f"x.{suffix}", exif=exif)
    assert read_text(tmp_path / f"x.{suffix}") == {"parameters": text}
    made = recipe.read(tmp_path / f"x.{suffix}")
    assert made.request == REQUEST
    assert (made.made.program, made.made.model, made.made.model_hash) == ("AUTOMATIC1111", "a, b: c", "0123456789")


def test_comfyuis_webp(tmp_path: Path) -> None:
    exif = Pillow.Exif()
    exif[ExifTags.Base.Model] = "prompt:" + json.dumps(GRAPH)
    Pillow.new("RGB", (8, 8)).save(tmp_path / "x.webp", exif=exif)
    assert recipe.read(tmp_path / "x.webp").request.seed == 77


def test_a_picture_of_no_program(tmp_path: Path) -> None:
    Pillow.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="holds no recipe"):
        recipe.read(tmp_path / "x.jpg")


@pytest.mark.skipif(not REAL.exists(), reason="the real pictures are not beside this copy")
@pytest.mark.parametrize(
    ("name", "program", "expected"),
    [
        ("a1111_cat", "AUTOMATIC1111", ("A photo of a cute cat", 2623256163, "dpmpp_2m", "karras", 20, 10.0, 768, 768)),
        (
            "a1111_negative_prompt",
            "AUTOMATIC1111",
            ("dreamlike", 2448144561, "euler_a", "linspace", 20, 12.0, 512, 768),
        ),
        ("a1111_platinum_template", "AUTOMATIC1111", ("A diamond", 2602647927, "euler_a", "linspace", 20, 7, 512, 512)),
        ("a1111_thumbnail", "AUTOMATIC1111", ("hands, soft", 2302659950, "euler_a", "linspace", 20, 12, 512, 512)),
        ("comfyui_hiresfix", "ComfyUI", ("masterpiece", 89848141647836, "dpmpp_sde", "linspace", 12, 8.0, 768, 768)),
    ],
)
def test_real_pictures(name: str, program: str, expected: tuple[object, ...]) -> None:
    found = recipe.read(REAL / f"{name}.png")
    r = found.request
    assert found.made.program == program and r.prompt.startswith(str(expected[0]))
    assert (r.seed, r.sampler, r.schedule, r.steps, r.cfg_scale, r.width, r.height) == expected[1:]
