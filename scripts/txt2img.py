"""Paint pictures from text, and from pictures.

python scripts/txt2img.py --prompt "a red apple" "a blue sofa" --n 4 --seed 1 --grid
python scripts/txt2img.py --prompt "a green apple" --init-image outputs/00000.png --strength 0.6
python scripts/txt2img.py --from-image outputs/00000.png
"""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads wait asleep: on a busy machine several times faster
gc.set_threshold(100_000)  # imports make many objects and hardly any garbage
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import request
from ldm.errors import Parser, script

FLAGS = Parser(__doc__)
request.add_flags(FLAGS, request.Run)
request.add_flags(FLAGS, request.Request)


@script
def main() -> None:
    args = FLAGS.parse_args()
    run = request.checked(request.Run(**request.given(args, request.Run)))

    from ldm import painting  # after the flags are read: what follows takes seconds
    from ldm.models import speed

    speed.keep_memory()
    for path in painting.run(run, request.given(args, request.Request)):
        print(path, flush=True)


if __name__ == "__main__":
    main()
