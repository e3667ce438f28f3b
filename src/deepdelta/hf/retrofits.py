"""What the Auto classes of transformers make of what `save_pretrained` of a retrofitted model wrote."""

import json
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class

from deepdelta.errors import UserError
from deepdelta.retrofitting.core import record_of, refreeze, retrofit, retrofitted
from deepdelta.retrofitting.huggingface import MARK, MODEL_TYPE, PLAIN, unmarked, write


class DeltaRetrofitConfig(transformers.PretrainedConfig):
    """The settings of a plain model, and what `retrofit` was told."""

    model_type = MODEL_TYPE

    def __init__(self, plain: Any = None, mark: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plain, self.mark = plain, mark

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        mark, plain = config_dict.get(MARK), config_dict.get(PLAIN)
        if not isinstance(mark, dict) or not isinstance(plain, str):
            raise UserError(
                f"config.json must hold '{MARK}' and '{PLAIN}' of one retrofit, and lacks one; models that share their "
                "settings and were retrofitted differently are to be saved with deepdelta.save_retrofit."
            )
        settings = json.loads(plain)
        unused = kwargs.pop("return_unused_kwargs", False)
        kind = transformers.CONFIG_MAPPING[settings["model_type"]]
        config, rest = kind.from_dict(settings, return_unused_kwargs=True, **kwargs)
        made = cls(plain=config, mark=mark, architectures=config.architectures)
        return (made, rest) if unused else made

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        write(json_file_path, unmarked(self.plain), [self.mark], use_diff)


class Loader:
    """What an Auto class finds for these settings: it makes what that class makes of the plain ones, retrofitted."""

    config_class = DeltaRetrofitConfig
    auto: Any

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: DeltaRetrofitConfig, **kwargs: Any) -> Any:
        """The model, loaded as transformers loads its own: in any dtype and on any device map.

        Raises:
            UserError: the Auto class has no model for the plain settings, or what was retrofitted is another part.
        """
        kind = cls._kind(config)
        wanted = kwargs.pop("output_loading_info", False)
        loading = _loading(kind, config.mark)
        model, info = loading.from_pretrained(path, *args, config=config.plain, output_loading_info=True, **kwargs)
        model.__class__ = kind
        if missing := sorted(set(record_of(model).keys) & set(info["missing_keys"])):
            raise UserError(f"{path} does not hold what the retrofit added: missing tensors {missing[:5]}.")
        refreeze(model)
        return (model, info) if wanted else model

    @classmethod
    def _from_config(cls, config: DeltaRetrofitConfig, **kwargs: Any) -> Any:
        return _retrofitted(cls._kind(config)._from_config(unmarked(config.plain), **kwargs), config.mark)

    @classmethod
    def _kind(cls, config: DeltaRetrofitConfig) -> Any:
        if type(config.plain) not in cls.auto._model_mapping:
            raise UserError(
                f"{cls.auto.__name__} has no model for {type(config.plain).__name__}; this is a retrofit of a "
                f"{' or '.join(config.architectures or ['model'])}."
            )
        return _get_model_class(config.plain, cls.auto._model_mapping)


def _loading(kind: type, mark: dict[str, Any]) -> Any:
    """A class like `kind` whose models are retrofitted before their weights are loaded."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        _retrofitted(self, mark)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def _retrofitted(model: Any, mark: dict[str, Any]) -> Any:
    retrofit(model, **mark["options"])
    found = list(retrofitted(model).families)
    if found != mark["families"]:
        raise UserError(
            f"this is a retrofit of {mark['families']}, and {type(model).__name__} holds {found}: a part of a model is "
            "kept with deepdelta.save_retrofit."
        )
    return model


def register() -> None:
    """Make the model type known to transformers."""
    transformers.AutoConfig.register(MODEL_TYPE, DeltaRetrofitConfig, exist_ok=True)
    known: list[Any] = [one for one in vars(modeling_auto).values() if isinstance(one, type)]
    for auto in known:
        if issubclass(auto, _BaseAutoModelClass) and auto._model_mapping is not None:
            loader = type(f"Retrofitted{auto.__name__}", (Loader,), {"auto": auto, "__module__": __name__})
            auto.register(DeltaRetrofitConfig, loader, exist_ok=True)
