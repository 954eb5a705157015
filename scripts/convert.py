"""Convert a model between layouts; the way there and back is the identity, tensor for tensor.

python scripts/convert.py embedded half.safetensors --to ldm --dtype fp16
python scripts/convert.py v1-5-pruned.ckpt sd15-folder --to diffusers
python scripts/convert.py learned_embeds.bin style.safetensors --to tensors
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, UserError, script

FLAGS = Parser(__doc__)
FLAGS.add_argument("model", help="a packaged model's name, a file, or a diffusers folder; .ckpt and .bin too")
FLAGS.add_argument("out", type=Path, help="the file or folder to write")
FLAGS.add_argument(
    "--to",
    required=True,
    choices=("ldm", "diffusers", "compvis", "tensors"),
    help=("the layout to write; tensors: those of a pickled file under their names, as of an embedding or LoRA"),
)
FLAGS.add_argument("--dtype", choices=("fp16", "bf16", "fp32", "int8"), help="of weights (as they are); int8: ldm only")
FLAGS.add_argument("--vae", type=Path, help="an autoencoder in place of the model's own: a file or folder")


@script
def main() -> None:
    args = FLAGS.parse_args()

    from ldm import pipeline  # after the flags are read: what follows takes seconds
    from ldm.checkpoints import pickled
    from ldm.checkpoints.integrity import read_header
    from ldm.families.convert import convert

    if args.out.is_file():
        try:
            read_header(args.out)
        except UserError:
            raise UserError(
                f"{str(args.out)!r} is there and no model, and is left as it is: give another name"
            ) from None
    if args.to == "tensors":
        pickled.to_safetensors(Path(args.model), args.out)
        print(args.out)
        return
    with tempfile.TemporaryDirectory(prefix=".convert.", dir=pickled.room(args.out)) as scratch:
        safe = pickled.unpacked(pipeline.find(args.model), Path(scratch))
        convert(safe, args.out, args.to, args.dtype, args.vae)
    print(args.out)


if __name__ == "__main__":
    main()
