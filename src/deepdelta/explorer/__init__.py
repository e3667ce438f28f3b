"""Pages to look at: the operator moved by hand, and one token's state through the depth of a model."""

from deepdelta.explorer.operator_page import operator_page
from deepdelta.explorer.token_page import explore, explore_runs

__all__ = ["explore", "explore_runs", "operator_page"]
