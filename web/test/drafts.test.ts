import { beforeEach, expect, test } from "vitest";
import { Drafts, NEW } from "../src/drafts";
import { readDraft } from "../src/preferences";

const FILES = [{ name: "a.txt", text: "a" }];

beforeEach(() => localStorage.clear());

test("each chat has its own question, and its files", () => {
  const drafts = new Drafts();
  expect(drafts.turnTo("one")).toEqual({ text: "", files: [] });
  drafts.changed({ text: "first", files: FILES });
  expect(drafts.turnTo("two")).toEqual({ text: "", files: [] });
  drafts.changed({ text: "second", files: [] });
  expect(drafts.turnTo("two")).toBeNull();
  expect(drafts.turnTo("one")).toEqual({ text: "first", files: FILES });
  // the text alone is kept beyond this page
  expect(new Drafts().turnTo("two")).toEqual({ text: "second", files: [] });
});

test("what is written goes along when its chat gets a name", () => {
  const drafts = new Drafts();
  drafts.turnTo(NEW);
  drafts.changed({ text: "more", files: FILES });
  drafts.giveTo("one");
  expect(drafts.turnTo(NEW)).toEqual({ text: "", files: [] });
  expect(drafts.turnTo("one")).toEqual({ text: "more", files: FILES });
});

test("nothing is left of those that are forgotten", () => {
  localStorage.setItem("else", "stays");
  const drafts = new Drafts();
  drafts.turnTo("one");
  drafts.changed({ text: "secret", files: FILES });
  drafts.turnTo("two");
  drafts.changed({ text: "secret", files: [] });
  drafts.forget();
  drafts.save();
  expect(Object.keys(localStorage)).toEqual(["else"]);
  expect(readDraft("one")).toBe("");
  expect(drafts.turnTo("one")).toEqual({ text: "", files: [] });
});
