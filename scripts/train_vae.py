"""Train an autoencoder on shards; running the same command again goes on where it stopped.

python scripts/train_vae.py configs/tiny/vae.yaml --data.shards 'data/{00000..00003}.tar' --run runs/vae
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ldm.errors import script
from ldm.training.arguments import train_by
from ldm.training.config import VaeRun
from ldm.training.tasks.autoencoder import AutoencoderTask


@script
def main() -> None:
    raise SystemExit(train_by(VaeRun, AutoencoderTask, str(__doc__)))


if __name__ == "__main__":
    main()
