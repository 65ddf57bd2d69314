"""Text and images together where only the image processor is at hand.

The processors of some models prepare videos too and cannot be made without further libraries. In
families that write nothing but placeholders for an image, the image processor, a tokenizer and the
layout are all that is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.errors import InputError
from interp.images.layouts import Example, Family
from interp.images.plane import Settings


@dataclass(frozen=True)
class RunProcessor:
    """An image processor and a tokenizer, used as a processor.

    Attributes:
        image_processor: prepares the images.
        tokenizer: of the text.
        config: of the model.
        family: of the model; must write runs of placeholders.
        images_kwargs: none: the image processor is called as it is set.
    """

    image_processor: Any
    tokenizer: Any
    config: Any
    family: Family
    images_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def image_token(self) -> str:
        """The placeholder."""
        return str(self.tokenizer.convert_ids_to_tokens(int(self.config.image_token_id)))

    def __call__(
        self,
        *,
        text: Sequence[str],
        images: Sequence[Any],
        return_tensors: str,
        return_offsets_mapping: bool = False,
        return_text_replacement_offsets: bool = False,
    ) -> dict[str, Any]:
        """Tensors of one text with its images, as processors of transformers return them."""
        made = dict(self.image_processor(images=list(images), return_tensors=return_tensors))
        sizes = tuple((image.width, image.height) for image in images)
        found = self.family.read(Example(self.config, made, sizes, Settings.of(self)))
        ((token, cells),) = found.text
        mark = self.image_token
        pieces = text[0].split(mark)
        if len(pieces) != len(images) + 1:
            raise InputError(f"there are {len(images)} images; the text has {len(pieces) - 1}")
        whole, replaced = pieces[0], []
        for image, piece in enumerate(pieces[1:]):
            count = sum(cell.image == image for cell in cells)
            replaced.append({"new_span": (len(whole), len(whole) + count * len(mark))})
            whole += mark * count + piece
        words = self.tokenizer(
            [whole], return_tensors=return_tensors, return_offsets_mapping=return_offsets_mapping
        )
        made |= dict(words)
        made["mm_token_type_ids"] = (made["input_ids"] == token).long()
        if return_text_replacement_offsets:
            made["text_replacement_offsets"] = [replaced]
        return made
