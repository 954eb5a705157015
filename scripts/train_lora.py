"""Train a LoRA or DoRA on a model of any layout; running the same command again goes on where it stopped.

python scripts/train_lora.py configs/tune/lora.yaml --data.shards 'data/mine/{00000..00003}.tar' --run runs/lora
python scripts/txt2img.py --prompt "a red car" --lora runs/lora/model.safetensors:0.8

The model is the embedded one, or --weights PATH: ours, Stable Diffusion's single file, or diffusers' folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ldm.errors import script
from ldm.training.arguments import train_by
from ldm.training.config import LoraRun
from ldm.training.tasks.lora import LoraTask


@script
def main() -> None:
    raise SystemExit(train_by(LoraRun, LoraTask, str(__doc__)))


if __name__ == "__main__":
    main()
