"""`interp.load`: one way in for every kind of model."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import DeviceError, InputError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from interp.model import Model

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load(
    source: Any,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    attn: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
    example: "Mapping[str, Tensor] | None" = None,
) -> "Model":
    """Take a model in hand.

    Args:
        source: a Hugging Face model object, a local folder, a hub name, a `TransformerBridge`, or
            `zoo:NAME`.
        tokenizer: tokenizer of a model object; found by itself for folders and hub names.
        processor: processor of a vision-language model object.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; a model object stays where it is.
        dtype: `auto` (as saved), `float32`, `bfloat16`, `float16` or `float64`.
        attn: attention implementation to load with; the model's own choice if None.
        revision: branch, tag or commit of a hub name.
        trust_remote_code: run code that comes with the weights. Off by default.
        offline: never look at the hub.
        example: keyword inputs with which the forward runs, for models whose inputs cannot be
            made from the configuration.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
        UnknownNameError: no zoo model of that name.
        DeviceError: no such device.
    """
    from torch import nn

    from interp.model import Model

    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if isinstance(source, Model):
        return source
    if isinstance(source, nn.Module):
        if device != "auto":
            source.to(pick_device(device))
        if any(cls.__name__ == "TransformerBridge" for cls in type(source).__mro__):
            from interp.bridge import BridgeModel

            return BridgeModel(source.eval(), tokenizer, processor, example=example)
        name = getattr(getattr(source, "config", None), "_name_or_path", "") or (
            type(source).__name__
        )
        return Model(source.eval(), tokenizer, processor, name=name, example=example)
    if not isinstance(source, str | Path):
        raise InputError(
            f"a model is a Hugging Face model, a folder, a hub name, a TransformerBridge or "
            f"zoo:NAME; got {type(source).__name__}"
        )
    if str(source).startswith("zoo:"):
        return _from_zoo(str(source)[4:], pick_device(device), dtype, attn)
    return _from_pretrained(
        str(source),
        device=pick_device(device),
        dtype=dtype,
        attn=attn,
        revision=revision,
        trust=trust_remote_code,
        offline=offline,
        tokenizer=tokenizer,
        processor=processor,
        example=example,
    )


def pick_device(name: str) -> str:
    """The device meant by `auto`, or the named one if it is there.

    Raises:
        DeviceError: it is not.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    there = {
        "cpu": lambda: not index,
        "cuda": lambda: torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count(),
        "mps": lambda: torch.backends.mps.is_available() and not index,
    }
    if kind not in there or (index and not index.isdigit()):
        raise DeviceError(f"device must be auto, cpu, cuda, cuda:N or mps; got {name!r}")
    if not there[kind]():
        raise DeviceError(
            f"device {name!r} is not available on this machine", hint="use --device cpu"
        )
    return name


def _from_zoo(name: str, device: str, dtype: str, attn: str | None) -> "Model":
    import torch

    from interp.model import Model
    from interp.zoo import ZOO

    built = ZOO[name]()
    hf = built.hf.eval()
    if attn is not None:
        hf.set_attn_implementation(attn)
    if dtype != "auto":
        hf = hf.to(getattr(torch, dtype))
    return Model(
        hf.to(device), built.tokenizer, built.processor, name=f"zoo:{name}", truth=built.truth
    )


def _from_pretrained(
    source: str,
    *,
    device: str,
    dtype: str,
    attn: str | None,
    revision: str | None,
    trust: bool,
    offline: bool,
    tokenizer: Any,
    processor: Any,
    example: "Mapping[str, Tensor] | None",
) -> "Model":
    import transformers as tf

    from interp.model import Model

    common: dict[str, Any] = {
        "revision": revision or "main",
        "trust_remote_code": trust,
        "local_files_only": offline,
    }
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise ModelError(
            f"a model folder must hold config.json; {source} does not",
            hint="pass the folder that save_pretrained wrote",
        )
    try:
        config = tf.AutoConfig.from_pretrained(source, **common)
        cls = _class_for(config)
        options = {} if attn is None else {"attn_implementation": attn}
        hf = cls.from_pretrained(source, dtype=dtype, **common, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"no model could be loaded from {source!r}: {first}",
            hint="a folder, a hub name, or zoo:NAME (headscope list zoo)",
        ) from error
    if tokenizer is None:
        tokenizer = _optional(tf.AutoTokenizer, source, common)
    if processor is None and _reads_images(hf):
        processor = _optional(tf.AutoProcessor, source, common)
        if not hasattr(processor, "image_processor"):  # none, or a tokenizer in its place
            processor = _optional(tf.AutoImageProcessor, source, common)
    return Model(hf.eval().to(device), tokenizer, processor, name=source, example=example)


def _reads_images(hf: Any) -> bool:
    return "pixel_values" in inspect.signature(hf.forward).parameters


def _class_for(config: Any) -> Any:
    """The class named by the checkpoint, so that no head is lost; else a generic one."""
    import transformers as tf

    for name in getattr(config, "architectures", None) or ():
        if (cls := getattr(tf, name, None)) is not None:
            return cls
    if type(config) in tf.MODEL_FOR_CAUSAL_LM_MAPPING:
        return tf.AutoModelForCausalLM
    return tf.AutoModel


def _optional(auto: Any, source: str, common: dict[str, Any]) -> Any:
    """A tokenizer or processor if the checkpoint has one; a model without is still readable."""
    try:
        return auto.from_pretrained(source, **common)
    except (OSError, ValueError, ImportError, KeyError, TypeError):
        return None
