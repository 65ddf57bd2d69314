"""Registries fill themselves, once, whoever looks first."""

import sys
import threading

from interp.registry import Registry


def test_a_thread_that_looks_while_another_fills_sees_every_entry(tmp_path, monkeypatch):
    package = tmp_path / "slow_entries"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for i in range(3):
        (package / f"m{i}.py").write_text(
            f"import sys, time; time.sleep(0.05); sys.slow_registry.register('n{i}')({i})"
        )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "slow_registry", Registry("entry", "slow_entries"), raising=False)
    seen: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: seen.append(list(sys.slow_registry))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["n0", "n1", "n2"]] * 4


def test_a_module_may_look_while_it_is_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "looking_entries"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("import sys; sys.looking.register('a')(list(sys.looking))")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "looking", Registry("entry", "looking_entries"), raising=False)
    assert sys.looking["a"] == []
