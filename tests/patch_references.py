"""Formulas of detectors of vision towers, as loops over whole patterns of one image alone."""

import copy
import functools
import math
import random
from dataclasses import replace

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from interp import load
from interp.images import prompt_from_tensors

ROWS, COLUMNS, SIDE = 3, 5, 4
CELLS = [(r, c) for r in range(ROWS) for c in range(COLUMNS)]


@functools.cache
def random_vit():
    """A grid that is not square, and scores large enough for peaked patterns."""
    config = ViTConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        image_size=(ROWS * SIDE, COLUMNS * SIDE), patch_size=SIDE, num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        hf = ViTForImageClassification(config).eval()
        with torch.no_grad():
            for name, weight in hf.named_parameters():
                if weight.dim() > 1:
                    weight.normal_(std=0.9 if "position" in name else 0.25)
    return load(hf)


@torch.no_grad()
def patterns(prompt, pixels=None):
    """[layer, head, query, key], float64, class token first."""
    hf = copy.deepcopy(random_vit().hf).double()
    hf.set_attn_implementation("eager")
    pixels = prompt.inputs["pixel_values"] if pixels is None else pixels
    out = hf(pixel_values=pixels.double(), output_attentions=True)
    return torch.stack(out.attentions)[:, 0].numpy()


def images():
    """Images of noise."""
    gen = torch.Generator().manual_seed(8)
    return [
        prompt_from_tensors(
            random_vit(),
            {"pixel_values": torch.randn(1, 3, ROWS * SIDE, COLUMNS * SIDE, generator=gen)},
            id=f"v{i}",
        )
        for i in range(4)
    ]


def ring(p, q):
    (a, b), (c, d) = CELLS[p], CELLS[q]
    return max(abs(a - c), abs(b - d))


def ref_distance(detector, prompt):
    a = patterns(prompt)
    n = len(CELLS)
    score, null, distance, patches = (np.zeros(a.shape[:2]) for _ in range(4))
    counted = [[detector.nearest <= ring(p, q) <= detector.farthest for q in range(n)]
               for p in range(n)]  # fmt: skip
    even = sum(map(sum, counted)) / n**2
    for at in np.ndindex(*score.shape):
        m = a[at]
        for p in range(n):
            for q in range(n):
                mass = m[1 + p, 1 + q] / n
                score[at] += mass * counted[p][q]
                distance[at] += mass * ring(p, q)
                patches[at] += mass
        distance[at] /= patches[at]
        null[at] = patches[at] * even
    return score, null, {"distance": distance, "patches": patches}


def traded(prompt):
    """The order of the patches, and pixels of the image in that order."""
    order = list(range(len(CELLS)))
    order = random.Random(f"patches/{prompt.id}").sample(order, len(order))
    old = prompt.inputs["pixel_values"]
    new = old.clone()
    for place, source in enumerate(order):
        (r, c), (s, d) = CELLS[place], CELLS[source]
        new[..., r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE] = old[
            ..., s * SIDE : (s + 1) * SIDE, d * SIDE : (d + 1) * SIDE
        ]
    return order, new


def ref_agnostic(detector, prompt):
    order, pixels = traded(prompt)
    before, after = patterns(prompt), patterns(prompt, pixels)
    place, null, content = (np.full(before.shape[:2], math.nan) for _ in range(3))
    for at in np.ndindex(*place.shape):
        here, there = before[at][1:, 1:], after[at][1:, 1:]
        moved = np.array([[here[p, q] for q in order] for p in order])
        place[at] = np.corrcoef(here.ravel(), there.ravel())[0, 1]
        null[at] = np.corrcoef(here.ravel(), moved.ravel())[0, 1]
        content[at] = np.corrcoef(there.ravel(), moved.ravel())[0, 1]
    return place, null, {"content": content}


@torch.no_grad()
def classes(prompt, pruned=None):
    """Class distribution, and the class token after the last block; float64, one image alone."""
    hf, left = copy.deepcopy(random_vit().hf).double(), []
    for i, layer in enumerate(hf.vit.layers):
        if pruned is not None and pruned[0] == i:
            size = hf.config.hidden_size // hf.config.num_attention_heads
            columns = slice(pruned[1] * size, (pruned[1] + 1) * size)
            layer.attention.o_proj.weight[:, columns] = 0
        layer.register_forward_hook(lambda m, a, out: left.append(out))
    logits = hf(pixel_values=prompt.inputs["pixel_values"].double()).logits[0]
    last = left[-1] if isinstance(left[-1], torch.Tensor) else left[-1][0]
    return logits.softmax(-1).numpy(), last[0, 0].numpy()


def ref_pruning(detector, prompt):
    p, r = classes(prompt)
    y = prompt.answer[0] if prompt.answer else int(np.argmax(p))
    jsd, prob, moved = (np.zeros((3, 4)) for _ in range(3))
    for at in np.ndindex(3, 4):
        q, s = classes(prompt, at)
        for a, b in zip(p, q, strict=True):
            m = (a + b) / 2
            jsd[at] += (a * math.log2(a / m) + b * math.log2(b / m)) / 2
        prob[at] = p[y] - q[y]
        moved[at] = np.linalg.norm(r - s) / (np.linalg.norm(r) + np.linalg.norm(s))
    score = jsd if detector.measure == "jsd" else prob
    null = np.array([[np.mean([row[j] for j in range(4) if j != i]) for i in range(4)]
                     for row in score])  # fmt: skip
    return score, null, {"jsd": jsd, "prob": prob, "class": moved}


def answered():
    """Images of noise, two of them with a class that is not the predicted one."""
    listed = images()
    for i in (0, 2):
        wrong = int(np.argmin(classes(listed[i])[0]))
        listed[i] = replace(listed[i], answer=(wrong,))
    return listed


REFERENCES = {
    "pruning-importance": (ref_pruning, answered, [{}, {"measure": "prob"}]),
    "distance-profile": (ref_distance, images, [{}, {"nearest": 1, "farthest": 2}]),
    "content-agnostic": (ref_agnostic, images, [{}]),
}
RANDOM = dict.fromkeys(REFERENCES, random_vit)
