"""Images on the command line: prompts with images and boxes, overlays, bad input in one line."""

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from app_kit import AFTER, Done, assert_refused, files, in_process, process
from PIL import Image

from app import drawing, overlay
from app.loading import Source
from interp.errors import InputError, RunError
from interp.images import image_prompt
from interp.loading import load
from interp.metrics import METRICS, bind
from interp.prompts import Batch, Prompt
from interp.recipe import Edit, Recipe, Where
from interp.run import Run
from interp.scenes import Scene, make_scene
from interp.tasks.shapes import Question, Shapes

VLM, VIT = "zoo:shapes-vlm", "zoo:shapes-vit"
QUESTION = "what color is the square ?"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADSCOPE_RUNS", raising=False)


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def asked(i: int) -> tuple[Scene, Question]:
    return Shapes().scene(f"cli/{i}")


def pictured(i: int) -> tuple[Scene, Question]:
    return Shapes().picture(f"cli/{i}")


def written(pixels: np.ndarray, name: str) -> str:
    Image.fromarray(pixels).save(name)
    return name


def vlm_file(n: int = 6) -> str:
    lines = []
    for i in range(n):
        scene, q = asked(i)
        assert q.thing is not None
        lines.append({
            "image": written(scene.pixels, f"s{i}.png"), "text": q.text, "answer": q.answer,
            "boxes": {"thing": list(q.thing.box)}, "id": f"q{i}",
        })  # fmt: skip
    Path("vlm.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return "vlm.jsonl"


def vit_file(n: int = 6) -> str:
    lines = []
    for i in range(n):
        scene, q = pictured(i)
        assert q.thing is not None
        image = written(scene.pixels, f"v{i}.png")
        lines.append({"image": image, "boxes": {"thing": list(q.thing.box)}, "id": f"v{i}"})
    Path("vit.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return "vit.jsonl"


def pair_file(n: int = 3) -> str:
    lines = []
    for i in range(n):
        scene, q = asked(i)
        assert q.thing is not None
        painted = make_scene(f"cli/{i}", world="even", faint=0.0, paint={
            (q.thing.row, q.thing.column): next(
                c for c in ("red", "green", "blue", "white", "purple", "yellow")
                if c not in {t.colour for t in scene.things}
            )})  # fmt: skip
        [other] = [t for t in painted.things if t.shape == q.thing.shape]
        sides = {
            side: {"image": written(pixels, f"{side}{i}.png"), "text": q.text}
            for side, pixels in (("clean", scene.pixels), ("corrupted", painted.pixels))
        }
        lines.append({**sides, "answer": q.answer, "wrong": other.colour})
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return "pairs.jsonl"


def the_square() -> str:
    """The image of a scene with a square, of which the question is."""
    scene = next(s for s in (make_scene(i, world="even", faint=0.0) for i in range(99))
                 if s.find("square"))  # fmt: skip
    return written(scene.pixels, "square.png")


# ---- every command


COMMANDS: dict[str, Callable[[], Sequence[str]]] = {
    "rank": lambda: ("rank", "region-grounding", "-m", VLM, "-p", vlm_file()),
    "rank tower": lambda: (
        "rank", "region-grounding", "-m", VLM, "--tower", "vision", "-p", vlm_file()
    ),
    "rank towers": lambda: (
        "rank", "content-agnostic", "region-grounding", "-m", VLM, "--tower", "all",
        "-p", vlm_file()
    ),
    "rank vit": lambda: ("rank", "region-grounding", "-m", VIT, "-p", vit_file()),
    "verdict": lambda: ("verdict", "region-grounding", "-m", VLM, "-p", vlm_file(),
                        "--most", "1", "--controls", "1"),
    "ablate": lambda: ("ablate", "-m", VLM, "-p", vlm_file(), "-H", "L3H4,L3H5"),
    "joint": lambda: ("ablate", "-m", VLM, "-p", vlm_file(), "-H", "L3H4", "--joint",
                      "--controls", "1"),
    "ablate pairs": lambda: ("ablate", "-m", VLM, "-p", pair_file(), "-H", "L3H4"),
    "patch": lambda: ("patch", "-m", VLM, "-p", pair_file(), "-H", "L3"),
    "patch tower": lambda: ("patch", "-m", VLM, "-p", pair_file(), "-H", "vision.L1",
                            "--tower", "vision"),
    "attribute": lambda: ("attribute", "atp", "-m", VLM, "-p", pair_file(),
                          "--param", "atp:verify=1"),
    "steer": lambda: ("steer", "run", "--op", "knockout", "-H", "L3H4", "--keys", "span:thing",
                      "-m", VLM, "-p", vlm_file(), "--tokens", "1", "--windows", "1",
                      "--controls", "0"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_prompts_with_images_and_boxes_go_through_every_command_and_leave_an_overlay(
    case: str, run
) -> None:
    command = COMMANDS[case]()
    done = run(*command, "--out", "r", "-q")
    assert done.code == 0 and done.rows, done.err
    kept = {p: p.read_bytes() for p in files(Path("r"))}
    again = run(*command, "--out", "r")
    assert "nothing was computed" in again.err and again.out == done.out
    assert {p: p.read_bytes() for p in files(Path("r"))} == kept
    drawn = run("show", "r", "--overlay", "out.png", "--format", "json")
    assert drawn.code == 0, drawn.err
    with Image.open("out.png") as image:
        assert image.format == "PNG" and image.width > 300
    rows = json.loads(drawn.out)["rows"]
    assert all(0 <= row["mass"] <= 1.001 for row in rows)
    assert run("show", "r", "--format", "tsv").out == done.out


def test_heads_of_several_towers_share_a_run_a_table_and_what_follows_from_it(run) -> None:
    rank = ("rank", "region-grounding", "content-agnostic", "-m", VLM, "-p", vlm_file())
    done = run(*rank, "--tower", "text,vision", "--out", "both")
    assert done.code == 0, done.err
    assert "q over all heads of text and vision" in done.err
    assert "tower text is left out: one image that tower 'text' sees" in done.err
    mine = [r for r in done.rows if r["detector"] == "region-grounding"]
    assert len(mine) == 44 and {r["tower"] for r in mine} == {"text", "vision"}
    scores = {r["head"]: (r["score"], r["null"], r["n"], r["ci_lo"]) for r in mine}
    for tower in ("text", "vision"):
        alone = run("rank", "region-grounding", *rank[3:], "--tower", tower, "--no-save").rows
        for r in alone:
            assert scores.pop(r["head"]) == (r["score"], r["null"], r["n"], r["ci_lo"])
    assert not scores
    rest = [r for r in done.rows if r["detector"] == "content-agnostic"]
    assert len(rest) == 12 and {r["tower"] for r in rest} == {"vision"}
    for same in ("all", "vision,text", " text, vision"):
        again = run(*rank, "--tower", same, "--out", "both")
        assert again.out == done.out and "nothing was computed" in again.err
    assert run("show", "both", "--format", "tsv").out == done.out
    shown = json.loads(run("show", "both", "--format", "json").out)
    told = shown["detectors"]["content-agnostic"]["provenance"]["left_out"]
    assert list(told) == ["text"]
    # Another run of the same towers compares; one of a single tower says what differs.
    assert run(*rank, "--tower", "all", "--n", "5", "--seed", "1", "--out", "next").code == 0
    compared = run("compare", "both", "next")
    assert compared.code == 0 and [r["heads"] for r in compared.rows] == ["44", "12"]
    assert run("rank", "region-grounding", *rank[3:], "--out", "one").code == 0
    assert_a_line(run("compare", "both", "one"), "must be about the same heads")


def test_a_verdict_takes_the_heads_of_both_towers_from_a_run(run) -> None:
    """Of both towers: their ids are read, their controls come from their own towers."""
    rank = ("rank", "visual-attention", "-m", VLM, "-p", vlm_file(), "--out", "both")
    assert run(*rank, "--tower", "all").code == 0
    verdict = ("verdict", "visual-attention", "-m", VLM, "-p", "vlm.jsonl", "--controls", "1")
    done = run(*verdict, "--scores", "both", "--heads", "L3H4,vision.L2H1", "--out", "v")
    assert done.code == 0, done.err
    assert {r["head"] for r in done.rows} >= {"L3H4", "vision.L2H1"}
    drawn = [
        row["heads"].split() for rows in json.loads(run("show", "v", "--format", "json").out)[
            "draws"].values() for row in rows
    ]  # fmt: skip
    assert all(sum(h.startswith("vision.") for h in heads) <= 1 for heads in drawn) and drawn
    by_scores = run(*verdict, "--scores", "both", "--most", "2", "--no-save")
    assert by_scores.code == 0, by_scores.err
    best = [r["head"] for r in run("show", "both", "--top", "4", "--format", "tsv").rows]
    assert len({"vision" in head for head in best}) == 2
    ablated = run("ablate", "-m", VLM, "-p", "vlm.jsonl", "-H", "top:4@both", "--no-save")
    assert ablated.code == 0 and {r["head"] for r in ablated.rows} == {*best}, ablated.err


def test_an_overlay_shows_the_first_tower_that_was_scored(run) -> None:
    for detector, tower in (("content-agnostic", "vision"), ("region-grounding", "text")):
        done = run("rank", detector, "-m", VLM, "-p", vlm_file(), "--tower", "all", "--out", tower)
        assert done.code == 0, done.err
        kept = Run.load(tower).extra(overlay.EXTRA)
        assert kept is not None and kept.meta["tower"] == tower
        mine = [r["head"] for r in done.rows if r["tower"] == tower]
        assert kept.meta["best"][detector] == mine[: len(kept.meta["best"][detector])] != []


def test_a_dry_run_counts_the_passes_of_every_tower(run) -> None:
    """Each detector is tried on a prompt in each tower, and then reads its batches in it."""

    def counts(*args: str) -> dict[str, float]:
        done = run("rank", "visual-attention", "region-grounding", "-m", VLM, "-p", "vlm.jsonl",
                   "--dry-run", "--batch-size", "1", *args)  # fmt: skip
        assert done.code == 0, done.err
        return {r["quantity"]: float(r["value"]) for r in done.rows}

    vlm_file()
    one, both = counts(), counts("--tower", "all")
    assert both["towers"] == 2 and "towers" not in one
    for name in ("prompts", "tokens", "batches", "longest prompt"):
        assert both[name] == one[name]
    through = "tokens through the model"
    shortest = min(len(p) for p in both_prompts())
    assert both[through] == 2 * (one[through] + 2 * shortest)
    assert counts("--tower", "text,vision") == {**both, "time": pytest.approx(both["time"], rel=99)}
    model = load(VLM)
    model.check()  # which runs it too
    passed: list[int] = []
    handle = model.hf.register_forward_pre_hook(
        lambda _m, _a, kwargs: passed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    from heads import score

    score(model, ["visual-attention", "region-grounding"], both_prompts(), batch_size=1,
          tower=("text", "vision"))  # fmt: skip
    handle.remove()
    assert sum(passed) == both[through]


def both_prompts() -> list[Prompt]:
    from app.given import Given, made_prompts

    lines = Given(Path("vlm.jsonl"), (), ()).lines()
    assert lines is not None
    return made_prompts(lines, load(VLM))


@pytest.mark.parametrize(
    ("towers", "code", "part"),
    [
        ("text,audio", 2, "'audio'"),
        ("text,text", 2, "names each tower once"),
        ("text,", 2, "names each tower once"),
        ("", 2, "names each tower once"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_towers_that_are_not_there_are_one_line(
    towers: str, code: int, part: str, more: Sequence[str], run
) -> None:
    done = run("rank", "visual-attention", "-m", VLM, "--n", "1", "--tower", towers, *more)
    assert (done.code, done.out) == (code, "")
    assert_a_line(done, part)
    assert not Path("runs").exists()


def test_an_image_on_the_command_line_is_the_line_of_a_file(run) -> None:
    place = the_square()
    line = {"image": place, "text": QUESTION, "id": "prompt-1"}
    Path("one.jsonl").write_text(json.dumps(line))
    Path("one.txt").write_text(f"{QUESTION}\n")
    rank = ("rank", "visual-attention", "-m", VLM, "--no-save", "--format", "tsv")
    expected = run(*rank, "-p", "one.jsonl")
    assert expected.code == 0
    assert run(*rank, "--image", place, "--prompt", QUESTION).rows == expected.rows
    from_text = run(*rank, "--image", place, "-p", "one.txt").rows
    assert [r["score"] for r in from_text] == [r["score"] for r in expected.rows]
    # Of a vision transformer each image is a prompt; a placeholder says where an image belongs.
    alone = run("rank", "visual-attention", "-m", VIT, "--image", place, "--image", place,
                "--no-save")  # fmt: skip
    assert alone.code == 0 and {r["n"] for r in alone.rows} == {"2"}
    two = run(*rank, "--image", place, "--image", place, "--prompt",
              f"<image> <image> {QUESTION}")  # fmt: skip
    assert two.code == 0, two.err


def test_pairs_verdicts_and_steering_take_images_on_the_command_line(run) -> None:
    scene, q = asked(1)
    assert q.thing is not None
    clean = written(scene.pixels, "clean.png")
    other = written(make_scene("another").pixels, "other.png")
    pair = ("--prompt", q.text, "--image", clean, "--corrupted-image", other)
    wrong = "red" if q.answer != "red" else "blue"
    sides = {"clean": {"image": clean, "text": q.text}, "corrupted": {"image": other,
             "text": q.text}}  # fmt: skip
    Path("p.jsonl").write_text(json.dumps({**sides, "answer": q.answer, "wrong": wrong}))
    answers = ("--answer", q.answer, "--wrong", wrong)
    common = ("-m", VLM, "-H", "L3H4", "--no-save", "--format", "tsv")
    for command in ("patch", "ablate"):
        done = run(command, *pair, *answers, *common)
        assert done.code == 0 and done.rows == run(command, "-p", "p.jsonl", *common).rows
    # Divergence compares with the unedited run and needs no answer.
    kl = run("patch", *pair, *common, "--metric", "kl")
    assert kl.code == 0 and float(kl.rows[0]["effect"]) > 0
    one = ("--prompt", q.text, "--image", clean)
    ablated = run("ablate", *one, "--answer", q.answer, *common)
    Path("a.jsonl").write_text(json.dumps({"image": clean, "text": q.text, "answer": q.answer}))
    assert ablated.code == 0 and ablated.rows == run("ablate", "-p", "a.jsonl", *common).rows
    judged = run("verdict", "visual-attention", *one, "--answer", q.answer, "-m", VLM, "--no-save")
    assert judged.code == 0, judged.err
    steered = run("steer", "run", "--op", "zero", "-H", "L0", *one, "-m", VLM, "--no-save",
                  "--tokens", "1", "--windows", "1", "--controls", "0")  # fmt: skip
    assert steered.code == 0 and steered.rows[0]["without"] == q.answer


# ---- overlays


def test_the_hottest_pixel_of_the_best_grounded_head_lies_in_the_box(run) -> None:
    """Found in the picture by its colour, and in the weights that the model itself returns."""
    done = run("rank", "region-grounding", "-m", VLM, "-p", vlm_file(), "--out", "r")
    best = done.rows[0]["head"]
    model = load(VLM)
    for i in range(overlay_prompts()):
        _, q = asked(i)
        assert q.thing is not None
        drawn = run("show", "r", "--overlay", "o.png", "--head", best, "--prompt", f"q{i}")
        assert drawn.code == 0, drawn.err
        [row] = drawn.rows
        sight = overlay.sight_of(Run.load("r"), prompt=f"q{i}", heads=[best])
        with Image.open("o.png") as image:
            seen = np.asarray(image.convert("RGB")).astype(int)
        top, left = find(seen, drawing.panel(sight, best, 640))
        part = seen[top : top + 640, left : left + 640].reshape(8, 80, 8, 80, 3)
        # The hot end of the colours; the median of a patch is not that of the box's frame.
        means = -np.abs(np.median(part, (1, 3)) - (253, 231, 37)).sum(-1)
        y, x = np.unravel_index(means.argmax(), means.shape)
        box = np.array(q.thing.box) / 8
        assert box[0] - 1 < x < box[2] and box[1] - 1 < y < box[3], (i, x, y, box)
        assert (float(row["left"]) / 8, float(row["top"]) / 8) == hottest(model, i, best)


def overlay_prompts() -> int:
    from app.sights import PROMPTS

    return PROMPTS


def find(seen: np.ndarray, panel: Image.Image) -> tuple[int, int]:
    """Where a panel stands in a picture."""
    wanted = np.asarray(panel).astype(int)
    high, wide = wanted.shape[:2]
    for top in range(seen.shape[0] - high + 1):
        for left in range(min(30, seen.shape[1] - wide + 1)):
            if (seen[top, left] == wanted[0, 0]).all() and (
                seen[top : top + high, left : left + wide] == wanted
            ).all():
                return top, left
    raise AssertionError("the panel is not in the picture")


def hottest(model, i: int, head: str) -> tuple[float, float]:
    """The patch with the most mass, from the weights that the model itself returns."""
    scene, q = asked(i)
    prompt = image_prompt(model, q.text, [scene.pixels])
    inner = model.hf
    inner.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = inner(**model.batch([prompt]).inputs(), output_attentions=True)
    finally:
        inner.set_attn_implementation("sdpa")
    layer, index = (int(x) for x in head.removeprefix("L").split("H"))
    row = out.attentions[layer][0, index, -1]
    best = int(row[prompt.positions("image")].argmax())
    return best % 8, best // 8


def test_what_is_kept_is_what_the_model_saw_and_an_overlay_needs_no_torch(run) -> None:
    assert run("rank", "visual-attention", "-m", VLM, "-p", vlm_file(), "--out", "r").code == 0
    model = load(VLM)
    for i in range(overlay_prompts()):
        scene, q = asked(i)
        assert q.thing is not None
        sight = overlay.sight_of(Run.load("r"), prompt=f"q{i}")
        assert (np.asarray(sight.images[0]) == scene.pixels).all()  # a small image as it was
        assert sight.named == {"thing": (0, q.thing.box)} and sight.sizes == [(64, 64)]
        prompt = image_prompt(model, q.text, [scene.pixels], boxes={"thing": q.thing.box})
        assert prompt.patches is not None
        assert (sight.boxes == prompt.patches.boxes).all()
        inside = {p for s, e in prompt.spans["thing"] for p in range(s, e)}
        assert sight.inside().tolist() == [p.position in inside for p in prompt.patches]
    done = process(["show", "r", "--overlay", "o.png"], before=AFTER)
    assert done.code == 0 and "PIL" in done.err.split()
    assert not {"torch", "transformers"} & set(done.err.split())


def test_large_images_are_kept_small_and_their_boxes_stay_in_their_own_pixels(run) -> None:
    scene, q = asked(0)
    assert q.thing is not None
    model = load(VLM)
    wide = Image.fromarray(scene.pixels).resize((2560, 2560), Image.Resampling.NEAREST)
    from app.sights import png

    data = png(wide)
    assert overlay._opened(data).size == (1024, 1024) and wide.size == (2560, 2560)
    prompt = image_prompt(model, q.text, [scene.pixels])
    assert prompt.patches is not None
    n = len(prompt.patches)
    boxes = prompt.patches.boxes * 40
    sight = overlay.Sight(
        "big", "", "last token", [overlay._opened(data)], [(2560, 2560)],
        {"thing": (0, tuple(x * 40.0 for x in q.thing.box))}, boxes, np.zeros(n, int),
        {"L0H0": np.arange(n) / n / n},
    )  # fmt: skip
    values, there = drawing.heat(sight, "L0H0", 0, (320, 320))
    assert there.all()
    expected = prompt.patches.heat(np.arange(n) / n / n)
    assert np.allclose(values, np.repeat(np.repeat(expected, 5, 0), 5, 1))
    assert drawing.draw(sight).width > 600


def test_heads_without_boxes_tasks_and_several_images_are_drawn_too(run) -> None:
    place = the_square()
    two = ("--image", place, "--image", place, "--prompt", f"<image> <image> {QUESTION}")
    assert run("rank", "visual-attention", "-m", VLM, *two, "--out", "two").code == 0
    drawn = run("show", "two", "--overlay", "two.png", "--top", "1")
    assert drawn.code == 0 and drawn.rows[0]["in_box"] == "" and len(drawn.rows) == 1
    with Image.open("two.png") as image:
        assert image.width > 2 * 640  # side by side
    assert run("rank", "region-grounding", "-m", VLM, "--n", "3", "--out", "task").code == 0
    sight = overlay.sight_of(Run.load("task"))
    scene, q = Shapes().scene("0/0")
    assert q.thing is not None and sight.named == {"thing": (0, q.thing.box)}
    far = np.abs(np.asarray(sight.images[0]).astype(int) - scene.pixels)
    assert far.max() <= 1  # through the processor's normalisation and back


def test_a_run_made_before_overlays_gets_one_from_its_own_command(run) -> None:
    command = ("rank", "visual-attention", "-m", VLM, "-p", vlm_file(2), "--out", "r")
    assert run(*command).code == 0
    [extra] = files(Path("r/extra"))
    kept = extra.read_bytes()
    extra.unlink()
    assert run("show", "r").code == 0
    assert_refused(run("show", "r", "--overlay", "o.png"), "needs a run of prompts with images")
    again = run(*command)
    assert again.code == 0 and "nothing was computed" in again.err
    assert extra.read_bytes() == kept


def test_overlay_mistakes_are_one_line_and_write_nothing(run) -> None:
    assert run("rank", "visual-attention", "-m", VLM, "-p", vlm_file(2), "--out", "r").code == 0
    assert run("rank", "sink", "-m", "zoo:planted-sink", "--n", "2", "--out", "t").code == 0
    for args, code, part in (
        (("t", "--overlay", "o.png"), 65, "needs a run of prompts with images; t has none"),
        (("r", "--overlay", "o.txt"), 2, "must end in .png"),
        (("r", "--overlay", "o.png", "--head", "L9H9"), 2, "'L9H9'"),
        (("r", "--overlay", "o.png", "--head", "nine"), 65, "a head is written L9H6"),
        (("r", "--overlay", "o.png", "--prompt", "q9"), 2, "'q9'"),
        (("r", "--overlay", "o.png", "--detector", "sink"), 2, "'sink'"),
        (("r", "--head", "L0H0"), 2, "--head goes with --overlay"),
        (("r/scores/visual-attention.safetensors", "--overlay", "o.png"), 2, "needs a run"),
    ):  # fmt: skip
        done = run("show", *args)
        assert (done.code, done.out) == (code, ""), (args, done)
        assert_a_line(done, part)
        assert not Path("o.png").exists()
    [extra] = files(Path("r/extra"))
    extra.write_bytes(extra.read_bytes()[:-100])
    done = run("show", "r", "--overlay", "o.png")
    assert_refused(done, "damaged")
    assert run("show", "r").code == 0  # its tables are whole


# ---- bad input


def bad_image(kind: str) -> str:
    scene, _ = asked(0)
    good = Path(written(scene.pixels, "good.png")).read_bytes()
    if kind == "text":
        data = b"this is no image\n" * 9
    elif kind == "truncated":
        data = good[: len(good) // 2]
    elif kind == "huge":
        head = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
        check = struct.pack(">I", zlib.crc32(b"IHDR" + head))
        data = good[:8] + struct.pack(">I", 13) + b"IHDR" + head + check + good[33:]
    else:
        return "absent.png"
    Path("bad.png").write_bytes(data)
    return "bad.png"


def assert_a_line(done: Done, part: str) -> None:
    """One line that says what is wrong, and at most one that says what to do."""
    lines = done.err.strip().splitlines()
    assert part in lines[0] and lines[0].startswith("error: "), done.err
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("kind", "code", "part"),
    [
        ("text", 65, "bad.png must be an image"),
        ("truncated", 65, "bad.png must be a whole image"),
        ("huge", 65, "an image may have 100000000 pixels; bad.png has"),
        ("absent", 66, "absent.png: there is no such file"),
    ],
)
@pytest.mark.parametrize("command", ["rank", "verdict", "patch", "steer"])
def test_a_bad_image_is_one_line_and_nothing_is_lost(
    command: str, kind: str, code: int, part: str, run
) -> None:
    """In the last of several prompts: a run that is there stays as it is, none is begun."""
    good, bad = written(asked(0)[0].pixels, "fine.png"), bad_image(kind)
    line = {"image": good, "text": QUESTION, "answer": "red", "id": "a"}
    rows = [line, {**line, "image": bad, "id": "b"}]
    if command == "patch":
        side = {"image": good, "text": QUESTION}
        pair = {"clean": side, "corrupted": side, "answer": "red", "wrong": "blue", "id": "a"}
        rows = [pair, {**pair, "corrupted": {**side, "image": bad}, "id": "b"}]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = {
        "rank": ("rank", "visual-attention"), "verdict": ("verdict", "visual-attention"),
        "patch": ("patch",), "steer": ("steer", "run", "--op", "zero", "-H", "L0H0"),
    }[command]  # fmt: skip
    before = {p: p.read_bytes() for p in files(Path())}
    done = run(*words, "-m", VLM, "-p", "own.jsonl")
    assert (done.code, done.out) == (code, "")
    assert_a_line(done, part)
    assert "own.jsonl, line 2" in done.err
    assert {p: p.read_bytes() for p in files(Path())} == before


def line_file(**more: object) -> str:
    place = written(asked(0)[0].pixels, "fine.png")
    Path("line.jsonl").write_text(json.dumps({"image": place, "text": QUESTION, **more}))
    return "line.jsonl"


@pytest.mark.parametrize(
    ("model", "args", "code", "part"),
    [
        (VLM, ("--image", "fine.png", "--image", "fine.png", "--prompt", QUESTION), 65,
         "a placeholder <image> for each image; got 0 for 2 images"),
        (VLM, ("--image", "fine.png", "--prompt", f"<image> <image> {QUESTION}"), 65,
         "got 2 for 1 images"),
        (VLM, ("--prompt", f"<image> {QUESTION}"), 65, "got 1 placeholders and no image"),
        (VLM, ("--image", "fine.png"), 65, "reads a text with its images"),
        (VIT, ("--prompt", QUESTION), 65, "reads images alone"),
        (VIT, ("--image", "fine.png", "--prompt", QUESTION), 65, "reads images alone"),
        ("zoo:needle", ("--image", "fine.png", "--prompt", "code"), 65, "reads no images"),
        ("zoo:needle", ("--image", "fine.png"), 65, "reads no images"),
        (VLM, ("-p", "line.jsonl"), 65, "within the 64 x 64 pixels"),
        (VLM, ("-t", "shapes", "--image", "fine.png"), 2, "--image and --task"),
        (VLM, ("-p", "line.jsonl", "--image", "fine.png"), 2, "has images of its own"),
        (VLM, ("--image", "https://x.y/a.png", "--prompt", QUESTION), 65, "on this machine"),
        (VLM, ("--image", "fine.png", "--prompt", "a", "--prompt", "b"), 2, "one text; got 2"),
    ],
)  # fmt: skip
def test_images_and_prompts_that_do_not_fit_are_one_line(
    model: str, args: Sequence[str], code: int, part: str, run
) -> None:
    line_file(boxes={"thing": [0, 0, 65, 10]})
    done = run("rank", "visual-attention", "-m", model, *args)
    assert (done.code, done.out) == (code, "")
    assert_a_line(done, part)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("verdict", "visual-attention", "-m", VIT, "-p", "vit.jsonl"), "produces none"),
        (("ablate", "-m", VIT, "-p", "vit.jsonl"), "produces none"),
        (("patch", "-m", VIT, "-t", "shapes", "--metric", "kl"), "produces none"),
        (("steer", "run", "--op", "zero", "-H", "all", "-m", VIT, "-p", "vit.jsonl"),
         "produces none"),
        (("verdict", "visual-attention", "-m", VLM, "-p", "line.jsonl"), "answer to an image"),
        (("ablate", "-m", VLM, "-p", "line.jsonl"), "answer to an image"),
    ],
)  # fmt: skip
def test_commands_on_tokens_say_what_they_lack(args: Sequence[str], part: str, run) -> None:
    vit_file(2)
    line_file()
    done = run(*args)
    assert_refused(done, part)
    assert_a_line(done, part)


def given_model(monkeypatch: pytest.MonkeyPatch, model: object) -> None:
    monkeypatch.setattr(Source, "load", lambda self, *, quiet=False: model)


def test_a_grid_that_does_not_fit_the_tokens_is_one_line(run, monkeypatch) -> None:
    model = load(VLM)
    model.processor.patch_size *= 2  # the settings of another model: a quarter of the tokens
    given_model(monkeypatch, model)
    done = run("rank", "visual-attention", "-m", VLM, "-p", line_file())
    assert_refused(done, "the images make 64 tokens")
    assert_a_line(done, "placeholders")


class HiddenAttention(torch.nn.Module):
    """Attention that calls no kernel known here."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj = inner.q_proj, inner.k_proj
        self.v_proj, self.out_proj = inner.v_proj, inner.out_proj

    def forward(self, hidden_states: torch.Tensor, **rest: object) -> tuple[torch.Tensor, None]:
        q, k, v = (p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj))
        weights = torch.exp(q @ k.mT / q.shape[-1])
        return self.out_proj(weights / weights.sum(-1, keepdim=True) @ v), None


def test_a_vision_tower_without_reachable_attention_is_one_line(run, monkeypatch) -> None:
    plain = load(VLM)
    inner = plain.hf
    for layer in inner.model.vision_tower.encoder.layers:
        layer.self_attn = HiddenAttention(layer.self_attn)
    model = load(inner, tokenizer=plain.tokenizer, processor=plain.processor)
    assert list(model.towers) == ["text"]
    given_model(monkeypatch, model)
    rank = ("rank", "visual-attention", "-m", VLM, "-p", line_file())
    done = run(*rank, "--tower", "vision")
    assert (done.code, done.out) == (69, "")
    assert_a_line(done, "no tower 'vision' whose attention is reached")
    assert not Path("runs").exists()
    assert run(*rank).code == 0  # the heads that read the text are reached


def test_divergence_needs_no_answer_and_the_others_do() -> None:
    prompts = [Prompt((1, 2), id="a"), Prompt((3,), id="b", answer=(4,))]
    assert [name for name in METRICS if not METRICS[name].needs_answer] == ["kl"]
    assert bind(METRICS["kl"], prompts, "cpu").answer.tolist() == [0, 4]
    with pytest.raises(Exception, match="needs an answer; prompt a has none"):
        bind(METRICS["prob"], prompts, "cpu")


# ---- strengths for each example


def test_strengths_for_examples_act_on_these_and_on_their_beams_alone() -> None:
    """Rows that are twice as many are beams of the same prompts, or a mistake that is said."""
    model = load("zoo:planted-llama")
    rng = np.random.default_rng(0)
    prompts = [Prompt(tuple(map(int, rng.integers(5, 20, 6))), id=str(i)) for i in range(4)]
    recipe = Recipe([Edit("scale", Where(heads=["L0H0"]), torch.tensor([[0.0, 3.0]]))])
    two, four = model.batch(prompts[:2]), model.batch(prompts)

    def logits(rows: torch.Tensor, made: Recipe, spans: Batch | None) -> torch.Tensor:
        with torch.no_grad(), made.on(model, spans=spans):
            return model.hf(input_ids=rows).logits

    def alone(i: int, strength: float) -> torch.Tensor:
        made = Recipe([Edit("scale", Where(heads=["L0H0"]), strength)])
        return logits(two.input_ids[i : i + 1], made, None)[0]

    beams = two.input_ids.repeat_interleave(2, 0)
    wanted = torch.stack([alone(0, 0.0), alone(0, 0.0), alone(1, 3.0), alone(1, 3.0)])
    assert not torch.allclose(wanted[0], alone(0, 3.0), atol=1e-3)
    for spans in (None, two):
        assert torch.allclose(logits(beams, recipe, spans), wanted, atol=1e-5)
    for rows, spans in (
        (four.input_ids, None), (four.input_ids, four), (two.input_ids.repeat(2, 1), None)
    ):  # fmt: skip
        with pytest.raises(InputError, match="given for 2 examples must run on these; got 4 rows"):
            logits(rows, recipe, spans)
    # What is produced differs between the beams of a prompt; it is the prompt that is compared.
    with recipe.on(model, spans=None):
        made = model.hf.generate(
            input_ids=two.input_ids, max_new_tokens=4, min_new_tokens=4, num_beams=2,
            num_return_sequences=2, pad_token_id=0, do_sample=False,
        )  # fmt: skip
    assert made.shape == (4, 10)


# ---- extras of a run, and patches that overlap


def test_an_extra_belongs_to_a_run_that_is_complete_or_being_written() -> None:
    arrays = {"x": np.arange(3)}
    with Run.open_or_create("r", {"a": 1}) as going:
        assert going.extra("sight") is None
        with pytest.raises(RunError, match="open for reading only"):
            Run.load("r").put_extra("sight", arrays)
        going.put_extra("sight", arrays, {"b": 2})
        for name in ("", "../x", "a/b", "A", ".x"):
            with pytest.raises(InputError, match="lower-case letters"):
                going.put_extra(name, arrays)
        going.finish([])
    done = Run.load("r")
    found = done.extra("sight")
    assert found is not None and found.meta == {"b": 2} and found.arrays["x"].tolist() == [0, 1, 2]
    done.put_extra("sight", {"x": np.arange(2)})
    again = Run.load("r").extra("sight")
    assert again is not None and len(again.arrays["x"]) == 2
    assert [p.name for p in Path("r/extra").iterdir()] == ["sight.safetensors"]


def test_where_patches_overlap_a_pixel_has_their_mean() -> None:
    boxes = np.array([(0, 0, 4, 4), (0, 0, 2, 2), (6, 0, 8, 2)], dtype=np.float32)
    sight = overlay.Sight(
        "a", "", "last token", [Image.new("RGB", (8, 4))], [(8, 4)], {}, boxes,
        np.array([0, 0, 0]), {"L0H0": np.array([0.2, 0.6, np.nan])},
    )  # fmt: skip
    values, there = drawing.heat(sight, "L0H0", 0, (8, 4))
    expected = np.zeros((4, 8))
    expected[:, :4] = 0.2
    expected[:2, :2] = 0.4
    assert np.allclose(values, expected) and (there == (expected > 0)).all()
    assert sight.row("L0H0")["mass"] == pytest.approx(0.8)
