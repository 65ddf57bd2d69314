"""The page Vision: its readings against the maps themselves, its routes, and it in a browser."""

import io
from dataclasses import replace

import browser
import numpy as np
import pytest
from dashboard_kit import arrive, served, show, violations
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from plotly.colors import sample_colorscale, unlabel_rgb

from app.capture import captured, continued
from app.dashboard.library import Library
from app.dashboard.page import Site
from app.dashboard.pages.vision import command, python
from app.dashboard.vision import (
    budget,
    groups_of,
    looks,
    own_query,
    patches_of,
    positions_of,
    query_of,
    row_of,
    towers_of,
)
from app.dashboard.vision_heads import best_heads, box_names, pointing, readers, readers_by_head
from app.dashboard.vision_panels import drawn_budget, nothing, pointed, seen_tower, traced
from app.dashboard.vision_routes import described, relative
from app.figures.vision import budget_bars, segment_order
from interp import load
from interp.errors import InputError, RunError
from interp.files import read_table, write_table
from interp.headid import HeadId
from interp.images import image_prompt
from interp.images.patches import Patch, PatchMap
from interp.run import Run
from interp.scores import HeadScores
from interp.tasks import make_task
from interp.traces import decode, traces_of
from interp.traces.trace import Trace

chromium = pytest.fixture(scope="module")(browser.chromium)
tab = pytest.fixture(scope="module")(browser.tab)
page = pytest.fixture(browser.kept)
PIXELS = """([j, points]) => {
    const c = document.querySelectorAll('.vision-frame canvas')[j];
    const all = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    return points.map(([x, y]) => {
        const at = 4 * (Math.floor(y * c.height) * c.width + Math.floor(x * c.width));
        return [...all.slice(at, at + 4)];
    });
}"""


@pytest.fixture(scope="module")
def model():
    return load("zoo:shapes-vlm")


@pytest.fixture(scope="module")
def prompts(model):
    """Two of the task, one of them continued by two tokens; and one of two images."""
    one, other = make_task("shapes").prompts(model, 2)
    task = make_task("shapes")
    scenes = [task.picture(f"pair-{i}")[0] for i in range(2)]
    pair = image_prompt(
        model, "<image> <image> what color is the square ?", [s.pixels for s in scenes], id="pair"
    )
    boxes = {"left": (0, scenes[0].things[0].box), "right": (1, scenes[1].things[0].box)}
    return [one, continued(model, other, 2), replace(pair, meta={**pair.meta, "boxes": boxes})]


@pytest.fixture(scope="module")
def root(tmp_path_factory, model, prompts):
    place = tmp_path_factory.mktemp("runs")
    table = scores(model, "visual-attention", {"span": "image"})
    kept = {"shapes": prompts[:2], "pair": prompts[2:], "bare": []}
    kept |= {"tiles": prompts[:1], "video": prompts[:1]}
    for name, some in kept.items():
        about = {"model": "zoo:shapes-vlm", "command": "headscope capture", "batches": 1}
        with Run.open_or_create(place / name, {"name": name}, about) as run:
            for prompt in some:
                trace = captured(model, prompt, place / name)
            if name in ("tiles", "video"):
                regrid(trace, video=name == "video")
            run.put_part(0, {})
            run.finish([table] if name == "shapes" else [])
    return place


def scores(model, name, params):
    heads = model.tower("text").heads
    values = np.arange(float(len(heads)))[None].repeat(2, 0)
    return HeadScores(name, heads, values, None, ("a", "b"), params=params)


