import pytest

from hourjax.inference.terminal import image_paths


@pytest.mark.parametrize(
  "values, expected",
  [
    ([], []),
    (["a.png"], ["a.png"]),
    (["a.png", "none.png"], ["a.png", "none.png"]),
    (["a.png,b.png"], ["a.png", "b.png"]),
    (["a.png, b.png"], ["a.png", "b.png"]),
    (["x,y.png"], ["x,y.png"]),
    (["x,y.png,a.png"], ["x,y.png", "a.png"]),
    (["a.png,x,y.png", "b.png"], ["a.png", "x,y.png", "b.png"]),
    (["none,y.png"], ["none", "y.png"]),
    (["a.png,"], ["a.png", ""]),  # which `check_options` refuses
    ([""], [""]),
  ],
)
def test_names_with_commas(tmp_path, monkeypatch, values, expected):
  monkeypatch.chdir(tmp_path)
  for name in ("a.png", "b.png", "x,y.png"):
    (tmp_path / name).touch()
  assert image_paths(values) == expected
