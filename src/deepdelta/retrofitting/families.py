"""The blocks of the library transformers, which is never imported here, as its releases 5.24 and 4.57 have them."""

from dataclasses import replace

from torch import Tensor, nn

from deepdelta.errors import UserError
from deepdelta.retrofitting.describing import ALL, Addition, Block, Blocks, Branch, Stack, Takes, full_name


def _two(attention: Branch, mlp: Branch) -> Block:
    return Block((Addition("attention", (attention,)), Addition("mlp", (mlp,))))


_NO_ENCODER = {"encoder_hidden_states": "", "encoder_attention_mask": ""}
LLAMA = _two(
    Branch(("self_attn",), "input_layernorm", ALL),
    Branch(("mlp",), "post_attention_layernorm"),
)
PHI3 = _two(
    Branch(("self_attn", "resid_attn_dropout"), "input_layernorm", ALL),
    Branch(("mlp", "resid_mlp_dropout"), "post_attention_layernorm"),
)
GEMMA2 = _two(
    Branch(("self_attn", "post_attention_layernorm"), "input_layernorm", ALL),
    Branch(("mlp", "post_feedforward_layernorm"), "pre_feedforward_layernorm"),
)
OLMO2 = _two(
    Branch(("self_attn", "post_attention_layernorm"), takes=ALL),
    Branch(("mlp", "post_feedforward_layernorm")),
)
VIT = _two(
    Branch(("attention", "dropout"), "layernorm_before", ALL),
    Branch(("mlp", "dropout"), "layernorm_after"),
)
DINOV2 = _two(
    Branch(("attention", "layer_scale1", "drop_path"), "norm1", ALL),
    Branch(("mlp", "layer_scale2", "drop_path"), "norm2"),
)
CLIP = _two(
    Branch(("self_attn",), "layer_norm1", ALL),
    Branch(("mlp",), "layer_norm2"),
)
GPT2 = Block(
    (
        Addition("attention", (Branch(("attn",), "ln_1", _NO_ENCODER),)),
        Addition(
            "cross_attention",
            (
                Branch(
                    ("crossattention",),
                    "ln_cross_attn",
                    (
                        *("cache", "past_key_values", "attention_mask", "head_mask", "output_attentions"),
                        *("encoder_hidden_states", "encoder_attention_mask"),
                    ),
                ),
            ),
            given="encoder_hidden_states",
        ),
        Addition("mlp", (Branch(("mlp",), "ln_2"),)),
    )
)
_NEOX = (
    Branch(("attention", "post_attention_dropout"), "input_layernorm", ALL),
    Branch(("mlp", "post_mlp_dropout"), "post_attention_layernorm"),
)
GPT_NEOX = (
    Block((Addition("branches", _NEOX),), when={"use_parallel_residual": True}),
    Block(_two(*_NEOX).additions, when={"use_parallel_residual": False}),
)
BERT = Block(
    (
        Addition(
            "attention",
            (Branch(("attention.self", "attention.output.dense", "attention.output.dropout"), takes=_NO_ENCODER),),
            after="attention.output.LayerNorm",
        ),
        Addition(
            "cross_attention",
            (
                Branch(
                    ("crossattention.self", "crossattention.output.dense", "crossattention.output.dropout"),
                    takes={"attention_mask": "", "encoder_attention_mask": "attention_mask"},
                ),
            ),
            after="crossattention.output.LayerNorm",
            given="encoder_hidden_states",
        ),
        Addition("mlp", (Branch(("intermediate", "output.dense", "output.dropout")),), after="output.LayerNorm"),
    ),
    when={"chunk_size_feed_forward": 0},
)
_OPT_ATTENTION, _OPT_MLP = ("self_attn", "dropout"), ("fc1", "activation_fn", "fc2", "dropout")
_OPT_TAKES: Takes = {"use_cache": ""}
OPT = (
    Block(
        _two(
            Branch(_OPT_ATTENTION, "self_attn_layer_norm", _OPT_TAKES), Branch(_OPT_MLP, "final_layer_norm")
        ).additions,
        when={"do_layer_norm_before": True},
    ),
    Block(
        (
            Addition("attention", (Branch(_OPT_ATTENTION, takes=_OPT_TAKES),), after="self_attn_layer_norm"),
            Addition("mlp", (Branch(_OPT_MLP),), after="final_layer_norm"),
        ),
        when={"do_layer_norm_before": False},
    ),
)
_WHISPER_MLP = Branch(("fc1", "activation_fn", "activation_dropout", "fc2", "dropout"), "final_layer_norm")
WHISPER_ENCODER = _two(Branch(("self_attn", "dropout"), "self_attn_layer_norm", ALL), _WHISPER_MLP)
WHISPER_DECODER = Block(
    (
        Addition(
            "attention",
            (Branch(("self_attn", "dropout"), "self_attn_layer_norm", {"use_cache": ""} | _NO_ENCODER),),
        ),
        Addition(
            "cross_attention",
            (
                Branch(
                    ("encoder_attn", "dropout"),
                    "encoder_attn_layer_norm",
                    {
                        "use_cache": "",
                        "attention_mask": "",
                        "encoder_hidden_states": "key_value_states",
                        "encoder_attention_mask": "attention_mask",
                    },
                ),
            ),
            given="encoder_hidden_states",
        ),
        Addition("mlp", (_WHISPER_MLP,)),
    )
)


