"""Training a latent-diffusion model (Rombach et al. 2022) in the latents of a finished autoencoder.

Classifier-free guidance by dropped captions after Ho & Salimans 2022.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from ldm.checkpoints import native
from ldm.checkpoints.native import Model, ModelSpec
from ldm.conditioning import Conditioning
from ldm.data.cache import Encoders, States, cached, kept_with
from ldm.data.dataset import Dataset, open_dataset, to_image
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import cfg
from ldm.diffusion.losses import diffusion_loss, find_weighting
from ldm.diffusion.noise import NOISES, SeededNoise, paired
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.samplers import find_sampler
from ldm.diffusion.schedules import make_schedule
from ldm.errors import UserError
from ldm.families.load import load
from ldm.families.vae import load_vae
from ldm.files import digest
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.unet import UNet
from ldm.shapes import Image, Latent, Sigma, TokenIds
from ldm.text.tower import Conditioner
from ldm.training import keyed
from ldm.training.config import LdmRun
from ldm.training.heldback import HeldBack
from ldm.training.importance import Importance
from ldm.training.learner import Batch, Losses, Objective
from ldm.training.memory import recompute
from ldm.training.meter import binned
from ldm.training.optim import check_patterns, freeze
from ldm.training.progress import Bar

EMBEDDED = Path(__file__).parents[2] / "assets" / "embedded.safetensors"


class DenoisingTask:
    """One objective: the weighted squared error of the network's output. UserError where parts do not fit."""

    def __init__(self, config: LdmRun) -> None:
        weights = str(EMBEDDED) if config.weights == "embedded" else config.weights
        begun = load(Path(weights)) if weights else None
        self.config = config = _settled(config, begun)
        self.seed = config.run.seed
        self._source = Path(config.autoencoder)
        self.autoencoder = _autoencoder(config, begun)
        self.backbone = UNet(config.backbone) if begun is None or begun.backbone is None else begun.backbone
        self.backbone.requires_grad_(True).train()
        self.text = _tower(config, begun)
        _check_fit(config, self.autoencoder.config)
        self.prediction, self.schedule = PREDICTIONS[config.prediction], make_schedule(config.schedule)
        self.weighting = find_weighting(config.loss.weighting, config.loss.gamma)
        self.trains_text = config.text.train
        self.networks = self.trained()
        freeze(self.networks, config.freeze)
        check_patterns(self.networks, config.optim.rates, "optim.rates")
        self.averaged = tuple(self.networks)
        self.importance = Importance() if config.loss.importance else None
        if self.importance is not None:
            self.networks["importance"] = self.importance  # nothing to train, but to keep
        self.empty = self.tokenize([""])
        self.pictures = open_dataset(config.data, self.tokenize, batch=config.run.batch_size)
        self.dataset: Dataset = self.pictures
        self._cached: Dataset | None = None
        self.held_back = HeldBack(config.data, config.run.validate_on, self.tokenize)
        if config.run.recompute:
            for network in {self.backbone, *self.networks.values()}:
                recompute(network)
        if config.run.compile:
            self.backbone.compile()
            self.autoencoder.encoder.compile()

    def freeze(self) -> None:
        self.trains_text = False
        for network in (self.backbone, self.text):
            network.requires_grad_(False)

    def trained(self) -> dict[str, nn.Module]:
        """The networks that may move; `trains_text` is to be what becomes of the text tower."""
        return {"backbone": self.backbone} | ({"text": self.text} if self.trains_text else {})

    def to(self, device: torch.device) -> None:
        self.device = device
        for module in (self.autoencoder, self.backbone, self.text, *self.networks.values()):
            module.to(device)
        self.empty = self.empty.to(device)
        if self.config.cache:
            self.dataset = self._cached = self._encoded(self.config.cache)

    def objectives(self) -> list[Objective]:
        return [Objective("denoiser", {name: self.networks[name] for name in self.averaged}, self.denoising_loss)]

    def denoising_loss(self, batch: Batch) -> Losses:
        loss, position, x0 = self.config.loss, batch["position"], self.latent(batch)
        draw = partial(self.normal, batch)
        cond = self.conditions(batch, keyed.uniform(self.seed, "caption", position) < loss.caption_dropout)
        u = keyed.uniform(self.seed, "sigma", position)
        density = torch.ones_like(u)
        if self.importance is not None:
            u, density = self.importance.draw(u, batch["step"])
        noise = draw("noise", x0.shape[1:])
        for name, function in NOISES.items():
            if strength := getattr(loss, name):
                noise = function(noise, strength, draw)
        if loss.pairing:
            noise = paired(noise, x0, loss.pairing)
        seen = noise + loss.perturbation * draw("perturbation", x0.shape[1:]) if loss.perturbation else None
        losses = self.losses(x0, self.levels(u), noise, cond, seen=seen, network=self.network(batch))
        if self.importance is not None:
            self.importance.see(u, losses.detach())
        return {"loss": (losses / density).mean(), "loss_by_sigma": binned(losses.detach(), u)}

    def normal(self, batch: Batch, stream: str, shape: Sequence[int]) -> Tensor:
        """The normal numbers (b, *shape) of a batch's samples in a stream."""
        return keyed.normal(self.seed, stream, batch["position"], tuple(shape))

    def levels(self, u: Tensor) -> Sigma:
        """Noise levels (b,) of numbers that are even over [0, 1)."""
        return self.schedule.quantile(u)

    def losses(
        self, x0: Latent, sigma: Sigma, noise: Latent, cond: Conditioning, *, seen: Latent | None = None,
        network: nn.Module | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss of each sample (b,) at given noise; see `diffusion_loss`. network: in place of the UNet alone."""
        parts = (network or self.backbone, self.prediction, self.schedule)
        vlb = self.config.loss.vlb
        return diffusion_loss(*parts, x0, sigma, noise, cond, self.weighting, seen=seen, vlb=vlb)

    def network(self, batch: Batch) -> nn.Module:
        """What denoises a batch; a task may look at its pictures for it."""
        return self.backbone

    def tokenize(self, captions: Sequence[str]) -> TokenIds:
        return self.text.tokenize(captions)

    def latent(self, batch: Batch) -> Latent:
        """A draw from the posterior of each picture, cached or encoded now; fp32."""
        if "mean" in batch:
            mean, std = batch["mean"].float(), batch["std"].float()
        else:
            mean, std = self._posterior(batch["image"])
        return mean + std * self.normal(batch, "posterior", mean.shape[1:])

    def conditions(self, batch: Batch, dropped: Tensor) -> Conditioning:
        """Text states of a batch, kept or encoded now: of the empty caption where it is dropped."""
        if "states" not in batch or self.trains_text:
            return self.encode_text(torch.where(dropped[:, None], self.empty, batch["tokens"]), batch.get("size_ids"))
        empty = getattr(self._cached, "empty", None) or {}
        kept = {name: torch.from_numpy(empty[name]).to(self.device) for name in ("states", "vector") if name in empty}
        tokens = torch.where(dropped[:, None, None], kept["states"], batch["states"]).float()
        if "vector" not in kept:
            return Conditioning(tokens)
        vector = torch.where(dropped[:, None], kept["vector"], batch["vector"]).float()
        if self.text.config.size_ids:  # kept without knowing of which crop
            sizes = self.text.about(batch["size_ids"], len(tokens)).float()
            vector = torch.cat([vector[:, : -sizes.shape[1]], sizes], dim=1)
        return Conditioning(tokens, vector=vector)

    def encoders(self, *, text: bool, crops: int) -> Encoders:
        """What fills a cache. text: with states of the tower, which must be frozen."""
        if text and self.trains_text:
            raise UserError("text states can be kept only of a tower that is not trained: set text.train to false")

        def states(captions: list[str]) -> States:
            cond = self.encode_text(self.text.tokenize(captions).to(self.device))
            return cond.tokens, cond.vector

        model = digest(Path(self.config.text.weights or self.config.weights)) if text else ""
        return Encoders(digest(self._source), self._posterior, model, states if text else None, crops)

    def _encoded(self, cache: str) -> Dataset:
        encoders = self.encoders(text=False, crops=1)
        kept = kept_with(self.pictures, encoders, cache)
        if kept.get("text") or kept.get("crops", 1) > 1:
            encoders = self.encoders(text=bool(kept["text"]), crops=int(kept["crops"]))
        with Bar(len(self.pictures)) as bar:
            return cached(self.pictures, encoders, cache, show=lambda done, _: bar.reach(done, "pictures encoded"))

    @torch.no_grad()
    def _posterior(self, image: UInt8[Tensor, "b 3 H W"]) -> tuple[Latent, Latent]:
        """Mean and deviation of the latents of pictures in 0..255."""
        posterior = self.autoencoder.encode(to_image(image.to(self.device)))
        return posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()

    def encode_text(self, ids: TokenIds, sizes: Tensor | None = None) -> Conditioning:
        """Conditions of token ids; sizes: `size_ids` of a batch, those of whole pictures where there are none."""
        side = self.config.data.size
        with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
            return self.text.encode(ids, (side, side) if sizes is None else sizes)

    def validate(self) -> dict[str, float]:
        """The loss on held-back pictures: noise fixed, noise levels spread evenly over the training density."""
        position, total, held = torch.arange(len(self.held_back)), 0.0, self.held_back.batch
        place = keyed.uniform(self.seed, "validation order", position).argsort()
        levels = self.levels((place + 0.5) / len(place))
        for part in position.split(self.config.run.batch_size):
            x0 = self.autoencoder.encode(to_image(held["image"][part]).to(self.device)).mode.float()
            noise = keyed.normal(self.seed, "validation noise", part, tuple(x0.shape[1:])).to(self.device)
            cond = self.encode_text(held["tokens"][part].to(self.device))
            network = self.network({"image": held["image"][part]})
            total += self.losses(x0, levels[part].to(self.device), noise, cond, network=network).sum().item()
        return {f"{self.held_back.name}_loss": total / len(position)}

    def remarks(self, record: Mapping[str, Any]) -> list[str]:
        return []

    def sample(self) -> tuple[Image, int]:
        return self.paint(self.backbone, self.config.samples.prompts), 0

    def paint(self, network: nn.Module, captions: Sequence[str]) -> Image:
        """A picture of each caption, from its own seed, as the config's defaults say."""
        how, n = self.config.defaults, len(captions)
        cond, uncond = (self.encode_text(self.tokenize(t).to(self.device)) for t in (captions, [""] * n))
        denoise = cfg(Denoiser(network, self.prediction, self.schedule), cond, uncond, how.cfg_scale)
        sigmas = self.schedule.steps(how.steps, how.schedule)
        noise = SeededNoise([self.config.samples.seed + i for i in range(n)])
        side = self.config.data.size // self.autoencoder.factor
        blank = torch.zeros(n, self.autoencoder.config.z_channels, side, side, device=self.device)
        x = noise(blank) * self.schedule.start(float(sigmas[0]))
        *_, last = find_sampler(how.sampler)(denoise, x, sigmas, noise)
        return self.autoencoder.decode(last.x)

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        model = self.model(provenance)
        native.save(path, model.spec, model.modules)

    def model(self, provenance: dict[str, Any] | None = None) -> Model:
        config = self.config
        shapes = self.autoencoder.config, config.data.size, config.backbone, config.text.tower
        spec = ModelSpec(*shapes, config.prediction, config.schedule, config.defaults, provenance or {})
        return Model(spec, self.autoencoder, self.backbone, self.text)


def _settled(config: LdmRun, begun: Model | None) -> LdmRun:
    """The config with what it leaves open: as the model that the training starts from has it, else the usual."""
    name = config.autoencoder or config.weights or "embedded"
    config = replace(config, autoencoder=str(EMBEDDED) if name == "embedded" else name)
    if begun is None:
        return replace(config, prediction=config.prediction or "eps")
    spec, none, text = begun.spec, LdmRun(config.run, config.data), config.text
    if spec.backbone is None or spec.text is None:
        raise UserError(f"weights {config.weights!r} holds an autoencoder alone: give a whole model")
    parts: list[tuple[str, Any, Any, Any]] = [("backbone", config.backbone, none.backbone, spec.backbone)]
    if not text.weights:
        parts.append(("text.tower", text.tower, none.text.tower, spec.text))
        text = replace(text, tower=spec.text)
    for name, given, usual, theirs in parts:
        if given not in (usual, theirs):
            raise UserError(f"weights {config.weights!r} has the {name} {theirs}, not {given}")
    return replace(
        config, backbone=spec.backbone, text=text, prediction=config.prediction or cast(Any, spec.prediction),
        schedule=spec.schedule if config.schedule == none.schedule else config.schedule,
        defaults=spec.defaults if config.defaults == none.defaults else config.defaults,
    )  # fmt: skip


def _autoencoder(config: LdmRun, begun: Model | None) -> Autoencoder:
    own = begun is not None and config.autoencoder == config.weights
    found = begun.autoencoder if begun is not None and own else load_vae(Path(config.autoencoder))
    if not isinstance(found, Autoencoder):
        raise UserError(f"autoencoder {config.autoencoder!r} is a tiny one, which cannot stand in a model of ours")
    return found


def _tower(config: LdmRun, begun: Model | None) -> Conditioner:
    """The text tower of the file that the config names, of the model that the training starts from, or a fresh one."""
    source = load(Path(config.text.weights)) if config.text.weights else begun
    text = source.conditioner if source is not None else Conditioner(config.text.tower)
    if source is None and not config.text.train:
        raise UserError("text.train is false: give text.weights, a model file with a trained text tower")
    if text is None or text.config != config.text.tower:
        has = None if text is None else text.config
        raise UserError(f"text.weights {config.text.weights!r} has the tower {has}, not {config.text.tower}")
    return text.train().requires_grad_(config.text.train)


def _check_fit(config: LdmRun, autoencoder: AutoencoderConfig) -> None:
    backbone, size, z_channels = config.backbone, config.data.size, autoencoder.z_channels
    if backbone.in_channels != z_channels or backbone.out_channels not in (z_channels, 2 * z_channels):
        raise UserError(
            f"backbone.in_channels {backbone.in_channels} and out_channels {backbone.out_channels} must both be "
            f"{z_channels}, the channels of the autoencoder {config.autoencoder!r}, or out_channels twice that"
        )
    if backbone.out_channels == 2 * z_channels and config.schedule.kind != "vp":
        raise UserError(f"learned variances are of the steps of vp: schedule.kind {config.schedule.kind} has none")
    tower = config.text.tower
    for name, needs in (("context_dim", tower.states_width), ("vector_dim", tower.vector_width)):
        if (has := getattr(backbone, name)) != needs:
            raise UserError(f"backbone.{name} is {has}: must be {needs}, what text.tower gives")
    if size % (halvings := autoencoder.factor * backbone.factor):
        raise UserError(f"data.size {size} is not a multiple of {halvings}, which halvings need")
