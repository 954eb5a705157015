"""What fine-tuning writes, other programs read: LoRAs trained here paint the same in diffusers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file

from ldm import config
from ldm.checkpoints import lora
from ldm.checkpoints.native import Model, SamplingDefaults
from ldm.conditioning import Conditioning
from ldm.data.options import PrepareConfig
from ldm.data.prepare import prepare
from ldm.diffusion.guidance import cfg
from ldm.diffusion.samplers import SAMPLERS as SAMPLERS_OF
from ldm.errors import UserError
from ldm.families.control import load_control
from ldm.families.load import load
from ldm.request import Request
from ldm.text import inversion
from ldm.text.chunks import read
from ldm.text.reader import Reader
from ldm.training import keyed
from ldm.training.config import ControlRun, DistilRun, InversionRun, LoraRun
from ldm.training.loop import train
from ldm.training.tasks.controlnet import ControlTask
from ldm.training.tasks.denoising import DenoisingTask
from ldm.training.tasks.distil import SAMPLERS, DistilTask, consistency, progressive
from ldm.training.tasks.inversion import InversionTask
from ldm.training.tasks.lora import LoraTask

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SHARDS = Path(__file__).parents[1] / "assets/shards/{00000..00001}.tar"
TUNED = f"""
data: {{shards: '{SHARDS}', size: 32, workers: 0}}
optim: {{lr: 5e-2}}
run: {{steps: 2, batch_size: 2, trackers: [], log_every: 1, sample_every: 0, validate_on: 2, ema: {{decay: 0}}}}
samples: {{prompts: [a red apple]}}
defaults: {{sampler: euler, steps: 1, cfg_scale: 1.0}}
"""


@pytest.fixture
def settings(tmp_path: Path, folders: dict[str, Path]) -> Callable[..., Any]:
    """settings(LoraRun, "--lora.rank", "3"): a run of two steps on a tiny model of SD 1's layout."""
    (tmp_path / "tuned.yaml").write_text(TUNED)
    base = ["--weights", str(folders["sd1"])]
    return lambda kind, *overrides: config.load(kind, tmp_path / "tuned.yaml", [*base, *overrides])


@pytest.fixture
def base(folders: dict[str, Path]) -> Model:
    return load(folders["sd1"])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def answer(backbone: Any, tokens: torch.Tensor) -> torch.Tensor:
    z = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone(z, torch.tensor([500.0]), Conditioning(tokens))