def _t5(attention: str) -> Block:
    """T5 adds in the parts of its blocks: each of them is a block here."""
    branch = Branch((attention, "dropout"), "layer_norm", {"attention_mask": "mask"})
    return Block((Addition("attention", (branch,)),), returns_rest=True)


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


CONVNEXT = Block(
    (
        Addition(
            "convolutions",
            (
                Branch(
                    (
                        *("dwconv", channels_last, "layernorm", "pwconv1", "act", "pwconv2", "layer_scale_parameter"),
                        *(channels_first, "drop_path"),
                    )
                ),
            ),
        ),
    )
)
RESNET = Block((Addition("convolutions", (Branch(("layer",)),), after="activation", shortcut="shortcut"),))


def _of(module: str, name: str) -> str:
    return f"transformers.models.{module}.modeling_{module}.{name}"


_DEPTH = "config.num_hidden_layers"


def _decoder(module: str, name: str, block: Block, owner: str = "Model", **options: str) -> dict[str, Stack]:
    """One that cuts its layers to the number in its configuration."""
    blocks: Blocks = {_of(module, f"{name}DecoderLayer"): block}
    return {_of(module, name + owner): Stack("layers.*", blocks, end=("norm",), depth=_DEPTH, **options)}  # type: ignore[arg-type]


def _post_norm(module: str, name: str) -> dict[str, Stack]:
    blocks: Blocks = {_of(module, f"{name}Layer"): BERT}
    return {_of(module, f"{name}Model"): Stack("encoder.layer.*", blocks, loop="encoder", depth=_DEPTH)}


def _images(module: str, name: str) -> dict[str, Stack]:
    blocks: Blocks = {_of(module, f"{name}Layer"): VIT}
    return {_of(module, f"{name}Model"): Stack("layers.*", blocks, end=("layernorm",), depth=_DEPTH)}


def _tower(name: str) -> dict[str, Stack]:
    blocks: Blocks = {_of("clip", "CLIPEncoderLayer"): CLIP}
    return {_of("clip", name): Stack("encoder.layers.*", blocks, loop="encoder", depth=_DEPTH)}


def _speech(name: str, block: Block, depth: str) -> dict[str, Stack]:
    blocks: Blocks = {_of("whisper", f"{name}Layer"): block}
    return {_of("whisper", name): Stack("layers.*", blocks, end=("layer_norm",), depth=depth)}


