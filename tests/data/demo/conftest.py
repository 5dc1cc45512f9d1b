import pytest

from hourjax.data.demo import build


@pytest.fixture(scope="session")
def small():
  """Options of three training videos and one test video."""
  return build.Options(train_videos=3, test_scale=0.02, conversations=2)


@pytest.fixture(scope="session")
def built(tmp_path_factory, small):
  """A folder with that data set; tests must leave it as it is."""
  folder = tmp_path_factory.mktemp("demo")
  build.build(folder, small)
  return folder