def regrid(trace: Trace, *, video: bool) -> None:
    """The same attention on another grid: an overview and two tiles, or the frames of a video."""
    arrays, _ = trace.pictures
    at = np.flatnonzero(np.isfinite(arrays["text/boxes"]).all(1))
    places = np.full_like(arrays["text/places"], -1)
    boxes = np.full_like(arrays["text/boxes"], np.nan)
    grids = (
        [(3, 5, (0, 0, 500, 300), -1, f) for f in range(4)]
        if video
        else [(3, 4, (0, 0, 500, 300), -1, 0), (5, 5, (0, 0, 250, 300), 0, 0),
              (5, 5, (250, 0, 500, 300), 1, 0)]
    )  # fmt: skip
    i = 0
    for rows, columns, (left, top, right, bottom), tile, frame in grids:
        w, h = (right - left) / columns, (bottom - top) / rows
        for r in range(rows):
            for c in range(columns):
                places[at[i]] = (0, at[i], 0, r, c, tile, frame)
                boxes[at[i]] = (left + c * w, top + r * h, left + c * w + w, top + r * h + h)
                i += 1
    out = io.BytesIO()
    Image.new("RGB", (500, 300), (0, 0, 0)).save(out, "PNG")
    png = np.frombuffer(out.getvalue(), np.uint8)
    named = {"thing": [0, 120.0, 60.0, 260.0, 180.0], "cell": [0, 100.0, 100.0, 200.0, 200.0]}
    write_table(
        trace.folder / "pictures.safetensors",
        {"image-0": png, "text/places": places, "text/boxes": boxes},
        {"sizes": [[500, 300]], "boxes": named},
    )


@pytest.fixture(scope="module")
def traces(root):
    """By id of the prompt; `tiles` and `video` for those on other grids."""
    found = {t.id: t for name in ("shapes", "pair") for t in traces_of(root / name).values()}
    more = {name: next(iter(traces_of(root / name).values())) for name in ("tiles", "video")}
    return found | more


@pytest.fixture(scope="module")
def site(root):
    with served(root) as address:
        yield address


def whole(trace, head):
    """The whole map of a head, zeros where masked."""
    one = trace.head(head)
    return np.nan_to_num(one.block((0, one.n_query), (0, one.n_key)))


def every_head(trace, tower):
    layers = trace.tower(tower).layers
    return [HeadId(i, h, tower) for i in layers for h in range(layers[i].n_heads)]


# ---- readings ----


def test_patches_are_those_of_the_prompt(traces, prompts):
    trace, prompt = traces[prompts[0].id], prompts[0]
    found = patches_of(trace, "text")
    assert found.at.tolist() == [p.position for p in prompt.patches]
    assert np.allclose(found.boxes, prompt.patches.boxes)
    assert towers_of(trace) == ["text", "vision"]
    (row,) = prompt.views["vision"]
    assert patches_of(trace, "vision").at.tolist() == [p.position for p in row.patches]


def test_patches_of_two_images_stand_at_positions_of_both_rows(traces, prompts):
    trace = traces["pair"]
    found = patches_of(trace, "vision")
    rows = prompts[2].views["vision"]
    want = [p.position for p in rows[0].patches] + [
        len(rows[0]) + p.position for p in rows[1].patches
    ]
    assert found.at.tolist() == want
    assert found.places[:, 2].tolist() == [0] * 64 + [1] * 64


@pytest.mark.parametrize(
    ("which", "name"),
    [("shapes", "thing"), ("tiles", "thing"), ("video", "thing"), ("pair", "left"),
     ("pair", "right"), ("tiles", "cell"), ("video", "cell")],
)  # fmt: skip
def test_patches_that_touch_a_box_are_those_that_overlap_it(traces, prompts, which, name):
    found = patches_of(traces[prompts[0].id if which == "shapes" else which], "text")
    made = tuple(
        Patch(int(p), tuple(b), 0, 0, image=int(i))
        for p, b, i in zip(found.at, found.boxes.tolist(), found.places[:, 2], strict=True)
    )
    image, box = found.named[name]
    want = PatchMap(made, found.sizes, found.n).touching(box, image=image)
    assert found.at[found.touching(name)].tolist() == list(want)
    assert 0 < len(want) < len(found.at)
    if (which, name) == ("video", "cell"):  # just one patch of each of four frames
        assert len(want) == 4


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_row_and_the_mean_of_all_rows_are_those_of_the_map(traces, tower):
    trace = traces["pair"]
    head = trace.head(HeadId(1, 2, tower))
    p = head.block((0, head.n_query), (0, head.n_key))
    assert np.allclose(row_of(head, 66), p[66], atol=1e-6, equal_nan=True)
    assert np.allclose(row_of(head, None), np.nan_to_num(p).mean(0), atol=1e-5)
    assert np.isnan(row_of(head, 3)).any()


