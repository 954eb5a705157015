"""Measure a model, or a folder of ready pictures.

python scripts/evaluate.py --model embedded --data data/drawn/val --metrics fid,kid,pr,dc,diversity,judge
python scripts/evaluate.py --model embedded --data data/drawn/val --metrics rfid,psnr,ssim,lpips
python scripts/evaluate.py --images outputs --data data/drawn/val --metrics fid,kid
python -m torch.distributed.run --nproc_per_node 2 -- scripts/evaluate.py --model embedded ...

`make weights` first, and `scripts/train_judge.py` for the metric judge. Stopped, it goes on where it was.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, UserError, script, whole

FLAGS = Parser(__doc__)
FLAGS.add_argument("--model", default="", help="a packaged model's name, or a path; for its own metrics an autoencoder")
FLAGS.add_argument("--images", default="", help="a folder of ready pictures, in place of --model")
FLAGS.add_argument("--data", default="", help="held-back pictures: shards, a folder, a parquet file")
FLAGS.add_argument("--train", default="", help="what the model was trained on, for the metric neighbours")
FLAGS.add_argument("--metrics", default="fid,kid,pr,dc", help="with commas between; a wrong one lists all")
FLAGS.add_argument("--n", type=whole(0), default=0, help="pictures of the data's captions, or of --images (all)")
FLAGS.add_argument("--prompts", default="configs/evaluate/prompts.yaml", help="groups of them, for judge and diversity")
FLAGS.add_argument("--per-prompt", type=whole(1), default=4, help="pictures of each of those prompts (4)")
FLAGS.add_argument("--train-n", type=whole(1), default=1000, help="training pictures to compare with (1000)")
FLAGS.add_argument("--sweep", action="append", default=[], help="cfg_scale=1,3,5 or steps=4,8,16; may be repeated")
FLAGS.add_argument(
    "--set", action="append", default=[], help="how to paint: cfg_scale=4, sampler=ddim (the model's own)"
)
FLAGS.add_argument("--seed", type=whole(0), default=0, help="seed of the first picture (0)")
FLAGS.add_argument("--size", type=whole(0), default=0, help="pixels a side (the model's own)")
FLAGS.add_argument("--rounds", type=whole(0), default=200, help="of the bootstrap (200)")
FLAGS.add_argument("--batch-size", type=whole(1), default=16, help="pictures made at once (16)")
FLAGS.add_argument("--device", default="auto", help="auto, cpu, cuda (auto: this process's)")
FLAGS.add_argument("--precision", default="auto", help="auto, fp32, bf16, fp16 (auto: bf16 where it is native)")
for name, file in (("inception", "inception"), ("lpips", "lpips_alex"), ("judge", "judge")):
    FLAGS.add_argument(f"--{name}", default=f"weights/{file}.safetensors", help=f"weights (weights/{file}.safetensors)")
FLAGS.add_argument("--clip", default="", help="open_clip weights, for the metric clip")
FLAGS.add_argument("--clip-model", default="ViT-B-32", help="their name in open_clip, or a JSON config (ViT-B-32)")
FLAGS.add_argument("--out", type=Path, default=Path("outputs/evaluation"), help="folder for the JSON and the page")
FLAGS.add_argument("--work", type=Path, default=Path("outputs/evaluation/work"), help="folder of what was computed")


@script
def main() -> None:
    given = vars(FLAGS.parse_args())
    from accelerate import PartialState

    from ldm.evaluation import report
    from ldm.evaluation.store import Store
    from ldm.evaluation.suite import Plan, Suite, settings

    out, work, chunk = given.pop("out"), given.pop("work"), given.pop("batch_size")
    sweeps, chosen = settings(given.pop("sweep")), settings(given.pop("set"))
    if any(len(values) > 1 for values in chosen.values()):
        raise UserError("--set takes one value a field; --sweep takes several")
    base = {name: value for name, (value, *_) in chosen.items()}
    state = PartialState(cpu=given["device"] == "cpu", timeout=timedelta(days=7))
    given["device"] = str(state.device) if given["device"] == "auto" else given["device"]
    metrics = tuple(filter(None, given.pop("metrics").split(",")))
    store = Store(work, state.process_index, state.num_processes, state.wait_for_everyone, chunk)
    suite = Suite(Plan(metrics=metrics, **given), store)
    measured = suite.measure(base)
    swept = {axis: {value: suite.measure(base | {axis: value}) for value in values} for axis, values in sweeps.items()}
    if state.is_main_process:
        for name, one in report.write(out, suite, measured, swept)["metrics"].items():
            print(f"{name:28} {one['value']:10.5g}  {one['low']:.5g} .. {one['high']:.5g}  n {one['n']}")
        print(out / "evaluation.json", out / "evaluation.html", sep="\n")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
