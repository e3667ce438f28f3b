"""Networks that already exist: `retrofit` gives them delta residuals without changing what they compute."""

from deepdelta.retrofitting.config import RetrofitConfig, RetrofitReport
from deepdelta.retrofitting.core import retrofit, retrofitted, undo_retrofit
from deepdelta.retrofitting.describing import ALL, Addition, Block, Branch, Stack
from deepdelta.retrofitting.families import register
from deepdelta.retrofitting.saving import load_retrofit, save_retrofit

__all__ = [
    "ALL",
    "Addition",
    "Block",
    "Branch",
    "RetrofitConfig",
    "RetrofitReport",
    "Stack",
    "load_retrofit",
    "register",
    "retrofit",
    "retrofitted",
    "save_retrofit",
    "undo_retrofit",
]