def test_the_mean_of_rows_that_were_kept_whole_is_that_of_the_map(traces, monkeypatch):
    trace = traces["pair"]
    head = trace.head(HeadId(1, 2, "text"))
    want = whole(trace, HeadId(1, 2, "text")).mean(0)
    monkeypatch.setattr("app.dashboard.vision.EXACT", "no form")
    monkeypatch.setattr("app.dashboard.vision._QUERIES_AT_ONCE", 50)
    assert np.allclose(row_of(head, None), want, atol=1e-6)


@pytest.mark.parametrize("query", [40, None])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_looks_and_budgets_are_sums_over_the_maps(traces, tower, query):
    trace = traces["pair"]
    made = looks(trace, tower, query)
    assert list(made.heads) == every_head(trace, tower)
    names, of = groups_of(trace, tower)
    at = patches_of(trace, tower).at
    for i in (0, 5, len(made.heads) - 1):
        p = whole(trace, made.heads[i])
        row = p.mean(0) if query is None else p[query]
        assert np.allclose(made.patches[i], row[at], atol=1e-5)
        for j in range(len(names)):
            assert made.mass[i, j] == pytest.approx(row[of == j].sum(), abs=1e-4)
    assert np.allclose(made.mass.sum(1), 1, atol=1e-3)


def test_keys_of_several_images_are_told_apart(traces, prompts):
    assert groups_of(traces["pair"], "text")[0] == ["bos", "image 1", "image 2", "other"]
    assert groups_of(traces["pair"], "vision")[0] == ["cls", "image 1", "image 2"]
    assert groups_of(traces[prompts[0].id], "vision")[0] == ["cls", "image"]


def test_the_budget_of_a_segment_is_the_mean_over_its_queries(traces, prompts):
    trace = traces[prompts[0].id]
    heads, names, mass = budget(trace, "text", 67, by_segment=True)
    of = np.array(trace.tower("text").about["query_segments"])
    keys = np.array(trace.tower("text").about["key_segments"])
    p = whole(trace, heads[9])[of == of[67]].mean(0)
    assert names == ("bos", "image", "other")
    assert np.allclose(mass[9], [p[keys == j].sum() for j in range(3)], atol=1e-4)


def test_the_query_is_the_last_of_the_prompt_or_the_class_token(traces, prompts):
    plain, longer = traces[prompts[0].id], traces[prompts[1].id]
    assert own_query(plain, "text") == len(prompts[0]) - 1
    ((start, _),) = prompts[1].spans["generated"]
    assert own_query(longer, "text") == start - 1 == len(longer.tokens) - 3
    assert own_query(plain, "vision") == 0
    assert own_query(traces["pair"], "vision") is None
    assert query_of(longer, "text", f"r{start}") == start
    assert query_of(longer, "text", "all") is None
    for unknown in (None, "", "r999", "c3", "rx", "r"):
        assert query_of(longer, "text", unknown) == start - 1


@pytest.mark.parametrize("every", [False, True])
def test_readers_are_the_queries_with_the_largest_sums_of_columns(traces, prompts, every):
    trace = traces[prompts[0].id]
    patches = patches_of(trace, "text")
    chosen = patches.among([7, 8, 15])
    total = whole(trace, "L2H3")[:, [7, 8, 15]].sum(1)
    if not every:
        total[patches.at] = 0
    got = readers(trace.head("L2H3"), patches, chosen, every=every, most=6)
    order = np.argsort(-total, kind="stable")[:6]
    assert [i for i, _ in got] == order.tolist()
    assert np.allclose([m for _, m in got], total[order], atol=1e-5)


