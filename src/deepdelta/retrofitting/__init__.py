"""Networks that already exist: `retrofit` gives them delta residuals without changing what they compute."""

from deepdelta.retrofitting.config import RetrofitConfig, RetrofitReport
from deepdelta.retrofitting.core import retrofit, retrofitted, undo_retrofit
from deepdelta.retrofitting.saving import load_retrofit, save_retrofit

__all__ = [
    "RetrofitConfig",
    "RetrofitReport",
    "load_retrofit",
    "retrofit",
    "retrofitted",
    "save_retrofit",
    "undo_retrofit",
]
