"""What a construction's calls and books cost, measured on little."""

from hourjax.benchmarks import construct


def test_figures(tmp_path):
  sizes = construct.Sizes(videos=2, videos_with_frames=1, stored=300, left=2)
  found = construct.measure_construct(tmp_path, sizes)
  for name in ("calls without frames", "calls with frames"):
    assert found[name]["calls"] > 150 and found[name]["calls a second"] > 0
  books = found["bookkeeping"]
  assert books["videos"] == 300 and books["answers"] == 300 * 42
  assert 0 < books["to the first call, s"] < 60
  assert 50 < books["MiB"] < 2000