def test_heads_that_read_are_those_with_most_mass_on_the_patches(traces, prompts):
    trace = traces[prompts[0].id]
    chosen = patches_of(trace, "text").among([7, 8, 15])
    got = readers_by_head(trace, "text", 70, chosen, k=5)
    mass = {h: whole(trace, h)[70, [7, 8, 15]].sum() for h in every_head(trace, "text")}
    best = sorted(mass, key=lambda h: -mass[h])[:5]
    assert [h for h, _ in got] == best
    assert np.allclose([m for _, m in got], [mass[h] for h in best], atol=1e-5)


def test_pointing_is_counted_prompt_by_prompt(traces, prompts):
    both = [traces[p.id] for p in prompts[:2]]
    rows = {r["head"]: r for r in pointing(both, "text", "thing")}
    assert len(rows) == 32
    for name in ("L2H4", "L0H2", "L3H3"):
        hits, shares, chances, masses = [], [], [], []
        for trace, prompt in zip(both, prompts[:2], strict=True):
            at = [p.position for p in prompt.patches]
            row = whole(trace, name)[len(trace.tokens) - 1 - 2 * ("generated" in prompt.spans)]
            inside = set(prompt.patches.touching(prompt.meta["boxes"]["thing"]))
            hits.append(max(at, key=lambda p: row[p]) in inside)
            masses.append(row[at].sum())
            shares.append(sum(row[p] for p in inside) / masses[-1])
            chances.append(len(inside) / len(at))
        got = rows[name]
        assert (got["pointing"], got["n"]) == (np.mean(hits), 2)
        assert got["share"] == pytest.approx(np.mean(shares), abs=1e-4)
        assert got["chance"] == pytest.approx(np.mean(chances))
        assert got["lift"] == pytest.approx(np.mean(shares) / np.mean(chances), rel=1e-3)
        assert got["mass"] == pytest.approx(np.mean(masses), abs=1e-4)
    order = [(r["pointing"], r["share"]) for r in rows.values()]
    assert order == sorted(order, reverse=True)


def test_boxes_of_other_prompts_do_not_count(traces):
    rows = pointing(traces.values(), "text", "right")
    assert {r["n"] for r in rows} == {1}
    assert pointing(traces.values(), "text", "nowhere") == []
    assert box_names(traces.values())[0] == "thing"


def test_vision_heads_are_the_best_of_a_visual_table_else_by_mass(root, traces, prompts):
    library = Library(root)
    trace = traces[prompts[0].id]
    best, by = best_heads(library.open("shapes"), trace, "text", {}, 3)
    assert by == "visual-attention" and [str(h) for h, _ in best] == ["L3H7", "L3H6", "L3H5"]
    found, by = best_heads(library.open("shapes"), trace, "text", {"vby": "mass", "lock": "r66"}, 3)
    mass = {h: whole(trace, h)[66, 1:65].sum() for h in every_head(trace, "text")}
    assert by == "mass" and [h for h, _ in found] == sorted(mass, key=lambda h: -mass[h])[:3]
    assert best_heads(library.open("pair"), traces["pair"], "vision", {}, 3)[1] == "mass"


def test_a_table_of_something_else_is_not_asked_who_sees(model, root, traces, prompts, tmp_path):
    about = {"model": "m", "batches": 1}
    with Run.open_or_create(tmp_path / "other", {"name": "other"}, about) as run:
        run.put_part(0, {})
        run.finish([scores(model, "induction", {}), scores(model, "localisation", {})])
    found = Library(tmp_path).open("other")
    assert best_heads(found, traces[prompts[0].id], "text", {}, 1)[1] == "localisation"


@given(st.sets(st.integers(0, 3000), min_size=1, max_size=60))
def test_positions_are_read_as_they_are_written(places):
    runs: list[list[int]] = []
    for p in sorted(places):
        if runs and runs[-1][1] == p - 1:
            runs[-1][1] = p
        else:
            runs.append([p, p])
    text = ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)
    assert positions_of(text) == tuple(sorted(places))


@pytest.mark.parametrize("text", ["a", "3-", "-3", "9-3", "1-99999999", "1;2", "1-2-3"])
def test_other_writings_of_positions_are_refused(text):
    with pytest.raises(InputError):
        positions_of(text)


