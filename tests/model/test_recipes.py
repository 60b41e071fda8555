"""The recipes of named architectures have the sizes that their papers state."""

import pytest

from model.count import parameter_count
from train.config_file import load_config

# In millions, as published (PaLM 8.63 B; the others from the counts of the released weights).
PUBLISHED = {
    "gpt2": "124",
    "llama3": "8030",
    "qwen3": "596",
    "mistral": "7242",
    "mixtral": "46703",
    "deepseek_moe": "16376",
    "palm": "8632",
    "gemma": "2614",
    "t5": "61",
}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_parameters_are_as_published(name: str, millions: str) -> None:
    model = load_config(name, ["run.steps=1", "data.path=unused"]).config.model
    assert f"{parameter_count(model).total / 1e6:.0f}" == millions
