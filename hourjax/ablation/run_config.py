"""A run's configuration, as `python -m hourjax.train` takes one.

--config=hourjax/ablation/run_config.py:FOLDER/config.json
"""

import json
import pathlib

from ml_collections import ConfigDict


def get_config(path: str) -> ConfigDict:
  """Returns the configuration in a JSON file."""
  return ConfigDict(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
