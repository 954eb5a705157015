"""The benchmarks in their short form; what they print goes into docs/performance.md.

    python benchmarks/run.py [NAME ...]      # all of them without a name: about twenty-five minutes on two quiet cores

Figures go to runs/bench/NAME.json too. One that fails leaves its section as it was and stops no other. Each is a
program of its own, with more to ask of it: see its --help.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
FOUR = "--variants diffusers 'diffusers tuned' 'ldm fp32' ldm"  # OpenVINO takes minutes to convert, SDXL more memory
SHORT = {
    "samplers": "benchmarks/samplers.py --repeats 5",
    "steps": f"benchmarks/steps.py --apart --unet 64 --repeats 2 {FOUR}",
    "steps-sdxl": f"benchmarks/steps.py --network sdxl --repeats 2 {FOUR}",
    "steps-embedded": "benchmarks/steps.py --network embedded --repeats 15",
    "txt2img": "benchmarks/txt2img.py --repeats 3",
    "load": "benchmarks/load.py --runs 3",
    "scaling": "benchmarks/scaling.py --width 160 --repeats 1 --figure docs/images/scaling.png",
    "training": "benchmarks/training.py --repeats 3",
    "data": "benchmarks/data.py --repeats 2",
}
JSON = ROOT / "runs" / "bench"
PEERS = ROOT / ".venv" / "bench"  # where the Makefile puts requirements-bench.txt
LONGEST = 3600  # seconds


def replaced(page: str, name: str, command: str, printed: str) -> str:
    """The page with a benchmark's section, which stands between two marks, renewed. ValueError where it has none."""
    section = f"<!-- {name} -->\n```\n$ python {command}\n{printed.strip()}\n```\n<!-- end -->"
    page, count = re.subn(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _: section, page, count=1, flags=re.DOTALL)
    if not count:
        raise ValueError(f"the page has no section between <!-- {name} --> and <!-- end -->")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *SHORT], help="which (all)", default=[])
    failed, began = [], time.monotonic()
    paths = [os.environ.get("PYTHONPATH", ""), str(PEERS) if PEERS.is_dir() else ""]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for name in parser.parse_args().names or SHORT:
        print(f"{name} ...", flush=True)
        command, start = [sys.executable, *shlex.split(SHORT[name])], time.monotonic()
        command += ["--json", str(JSON / f"{name}.json")]
        try:
            ran = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=LONGEST
            )
            PAGE.write_text(replaced(PAGE.read_text(), name, SHORT[name], ran.stdout))
        except (subprocess.SubprocessError, ValueError) as error:
            failed.append(name)
            print(error, file=sys.stderr)
            continue
        print(f"{ran.stdout}{time.monotonic() - start:.0f} s", flush=True)
    print(f"{time.monotonic() - began:.0f} s in all; figures as JSON in {JSON.relative_to(ROOT)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
