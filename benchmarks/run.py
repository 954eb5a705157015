"""The benchmarks in their short form; what they print goes into docs/performance.md.

    python benchmarks/run.py [NAME ...]      # all of them without a name: about twenty minutes on two quiet cores

Each is a program of its own, with more to ask of it: see its --help.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
SHORT = {
    "samplers": "benchmarks/samplers.py --repeats 5",
    "steps": "benchmarks/steps.py --repeats 2 --variants diffusers fp32 default",
    "load": "benchmarks/load.py --runs 3",
    "training": "benchmarks/training.py --steps 3 --clock cpu",
    "data": "benchmarks/data.py --rounds 2",
}


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
    failed = []
    for name in parser.parse_args().names or SHORT:
        print(f"{name} ...", flush=True)
        ran = subprocess.run(
            [sys.executable, *shlex.split(SHORT[name])], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
        )
        if ran.returncode:
            failed.append(name)
            continue
        print(ran.stdout)
        PAGE.write_text(replaced(PAGE.read_text(), name, SHORT[name], ran.stdout))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
