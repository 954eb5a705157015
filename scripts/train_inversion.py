"""Learn a new word from a few pictures, by textual inversion; running the same command again goes on where it stopped.

python scripts/prepare_data.py photos/ --out data/mine --caption-template "a photo of <mine>" --max-captions 0
python scripts/train_inversion.py configs/tune/inversion.yaml --data.shards data/mine/00000.tar --run runs/mine
python scripts/txt2img.py --prompt "a blue <mine>" --embedding runs/mine/model.safetensors

The model is the embedded one, or --weights PATH: ours, Stable Diffusion's single file, or diffusers' folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from ldm import config
from ldm.errors import script
from ldm.training.arguments import split
from ldm.training.config import InversionRun
from ldm.training.loop import train
from ldm.training.tasks.inversion import InversionTask


@script
def main() -> None:
    path, run, overrides = split(sys.argv[1:], str(__doc__), InversionRun)
    settings = config.load(InversionRun, path, overrides)
    torch.manual_seed(settings.run.seed)
    raise SystemExit(train(InversionTask(settings), settings, run).exit_code)


if __name__ == "__main__":
    main()
