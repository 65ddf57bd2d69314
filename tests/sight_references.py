"""Formulas of detectors of visual heads, as loops over whole patterns of one prompt alone.

`references` takes what the conformance tests know of the random model: whole patterns, outputs of
the last token, and the model in double precision.
"""

import math
import random
from collections import Counter

import numpy as np
import torch

from interp.images.patches import PatchMap, grid_patches
from interp.prompts import Prompt


def references(patterns, last_outputs, whole_copy):
    """Detector to formula, prompts and parameters."""

    @torch.no_grad()
    def decoded(tokens, n):
        """Tokens produced by whole forwards, and the top key of each step's row."""
        tokens, steps = list(tokens), []
        for _ in range(n):
            out = whole_copy()(torch.tensor([tokens]), output_attentions=True)
            word = int(out.logits[0, -1].argmax())
            steps.append((word, np.stack([x[0, :, -1].numpy().argmax(-1) for x in out.attentions])))
            tokens.append(word)
        return steps

    @torch.no_grad()
    def streams(tokens):
        """What enters each layer, [layer, pos, d_model]."""
        out = whole_copy()(torch.tensor([tokens]), output_hidden_states=True)
        return [x[0].numpy() for x in out.hidden_states[:-1]]

    def shown():
        """Prompts whose words have regions: one, several, or too few to tell apart."""
        out = []
        for i, length in enumerate((40, 64, 33, 52, 47)):
            rng = random.Random(i)
            first = rng.randrange(1, 9)
            spans = {
                "image": ((first, first + 16),),
                "left": ((first, first + 5),),
                "right": ((first + 5, first + 6), (first + 8, first + 14)),
                "dot": ((first + 14, first + 15),),
            }
            names = ["left"] if i == 3 else ["left", "right", "dot"]
            words = {str(t): names[t % len(names)] for t in range(40) if t % 7}
            tokens = (0, *(rng.randrange(1, 40) for _ in range(length - 1)))
            said = [word for word, _ in decoded(tokens, 3)]
            answer = tuple(said[: 2 + i % 2]) if i % 2 else (said[0], 39)
            meta = {"answer_spans": words}
            out.append(Prompt(tokens, spans, f"s{i}", answer, meta=meta))
        return out

    def ref_retrieval(detector, prompt):
        steps = decoded(prompt.tokens, len(prompt.answer) + detector.extra)
        missing = Counter(prompt.answer)
        kept = []
        for word, tops in steps:
            kept.append((word, tops))
            missing[word] -= 1
            if all(n <= 0 for n in missing.values()):
                break
        words = prompt.meta["answer_spans"]
        regions = {name: set(prompt.positions(name)) for name in set(words.values())}
        whole = set(prompt.positions("image"))
        found, null, image = [], [], []
        for word, tops in kept:
            if str(word) not in words:
                continue
            own = regions[words[str(word)]]
            others = {i for places in regions.values() for i in places if i not in own}
            others = others or {i for i in whole if i not in own}
            grid = [[int(j) for j in row] for row in tops]
            found.append([[float(j in own) for j in row] for row in grid])
            chance = min(1, len(own) / len(others))
            null.append([[chance * (j in others) for j in row] for row in grid])
            image.append([[float(j in whole) for j in row] for row in grid])
        return *(np.mean(x, axis=0) for x in (found, null)), {"image": np.mean(image, axis=0)}

    def ref_sink(detector, prompt):
        row, image = patterns(prompt.tokens)[:, :, -1], prompt.positions("image")
        entering = streams(prompt.tokens)
        if detector.dims == "found":
            sizes = []
            for x in entering:  # three layers: none lies between the first two and the last
                sizes.append([max(abs(x[:, d])) / np.median(abs(x)) for d in range(x.shape[1])])
            size = np.median(sizes, axis=0)
            ranked = sorted(range(len(size)), key=lambda d: -size[d])[: detector.most]
            dims = [d for d in ranked if size[d] >= max(0.1 * size[ranked[0]], detector.massive)]
        else:
            dims = [int(d) for d in detector.dims.split(",")]
        share, null, centric = (np.zeros(row.shape[:2]) for _ in range(3))
        for layer, x in enumerate(entering):
            heavy = []
            for j in image:
                rms = math.sqrt(sum(v * v for v in x[j]) / len(x[j]) + 1e-6)
                peak = max((abs(x[j][d]) / rms for d in dims), default=0)
                if peak > detector.tau_rel * math.sqrt(len(x[j])):
                    heavy.append(j)
            for head in range(row.shape[1]):
                seen = sum(row[layer, head, j] for j in image)
                lost = sum(row[layer, head, j] for j in heavy)
                null[layer, head] = len(heavy) / len(image)
                if seen >= detector.least:
                    share[layer, head] = lost / seen
                    centric[layer, head] = lost <= detector.rho * seen
        return share, null, {"image_centric": centric}

    def ref_inactive(detector, prompt):
        a, image = patterns(prompt.tokens), set(prompt.positions(detector.span))
        rows = prompt.positions(detector.query)
        found, null, seen = (np.zeros(a.shape[:2]) for _ in range(3))
        for at in np.ndindex(*found.shape):
            on = sum(a[at][i, j] for i in rows for j in range(i + 1) if j in image)
            off = sum(a[at][i, j] for i in rows for j in range(i + 1) if j not in image)
            found[at] = on / off <= detector.ratio
            seen[at] = on / len(rows)
            on = sum(1 / (i + 1) for i in rows for j in range(i + 1) if j in image)
            off = sum(1 / (i + 1) for i in rows for j in range(i + 1) if j not in image)
            null[at] = on / off <= detector.ratio
        return found, null, {"image": seen}

    def ref_localisation(detector, prompt):
        row = patterns(prompt.tokens)[:, :, -1]
        patches = list(prompt.patches)
        seen = row[..., [p.position for p in patches]]
        mass = seen.sum(-1)
        ranked = sorted(mass.ravel())
        last = len(ranked) - 1
        line = [ranked[0] + (ranked[-1] - ranked[0]) * i / last for i in range(last + 1)]
        gaps = [y - x for x, y in zip(ranked, line, strict=True)]
        reached = (mass >= ranked[gaps.index(max(gaps))]) & (mass >= detector.least)
        score, null = np.zeros(mass.shape), np.zeros(mass.shape)
        for at in np.ndindex(*mass.shape):
            score[at], count = spread(list(seen[at]), patches) if reached[at] else (0, 0)
            null[at] = by_chance(patches, max(count, round(len(patches) / math.e)))
        return score, null, {"mass": mass, "reached": reached}

    def spread(values, patches):
        middle = sum(values) / len(values)
        over = {i: v - middle for i, v in enumerate(values) if v > 1.001 * middle}
        left, masses = set(over), []
        while left:
            todo, mine = [left.pop()], 0.0
            while todo:
                i = todo.pop()
                mine += over[i]
                for j in list(left):
                    p, q = patches[i], patches[j]
                    near = abs(p.row - q.row) <= 1 and abs(p.column - q.column) <= 1
                    if near and (p.image, p.tile, p.frame) == (q.image, q.tile, q.frame):
                        left.remove(j)
                        todo.append(j)
            masses.append(mine)
        if not masses:
            return 0.0, 0
        entropy = -sum(m / sum(masses) * math.log(m / sum(masses)) for m in masses)
        grids = {(p.image, p.tile, p.frame) for p in patches}
        most = 0
        for grid in grids:
            mine = [p for p in patches if (p.image, p.tile, p.frame) == grid]
            rows = max(p.row for p in mine) + 1
            columns = max(p.column for p in mine) + 1
            most += math.ceil(rows / 2) * math.ceil(columns / 2)
        return 1 - entropy / math.log(most), len(over)

    def by_chance(patches, count):
        rng = np.random.default_rng([len(patches), count])
        scores = []
        for _ in range(64):
            chosen = set(rng.choice(len(patches), count, replace=False).tolist())
            scores.append(spread([float(i in chosen) for i in range(len(patches))], patches)[0])
        return sum(scores) / len(scores)

    def ref_sensitivity(detector, prompt):
        row = patterns(prompt.tokens)[:, :, -1]
        image = [i for i in prompt.positions("image") if i > 0]
        total = {i: row[..., i].sum() for i in image}
        n = max(1, round(detector.share * len(image)))
        ranked = sorted(image, key=lambda i: -total[i])
        whole = last_outputs(prompt.tokens)

        def change(gone):
            less = last_outputs(prompt.tokens, [int(i not in gone) for i in range(len(prompt))])
            gap = np.linalg.norm(whole - less, axis=-1)
            size = np.linalg.norm(whole, axis=-1) + np.linalg.norm(less, axis=-1)
            return np.where(gap <= 1e-5 * size, 0, gap / size)

        rest = sorted(ranked[n:])
        drawn = [random.Random(f"masked/{i}/{prompt.id}").sample(rest, min(n, len(rest)))
                 for i in range(detector.draws)]  # fmt: skip
        return change(ranked[:n]), np.mean([change(x) for x in drawn], axis=0), {}

    def framed():
        """Prompts with an image of one grid, of other shapes, or whole and in tiles."""
        out = []
        grids = (((4, 4),), ((3, 5),), ((3, 3), (2, 4), (1, 3)), ((2, 8), (3, 3)))
        for i, (length, shapes) in enumerate(zip((40, 64, 33, 52), grids, strict=True)):
            rng = random.Random(i)
            first = at = rng.randrange(0, 6)
            patches = []
            for tile, (rows, columns) in enumerate(shapes):
                patches += grid_patches(
                    rows, columns, area=(0, 0, 40, 40), first=at, step=1, tile=tile or None
                )
                at += rows * (columns + 1)
            tokens = (0, *(rng.randrange(1, 40) for _ in range(length - 1)))
            seen = PatchMap(tuple(patches), ((40, 40),), length)
            spans = {"image": ((first, at),), "after": ((at, length),)}
            out.append(Prompt(tokens, spans, f"g{i}", patches=seen))
        return out

    return {
        "visual-retrieval": (
            ref_retrieval,
            shown,
            [{"success": -1.0}, {"success": 0.4, "extra": 0}],
        ),
        "visual-sink": (
            ref_sink,
            framed,
            [
                {"tau_rel": 0.3, "least": 0.05, "massive": 0.0},
                {"tau_rel": 0.25, "dims": "3,7,11", "rho": 0.2},
                {"tau_rel": 0.35, "most": 6, "least": 0.0, "massive": 5.0},
            ],
        ),
        "inactive-visual": (
            ref_inactive,
            framed,
            [{"ratio": 1.5}, {"ratio": 3.0, "query": "after", "vote": 0.1}, {"ratio": 11.0}],
        ),
        "localisation": (ref_localisation, framed, [{}, {"least": 0.5}]),
        "image-sensitivity": (ref_sensitivity, framed, [{}, {"share": 0.6, "draws": 2}]),
    }