@given(
    st.lists(
        st.one_of(st.floats(0, 1, width=32), st.just(float("nan"))), min_size=2, max_size=40
    )
)  # fmt: skip
def test_codes_say_how_much_of_the_largest_each_patch_has(values):
    row = np.array([values], dtype=np.float32)
    codes, (most,) = relative(row)
    known = row[0][~np.isnan(row[0])]
    assert most == (known.max() if len(known) else 0)
    back = decode(codes[0])
    assert np.array_equal(np.isnan(back), np.isnan(row[0]))
    if most > 1e-30:
        # Half a step of the root of the share.
        root = np.sqrt(row[0] / most)
        assert np.nanmax(np.abs(np.sqrt(back) - root)) <= 0.5 / 254 + 1e-3


def test_a_file_of_pictures_of_another_length_is_refused(traces, prompts, tmp_path):
    import shutil

    source = traces[prompts[0].id]
    made = Trace(shutil.copytree(source.folder, tmp_path / source.key))
    arrays, facts = read_table(made.folder / "pictures.safetensors")
    short = {n: x[:-1] if "/" in n else x for n, x in arrays.items()}
    write_table(made.folder / "pictures.safetensors", short, facts)
    with pytest.raises(RunError, match="must place each of the 71 positions"):
        patches_of(made, "text")
    (made.folder / "pictures.safetensors").unlink()
    with pytest.raises(RunError, match="has no images"):
        towers_of(Trace(made.folder))


# ---- panels ----


def test_bars_stack_up_to_the_whole(traces, root, prompts):
    run = Library(root).open("shapes")
    key = traces[prompts[0].id].key
    figure, text = drawn_budget(run, {"prompt": key})
    assert [bar.name for bar in figure.data] == ["image", "bos", "other"]
    assert len({bar.marker.pattern.shape for bar in figure.data}) == 3
    assert np.allclose(np.sum([bar.y for bar in figure.data], axis=0), 1, atol=1e-3)
    assert list(figure.data[0].x) == [0, 1, 2, 3]
    assert "(70), the prompt's own" in text
    feed = {"prompt": key, "vsplit": "heads", "layer": "2", "head": "1", "lock": "all"}
    figure, text = drawn_budget(run, feed)
    want = [whole(traces[prompts[0].id], HeadId(2, h)).mean(0)[1:65].sum() for h in range(8)]
    assert np.allclose(figure.data[0].y, want, atol=1e-4)
    assert text.startswith("Heads of layer 2 of text. Mean over all queries")


def test_all_positions_count_where_no_segment_is_known(root, traces):
    feed = {"tower": "vision", "vsource": "segment", "lock": "r3"}
    figure, text = drawn_budget(Library(root).open("pair"), feed)
    assert "Mean over all queries" in text and "Images get most" in text
    assert [bar.name for bar in figure.data] == ["image 1", "image 2", "cls"]
    # Each image has half of the queries, which see it alone.
    assert all(0.3 < y <= 0.5 for bar in figure.data[:2] for y in bar.y)


def test_names_of_segments_are_drawn_as_they_are():
    name = "<b>bold</b><a href='x'>"
    figure = budget_bars(np.ones((2, 1)), [name], [0, 1], axis="layer")
    assert figure.data[0].name.startswith("&lt;b&gt;") and "<b>" not in figure.data[0].hovertemplate
    assert segment_order(["a", "image 2", "bos", "image 1"]) == [1, 3, 2, 0]


def test_pointing_says_of_how_many_prompts_it_is(root):
    library = Library(root)
    rows, line, names, name = pointed(library.open("shapes"), "text", None)
    assert len(rows) == 32 and line.startswith("2 prompts with a box thing")
    assert name == "thing" and names[0] == "thing"
    assert pointed(library.open("shapes"), "text", "nowhere")[3] == "thing"


