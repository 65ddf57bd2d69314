"""The documentation says what is there."""

import re
from pathlib import Path

import pytest

from heads import DETECTORS
from interp.zoo import ZOO

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_opens_with_two_commands():
    first = README.split("```")[1]
    assert [line.split("#")[0].strip() for line in first.splitlines()[1:] if line] == [
        "make demo",
        "make test",
    ]
    makefile = (ROOT / "Makefile").read_text()
    assert "\ndemo:" in makefile and "\ntest:" in makefile


def test_every_detector_is_in_the_readme():
    for name in DETECTORS:
        assert f"`{name}`" in README, f"README does not name detector {name}"


def test_every_command_is_in_the_readme():
    from app.cli import app

    names = [c.name for c in app.registered_commands]
    names += [group.name for group in app.registered_groups]
    assert {"rank", "verdict", "steer"} <= set(names)
    for name in names:
        assert f"headscope {name}" in README, f"README does not name {name}"


def test_zoo_models_named_in_the_readme_exist():
    for name in re.findall(r"`zoo:([\w-]+)`", README):
        assert name in ZOO


def test_python_in_the_readme_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    own = [b for b in blocks if "zoo:" in b]
    assert len(own) == 3 and len(blocks) == 4  # the other one needs weights from elsewhere
    for block in own:
        exec(compile(block, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "all checks hold" in out and "causal" in out
    assert (tmp_path / "recipe.safetensors").stat().st_size > 0
