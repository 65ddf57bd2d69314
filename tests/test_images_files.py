"""Opening images with care, and prompts with images from code and from files."""

import io
import json
import struct
import zlib

import images_kit as kit
import numpy as np
import pytest
import torch
from images_kit import ALONE, TEXTUAL, case, ramp
from PIL import Image

import interp.images.files as files
from interp.engine import read
from interp.errors import InputError, PromptFileError, SpanError, UnsupportedModelError
from interp.images import image_prompt, open_image, prompt_from_tensors
from interp.loading import load
from interp.pairfile import read_pairs
from interp.promptfile import parse, read_prompts
from interp.readings import SpanMass

COLOURS = np.array(
    [[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [9, 99, 199]], [[1, 2, 3], [4, 5, 6]]]
)


def small() -> Image.Image:
    return Image.fromarray(COLOURS.astype(np.uint8))


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def levels(source, **options) -> np.ndarray:
    image = open_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_every_way_in_gives_the_same_pixels(tmp_path):
    path = tmp_path / "a picture.png"
    small().save(path)
    for source in (path, str(path), path.read_bytes(), small(), COLOURS.astype(np.uint8)):
        assert np.array_equal(levels(source), COLOURS)
    with Image.open(path) as still_open:
        assert np.array_equal(levels(still_open), COLOURS)


def test_images_given_are_left_as_they_are():
    mine = small()
    open_image(mine).paste((0, 0, 0), (0, 0, 2, 3))
    assert np.array_equal(np.asarray(mine), COLOURS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_camera_is_applied(orientation):
    upright = COLOURS
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: np.rot90(upright, 2).transpose(
            1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored).astype(np.uint8))
    assert np.array_equal(levels(saved(image, exif=exif)), upright)


