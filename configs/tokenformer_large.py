"""The model of configs/tokenformer.py with three times as many parameter tokens, for `lmlab grow` to grow it into."""

from dataclasses import replace
from pathlib import Path

from lmlab.models.config import ParameterTokens
from lmlab.recipe import Pretrain, load_recipe


def recipe() -> Pretrain:
    """576 and 2304 parameter tokens."""
    small = load_recipe(str(Path(__file__).with_name("tokenformer.py")))[1]
    return replace(small, model=replace(small.model, parameter_tokens=ParameterTokens(qkv=576)))
