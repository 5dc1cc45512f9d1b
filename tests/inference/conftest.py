"""A tiny model and the memory of one video, made once for all tests."""

import pytest

from tests.inference import models


@pytest.fixture(scope="session")
def model(tmp_path_factory):
  return models.tiny(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def visual():
  return models.features()


@pytest.fixture(scope="session")
def memory(model, visual):
  return model.encode_memory(visual)
