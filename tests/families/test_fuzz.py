"""A short run of the mutator; `make fuzz` is the long one."""

import importlib.util
from pathlib import Path


def test_a_broken_model_loads_or_is_refused_in_one_line() -> None:
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    assert spec is not None and spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    counts = fuzz.run(150, seed=0)
    assert counts["refused"] > 75 and counts["loaded"] > 5  # the mutator damages, and not only beyond recognition
