"""Teach a student to paint in few steps what its teacher paints in many; the same command again goes on.

python scripts/train_distil.py configs/tune/distil.yaml --data.shards 'data/mine/{00000..00003}.tar' --run runs/student
python scripts/txt2img.py --model runs/student/model.safetensors --prompt "a red car"

The teacher is the embedded model, or --weights PATH; with --lora.rank 16 adapters learn it in place of the whole UNet.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ldm.errors import script
from ldm.training.arguments import train_by
from ldm.training.config import DistilRun
from ldm.training.tasks.distil import DistilTask


@script
def main() -> None:
    raise SystemExit(train_by(DistilRun, DistilTask, str(__doc__)))


if __name__ == "__main__":
    main()
