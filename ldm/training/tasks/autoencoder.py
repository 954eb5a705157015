"""Training an autoencoder, after Esser et al. 2021 (arXiv:2012.09841) and Rombach et al. 2022, appendix G."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from ldm.checkpoints import native
from ldm.data.dataset import open_dataset, to_image
from ldm.errors import UserError
from ldm.evaluation.inception import Inception
from ldm.evaluation.reconstruction import reconstruction_report
from ldm.families.vae import load_vae
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig, Gaussian, normalised
from ldm.models.discriminator import PatchDiscriminator, adaptive_weight, hinge_d, hinge_g, r1
from ldm.models.perceptual import LPIPS
from ldm.shapes import Image
from ldm.training import keyed
from ldm.training.config import VaeRun
from ldm.training.heldback import HeldBack
from ldm.training.learner import Batch, Losses, Objective, summed
from ldm.training.memory import recompute
from ldm.training.optim import check_patterns, freeze

SHOWN = 8  # pictures of a sample sheet


class AutoencoderTask:
    """Objectives: the autoencoder's, and the discriminator's unless its weight is 0.

    UserError where parts do not fit, or LPIPS is wanted and its weights are not there.
    """

    averaged = ("autoencoder",)

    def __init__(self, config: VaeRun) -> None:
        self.config, self.loss = config, config.loss
        self.teacher = _teacher(config)
        self.autoencoder = _autoencoder(config)
        if self.teacher is not None:
            taught = self.teacher.config
            self.autoencoder.config = replace(self.autoencoder.config, mean=taught.mean, std=taught.std)
        self.model = self.autoencoder.config
        if config.data.size % self.model.factor:
            raise UserError(f"data.size {config.data.size} is not a multiple of the model's factor {self.model.factor}")
        if self.loss.lpips and not self.loss.lpips_weights:
            remedy = "give loss.lpips_weights a file (`make weights` makes it), or set loss.lpips 0"
            raise UserError(f"loss.lpips is on: {remedy}")
        self.dataset = open_dataset(config.data, batch=config.run.batch_size)
        self.held_back = HeldBack(config.data, config.run.validate_on)
        self.discriminator = PatchDiscriminator(config.discriminator)
        self.perceptual = LPIPS.load(self.loss.lpips_weights) if self.loss.lpips_weights else None
        self.inception = Inception.load(self.loss.fid_weights) if self.loss.fid_weights else None
        self.networks: dict[str, nn.Module] = {"autoencoder": self.autoencoder}
        if self.loss.adversarial:
            self.networks["discriminator"] = self.discriminator
        freeze(self.networks, config.freeze)
        check_patterns(self.networks, config.optim.rates, "optim.rates")
        decoder, self.balance = self.autoencoder.decoder, None
        if self.loss.adversarial and self.loss.adaptive:
            if not self._last_layer.requires_grad:
                raise UserError("loss.adaptive looks at decoder.conv_out.weight, which freeze names: set it to false")
            self.networks["balance"] = self.balance = Balance(self._last_layer)  # nothing to train, but to keep
        if config.run.compile:
            # the last layer stays outside: the adaptive weight asks for its gradient alone
            for part in (self.autoencoder.encoder, decoder.mid, *decoder.up):
                part.compile()
        if config.run.recompute:
            recompute(self.autoencoder)
        self._reconstruction: Tensor
        self._state = ""

    def to(self, device: torch.device) -> None:
        self.device = device
        for module in (*self.networks.values(), self.teacher, self.perceptual, self.inception):
            if module is not None:
                module.to(device)

    @property
    def _last_layer(self) -> Tensor:
        return self.autoencoder.decoder.conv_out.weight

    def objectives(self) -> list[Objective]:
        losses = {"autoencoder": (self.autoencoder_loss, 0)}
        if self.loss.adversarial:
            losses["discriminator"] = (self.discriminator_loss, self.loss.adversarial_start)
        return [Objective(name, {name: self.networks[name]}, *how) for name, how in losses.items()]

    def autoencoder_loss(self, batch: Batch) -> Losses:
        """The losses on pixels are differentiated at the pixels, once; the decoder then goes back along their sum."""
        image = to_image(batch["image"])
        posterior = self.autoencoder.encode(image)
        noise = keyed.normal(self.config.run.seed, "posterior", batch["position"], tuple(posterior.mean.shape[1:]))
        taught = None if self.teacher is None else self.teacher.encode(image)
        reconstruction = self.autoencoder.decode((taught or posterior).sample(noise)).float()
        self._reconstruction = pixels = reconstruction.detach().requires_grad_()

        difference = pixels - image
        terms = {"pixel": difference.abs().mean() if self.loss.pixel == "l1" else difference.square().mean()}
        total = terms["pixel"]
        if self.loss.lpips and self.perceptual:
            terms["lpips"] = self.perceptual(pixels, image).mean()
            total = total + self.loss.lpips * terms["lpips"]
        (direction,) = torch.autograd.grad(total, pixels)
        if self.loss.adversarial and batch["step"] >= self.loss.adversarial_start:
            terms["gan"] = hinge_g(self.discriminator(pixels))
            (push,) = torch.autograd.grad(terms["gan"], pixels)
            weight = torch.full((), self.loss.adversarial, device=self.device)
            if self.balance is not None:
                terms["gan_weight"] = self.balance.at(batch["step"]).clone()
                weight = weight * terms["gan_weight"]
                self.balance.see(*(self._at_last_layer(reconstruction, way) for way in (direction, push)))
            direction = direction + weight * push
            total = total + weight * terms["gan"]
        rest = self._latent_terms(posterior, image, terms) if taught is None else _likeness(posterior, taught, terms)
        backward = (reconstruction * direction).sum() + rest
        # the value of one, the gradient of the other
        return {"loss": backward + (total + rest - backward).detach()} | terms

    def _at_last_layer(self, reconstruction: Tensor, direction: Tensor) -> Tensor:
        """The gradient at the decoder's last layer of a loss that has this one at the pixels."""
        return torch.autograd.grad((reconstruction * direction).sum(), self._last_layer, retain_graph=True)[0]

    def _latent_terms(self, posterior: Gaussian, image: Image, terms: Losses) -> Tensor:
        """The loss on latents: of the KL, or of a codebook (VQGAN, Eq. 4), whose use is noted too."""
        codebook = self.autoencoder.decoder.codebook
        if codebook is None:
            terms["kl"] = posterior.kl(self.loss.free_bits).mean() / image[0].numel()
            return self.loss.kl * terms["kl"]
        z = self.autoencoder.raw(posterior.mean).float()
        near = codebook.nearest(z).float()
        terms["codebook"] = (near - z.detach()).square().mean()
        terms["commit"] = (z - near.detach()).square().mean()
        share = codebook.ids(z).flatten().bincount(minlength=len(codebook.codes)).float() / z[:, 0].numel()
        terms["codes_used"] = (share > 0).float().mean()
        terms["perplexity"] = torch.special.entr(share).sum().exp()
        return terms["codebook"] + self.loss.commit * terms["commit"]

    def discriminator_loss(self, batch: Batch) -> Losses:
        """Real pictures against the reconstructions that `autoencoder_loss` has just made of them."""
        image, terms = to_image(batch["image"]), {}
        if self.loss.r1:
            real, terms["r1"] = r1(self.discriminator, image)
        else:
            real = self.discriminator(image)
        fake = self.discriminator(self._reconstruction.detach())
        terms |= {"real": real.float().mean(), "fake": fake.float().mean()}
        terms |= {"accuracy_real": (real > 0).float().mean(), "accuracy_fake": (fake < 0).float().mean()}
        return {"loss": hinge_d(real, fake) + 0.5 * self.loss.r1 * terms.get("r1", 0.0)} | terms

    def remarks(self, record: Mapping[str, Any]) -> list[str]:
        """What a person should hear of a line of the log: a discriminator that has stopped to teach."""
        real, fake = (record.get(f"discriminator_accuracy_{kind}", 0.5) for kind in ("real", "fake"))
        state = ""
        if min(real, fake) > 0.995:
            state = "tells every picture: its gradient says little. Take loss.r1, discriminator.norm spectral"
        elif abs(record.get("discriminator_real", 1) - record.get("discriminator_fake", 0)) < 1e-3:
            state = "answers the same to all pictures: it has learned nothing. Take a lower optim.lr"
        news, self._state = state != self._state, state
        return [f"the discriminator {state}, or a later loss.adversarial_start"] if state and news else []

    def validate(self) -> dict[str, float]:
        """PSNR (dB), SSIM and, where their weights are given, LPIPS and rFID of held-back pictures."""
        features, size = None if self.inception is None else self._features, self.config.run.batch_size
        images = (self.held_back.images(start, start + size) for start in range(0, len(self.held_back), size))
        report = reconstruction_report(self.autoencoder, images, self.perceptual, features)
        return {f"{self.held_back.name}_{name}": value for name, value in report.items()}

    def _features(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Tensor:
        """Inception's, in fp32, in which FID is defined."""
        assert self.inception is not None
        with torch.autocast(self.device.type, enabled=False):
            pool: Tensor = self.inception(pixels).pool
        return pool

    def sample(self) -> tuple[Image, int]:
        originals = self.held_back.images(0, SHOWN).to(self.device)
        return torch.cat([originals, self.autoencoder.decode(self.autoencoder.encode(originals).mode)]), len(originals)

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        spec = native.ModelSpec(self.measured(), self.config.data.size, provenance=provenance)
        native.save(path, spec, {"autoencoder": self.autoencoder})

    def measured(self) -> AutoencoderConfig:
        """The config with mean and deviation of each latent channel over `statistics` training images.

        Those of a frozen encoder, or of a teacher, stay: models that were trained in its latents go on to fit.
        """
        frozen = normalised(self.model) and not any(p.requires_grad for p in self.autoencoder.encoder.parameters())
        if frozen or self.teacher is not None:
            return self.model
        count, size = 0, self.config.run.batch_size
        sums = torch.zeros(2, self.model.z_channels, dtype=torch.float64, device=self.device)
        for start in range(0, self.config.statistics, size):
            batch = self.dataset.__getitems__(range(start, min(start + size, self.config.statistics)))
            posterior = self.autoencoder.encode(to_image(batch["image"].to(self.device)))
            mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
            count += mean[:, 0].numel()
            sums += torch.stack([mean.sum((0, 2, 3)), (mean**2 + variance).sum((0, 2, 3))])
        mean, square = sums / count
        old_mean, old_std = (torch.tensor(v, device=self.device) for v in (self.model.mean, self.model.std))
        std = (square - mean**2).sqrt()
        new_mean, new_std = (tuple(v.tolist()) for v in (old_mean + old_std * mean, old_std * std))
        return replace(self.model, mean=new_mean, std=new_std)


class Balance(nn.Module):
    """VQGAN's adaptive weight of the step before, the same in all parts of a batch and processes; at first 0."""

    weight: Tensor
    pending: Tensor  # sums over the parts and processes of the step in hand, of both gradients

    def __init__(self, last_layer: Tensor) -> None:
        super().__init__()
        self.step = -1
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("pending", torch.zeros(2, *last_layer.shape))

    def at(self, step: int) -> Tensor:
        if step != self.step:
            self.step = step
            self.weight.copy_(adaptive_weight(*self.pending))
            self.pending.zero_()
        return self.weight

    def see(self, rec: Tensor, gan: Tensor) -> None:
        """Note the gradients of both losses at the last layer; those that are not finite do not count."""
        both = torch.stack([rec, gan]).detach().float()
        self.pending += summed(torch.where(both.isfinite().all(), both, 0.0))


def _likeness(posterior: Gaussian, taught: Gaussian, terms: Losses) -> Tensor:
    """How far the encoder's answers are from its teacher's; the weights keep it below the losses on pixels."""
    terms["latent"] = (posterior.mean.float() - taught.mean.float()).square().mean()
    terms["spread"] = (posterior.logvar.float() - taught.logvar.float()).square().mean()
    return 0.2 * terms["latent"] + 0.005 * terms["spread"]


def _teacher(config: VaeRun) -> Autoencoder | None:
    if not config.teacher:
        return None
    found, shape = load_vae(Path(config.teacher)), (config.model.z_channels, config.model.factor)
    if not isinstance(found, Autoencoder) or (found.config.z_channels, found.factor) != shape:
        raise UserError(
            f"teacher {config.teacher!r} must be an autoencoder of {shape[0]} channels and factor {shape[1]}, as the "
            "model is"
        )
    return found.requires_grad_(False)


def _autoencoder(config: VaeRun) -> Autoencoder:
    """Fresh weights, or those of the file that the config names, with its latent statistics."""
    if not config.weights:
        return Autoencoder(config.model)
    found = load_vae(Path(config.weights))
    if not isinstance(found, Autoencoder):
        raise UserError(f"weights {config.weights!r} is a tiny autoencoder, which has no posterior to train")
    shape, wanted = (replace(model, mean=(0.0,), std=(1.0,)) for model in (found.config, config.model))
    if wanted not in (shape, AutoencoderConfig()):
        raise UserError(f"weights {config.weights!r} has the autoencoder {shape}, not {wanted}")
    return found.requires_grad_(True).train()
