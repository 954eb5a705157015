"""Train a latent-diffusion model on shards; running the same command again goes on where it stopped.

python scripts/train_ldm.py configs/tiny/ldm.yaml --data.shards 'data/{00000..00003}.tar' --run runs/ldm

The autoencoder is the embedded model's, or --autoencoder runs/vae/model.safetensors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from ldm import config
from ldm.errors import script
from ldm.training.arguments import split
from ldm.training.config import LdmRun
from ldm.training.loop import train
from ldm.training.memory import announce
from ldm.training.tasks.denoising import DenoisingTask


@script
def main() -> None:
    path, run, overrides = split(sys.argv[1:], str(__doc__), LdmRun)
    settings = config.load(LdmRun, path, overrides)
    torch.manual_seed(settings.run.seed)  # of the fresh weights: all else is keyed
    task = DenoisingTask(settings)
    announce(task, settings)
    raise SystemExit(train(task, settings, run).exit_code)


if __name__ == "__main__":
    main()