def test_a_run_without_images_names_the_command_that_makes_some(root, prompts, traces, tmp_path):
    site = Site(Library(root))
    error = RunError("there is nothing")
    texts = str(nothing(site, {"run": "shapes"}, error))
    assert "headscope capture --model zoo:shapes-vlm --image PICTURE.png --prompt TEXT" in texts
    texts = str(nothing(site, {"run": "shapes", "prompt": "x"}, error))
    assert f"/r/shapes/vision?p={traces[prompts[0].id].key}" in texts
    assert "there is nothing" in str(nothing(site, {"run": "none"}, error))


def test_the_first_prompt_with_images_stands_for_none_named(root, traces):
    run = Library(root).open("pair")
    assert traced(run, {}).id == "pair"
    assert seen_tower(traces["pair"], {"tower": "audio"}) == "text"
    assert seen_tower(traces["pair"], {"tower": "vision"}) == "vision"


def test_the_python_that_is_copied_reads_the_same_row(root, traces, prompts):
    site = Site(Library(root))
    trace = traces[prompts[0].id]
    state = {"run": "shapes", "prompt": trace.key, "layer": "2", "head": "3", "lock": "r68"}
    found: dict[str, object] = {}
    exec(python(site, state), found)
    assert np.allclose(found["row"], trace.head("L2H3").rows([68])[0], equal_nan=True)
    exec(python(site, state | {"lock": "all"}), found)
    assert np.allclose(found["row"], row_of(trace.head("L2H3"), None), atol=1e-5)
    assert len(found["boxes"]) == 71
    assert command(site, state) == "headscope capture"


# ---- routes ----


@pytest.fixture(scope="module")
def client(root):
    from app.dashboard.security import Access
    from app.dashboard.server import make_app

    made = make_app(root, Access("127.0.0.1", 8050)).server.test_client()
    return lambda path: made.get(path, headers={"Host": "127.0.0.1:8050"})


def test_a_row_over_patches_comes_as_one_byte_each(client, traces, prompts):
    trace = traces[prompts[0].id]
    answer = client(f"/data/shapes/{trace.key}/text/sights/70?heads=L2H4,L0H1")
    assert answer.status_code == 200 and "immutable" in answer.headers["Cache-Control"]
    codes = np.frombuffer(answer.data, np.uint8).reshape(2, 64)
    for row, head, said in zip(
        codes, ("L2H4", "L0H1"), answer.headers["X-Sights"].split(), strict=True
    ):
        most, mass = map(float, said.split(":"))
        want = whole(trace, head)[70, 1:65]
        assert mass == pytest.approx(want.sum(), rel=1e-4)
        assert most == pytest.approx(want.max(), rel=1e-4)
        assert np.abs(np.sqrt(decode(row) * most) - np.sqrt(want)).max() < np.sqrt(most) / 500


def test_masked_patches_have_code_0(client, traces):
    answer = client(f"/data/pair/{traces['pair'].key}/vision/sights/3?heads=vision.L1H2")
    codes = np.frombuffer(answer.data, np.uint8)
    assert (codes[:64] > 0).all() and (codes[64:] == 0).all()


def test_what_is_told_of_patches_is_what_the_trace_keeps(client, traces):
    trace = traces["tiles"]
    told = client(f"/data/tiles/{trace.key}/text/patches.json").json
    found = patches_of(trace, "text")
    assert told == described(trace, "text", found)
    assert told["tile"] == [-1] * 12 + [0] * 25 + [1] * 25
    assert np.allclose(np.reshape(told["box"], (-1, 4)), found.boxes, atol=0.01)
    assert told["named"]["thing"] == [0, 120.0, 60.0, 260.0, 180.0]


