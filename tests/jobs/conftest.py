"""What the tests of the fine-tuning job share: small data."""

from pathlib import Path

import pytest
from finetuning import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of text for a language model, and two classes of them."""
    return write_data(tmp_path_factory.mktemp("data"))
