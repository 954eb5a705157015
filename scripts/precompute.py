"""Encode the pictures of a training run once, and its captions too with --text; run again, it goes on where it stopped.

python scripts/precompute.py configs/tiny/ldm.yaml --data.shards 'data/{00000..00003}.tar'
accelerate launch --num_processes 2 --cpu scripts/precompute.py configs/tiny/ldm.yaml --data.shards ...

The config and the overrides are those of scripts/train_ldm.py, which reads them with --cache beside: they are kept
beside the shards. Of shards elsewhere, and in folders that are not to be written to, --cache DIR keeps them in DIR.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState

from ldm import config
from ldm.data.cache import BESIDE, fill
from ldm.errors import Parser, script, whole
from ldm.training.config import LdmRun
from ldm.training.progress import Bar
from ldm.training.tasks.denoising import DenoisingTask


@script
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, help="a YAML file, as for scripts/train_ldm.py")
    parser.add_argument("--text", action="store_true", help="keep the text states of every caption, of a frozen tower")
    parser.add_argument("--crops", type=whole(1), default=1, help="views of each picture where data.crop is random (1)")
    parser.add_argument("--batch", type=whole(1), default=64, help="pictures encoded at a time (64)")
    known, overrides = parser.parse_known_args()
    settings = config.load(LdmRun, known.config, overrides)
    cache = settings.cache or BESIDE
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():
        task = DenoisingTask(dataclasses.replace(settings, cache=""))
    task.to(state.device)
    with Bar(len(task.dataset), shown=state.is_main_process) as bar:

        def show(done: int, total: int) -> None:
            bar.steps = total
            bar.step(done - bar.done)
            bar.show("pictures encoded" + (" by the first process" if state.num_processes > 1 else ""))

        share = (state.process_index, state.num_processes)
        encoders = task.encoders(text=known.text, crops=known.crops)
        fill(task.pictures, encoders, cache, batch_size=known.batch, share=share, show=show)
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{len(task.dataset)} pictures are encoded {'beside their shards' if cache == BESIDE else f'in {cache}'}")


if __name__ == "__main__":
    main()
