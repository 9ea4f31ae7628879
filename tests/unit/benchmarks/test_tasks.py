"""Prompts that no cache can use twice, and forms that this version can run."""

from __future__ import annotations

import pytest

from benchmarks.peers.chatserve import DEFAULT_FORMS, FORMS, check_form
from benchmarks.tasks import TRIAL, Task, random_prompts, tasks_of

MODES = ("in-process", "http")


def test_no_two_prompts_begin_alike() -> None:
    tasks = [task for task in tasks_of(MODES, TRIAL) if task.prompt]
    prompts = [
        tuple(prompt[:4])
        for task in tasks
        for round_ in range(3)
        for prompt in random_prompts(task, 49152, round_)
    ]
    assert len(set(prompts)) == len(prompts)


def test_a_task_asks_the_same_of_every_peer() -> None:
    task = Task("http", "streams", 8, 2, 4)
    assert random_prompts(task, 320, 1) == random_prompts(task, 320, 1)
    assert all(40 <= id_ < 160 for prompt in random_prompts(task, 320, 1) for id_ in prompt)


@pytest.mark.parametrize("form", DEFAULT_FORMS)
def test_default_forms_have_their_settings(form: str) -> None:
    check_form(form)


def test_a_form_without_its_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "int2", {"CHATSERVE_LOAD_2BIT": "1"})  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="this version has no CHATSERVE_LOAD_2BIT"):
        check_form("int2")
    with pytest.raises(SystemExit, match="no form int3"):
        check_form("int3")