def test_readers_come_with_tokens_and_heads(client, traces, prompts):
    trace = traces[prompts[0].id]
    told = client(f"/data/shapes/{trace.key}/text/2/4/readers/70?at=7-8,15").json
    patches = patches_of(trace, "text")
    chosen = patches.among([7, 8, 15])
    want = readers(trace.head("L2H4"), patches, chosen, every=False)
    assert told["patches"] == 3
    assert [i for i, *_ in told["tokens"]] == [i for i, m in want if m >= 1e-6]
    assert told["tokens"][0][1] == trace.tokens[want[0][0]]
    heads = readers_by_head(trace, "text", 70, chosen)
    assert told["heads"] == [[str(h), round(m, 6)] for h, m in heads if m >= 1e-6]


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("sights/70", 400, "heads"),
        ("sights/70?heads=" + ",".join(f"L0H{i}" for i in range(33)), 400, "32"),
        ("sights/71?heads=L0H0", 400, "0..70"),
        ("sights/-1?heads=L0H0", 400, "0..70"),
        ("sights/70?heads=L9H0", 400, "layer 9"),
        ("sights/70?heads=nonsense", 400, "nonsense"),
        ("2/4/readers/70?at=", 400, "patches"),
        ("2/4/readers/70?at=70", 400, "pixels"),
        ("2/4/readers/70?at=1-99999999", 400, "patches"),
        ("2/99/readers/70?at=7", 400, "L2H99"),
    ],
)
def test_wrong_questions_are_answered_in_a_line(client, traces, prompts, path, status, word):
    answer = client(f"/data/shapes/{traces[prompts[0].id].key}/text/{path}")
    assert answer.status_code == status and word in answer.text
    assert "\n" not in answer.text.strip() and "Traceback" not in answer.text


# ---- in a browser ----


def opened(page, path, head, image):
    """Show a page without loading the application anew; wait until its head is drawn."""
    page.evaluate("(path) => window.headscope.go(path)", path)
    drawn(page, head, image)


def drawn(page, head, image):
    page.wait_for_function(
        """([head, image]) => {
            const line = document.getElementById('vision-line');
            const pictures = [...document.querySelectorAll('.vision-frame img')];
            return line && line.textContent.startsWith(head) && pictures.length &&
                pictures.every((i) => i.complete && i.src.includes(image));
        }""",
        arg=[head, image],
    )
    page.evaluate("() => new Promise((f) => requestAnimationFrame(() => requestAnimationFrame(f)))")


def test_a_deep_link_draws_the_row_and_a_dragged_box_lists_who_reads_it(
    site, page, traces, prompts
):
    trace = traces[prompts[0].id]
    arrive(page, f"{site}/r/shapes/vision?p={trace.key}&layer=2&head=4&opacity=100&noboxes=1")
    drawn(page, "L2H4", trace.key)
    row = whole(trace, "L2H4")[70, 1:65].reshape(8, 8)
    places = [np.unravel_index(i, row.shape) for i in (row.argmax(), row.argmin())]
    points = [[(c + 0.5) / 8, (r + 0.5) / 8] for r, c in places]
    bright, dark = page.evaluate(PIXELS, [0, points])
    assert bright == [253, 231, 37, 255]
    assert dark[0] < 75 and dark[1] < 40 and dark[3] == 255
    line = page.inner_text("#vision-line")
    assert line.startswith(f"L2H4 from ? (70): {row.sum():.2f} of its attention")
    assert f"most at row {places[0][0]}, column {places[0][1]}." in line
    box = page.locator(".vision-frame").bounding_box()
    page.mouse.move(box["x"] + 0.22 * box["width"], box["y"] + 0.02 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.53 * box["width"], box["y"] + 0.28 * box["height"], steps=4)
    page.mouse.up()
    page.wait_for_function("() => document.querySelectorAll('#vision-readers ol').length === 2")
    # Columns 2 and 3 of rows 0 and 1, after the first token: of others less than half is inside.
    assert "patches=3-4,11-12" in page.url
    mass = {h: whole(trace, h)[70, [3, 4, 11, 12]].sum() for h in every_head(trace, "text")}
    best = max(mass, key=lambda h: mass[h])
    first = page.locator("#vision-readers [data-head]").first
    assert first.inner_text() == str(best)
    first.click()
    drawn(page, str(best), trace.key)
    assert page.get_attribute(".vision-frame canvas", "aria-label").startswith(
        f"{best} from ? (70) on image 1: strongest at row"
    )


