"""The trained models that ship with the package; `interp.zoo.train` reproduces them."""

from pathlib import Path

from interp.zoo import ZOO, Truth, ZooModel

WEIGHTS = Path(__file__).parent / "weights"


def shipped(name: str, truth: Truth) -> ZooModel:
    """A model and tokenizer from the package's own folder, offline."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = WEIGHTS / name
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, local_files_only=True))
    # from_pretrained would do the same with a progress bar.
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return ZooModel(model.eval(), truth, tokenizer)


@ZOO.register("induction")
def _induction() -> ZooModel:
    """Two layers; the truth is what the training started from and kept."""
    return shipped("induction", Truth(note="trained; continues repeats at lags it never saw"))


@ZOO.register("needle")
def _needle() -> ZooModel:
    """Four layers with grouped queries that answer questions about facts in long contexts."""
    return shipped("needle", Truth(note="trained; answers facts at any depth of 2,000 tokens"))


__all__ = ["WEIGHTS", "shipped"]
