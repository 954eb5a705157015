"""Train a ControlNet on a model of any layout; running the same command again goes on where it stopped.

python scripts/train_controlnet.py configs/tune/controlnet.yaml --data.shards data/mine/00000.tar --run runs/edges
python scripts/txt2img.py --prompt "a car" --control runs/edges/controlnet --control-image a.png --control-hint canny

The model is the embedded one, or --weights PATH: ours, Stable Diffusion's single file, or diffusers' folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ldm.errors import script
from ldm.training.arguments import train_by
from ldm.training.config import ControlRun
from ldm.training.tasks.controlnet import ControlTask


@script
def main() -> None:
    raise SystemExit(train_by(ControlRun, ControlTask, str(__doc__)))


if __name__ == "__main__":
    main()
