import pytest

from tests.launch import clouds


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
  return clouds.make_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def cloud(tmp_path, checkout):
  cloud = clouds.Cloud(tmp_path / "cloud", checkout)
  yield cloud
  cloud.close()
