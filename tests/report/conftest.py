"""A PNG for the tests of the report."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure


@pytest.fixture(scope="session")
def png() -> bytes:
    figure = Figure(figsize=(1, 1))
    figure.subplots().imshow(np.eye(4))
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
