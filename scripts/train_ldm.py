"""Train a latent-diffusion model on shards; running the same command again goes on where it stopped.

python scripts/train_ldm.py configs/tiny/ldm.yaml --data.shards 'data/{00000..00003}.tar' --run runs/ldm

The autoencoder is the embedded model's, or --autoencoder runs/vae/model.safetensors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ldm.errors import script
from ldm.training.arguments import train_by
from ldm.training.config import LdmRun
from ldm.training.tasks.denoising import DenoisingTask


@script
def main() -> None:
    raise SystemExit(train_by(LdmRun, DenoisingTask, str(__doc__)))


if __name__ == "__main__":
    main()