def test_every_mode_becomes_rgb():
    grey = Image.fromarray(np.array([[0, 128, 255]], np.uint8))
    assert levels(grey)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    assert levels(grey.convert("1", dither=0))[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]
    assert np.abs(levels(small().convert("CMYK")).astype(int) - COLOURS).max() <= 2
    assert np.array_equal(levels(small().quantize(6)), COLOURS)
    clear = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    assert levels(Image.fromarray(clear))[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert levels(clear)[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    half = Image.fromarray(np.array([[[0, 128]]], np.uint8), "LA")
    assert levels(half)[0, 0].tolist() == [127] * 3
    palette = saved(small().quantize(6), transparency=0)
    assert (levels(palette) == 255).all(-1).sum() == 1


def test_grey_of_sixteen_bits_is_scaled_not_cut():
    deep = Image.fromarray(np.array([[0, 257, 32896, 65280, 65535]], np.uint16))
    assert levels(deep)[0, :, 0].tolist() == [0, 1, 128, 254, 255]
    assert levels(saved(deep))[0, :, 0].tolist() == [0, 1, 128, 254, 255]


def test_the_first_frame_of_several_is_taken():
    frames = [small().quantize(6), Image.new("P", (2, 3))]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(levels(data), COLOURS)


def chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def bomb(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _broken() -> dict[str, tuple[object, str]]:
    png, jpeg = saved(ramp(60, 50)), saved(ramp(60, 50), "JPEG")
    return {
        "text": (b"this is no image", "must be an image"),
        "empty": (b"", "must be an image"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "must be an image"),
        "cut png": (png[: len(png) // 2], "must be a whole image"),
        "cut jpeg": (jpeg[: len(jpeg) // 2], "must be a whole image"),
        "bomb": (bomb(60000, 60000), "may have 100000000 pixels; .* far more"),
        "large": (bomb(11000, 10000), "may have 100000000 pixels; .* has 11000 x 10000"),
        "floats": (np.zeros((4, 4, 3)), "levels 0..255 of dtype uint8; got float64"),
        "channels first": (np.zeros((3, 8, 8), np.uint8), r"\[height, width\].* got \[3, 8, 8\]"),
        "no pixels": (np.zeros((0, 8), np.uint8), r"got \[0, 8\]"),
        "float pixels": (Image.new("F", (4, 4)), "floating-point"),
        "deep": (Image.fromarray(np.full((2, 2), 70000, np.int32)), "0..65535; .* 70000"),
        "missing": ("nowhere/x.png", "nowhere/x.png: there is no such file"),
        "folder": (".", "that is a folder"),
        "link": ("https://example.org/x.png", "on this machine"),
        "number": (7, "got int"),
    }  # fmt: skip


@pytest.mark.parametrize("what", _broken())
def test_what_is_no_image_is_one_line(what):
    source, said = _broken()[what]
    with pytest.raises(InputError, match=said) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)


def test_the_limit_of_pixels_can_be_moved():
    with pytest.raises(InputError, match="may have 5 pixels; the image has 2 x 3"):
        open_image(small(), max_pixels=5)
    assert levels(small(), max_pixels=6).shape == (3, 2, 3)
    with pytest.raises(InputError, match="may have 5 pixels; the array has 2 x 3"):
        open_image(COLOURS.astype(np.uint8), max_pixels=5)


def test_large_files_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="may have 100 pixels"):
        open_image(bomb(20, 20), max_pixels=100)
    assert files.MAX_PIXELS == 100_000_000


TEXT = "what is this ?"


def test_a_placeholder_is_put_first_where_one_image_has_none():
    model = case("llava").model
    left_out = image_prompt(model, TEXT, ramp(50, 40))
    written = image_prompt(model, f"<image>\n{TEXT}", ramp(50, 40))
    assert left_out.tokens == written.tokens and left_out.spans == written.spans
    qwen = image_prompt(case("qwen2_vl").model, TEXT, ramp(50, 40))
    start, stop = (kit.mark(f"<|vision_{x}|>") for x in ("start", "end"))
    ((first, last),) = qwen.span("image")
    assert (qwen.tokens[first - 1], qwen.tokens[last]) == (start, stop)


def test_images_keep_their_own_places_among_repeated_words():
    mark = "<image>"
    text = f"the cat {mark} the cat {mark} the cat"
    found = text.index("the cat", 9), text.rindex("the cat")
    spans = {"second": [(found[0], found[0] + 7)], "last": [(found[1], found[1] + 7)]}
    prompt = image_prompt(
        case("llava").model, text, [ramp(50, 40), ramp(40, 50)], spans=spans, answer="dog .",
        boxes={"a": (0, 0, 9, 9), "b": (1, (20, 20, 40, 50))}, id="x",
    )  # fmt: skip
    assert prompt.span("image-0") == ((2, 66),) and prompt.span("image-1") == ((68, 132),)
    assert prompt.span("image") == ((2, 66), (68, 132))
    assert prompt.span("second") == ((66, 68),) and prompt.span("last") == ((132, 134),)
    assert prompt.answer == (kit.mark("dog"), kit.mark(".")) and prompt.id == "x"
    assert prompt.positions("a") == list(prompt.patches.touching((0, 0, 9, 9)))
    assert set(prompt.positions("b")) < set(range(68, 132))
    first, second = prompt.views["vision"]
    assert [i - 2 for i in prompt.positions("a")] == [i - 1 for i in first.positions("a")]
    assert first.span("b") == () and second.positions("b") and second.span("a") == ()
    assert (first.id, second.id) == ("x/0", "x/1")


@pytest.mark.parametrize("name", [n for n in TEXTUAL if n not in ("paligemma", "gemma3")])
def test_spans_of_words_after_images(name):
    it = case(name)
    text = f"a {it.mark} dog {it.mark} cat ?"
    at = text.index("cat")
    images = [ramp(50, 40), ramp(90, 30)]
    prompt = image_prompt(it.model, text, images, spans={"cat": [(at, at + 3)]})
    (place,) = prompt.positions("cat")
    assert prompt.tokens[place] == kit.mark("cat")


def test_words_that_the_processor_moves_are_refused_not_misplaced():
    with pytest.raises((InputError, SpanError)):
        image_prompt(
            case("paligemma").model, "<image> dog cat", ramp(50, 40), spans={"cat": [(12, 15)]}
        )


def _calls() -> dict[str, tuple[str, str | None, object, dict[str, object], str]]:
    one, two = ramp(50, 40), [ramp(50, 40)] * 2
    return {
        "more images": ("llava", "a <image>", two, {}, "placeholder <image> .* got 1 for 2 images"),
        "fewer images": ("llava", "<image> <image>", one, {}, "got 2 for 1 images"),
        "none written": ("llava", "a cat", two, {}, "got 0 for 2 images"),
        "no text": ("llava", "", one, {}, "must not be empty"),
        "no image": ("llava", "a cat", [], {}, "needs at least one"),
        "text for eyes": ("vit", "a cat", one, {}, "reads images alone; got the text 'a cat'"),
        "two for eyes": ("vit", None, two, {}, "one image a prompt; got 2"),
        "box outside": (
            "llava", "a", one, {"boxes": {"b": (0, 0, 51, 9)}}, "box 'b': .* 50 x 40 .* 0, 0, 51, 9"
        ),
        "box empty": ("llava", "a", one, {"boxes": {"b": (5, 5, 5, 9)}}, "box 'b': a box is left"),
        "box nowhere": (
            "llava", "a", one, {"boxes": {"b": (1, (0, 0, 9, 9))}}, "there are 1 images"
        ),
        "box of words": ("llava", "a", one, {"boxes": {"b": "left"}}, "must be four numbers"),
        "box of nan": ("llava", "a", one, {"boxes": {"b": (0, 0, float("nan"), 3)}}, "box 'b'"),
        "box named so": ("llava", "a", one, {"boxes": {"image-0": (0, 0, 9, 9)}}, "be called"),
        "box cropped": ("llava", "a", ramp(90, 40), {"boxes": {"b": (0, 0, 9, 9)}}, "cropped"),
        "span twice": ("llava", "a", one, {"spans": {"image": [(0, 1)]}}, "cannot be called"),
        "span outside": ("llava", "a", one, {"spans": {"w": [(0, 99)]}}, "characters"),
        "no answer": ("llava", "a", one, {"answer": ""}, "at least one token"),
        "too thin": ("qwen2_vl", "a", ramp(999, 2), {}, "it says: absolute aspect ratio"),
    }  # fmt: skip


@pytest.mark.parametrize("what", _calls())
def test_what_does_not_fit_is_one_line(what):
    name, text, images, options, said = _calls()[what]
    with pytest.raises(InputError, match=said) as caught:
        image_prompt(case(name).model, text, images, **options)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_are_named():
    import transformers as tf

    llama = load(tf.LlamaForCausalLM(tf.LlamaConfig(**kit.TEXT)), tokenizer=kit.tokenizer())
    with pytest.raises(InputError, match=r"\(llama\) reads no images; got 1"):
        image_prompt(llama, "a", small())
    blind = load(case("llava").model.hf, tokenizer=kit.tokenizer())
    with pytest.raises(InputError, match="need a processor"):
        image_prompt(blind, "a", small())
    eye = {**kit.EYE, "image_size": 28, "patch_size": 4}
    other = load(tf.ViTMAEModel(tf.ViTMAEConfig(**eye)), processor=case("vit").model.processor)
    with pytest.raises(UnsupportedModelError, match=r"'vit_mae' .* known: .*llava.*qwen2_vl"):
        image_prompt(other, None, small())
    config = tf.LlavaConfig(
        vision_config=tf.ViTMAEConfig(**eye), text_config=tf.LlamaConfig(**kit.TEXT),
        image_token_id=kit.mark("<image>"),
    )  # fmt: skip
    odd = case("llava").model
    odd = type(odd)(odd.hf, odd.tokenizer, odd.processor, name="odd")
    kept = odd.hf.config
    try:
        odd.hf.config = config
        with pytest.raises(UnsupportedModelError, match="tower of type 'vit_mae'"):
            image_prompt(odd, "a", small())
    finally:
        odd.hf.config = kept


def test_processors_whose_rules_are_unknown_are_named():
    class OwnImageProcessor(type(case("vit").model.processor)):
        pass

    it = load(case("vit").model.hf, processor=OwnImageProcessor(size={"height": 28, "width": 28}))
    with pytest.raises(UnsupportedModelError, match="OwnImageProcessor"):
        image_prompt(it, None, small())


def ready(name: str, images, text: str = TEXT) -> dict[str, torch.Tensor]:
    it = case(name)
    if name in ALONE:
        return dict(it.model.processor(images=images, return_tensors="pt"))
    return dict(it.model.processor(text=f"{it.mark} {text}", images=images, return_tensors="pt"))


@pytest.mark.parametrize("name", [*TEXTUAL, *ALONE])
def test_ready_tensors_make_the_same_prompt(name):
    model = case(name).model
    text = None if name in ALONE else f"{case(name).mark} {TEXT}"
    boxes = {"b": (20, 20, 31, 28)}
    whole = image_prompt(model, text, ramp(61, 47), boxes=boxes, id="x")
    tensors = ready(name, ramp(61, 47))
    made = prompt_from_tensors(model, tensors, sizes=[(61, 47)], boxes=boxes, id="x")
    assert made == whole
    assert made.inputs.keys() == whole.inputs.keys()
    assert all(torch.equal(x, whole.inputs[k]) for k, x in made.inputs.items())
    if name not in ALONE:  # padding is no part of a prompt
        padded = {
            k: torch.cat([x[:, :1] * 0, x], 1) if k in PER_TOKEN else x for k, x in tensors.items()
        }
        again = prompt_from_tensors(model, padded, sizes=[(61, 47)], boxes=boxes, id="x")
        assert again == whole and "labels" not in again.inputs
        assert all(torch.equal(x, whole.inputs[k]) for k, x in again.inputs.items())


def test_pixels_have_the_dtype_of_the_model():
    model = load(kit.vit().model.hf.to(torch.bfloat16), processor=case("vit").model.processor)
    prompt = image_prompt(model, None, ramp(50, 40))
    assert prompt.inputs["pixel_values"].dtype == torch.bfloat16
    batch = model.batch([prompt])
    read(model, batch, {"x": SpanMass("cls", query="image")})


PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def test_without_sizes_boxes_are_in_pixels_of_the_tensors():
    model = case("llava").model
    bare = load(model.hf, tokenizer=model.tokenizer)
    made = prompt_from_tensors(bare, ready("llava", ramp(61, 47)), boxes={"b": (10, 5, 15, 10)})
    assert made.patches.sizes == ((40, 40),)
    assert made.patches.patches[0].box == (0, 0, 5, 5)
    assert made.positions("b") == [8 + 2]
    qwen = case("qwen2_vl").model
    made = prompt_from_tensors(qwen, ready("qwen2_vl", ramp(61, 47)))
    assert made.patches.sizes == ((60, 48),)
    tiles = case("llava_next").model  # sizes are among its tensors
    made = prompt_from_tensors(tiles, ready("llava_next", ramp(61, 47)))
    assert made.patches.sizes == ((61, 47),)


def test_tensors_that_do_not_fit_are_one_line():
    model = case("llava").model
    good = ready("llava", ramp(61, 47))
    ids = good["input_ids"]
    cases = [
        ({**good, "input_ids": ids.repeat(2, 1)}, {}, r"one example, .* got \[2, 68\]"),
        ({"pixel_values": good["pixel_values"]}, {}, "input_ids are needed"),
        ({**good, "input_ids": ids[:, 3:], "attention_mask": ids[:, 3:] * 0 + 1}, {},
         "make 64 tokens .* has 61 placeholders"),
        ({k: x for k, x in good.items() if k != "pixel_values"}, {}, "needs 'pixel_values'"),
        ({**good, "pixel_values": good["pixel_values"][0]}, {}, "must be .image, channel"),
        ({**good, "pixel_values": [1]}, {}, "'pixel_values' is list"),
        ({**good, "pixel_values": good["pixel_values"][..., :35]}, {"sizes": [(61, 47)]},
         "makes 40 x 40 pixels .* has 35 x 40"),
        (good, {"sizes": [(61, 47)] * 2}, "there are 1 images; got 2 sizes"),
    ]  # fmt: skip
    for tensors, options, said in cases:
        with pytest.raises(InputError, match=said):
            prompt_from_tensors(model, tensors, **options)
    bare = load(model.hf, tokenizer=model.tokenizer)
    with pytest.raises(InputError, match="known to its processor alone"):
        prompt_from_tensors(bare, good, sizes=[(61, 47)])
    for name in ("idefics3", "internvl"):
        tensors = ready(name, ramp(61, 47))
        with pytest.raises(InputError, match="by their size"):
            prompt_from_tensors(case(name).model, tensors)
        with pytest.raises(InputError, match=r"make . tiles; pixel_values"):
            prompt_from_tensors(case(name).model, tensors, sizes=[(20, 90)])
    with pytest.raises(InputError, match="sizes must be those in image_sizes"):
        prompt_from_tensors(
            case("llava_next").model, ready("llava_next", ramp(61, 47)), sizes=[(47, 61)]
        )
    qwen = ready("qwen2_vl", ramp(61, 47))
    with pytest.raises(InputError, match="1 images and videos; got 2 sizes"):
        prompt_from_tensors(case("qwen2_vl").model, qwen, sizes=[(61, 47)] * 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXTUAL)
def test_a_batch_runs_as_its_prompts_alone(name, side):
    """Of other sizes and lengths, so of other numbers of tiles."""
    model = case(name).model
    prompts = [
        image_prompt(model, f"{case(name).mark} {text}", ramp(*size))
        for text, size in (("a cat", (61, 47)), ("what is this dog ?", (30, 90)))
    ]
    together = model.batch(prompts, side=side)
    found = model.forward(together.inputs()).logits
    for row, (prompt, offset) in enumerate(zip(prompts, together.offsets, strict=True)):
        alone = model.forward(model.batch([prompt]).inputs()).logits[0]
        assert torch.allclose(found[row, offset : offset + len(prompt)], alone, atol=1e-5)


def test_heads_of_the_tower_are_read_by_spans_of_the_image():
    it = kit.llava_next()
    boxes = {"thing": (5, 5, 30, 30)}
    prompts = [
        image_prompt(it.model, TEXT, ramp(*size), boxes=boxes) for size in ((61, 47), (30, 90))
    ]
    batch = it.model.batch(prompts)
    wanted = {k: SpanMass(k, query="image") for k in ("cls", "image", "thing", "all")}
    got = {k: a.values for k, a in read(it.model, batch, wanted, tower="vision").items()}
    assert torch.allclose(got["cls"] + got["image"], got["all"], atol=1e-5)
    text = read(it.model, batch, {"x": SpanMass("image-0/whole", query="image")})["x"].values
    assert (text > 0).all()


def written(tmp_path, *lines: dict) -> str:
    ramp(50, 40).save(tmp_path / "a.png")
    (tmp_path / "more").mkdir(exist_ok=True)
    ramp(40, 60).save(tmp_path / "more" / "b.png")
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def test_prompts_with_images_from_a_file(tmp_path):
    path = written(
        tmp_path,
        {"image": "a.png", "text": TEXT, "answer": "cat", "id": "one", "boxes": {"x": [0, 0, 9, 9]},
         "spans": {"word": "this"}},
        {"images": ["a.png", "more/b.png"], "text": "<image> is <image> ?",
         "boxes": {"y": [1, [0, 30, 9.5, 41]]}},
        {"text": "a cat"},
    )  # fmt: skip
    model = case("llava").model
    first, second, third = read_prompts(path, model)
    same = image_prompt(
        model, TEXT, tmp_path / "a.png", answer="cat", id="one", boxes={"x": (0, 0, 9, 9)},
        spans={"word": [(8, 12)]},
    )  # fmt: skip
    assert first == same and first.tokens[first.positions("word")[0]] == kit.mark("this")
    assert second.positions("y") and second.positions("y")[0] >= second.span("image-1")[0][0]
    assert third.patches is None and third.tokens == (kit.mark("a"), kit.mark("cat"))


def test_images_alone_from_a_file(tmp_path):
    path = written(tmp_path, {"image": "a.png"}, {"image": "more/b.png", "id": "b"})
    prompts = read_prompts(path, case("vit").model)
    assert [p.id for p in prompts] == ["line-1", "b"]
    assert [len(p) for p in prompts] == [50, 50]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"image": "no.png", "text": "a"}, "line 1: .*no.png: there is no such file"),
        ({"image": "prompts.jsonl", "text": "a"}, "line 1: .* must be an image"),
        ({"image": "a.png", "images": ["a.png"], "text": "a"}, "either image or images"),
        ({"images": [], "text": "a"}, r"images must be a list of paths; got \[\]"),
        ({"images": "a.png", "text": "a"}, "images must be a list of paths"),
        ({"image": 3, "text": "a"}, "an image must be the path of a file; got 3"),
        ({"image": None, "text": "a"}, "an image must be the path of a file; got null"),
        ({"image": "http://x/a.png", "text": "a"}, "on this machine"),
        ({"image": "a.png", "tokens": [1, 2]}, "images belong to a text"),
        ({"image": "a.png", "text": "a", "answer": [3]}, "answer to an image must be a text"),
        ({"text": "a", "boxes": {"x": [0, 0, 1, 1]}}, "boxes need an image"),
        ({"image": "a.png", "text": "a", "boxes": [1]}, "boxes must map names"),
        ({"image": "a.png", "text": "a", "boxes": {"x": [0, 0, 1]}}, "box 'x' must be"),
        ({"image": "a.png", "text": "a", "boxes": {"x": [0, 0, 1, True]}}, "box 'x' must be"),
        ({"image": "a.png", "text": "a", "boxes": {"x": [2, [0, 0, 1, 1]]}}, "one of the 1 images"),
        (
            {"image": "a.png", "text": "a", "boxes": {"x": [0, 0, 51, 1]}},
            "line 1: box 'x': .* 50 x",
        ),
        ({"image": "a.png", "text": "<image> <image>"}, "line 1: .* got 2 for 1 images"),
        ({"image": "a.png"}, "line 1: .* reads a text with its images; got none"),
        ({"images": ["a.png", "a.png"], "text": "<image> a"}, "line 1: .* got 1 for 2 images"),
        ({"text": "a <image> <image>"}, "line 1: every placeholder .* got 2 placeholders and no"),
        ({"tokens": [5, "mark", 5]}, "line 1: every placeholder .* got 1 placeholders and no"),
        ({"image": "a.png", "txt": "a"}, "no key 'txt'"),
    ],
)
def test_lines_with_images_that_are_wrong(tmp_path, line, said):
    model = case("llava").model
    if "mark" in line.get("tokens", ()):
        line = {"tokens": [model.config.image_token_id if t == "mark" else t
                           for t in line["tokens"]]}  # fmt: skip
    with pytest.raises(PromptFileError, match=said) as caught:
        read_prompts(written(tmp_path, line), model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_a_pair_without_the_image_of_its_placeholder_is_refused(tmp_path, name):
    model = case(name).model
    mark = model.config.image_token_id
    assert mark is not None
    good, bad = {"tokens": [5, 6, 5]}, {"tokens": [5, mark, 5]}
    path = written(tmp_path, {"clean": good, "corrupted": bad})
    with pytest.raises(PromptFileError, match="line 1, corrupted: every placeholder") as caught:
        read_pairs(path, model)
    assert '"image"' in (caught.value.hint or "")
    [pair] = read_pairs(written(tmp_path, {"clean": good, "corrupted": good}), model)
    assert pair.clean.tokens == (5, 6, 5)


@pytest.mark.parametrize("line", [{"text": "a cat"}, {"tokens": [1, 2]}])
def test_a_model_of_images_alone_is_given_nothing_else(tmp_path, line):
    with pytest.raises(PromptFileError, match=r"line 1: .* reads images alone; got a prompt") as e:
        read_prompts(written(tmp_path, line), case("vit").model)
    assert "--image" in (e.value.hint or "")


def test_models_without_images_have_no_placeholders(tmp_path):
    model = load("zoo:planted-retrieval")
    every = {"tokens": list(range(model.vocabulary))[:200]}
    [prompt] = read_prompts(written(tmp_path, every), model)
    assert len(prompt) == len(every["tokens"])


def test_lines_are_parsed_without_opening_images():
    (line,) = parse(
        b'{"image": "x/y.png", "text": "a", "boxes": {"b": [0, 1, 2, 3]}}', "in/p.jsonl"
    )
    assert [str(p) for p in line.images] == ["in/x/y.png"]
    assert line.boxes == {"b": (0, (0.0, 1.0, 2.0, 3.0))}


@pytest.mark.parametrize("name", [
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
])  # fmt: skip
def test_an_image_processor_and_a_tokenizer_do_for_a_whole_processor(name):
    """Where only they can be made, as without torchvision."""
    it = case(name)
    parts = load(
        it.model.hf, tokenizer=it.model.tokenizer, processor=it.model.processor.image_processor
    )
    text = f"a {it.mark} dog {it.mark} cat ?"
    at = text.index("cat")
    options = {"spans": {"cat": [(at, at + 3)]}, "boxes": {"b": (1, (20, 20, 31, 28))}}
    images = [ramp(50, 40), ramp(61, 47)]
    whole = image_prompt(it.model, text, images, **options)
    made = image_prompt(parts, text, images, **options)
    assert made == whole and made.inputs.keys() == whole.inputs.keys()
    assert all(torch.equal(x, whole.inputs[k]) for k, x in made.inputs.items())
    assert image_prompt(parts, TEXT, ramp(50, 40)) == image_prompt(it.model, TEXT, ramp(50, 40))


def test_an_image_processor_is_not_enough_where_more_is_written():
    it = case("idefics3")
    parts = load(
        it.model.hf, tokenizer=it.model.tokenizer, processor=it.model.processor.image_processor
    )
    with pytest.raises(InputError, match=r"whole processor .* Idefics3ImageProcessorPil alone"):
        image_prompt(parts, TEXT, ramp(50, 40))
    it = case("llava_pixtral")  # which writes the ends of rows too
    parts = load(
        it.model.hf, tokenizer=it.model.tokenizer, processor=it.model.processor.image_processor
    )
    with pytest.raises(InputError, match="whole processor"):
        image_prompt(parts, TEXT, ramp(50, 40))
    eyes = load(it.model.hf, processor=it.model.processor.image_processor)
    with pytest.raises(InputError, match="text needs a tokenizer"):
        image_prompt(eyes, TEXT, ramp(50, 40))
