# ruff: noqa: RUF009 - the defaults are frozen
"""What a training run is told: frozen dataclasses, each field an option of the scripts (`--optim.lr 1e-4`)."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ldm.checkpoints.native import SamplingDefaults
from ldm.data.dataset import DataConfig
from ldm.diffusion.schedules import ScheduleConfig
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.discriminator import DiscriminatorConfig
from ldm.models.unet import UNetConfig
from ldm.text.tower import TextConfig


def at_least(config: Any, **bounds: float) -> None:
    """ValueError for a field that is less than its bound."""
    for name, least in bounds.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}: give at least {least}")


@dataclass(frozen=True)
class OptimConfig:
    """warmup: updates of linear rise; clip: largest gradient norm, 0 for none.

    rates: factors on the rate by names of parameters, `{text.*: 0.1}`, the last that fits. accumulate: parts that a
    process cuts its share of a batch into, to save memory. betas: of those kinds that have two.
    """

    kind: Literal["adamw", "adamw8bit", "prodigy", "adafactor", "muon"] = "adamw"
    lr: float = 1e-4
    rates: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float = 1.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        at_least(self, accumulate=1)


@dataclass(frozen=True)
class EmaConfig:
    """decay 0: the average is the last weights. warmup: begin with a short memory.

    widths: in its place, averages by powers of time, each over this share of the training (0.05 and 0.1, say); the
    first is sampled from and exported. Kept every snapshot_every steps (0: at the end), they give an average of any
    width after training: scripts/reconstruct_ema.py.
    """

    decay: float = 0.9999
    warmup: bool = True
    widths: tuple[float, ...] = ()
    snapshot_every: int = 0

    def __post_init__(self) -> None:
        for width in self.widths:
            if not 0 < width < 0.28:  # at 0.289 all weights since the first count alike
                raise ValueError(f"widths holds {width}: needs a share between 0 and 0.28")


@dataclass(frozen=True)
class RunConfig:
    """One step is one optimiser update over `batch_size` samples, whatever the number of processes.

    `*_every` are in steps, 0 for the end only; keep: checkpoints that stay, besides those at multiples of keep_every (0
    for none); validate_on: held-back images; recompute: gradient checkpointing; max_skipped: steps in a row that may be
    left out because something is not finite; timeout: seconds that processes wait for each other; trackers: of
    accelerate. precision: fp32 is fp32, tf32 lets a GPU's matrices be less exact; auto is bf16 where a GPU has it, else
    tf32. shard: split what stays between steps among the processes (FSDP).
    """

    steps: int
    batch_size: int
    seed: int = 0
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    checkpoint_every: int = 1000
    keep: int = 2
    keep_every: int = 0
    export_every: int = 0
    sample_every: int = 1000
    validate_every: int = 1000
    validate_on: int = 256
    log_every: int = 50
    channels_last: bool = False
    compile: bool = False
    recompute: bool = False
    max_skipped: int = 10
    timeout: int = 600
    trackers: tuple[str, ...] = ("tensorboard",)
    shard: bool = False
    ema: EmaConfig = EmaConfig()

    def __post_init__(self) -> None:
        at_least(self, steps=1, batch_size=1, log_every=0)


@dataclass(frozen=True)
class AutoencoderLoss:
    """pixel + lpips * LPIPS + kl * KL + adversarial * lambda * GAN; a weight of 0 switches a term off.

    kl: of nats per image value, so that the 1e-6 of CompVis' configs is 1e-6 here. free_bits: nats a latent value, the
    mean over a channel of a sample, below which the KL costs nothing (Kingma et al. 2016). commit: of the encoder's
    distance to the codes of a codebook. lpips_weights, fid_weights: files, see `make weights`; with the latter rFID is
    measured. adversarial_start: the first step with the discriminator. adaptive: lambda of VQGAN's Eq. 7, else 1; it
    is that of the step before, so that it is one number however the batch is split. r1: of the discriminator's squared
    gradient at real pictures (Mescheder et al. 2018).
    """

    pixel: Literal["l1", "l2"] = "l1"
    kl: float = 1e-6
    free_bits: float = 0.0
    commit: float = 0.25
    lpips: float = 1.0
    lpips_weights: str = "weights/lpips_vgg.safetensors"
    adversarial: float = 0.5
    adversarial_start: int = 0
    adaptive: bool = True
    r1: float = 0.0
    fid_weights: str = ""


@dataclass(frozen=True)
class VaeRun:
    """scripts/train_vae.py. statistics: images over which the latent's mean and deviation are measured.

    weights: a file with an autoencoder to start from, of any layout; `model` left as it is here is then the file's.
    freeze: names of parameters that stay as they are, `[encoder.*]` to train a decoder alone. teacher: a file with an
    autoencoder whose latents this one learns to give and to read, as TAESD learned Stable Diffusion's.
    """

    run: RunConfig
    data: DataConfig
    model: AutoencoderConfig = AutoencoderConfig()
    weights: str = ""
    teacher: str = ""
    freeze: tuple[str, ...] = ()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    loss: AutoencoderLoss = AutoencoderLoss()
    optim: OptimConfig = OptimConfig(betas=(0.5, 0.9))
    statistics: int = 2048


@dataclass(frozen=True)
class TextRun:
    """The text tower. train: with the UNet, else frozen. weights: a model file whose tower it starts from."""

    tower: TextConfig = TextConfig()
    train: bool = True
    weights: str = ""


@dataclass(frozen=True)
class DenoisingLoss:
    """weighting: of the noise levels, with its own gamma (None: the paper's); importance: draw levels by their losses.

    vlb: weight of the bound that trains variances, where the UNet has twice the latent's channels; 1 is the paper's
    0.001 of the sum over 1,000 steps. offset, pyramid: strength of such noise; perturbation: of noise that only the
    input has; pairing: how many samples share out their noise among them by optimal transport; 0 is none of it.
    caption_dropout: share of samples that see the empty caption, for guidance.
    """

    weighting: Literal["uniform", "snr", "min_snr", "soft_min_snr", "p2", "edm"] = "uniform"
    gamma: float | None = None
    importance: bool = False
    vlb: float = 1.0
    offset: float = 0.0
    pyramid: float = 0.0
    perturbation: float = 0.0
    pairing: int = 0
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        at_least(self, vlb=0, offset=0, pyramid=0, perturbation=0, pairing=0, caption_dropout=0)
        if self.caption_dropout > 1:
            raise ValueError(f"caption_dropout is {self.caption_dropout}: needs a share, at most 1")


@dataclass(frozen=True)
class Samples:
    """The pictures painted while training: prompt i with seed + i."""

    prompts: tuple[str, ...] = ("a red apple", "a blue sofa", "a brown horse", "a sunflower")
    seed: int = 0


@dataclass(frozen=True)
class LdmRun:
    """scripts/train_ldm.py.

    weights: a whole model of any layout to start from, whose UNet, text tower, autoencoder, prediction, schedule and
    defaults are then the run's where the config leaves them at what they are here; empty for fresh weights.
    autoencoder: a file with another one, or `embedded` for the package's, which also serves where nothing is said.
    text.weights: a file with another tower. freeze: names of parameters that stay as they are, such as `[down.*,
    text.*]`. cache: a folder for latents that are encoded once, or `beside` for one beside the shards; empty: encode
    every batch. defaults: how pictures are sampled, also by whoever uses the model without saying how.
    """

    run: RunConfig
    data: DataConfig
    autoencoder: str = ""
    backbone: UNetConfig = UNetConfig()
    weights: str = ""
    freeze: tuple[str, ...] = ()
    text: TextRun = TextRun()
    prediction: Literal["", "eps", "v", "x0", "flow", "edm"] = ""  # nowhere said: eps
    schedule: ScheduleConfig = ScheduleConfig()
    loss: DenoisingLoss = DenoisingLoss()
    optim: OptimConfig = OptimConfig()
    cache: str = ""
    samples: Samples = Samples()
    defaults: SamplingDefaults = SamplingDefaults()


@dataclass(frozen=True)
class TunedRun(LdmRun):
    """train_ldm's settings, of which `weights` names the model that is fine-tuned."""

    weights: str = "embedded"


@dataclass(frozen=True)
class LoraConfig:
    """rank, alpha (0: as rank): of the adapters, whose change counts alpha / rank. dora: learn magnitudes beside it.

    targets: patterns of diffusers' names of weights; convolutions too (LoCon) with `unet.*conv?`, the text towers with
    `text_encoder*.q_proj`. layout: whose names the file gets; half: in fp16, of half the size.
    """

    rank: int = 8
    alpha: float = 0.0
    dora: bool = False
    targets: tuple[str, ...] = ("unet.*.to_?", "unet.*.to_out.0")
    layout: Literal["kohya", "diffusers"] = "kohya"
    half: bool = False

    def __post_init__(self) -> None:
        at_least(self, rank=1, alpha=0)


@dataclass(frozen=True)
class LoraRun(TunedRun):
    """scripts/train_lora.py."""

    lora: LoraConfig = LoraConfig()


@dataclass(frozen=True)
class ControlRun(TunedRun):
    """scripts/train_controlnet.py. hint: what is drawn of each picture; none: the picture itself."""

    hint: Literal["canny", "soft_edges", "lineart", "none"] = "canny"


@dataclass(frozen=True)
class InversionConfig:
    """token: the new word as captions hold it; vectors: how many it stands for; start: a word to begin as."""

    token: str = "<mine>"
    vectors: int = 1
    start: str = "object"

    def __post_init__(self) -> None:
        at_least(self, vectors=1)
        if not self.token.strip():
            raise ValueError(f"token is {self.token!r}: give a word")


@dataclass(frozen=True)
class InversionRun(TunedRun):
    """scripts/train_inversion.py."""

    inversion: InversionConfig = InversionConfig()


@dataclass(frozen=True)
class DistilConfig:
    """steps: how many the teacher takes over all noise (consistency, reflow), or its student (progressive), while the
    teacher takes `stride` in each of those. guidance: the teacher's, which becomes the student's own: sample it with
    cfg_scale 1. paths: so many that the teacher paints beforehand, from noise to picture, kept in `cache` for every
    epoch and method; 0: steps of the teacher from noised pictures.
    """

    method: Literal["consistency", "progressive", "reflow"] = "consistency"
    steps: int = 16
    stride: int = 2
    guidance: float = 5.0
    paths: int = 0

    def __post_init__(self) -> None:
        at_least(self, steps=1, stride=1, paths=0)


@dataclass(frozen=True)
class DistilRun(TunedRun):
    """scripts/train_distil.py: the student begins as the teacher. lora: adapters learn in place of the whole UNet."""

    loss: DenoisingLoss = DenoisingLoss(caption_dropout=0.0)
    distil: DistilConfig = DistilConfig()
    lora: LoraConfig | None = None
