"""Two models beside each other, and who was better."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import expect

from chatserve.errors import GenerationFailed
from tests.browser.conftest import Opener
from tests.browser.house import House, Reply, said
from tests.browser.tab import Tab

OWNER = b""


def beside(tab: Tab) -> None:
    # the list of models has to be there
    expect(tab.button("Two models side by side")).to_be_enabled()
    tab.button("Two models side by side").click()
    expect(tab.page.get_by_label("Second model")).to_be_visible()


def votes(home: House) -> list[dict[str, Any]]:
    assert home.store is not None
    return [json.loads(vote) for _, vote in home.store.votes(OWNER)]


@pytest.fixture(autouse=True)
def no_votes(home: House) -> None:
    assert home.store is not None
    home.store.delete_votes(OWNER)


def test_both_answer_and_a_vote_is_kept(opened: Opener, home: House) -> None:
    home.answers(said("left one"), said("left two"))
    home.answers(said("right one"), said("right two"), model="beta")
    tab = opened()
    beside(tab)
    tab.ask("who?")
    tab.ended("left one", "right one")
    tab.page.get_by_role("button", name="Left is better").click()
    expect(tab.page.get_by_text("Your vote: left is better")).to_be_visible()
    tab.ask("and now?")
    expect(tab.page.get_by_text("right two")).to_be_visible()
    # each model has its own chat
    assert home.engines["beta"].prompts[-1] == "<user>who?<assistant>right one<user>and now?"
    tab.page.get_by_role("button", name="Both are bad").click()
    expect(tab.page.get_by_text("Your vote: both are bad")).to_be_visible()
    first, second = votes(home)
    assert (first["type"], second["type"]) == ("leftvote", "bothbad_vote")
    assert first["models"] == ["alpha", "beta"]
    left, right = first["states"]
    assert left["messages"] == [["user", "who?"], ["assistant", "left one"]]
    assert right["messages"] == [["user", "who?"], ["assistant", "right one"]]
    tab.page.reload()
    expect(tab.page.get_by_text("Your vote: left is better")).to_be_visible()
    expect(tab.page.get_by_text("right two")).to_be_visible()


def test_names_that_are_hidden_are_told_after_the_vote(opened: Opener, home: House) -> None:
    home.answers(said("left one"))
    home.answers(said("right one"), model="beta")
    tab = opened()
    beside(tab)
    tab.page.get_by_label("Hide the names").check()
    tab.ask("who?")
    # who is on which side is left to chance
    expect(tab.bodies).to_have_count(2)
    expect(tab.bodies.filter(has_text="left one")).to_have_count(1)
    expect(tab.bodies.filter(has_text="right one")).to_have_count(1)
    shown = tab.page.locator("main")
    expect(shown).not_to_contain_text("alpha")
    expect(shown).not_to_contain_text("beta")
    tab.page.get_by_role("button", name="A tie").click()
    expect(shown.get_by_role("article", name="alpha")).to_be_visible()
    (vote,) = votes(home)
    assert (vote["type"], vote["names_hidden"]) == ("tievote", True)
    answers = {state["model_name"]: state["messages"][-1][1] for state in vote["states"]}
    assert answers == {"alpha": "left one", "beta": "right one"}


def test_one_that_breaks_off_leaves_the_other_alone(opened: Opener, home: House) -> None:
    home.answers(Reply(["half"], error=GenerationFailed("the engine has failed")))
    home.answers(said("whole"), model="beta")
    tab = opened()
    beside(tab)
    tab.ask("both?")
    tab.ended("half", "whole")
    expect(tab.answers.first).to_contain_text("broke off")
    expect(tab.answers.last).not_to_contain_text("broke off")


def test_both_are_stopped(opened: Opener, home: House) -> None:
    home.answers(Reply(["left"], hangs=True))
    home.answers(Reply(["right"], hangs=True), model="beta")
    tab = opened()
    beside(tab)
    tab.ask("stop?")
    expect(tab.bodies).to_have_text(["left", "right"])
    tab.button("Stop").click()
    tab.ended("left", "right")
    for engine in home.engines.values():
        engine.wait_for(lambda each: not each.running)