STACKS: dict[str, Stack] = {
    **_decoder("llama", "Llama", LLAMA),
    **_decoder("mistral", "Mistral", LLAMA),
    **_decoder("mixtral", "Mixtral", LLAMA),
    **_decoder("qwen2", "Qwen2", LLAMA),
    **_decoder("qwen3", "Qwen3", LLAMA),
    **_decoder("gemma", "Gemma", LLAMA),
    **_decoder("smollm3", "SmolLM3", LLAMA),
    **_decoder("phi3", "Phi3", PHI3),
    **_decoder("gemma2", "Gemma2", GEMMA2),
    **_decoder("gemma3", "Gemma3", GEMMA2, owner="TextModel"),
    **_decoder("olmo2", "Olmo2", OLMO2, norm="rms"),
    _of("gpt2", "GPT2Model"): Stack("h.*", {_of("gpt2", "GPT2Block"): GPT2}, end=("ln_f",), depth=_DEPTH),
    _of("gpt_neox", "GPTNeoXModel"): Stack(
        "layers.*", {_of("gpt_neox", "GPTNeoXLayer"): GPT_NEOX}, end=("final_layer_norm",), depth=_DEPTH
    ),
    _of("opt", "OPTDecoder"): Stack(
        "layers.*", {_of("opt", "OPTDecoderLayer"): OPT}, end=("final_layer_norm", "project_out"), depth=_DEPTH
    ),
    **_post_norm("bert", "Bert"),
    **_post_norm("roberta", "Roberta"),
    **_images("vit", "ViT"),
    **_images("deit", "DeiT"),
    _of("dinov2", "Dinov2Encoder"): Stack("layer.*", {_of("dinov2", "Dinov2Layer"): DINOV2}, depth=_DEPTH),
    **_tower("CLIPTextModel"),
    **_tower("CLIPVisionModel"),
    _of("t5", "T5Stack"): Stack(
        "block.*.layer.*",
        {
            _of("t5", "T5LayerSelfAttention"): _t5("SelfAttention"),
            _of("t5", "T5LayerCrossAttention"): _t5("EncDecAttention"),
            _of("t5", "T5LayerFF"): Block(
                (Addition("mlp", (Branch(("DenseReluDense", "dropout"), "layer_norm"),)),),
            ),
        },
        end=("final_layer_norm",),
    ),
    **_speech("WhisperEncoder", WHISPER_ENCODER, "config.encoder_layers"),
    **_speech("WhisperDecoder", WHISPER_DECODER, "config.decoder_layers"),
    _of("convnext", "ConvNextStage"): Stack(
        "layers.*",
        {_of("convnext", "ConvNextLayer"): CONVNEXT},
        width="layers.0.dwconv.out_channels",
        norm="rms",
        channel_first=True,
    ),
    _of("resnet", "ResNetStage"): Stack(
        "layers.*",
        {_of("resnet", "ResNetBasicLayer"): RESNET, _of("resnet", "ResNetBottleNeckLayer"): RESNET},
        width="layers.0.layer.-1.convolution.out_channels",
        norm="rms",
        channel_first=True,
    ),
}
"""By the full name of the module that runs the blocks: the libraries need not be installed."""

_VIT_4 = _two(
    Branch(("attention",), "layernorm_before", ALL),
    Branch(("intermediate", "output.dense", "output.dropout"), "layernorm_after"),
)
_VIT_STACK_4 = Stack(
    "encoder.layer.*", {_of("vit", "ViTLayer"): _VIT_4}, end=("layernorm",), loop="encoder", depth=_DEPTH
)
_GPT2_4 = replace(GPT2, returns_rest=True)
FOUR: dict[str, Stack] = {
    **_decoder("llama", "Llama", LLAMA),
    **_decoder("qwen3", "Qwen3", LLAMA),
    _of("gpt2", "GPT2Model"): Stack("h.*", {_of("gpt2", "GPT2Block"): _GPT2_4}, end=("ln_f",), depth=_DEPTH),
    _of("vit", "ViTModel"): _VIT_STACK_4,
}
"""The same of transformers 4.57, in which these families have been tried."""


def register(kind: type[nn.Module], stack: Stack) -> None:
    """Let `retrofit` find modules of class `kind`, and of subclasses with the same forward, and convert their blocks.

    A process that loads what pickle wrote of such a model needs the classes alone; `load_retrofit` needs this too.

    Raises:
        UserError: the class is no module, or has been registered with another description.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"register takes a class of torch.nn.Module, got {kind!r}.")
    if STACKS.setdefault(full_name(kind), stack) != stack:
        raise UserError(f"{kind.__name__} has been registered already, with another description.")