def test_keys_alone_choose_patches_and_the_query(site, page, traces, prompts):
    trace = traces[prompts[0].id]
    arrive(page, f"{site}/r/shapes/vision?p={trace.key}&layer=2&head=4")
    drawn(page, "L2H4", trace.key)
    page.focus(".vision-frame")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", " ", "Shift+ArrowDown"):
        page.keyboard.press(key)
    # The first key enters at the first patch: then right to column 1, down to row 1 and row 2.
    page.wait_for_url("**patches=10,18*")
    page.focus("#vision-tokens")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**lock=r69*")
    page.wait_for_function(
        "() => document.getElementById('vision-line').textContent.includes('(69)')"
    )
    assert page.get_attribute("#vision-token-69", "aria-checked") == "true"
    page.focus(".vision-frame")
    page.keyboard.press("Escape")
    page.wait_for_function("() => !location.search.includes('patches')")
    page.wait_for_selector("#vision-pointing .ag-row")
    assert violations(page) == []
    page.keyboard.press("Alt+m")
    opened(page, f"/r/shapes/vision?p={trace.key}&patches=5-8&contour=1&smooth=1", "L3H7", "image")
    page.wait_for_selector("#vision-readers ol")
    assert page.get_attribute("html", "data-theme") == "dark"
    assert violations(page) == []


def test_any_grid_is_drawn_where_its_patches_lie(site, page, traces):
    trace = traces["tiles"]
    show(page, f"{site}/r/tiles/vision?layer=3&head=3&opacity=100&noboxes=1")
    drawn(page, "L3H3", trace.key)
    row, patches = whole(trace, "L3H3")[70], patches_of(trace, "text")
    tiles = np.flatnonzero(patches.places[:, 5] >= 0)
    best = tiles[row[patches.at[tiles]].argmax()]
    left, top, right, bottom = patches.boxes[best].tolist()
    x, y = (left + right) / 2 + 3, (top + bottom) / 2 + 3  # away from edges of either grid
    inside = [
        i for i, box in enumerate(patches.boxes) if box[0] <= x < box[2] and box[1] <= y < box[3]
    ]
    assert len(inside) == 2 and inside[1] == best
    # Of patches that lie on each other the mean is drawn, and the smallest is chosen.
    mean = np.mean([row[patches.at[i]] for i in inside]) / row[patches.at].max()
    (want,) = sample_colorscale("Viridis", [float(np.sqrt(mean))])
    (got,) = page.evaluate(PIXELS, [0, [[x / 500, y / 300]]])
    assert np.allclose(got[:3], unlabel_rgb(want), atol=6)
    box = page.locator(".vision-frame").bounding_box()
    page.mouse.click(box["x"] + x / 500 * box["width"], box["y"] + y / 300 * box["height"])
    page.wait_for_url(f"**patches={patches.at[inside[1]]}*")

    trace = traces["video"]
    opened(page, "/r/video/vision?layer=2&head=2&frame=3", "L2H2", "/video/")
    row, patches = whole(trace, "L2H2")[70], patches_of(trace, "text")
    own = np.flatnonzero(patches.places[:, 6] == 3)
    best = own[row[patches.at[own]].argmax()]
    label = page.get_attribute(".vision-frame canvas", "aria-label")
    assert f"column {patches.places[best, 4]}, frame 3" in label
    assert page.input_value("#vision-frame") == "3"

    opened(
        page, "/r/pair/vision?t=vision&lock=r3&layer=1&head=2&opacity=100", "vision.L1H2", "/pair/"
    )
    assert page.locator(".vision-frame").count() == 2
    # A row of the tower sees its own image alone; what is masked is grey, not dark.
    (got,) = page.evaluate(PIXELS, [1, [[0.3, 0.6]]])
    assert got == [150, 150, 150, 255]
    assert "Grey patches are not seen" in page.inner_text("#vision-spot")
    assert page.locator("#vision-heads [data-head]").count() == 8

    page.evaluate("() => window.headscope.go('/r/bare/vision')")
    page.wait_for_selector("#vision-note pre")
    assert "keeps no traces" in page.inner_text("#vision-note [role=alert]")
    assert "headscope capture" in page.inner_text("#vision-note pre")
    assert not page.locator("#vision-body").is_visible()
