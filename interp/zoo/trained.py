"""The trained models that ship with the package; `interp.zoo.train` reproduces them."""

from pathlib import Path
from typing import Any

from interp.zoo import ZOO, Truth, ZooModel

WEIGHTS = Path(__file__).parent / "weights"


def shipped(name: str, truth: Truth) -> ZooModel:
    """A language model and tokenizer from the package's own folder, offline."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / name, local_files_only=True)
    return ZooModel(_weighted(LlamaForCausalLM, name), truth, tokenizer)


def _weighted(cls: Any, name: str) -> Any:
    """A model with its shipped weights, in float32, without a progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = cls.from_pretrained(WEIGHTS / name, local_files_only=True, dtype="float32")
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval()


@ZOO.register("induction")
def _induction() -> ZooModel:
    """Two layers; the truth is what the training started from and kept."""
    return shipped("induction", Truth(note="trained; continues repeats at lags it never saw"))


@ZOO.register("needle")
def _needle() -> ZooModel:
    """Four layers with grouped queries that answer questions about facts in long contexts."""
    return shipped("needle", Truth(note="trained; answers facts at any depth of 2,000 tokens"))


@ZOO.register("shapes-vlm")
def _shapes_vlm() -> ZooModel:
    """A LLaVA that answers questions about coloured shapes, and has habits to hallucinate from."""
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    from interp.zoo.train.shapes_vlm import processor

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "shapes-vlm", local_files_only=True)
    truth = Truth(note="trained on the skewed world; boxes of all things are known")
    model = _weighted(LlavaForConditionalGeneration, "shapes-vlm")
    return ZooModel(model, truth, tokenizer, processor(tokenizer))


@ZOO.register("shapes-vit")
def _shapes_vit() -> ZooModel:
    """A vision transformer that names the shape of the red thing."""
    from transformers import ViTForImageClassification

    from interp.zoo.train.shapes_vit import processor

    truth = Truth(note="trained on the even world; the box of the red thing is known")
    return ZooModel(_weighted(ViTForImageClassification, "shapes-vit"), truth, None, processor())


__all__ = ["WEIGHTS", "shipped"]
