"""Learn a new word from a few pictures, by textual inversion; running the same command again goes on where it stopped.

python scripts/prepare_data.py photos/ --out data/mine --caption-template "a photo of <mine>" --max-captions 0
python scripts/train_inversion.py configs/tune/inversion.yaml --data.shards data/mine/00000.tar --run runs/mine
python scripts/txt2img.py --prompt "a blue <mine>" --embedding runs/mine/model.safetensors

The model is the embedded one, or --weights PATH: ours, Stable Diffusion's single file, or diffusers' folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ldm.errors import script
from ldm.training.arguments import train_by
from ldm.training.config import InversionRun
from ldm.training.tasks.inversion import InversionTask


@script
def main() -> None:
    raise SystemExit(train_by(InversionRun, InversionTask, str(__doc__)))


if __name__ == "__main__":
    main()