CASES = {
    "kohya": ["--lora.layout", "kohya"],
    "diffusers": ["--lora.layout", "diffusers"],
    "convolutions": ["--lora.targets", "[unet.*.to_q, unet.*conv1]"],
    "text": ["--lora.targets", "[unet.*.to_k, text_encoder.*_proj, text_encoder.*.fc1]"],
    "dora": ["--lora.dora", "true", "--lora.layout", "diffusers"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_trained_lora_works_alike_here_and_in_diffusers(
    case: str, settings: Callable[..., LoraRun], base: Model, folders: dict[str, Path], tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    run = settings(LoraRun, "--lora.rank", "3", "--lora.alpha", "2", *CASES[case])
    task = LoraTask(run)
    train(task, run, tmp_path / "run")
    assert base.backbone is not None and base.conditioner is not None
    state = task.backbone.state_dict()
    frozen = {name.replace("parametrizations.weight.original", "weight"): value for name, value in state.items()}
    assert all(torch.equal(frozen[name], value) for name, value in base.backbone.state_dict().items())

    ids = base.conditioner.tokenize(["a red apple"])
    with torch.no_grad():
        plain = answer(base.backbone, base.conditioner.encode(ids).tokens)
        tuned = answer(task.backbone, task.text.encode(ids).tokens)
    assert relative(tuned, plain) > 1e-3, "training must have moved something"
    injected = lora.inject(base, lora.read(tmp_path / "run/model.safetensors"))
    assert not injected.unmatched
    with torch.no_grad():
        tokens = base.conditioner.encode(ids).tokens
    assert relative(answer(base.backbone, tokens), tuned) < 1e-5

    folder = folders["sd1"]
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"), scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path / "run/model.safetensors")
    with torch.no_grad():
        theirs = pipe.text_encoder(ids).last_hidden_state
    assert relative(tokens, theirs) < 1e-5
    assert relative(tuned, answer(lambda z, label, cond: pipe.unet(z, label, cond.tokens).sample, theirs)) < 1e-5


def test_a_lora_in_half_is_the_same_rounded(settings: Callable[..., LoraRun], tmp_path: Path) -> None:
    run = settings(LoraRun, "--lora.rank", "3", "--lora.half", "true")
    train(task := LoraTask(run), run, tmp_path / "run")
    tensors = load_file(tmp_path / "run/model.safetensors")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
    up = task.adapters["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].up
    assert tensors[key].dtype == torch.float16 and torch.equal(tensors[key], up.half())
    assert up.dtype == torch.float32 and tensors[key].any()


def test_a_pattern_that_fits_nothing_is_refused(settings: Callable[..., LoraRun]) -> None:
    with pytest.raises(UserError, match="'unet.nothing' fits no weight of this model"):
        LoraTask(settings(LoraRun, "--lora.targets", "[unet.*.to_q, unet.nothing]"))
    with pytest.raises(UserError, match="rank is 0: give at least 1"):
        settings(LoraRun, "--lora.rank", "0")


@pytest.mark.parametrize("kind", [(LoraRun, LoraTask), (ControlRun, ControlTask), (DistilRun, DistilTask)])
def test_rates_are_of_what_trains_and_the_memory_of_losses_is_kept(
    kind: tuple[Any, Any], settings: Callable[..., Any]
) -> None:
    name = {LoraTask: "adapters", ControlTask: "control", DistilTask: "backbone"}[kind[1]]
    words = ["--loss.importance", "true", "--optim.rates"]
    task = kind[1](settings(kind[0], *words, f"{{{name}.*: 0.5}}"))
    assert task.networks.keys() == {name, "importance"} and task.averaged == (name,)
    with pytest.raises(UserError, match=rf"no parameter is named 'text.\*' \(there are {name}"):
        kind[1](settings(kind[0], *words, "{text.*: 0.5}"))


def test_a_trained_controlnet_moves_alone_and_diffusers_opens_it(
    settings: Callable[..., ControlRun], base: Model, tmp_path: Path
) -> None:
    from diffusers import ControlNetModel

    run = settings(ControlRun, "--hint", "soft_edges")
    task = ControlTask(run)
    train(task, run, tmp_path / "run")
    assert base.backbone is not None
    assert all(torch.equal(task.backbone.state_dict()[n], v) for n, v in base.backbone.state_dict().items())
    assert any(layer.weight.any() for layer in task.control.zero), "training must have moved something"
    theirs = ControlNetModel.from_pretrained(tmp_path / "run/controlnet")
    hint, tokens = torch.rand(1, 3, 16, 16), torch.randn(1, 16, 64)
    ours = load_control(tmp_path / "run/model.safetensors", base.backbone.config)
    z, label = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        down, middle = theirs(z, label, tokens, hint, return_dict=False)
        for network in (ours, task.control):
            control = network(z, label, Conditioning(tokens), hint)
            for mine, other in zip([*control.skips, control.middle], [*down, middle], strict=True):
                assert relative(mine, other) < 1e-5
    assert (tmp_path / "run/samples/00000002.png").is_file()


def test_hints_need_pictures(settings: Callable[..., ControlRun]) -> None:
    with pytest.raises(UserError, match="hints are drawn from the pictures"):
        ControlTask(settings(ControlRun, "--cache", "somewhere"))


@pytest.fixture
def named(tmp_path: Path) -> str:
    """Shards whose captions hold a new word."""
    rng = np.random.default_rng(0)
    for i in range(4):
        picture = Pillow.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture.save(tmp_path / f"photos/{i}.png")
        (tmp_path / f"photos/{i}.txt").write_text("a photo of <mine>")
    prepare([str(tmp_path / "photos")], PrepareConfig(out=str(tmp_path / "named"), size=32), lambda done, total: None)
    return str(tmp_path / "named/00000.tar")


def test_a_learnt_word_moves_alone_and_reads_alike_here_and_in_diffusers(
    settings: Callable[..., InversionRun], named: str, base: Model, folders: dict[str, Path], tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    run = settings(
        InversionRun, "--data.shards", named, "--inversion.vectors", "3", "--inversion.start", "red apple",
        "--loss.caption_dropout", "0",
    )  # fmt: skip
    task = InversionTask(run)
    start = task.word.tables[0].detach().clone()
    assert base.conditioner is not None
    first, second, *_ = base.conditioner.tokenizer.encode("red apple")
    assert torch.equal(start[:2], base.conditioner.tower.token_embedding.weight[[first, second]])
    train(task, run, tmp_path / "run")
    assert not torch.equal(task.word.tables[0], start)
    text = base.conditioner
    assert text is not None
    assert all(torch.equal(task.text.state_dict()[n], v) for n, v in text.state_dict().items())

    reader = Reader(text, [inversion.from_tensors(path := tmp_path / "run/model.safetensors", load_file(path), text)])
    part = reader.parsed(Request("a <mine> here"))[0].at(0, 1)[0]
    with torch.no_grad():
        ours = read(text, [reader.chunks(part)], (32, 32), scores=[6.0], embeddings=reader.embeddings).tokens
        trained = task.encode_text(task.tokenize(["a <mine> here"])).tokens
    assert relative(ours, trained) < 1e-5
    folder = folders["sd1"]
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"), unet=None, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.load_textual_inversion(str(path))
    prompt = pipe.maybe_convert_prompt("a <mine> here", pipe.tokenizer)
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = pipe.text_encoder(ids).last_hidden_state
    assert relative(ours, theirs) < 1e-5


def test_a_cache_of_a_word_with_other_vectors_is_refused(
    settings: Callable[..., InversionRun], named: str, tmp_path: Path
) -> None:
    words = ["--data.shards", named, "--cache", str(tmp_path / "latents"), "--inversion.vectors"]
    for _ in range(2):
        InversionTask(settings(InversionRun, *words, "2")).to(torch.device("cpu"))
    with pytest.raises(UserError, match="<mine> of 2', not '.*<mine> of 1'"):
        InversionTask(settings(InversionRun, *words, "1")).to(torch.device("cpu"))


def test_a_word_that_no_caption_holds_is_refused(settings: Callable[..., InversionRun], named: str) -> None:
    with pytest.raises(UserError, match="no caption holds inversion.token '<mine>'"):
        InversionTask(settings(InversionRun))
    with pytest.raises(UserError, match="start '' is no word"):
        InversionTask(settings(InversionRun, "--data.shards", named, "--inversion.start", ""))


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The denoiser of normal data of deviation 2."""
    return x * 4 / (4 + sigma.reshape(-1, 1, 1, 1) ** 2)


def exact(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Where the probability-flow ODE of that data leads."""
    return x * 2 / (4 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt()


def columns(*levels: float) -> list[torch.Tensor]:
    return [torch.full((3, 1, 1, 1), level, dtype=torch.float64) for level in levels]


def stepped(x: torch.Tensor, sigma: float, lower: float) -> tuple[torch.Tensor, ...]:
    """Where one step of the teacher leads, and the levels."""
    here, there = columns(sigma, lower)
    return gaussian(x, here).lerp(x, there / here), here, there


def test_progressive_distillation_asks_for_the_picture_to_which_one_step_leads_as_two_did() -> None:
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    sigma, middle, lower = columns(5.0, 2.0, 0.7)
    two = gaussian(x, sigma).lerp(x, middle / sigma)
    two = gaussian(two, middle).lerp(two, lower / middle)
    one = progressive(gaussian, x, two, sigma, lower).lerp(x, lower / sigma)
    torch.testing.assert_close(one, two)


def test_the_consistency_target_is_the_end_of_the_path_where_the_student_knows_it() -> None:
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    errors = []
    for lower in (4.5, 4.75, 4.875):
        wanted = consistency(exact, x, *stepped(x, 5.0, lower))
        errors.append((wanted - exact(x, columns(5.0)[0])).abs().max().item())
    assert errors[0] / errors[1] > 3.5 and errors[1] / errors[2] > 3.5, "one step's error is of second order"
    last = consistency(exact, x, *stepped(x, 0.5, 0.0))
    torch.testing.assert_close(last, gaussian(x, columns(0.5)[0]))  # at the end the teacher's own answer


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_student_of_each_method_trains_and_is_a_model(
    method: str, settings: Callable[..., Any], tmp_path: Path
) -> None:
    run = settings(DistilRun, "--distil.method", method, "--distil.steps", "4", "--optim.lr", "1e-3")
    run = replace(run, defaults=SamplingDefaults())
    task = DistilTask(run)
    train(task, run, tmp_path / "run")
    student = load(tmp_path / "run/model.safetensors")
    assert student.spec.defaults.sampler == SAMPLERS[method] and student.spec.defaults.cfg_scale == 1
    assert student.backbone is not None
    moved = [not torch.equal(student.backbone.state_dict()[n], v) for n, v in task.teacher.state_dict().items()]
    assert all(moved), "the student moves, the teacher stays"


def test_a_student_in_adapters_is_a_lora_file(settings: Callable[..., Any], base: Model, tmp_path: Path) -> None:
    run = settings(DistilRun, "--lora.rank", "2", "--lora.targets", "[unet.*.to_q]", "--distil.steps", "4")
    train(DistilTask(run), run, tmp_path / "run")
    assert not lora.inject(base, lora.read(tmp_path / "run/model.safetensors")).unmatched


def test_reflow_trains_on_what_the_teacher_makes_of_the_same_noise(settings: Callable[..., Any], base: Model) -> None:
    run = settings(DistilRun, "--distil.method", "reflow", "--distil.steps", "3", "--distil.guidance", "2")
    task = DistilTask(run)
    task.to(torch.device("cpu"))
    noise = torch.randn(1, 4, 8, 8)
    cond, empty = task.encode_text(task.tokenize(["a red apple"])), task.encode_text(task.empty)
    with torch.no_grad():
        made = painted_by(base, task, noise, cond, empty)[-1]
        sigma = torch.tensor([1.5])
        expected = DenoisingTask.losses(task, made, sigma, noise, cond)
        torch.testing.assert_close(task.losses(torch.zeros_like(made), sigma, noise, cond), expected)


def painted_by(
    base: Model, task: DistilTask, noise: torch.Tensor, cond: Conditioning, empty: Conditioning
) -> list[torch.Tensor]:
    """What a model paints under guidance 2 of noise, step by step."""
    sigmas = task.grid.double()
    x = noise * task.schedule.start(float(sigmas[0]))
    steps = SAMPLERS_OF["dpmpp_2m"](cfg(base.denoiser(), cond, empty, 2.0), x, sigmas, torch.randn_like)
    return [x, *(step.x for step in steps)]


@pytest.fixture
def along_paths(settings: Callable[..., Any], tmp_path: Path) -> Callable[..., DistilRun]:
    """along_paths("reflow"): a run that learns from 5 paths."""
    distil = ["--distil.paths", "5", "--distil.guidance", "2", "--cache", str(tmp_path / "paths")]
    return lambda method, *more: settings(DistilRun, "--distil.method", method, *distil, "--optim.lr", "1e-3", *more)


def test_paths_are_what_the_teacher_paints_and_are_painted_once(
    along_paths: Callable[..., DistilRun], base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = DistilTask(along_paths("progressive", "--distil.steps", "2", "--distil.stride", "3"))
    task.to(torch.device("cpu"))
    batch = task.dataset.__getitems__(range(5))
    assert len(task.dataset) == 5 and sorted(batch["key"]) == [f"path {i}" for i in range(5)]
    row = batch["key"].index("path 3")
    cond, empty = task.encode_text(batch["tokens"][row : row + 1]), task.encode_text(task.empty)
    assert torch.equal(batch["tokens"][row], task.pictures[3]["tokens"][0])
    with torch.no_grad():
        expected = painted_by(base, task, keyed.normal(0, "path", torch.tensor([3]), (4, 16, 16)), cond, empty)
    path: Any = batch["path"][row].float() * (1 + task.grid**2).sqrt().reshape(-1, 1, 1, 1)  # type: ignore[typeddict-item]
    assert len(path) == len(expected) == 7
    for mine, theirs in zip(path, expected, strict=True):
        assert relative(mine, theirs[0]) < 1e-3, "fp16"

    monkeypatch.setattr(DistilTask, "_paint", lambda *_: pytest.fail("painted again"))
    DistilTask(along_paths("consistency", "--distil.steps", "6")).to(torch.device("cpu"))  # the same levels
    with pytest.raises(pytest.fail.Exception, match="painted again"):
        DistilTask(along_paths("consistency", "--distil.steps", "6", "--data.seed", "1")).to(torch.device("cpu"))


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_student_along_paths_learns_the_same_after_a_stop(
    method: str, along_paths: Callable[..., DistilRun], tmp_path: Path
) -> None:
    run = along_paths(method, "--distil.steps", "4", "--run.steps", "4")
    train(DistilTask(run), run, tmp_path / "whole")
    for steps in ("2", "4"):
        part = along_paths(method, "--distil.steps", "4", "--run.steps", steps)
        task = DistilTask(part)
        train(task, part, tmp_path / "parts")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    moved = [not torch.equal(task.backbone.state_dict()[n], v) for n, v in task.teacher.state_dict().items()]
    assert all(moved)


def test_the_points_of_a_path_are_learnt_as_steps_of_the_teacher_would_be(
    along_paths: Callable[..., DistilRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = DistilTask(along_paths("progressive", "--distil.steps", "2", "--distil.stride", "3"))
    task.to(torch.device("cpu"))
    batch: Any = task.dataset.__getitems__(range(10))
    seen = []
    monkeypatch.setattr(
        task, "_distance", lambda cond, place, x, below: seen.append((place, x, below)) or x.mean((1, 2, 3))
    )
    task.denoising_loss(batch)
    ((place, x, below),) = seen
    assert set(place.tolist()) == {0, 3}
    scale = (1 + task.grid**2).sqrt()
    for i, at in enumerate(place.tolist()):
        torch.testing.assert_close(x[i], batch["path"][i, at].float() * scale[at])
        torch.testing.assert_close(below[i], batch["path"][i, at + 3].float() * scale[at + 3])


def test_paths_need_a_folder(along_paths: Callable[..., DistilRun]) -> None:
    with pytest.raises(UserError, match="distil.paths 5 needs a folder"):
        DistilTask(along_paths("reflow", "--cache", ""))
    with pytest.raises(UserError, match="stride is 0: give at least 1"):
        along_paths("progressive", "--distil.stride", "0")
