"""The data of the trainings' tests, which serves here too."""

from tests.training.conftest import data

__all__ = ["data"]
