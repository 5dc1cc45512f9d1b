"""Names of test files, which pytest tells apart by their last part alone."""

import collections
from pathlib import Path


def test_no_two_test_files_share_a_name():
  found = collections.defaultdict(list)
  for path in Path(__file__).parent.rglob("test_*.py"):
    found[path.name].append(str(path))
  twice = {name: paths for name, paths in found.items() if len(paths) > 1}
  assert len(found) > 100 and not twice
