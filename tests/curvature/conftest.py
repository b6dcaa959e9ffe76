"""Strict dtype promotion: nothing in this room may promote by accident."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
  with jax.numpy_dtype_promotion('strict'):
    yield
